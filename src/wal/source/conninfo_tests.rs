//! Table tests of connection strings.

use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> ConnInfo {
    text.parse().unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

#[test]
fn both_forms_give_the_same() {
    let expected = ConnInfo {
        host: Host::Tcp("db.example".into()),
        port: 5433,
        user: "repl icator".into(),
        password: Some(Secret::new("it's \\ secret")),
        dbname: Some("postgres".into()),
        application_name: "node 1".into(),
        options: None,
        connect_timeout: Duration::from_secs(7),
        passfile: None,
    };
    for text in [
        r"host=db.example port=5433 user='repl icator' password='it\'s \\ secret' dbname=postgres application_name='node 1' connect_timeout=7",
        r"  host = db.example port =5433 user= repl\ icator password=it\'s\ \\\ secret dbname=postgres application_name=node\ 1 connect_timeout=7 sslmode=disable ",
        "postgresql://repl%20icator:it's%20%5C%20secret@db.example:5433/postgres?application_name=node%201&connect_timeout=7&sslmode=prefer",
        "postgres://db.example/postgres?user=repl%20icator&password=it's%20%5c%20secret&port=5433&application_name=node+1&application_name=node%201&connect_timeout=7",
    ] {
        assert_eq!(parse(text), expected, "{text}");
    }
}

#[test]
fn hosts_and_sockets() {
    for (text, host, address) in [
        ("user=u host=/run/pg", Host::Unix("/run/pg".into()), "/run/pg/.s.PGSQL.5432"),
        ("postgresql://u@%2Frun%2Fpg:99", Host::Unix("/run/pg".into()), "/run/pg/.s.PGSQL.99"),
        ("postgresql://u@/?host=/run/pg", Host::Unix("/run/pg".into()), "/run/pg/.s.PGSQL.5432"),
        ("postgresql://u@[::1]:7/d", Host::Tcp("::1".into()), "[::1]:7"),
        ("user=u hostaddr=127.0.0.1 host=x", Host::Tcp("127.0.0.1".into()), "127.0.0.1:5432"),
    ] {
        let info = parse(text);
        assert_eq!(info.host, host, "{text}");
        assert_eq!(info.address(), address, "{text}");
    }
    let defaults = parse("host=h user=u connect_timeout=0");
    assert_eq!(defaults.application_name, "pgstrata");
    assert_eq!(defaults.connect_timeout, SOURCE_CONNECT_TIMEOUT);
}

#[test]
fn unusable_strings_are_refused_with_a_reason() {
    for (text, part) in [
        ("", "lacks 'host'"),
        ("host=h", "lacks 'user'"),
        ("user=u", "lacks 'host'"),
        ("host", "not followed by '='"),
        ("host=h user='u", "single quote"),
        ("host=h user=u pasword=x", "'pasword' is no keyword"),
        ("host=a,b user=u", "name one host"),
        ("host=h user=u port=0", "port"),
        ("host=h user=u port=65536", "port"),
        ("host=h user=u port=+1", "port"),
        ("host=h user=u connect_timeout=-1", "connect_timeout"),
        ("host=h user=u sslmode=require", "cannot be encrypted yet"),
        ("host=h user=u sslmode=verify-full", "cannot be encrypted yet"),
        ("host=h user=u sslmode=on", "none of disable"),
        ("host=h user=u channel_binding=require", "TLS"),
        ("host=h user=u target_session_attrs=standby", "follows the server"),
        ("service=x", "service files"),
        ("host=h user=u\0", "zero byte"),
        ("postgresql://u@[::1", "']'"),
        ("postgresql://u@[::1]x", "follow ']'"),
        ("postgresql://u%2@h", "hexadecimal"),
        ("postgresql://u%00@h", "%00"),
        ("postgresql://u%ff@h", "UTF-8"),
        ("postgresql://u@h?x", "lacks its '='"),
        ("postgresql://u@h?ssl=true", "cannot be encrypted yet"),
    ] {
        let error = text.parse::<ConnInfo>().expect_err(text);
        assert!(error.to_string().contains(part), "{text:?} gave: {error}");
        assert_eq!(error.kind(), Kind::Invalid);
    }
    let long = format!("host=/{} user=u", "x".repeat(120));
    assert!(long.parse::<ConnInfo>().unwrap_err().to_string().contains("socket path"));
    let endless = format!("host={} user=u", "x".repeat(CONNINFO_BYTES_MAX));
    assert_eq!(endless.parse::<ConnInfo>(), Err(ConnInfoError::TooLong));
}

#[test]
fn the_password_never_shows() {
    let info = parse("host=h user=u password=hunter2 dbname=d");
    assert!(!format!("{info} {info:?} {info:#?}").contains("hunter2"));
    assert_eq!(
        info.to_string(),
        "host='h' port=5432 user='u' password=*** dbname='d' application_name='pgstrata'"
    );
    for text in [
        "host=h user=u password='hunter2",
        "postgresql://u:hunter2@[h",
        "password=a hunter2",
        "postgresql://u:hunter2/x@h",
    ] {
        let error = text.parse::<ConnInfo>().unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    }
}

#[test]
fn password_files() {
    let info = parse("host=h port=1 user=u:v");
    let found = |text: &str| info.password_from_passfile(text).map(|s| s.reveal().to_owned());
    assert_eq!(found("h:1:replication:u\\:v:se:cr\\\\et"), Some("se:cr\\et".to_owned()));
    assert_eq!(found("# no\nx:*:*:*:1\n*:*:*:*:2\n*:*:*:*:3"), Some("2".to_owned()));
    assert_eq!(found("\\*:*:*:*:1"), None);
    assert_eq!(found("h:1:postgres:*:1\n\n:::\nh:1"), None);
}

proptest! {
    #[test]
    fn any_text_is_judged_and_quoting_round_trips(text in ".{0,80}", user in "[^\0]{1,20}") {
        let _ = text.parse::<ConnInfo>();
        let _ = format!("postgresql://{text}").parse::<ConnInfo>();
        let info = parse("host=h user=u");
        let _ = info.password_from_passfile(&text);
        let info = ConnInfo { user, ..info };
        prop_assert_eq!(info.to_string().parse::<ConnInfo>().unwrap(), info);
    }
}

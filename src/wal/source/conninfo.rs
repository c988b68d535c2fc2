//! libpq connection strings, as far as a replication connection needs them.
//!
//! Both forms of the PostgreSQL documentation ("Connection Strings") are read:
//! `keyword = value` with single quotes and backslashes, and `postgresql://` URIs. The
//! environment is never looked at: what a node connects to stands in its own records.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::base::Kind;
use crate::limits::{CONNINFO_BYTES_MAX, SOURCE_CONNECT_TIMEOUT};

/// Port of a server unless one is named.
const PORT_DEFAULT: u16 = 5432;
/// Longest path of a unix socket (`sockaddr_un.sun_path` less the closing zero), in bytes.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// A text that never shows.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a text.
    pub fn new(text: impl Into<String>) -> Self {
        Secret(text.into())
    }

    /// The text itself, for the one place that sends it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A host name or an IP address.
    Tcp(String),
    /// The directory of a unix socket.
    Unix(PathBuf),
}

/// A parsed connection string.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnInfo {
    /// Where the server listens.
    pub host: Host,
    /// Its port; names the socket file too.
    pub port: u16,
    /// Role to log in as.
    pub user: String,
    /// Its password.
    pub password: Option<Secret>,
    /// Database; a physical replication connection belongs to none, but password files name it.
    pub dbname: Option<String>,
    /// Name shown in the server's `pg_stat_replication`, and what `synchronous_standby_names`
    /// matches.
    pub application_name: String,
    /// Server settings for the session (`-c name=value`).
    pub options: Option<String>,
    /// How long connecting and logging in may take.
    pub connect_timeout: Duration,
    /// A file with passwords in libpq's format, for when there is no `password`.
    pub passfile: Option<PathBuf>,
}

/// Why a text is no connection string that we can use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the texts of the variants say it")]
pub enum ConnInfoError {
    #[error("the connection string is longer than {CONNINFO_BYTES_MAX} bytes")]
    TooLong,
    // Says no word of the text: it may be the second half of a password with a blank in it.
    #[error(
        "word {number} of the connection string is not followed by '='; quote values with blanks"
    )]
    NoEquals { number: usize },
    #[error("a quoted value in the connection string is not closed by a single quote")]
    OpenQuote,
    #[error("'{keyword}' is no keyword of a connection string")]
    UnknownKeyword { keyword: String },
    #[error("the connection string has a bad {keyword}: {detail}")]
    BadValue { keyword: &'static str, detail: String },
    #[error("the connection URI is malformed: {detail}")]
    BadUri { detail: &'static str },
    #[error("the connection string lacks '{keyword}'; add {keyword}=…")]
    Missing { keyword: &'static str },
    #[error("{keyword}={value} is not supported: {detail}")]
    Unsupported { keyword: &'static str, value: String, detail: &'static str },
}

impl ConnInfoError {
    /// What a caller can do about it: write another connection string.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// Keywords of libpq that make no difference to us.
const IGNORED: [&str; 22] = [
    "fallback_application_name",
    "client_encoding",
    "keepalives",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_count",
    "tcp_user_timeout",
    "replication",
    "sslcompression",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslrootcert",
    "sslcrl",
    "sslcrldir",
    "sslsni",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "requirepeer",
    "krbsrvname",
    "gsslib",
    "load_balance_hosts",
];

/// The settings as they are found, before they are judged.
#[derive(Default)]
struct Raw {
    host: Option<String>,
    hostaddr: Option<String>,
    port: Option<String>,
    user: Option<String>,
    password: Option<String>,
    dbname: Option<String>,
    application_name: Option<String>,
    options: Option<String>,
    connect_timeout: Option<String>,
    passfile: Option<String>,
}

impl Raw {
    /// Takes one setting. As in libpq the last one of a keyword counts.
    fn set(&mut self, keyword: &str, value: String) -> Result<(), ConnInfoError> {
        let slot = match keyword {
            "host" => &mut self.host,
            "hostaddr" => &mut self.hostaddr,
            "port" => &mut self.port,
            "user" => &mut self.user,
            "password" => &mut self.password,
            "dbname" => &mut self.dbname,
            "application_name" => &mut self.application_name,
            "options" => &mut self.options,
            "connect_timeout" => &mut self.connect_timeout,
            "passfile" => &mut self.passfile,
            _ => return check_unused(keyword, value),
        };
        *slot = Some(value);
        Ok(())
    }

    fn judge(self) -> Result<ConnInfo, ConnInfoError> {
        let present = |text: Option<String>| text.filter(|text| !text.is_empty());
        let host = present(self.hostaddr)
            .or(present(self.host))
            .ok_or(ConnInfoError::Missing { keyword: "host" })?;
        if host.contains(',') {
            return Err(ConnInfoError::Unsupported {
                keyword: "host",
                value: host,
                detail: "name one host; a node follows one primary",
            });
        }
        let port = match present(self.port) {
            None => PORT_DEFAULT,
            Some(text) => number(&text)
                .and_then(|port| u16::try_from(port).ok())
                .filter(|p| *p > 0)
                .ok_or(ConnInfoError::BadValue {
                    keyword: "port",
                    // The text may be a password in a URI that lacks its user.
                    detail: "write a number from 1 to 65535".to_owned(),
                })?,
        };
        let connect_timeout = match present(self.connect_timeout) {
            None => SOURCE_CONNECT_TIMEOUT,
            Some(text) => {
                let seconds =
                    number(&text).filter(|seconds| *seconds <= 3600).ok_or_else(|| {
                        ConnInfoError::BadValue {
                            keyword: "connect_timeout",
                            detail: format!("'{text}' is no number of seconds from 0 to 3600"),
                        }
                    })?;
                // libpq waits for ever at 0, which a node must not; and never less than 2 s.
                match seconds {
                    0 => SOURCE_CONNECT_TIMEOUT,
                    some => Duration::from_secs(some.max(2)),
                }
            }
        };
        let info = ConnInfo {
            // '@' would be Linux's abstract namespace; a stock server listens there on request.
            host: match host.starts_with('/') {
                true => Host::Unix(PathBuf::from(host)),
                false => Host::Tcp(host),
            },
            port,
            user: present(self.user).ok_or(ConnInfoError::Missing { keyword: "user" })?,
            password: present(self.password).map(Secret),
            dbname: present(self.dbname),
            application_name: present(self.application_name)
                .unwrap_or_else(|| "pgstrata".to_owned()),
            options: present(self.options),
            connect_timeout,
            passfile: present(self.passfile).map(PathBuf::from),
        };
        info.check_socket_path()?;
        Ok(info)
    }
}

/// Judges the keywords that we know but do not use.
fn check_unused(keyword: &str, value: String) -> Result<(), ConnInfoError> {
    let unsupported =
        |keyword, value, detail| Err(ConnInfoError::Unsupported { keyword, value, detail });
    match keyword {
        "sslmode" => match value.as_str() {
            "disable" | "allow" | "prefer" | "" => Ok(()),
            "require" | "verify-ca" | "verify-full" => unsupported(
                "sslmode",
                value,
                "connections to a WAL source cannot be encrypted yet; use sslmode=disable on a \
                 trusted network or through a tunnel",
            ),
            _ => Err(ConnInfoError::BadValue {
                keyword: "sslmode",
                detail: format!(
                    "'{value}' is none of disable, allow, prefer, require, verify-ca, verify-full"
                ),
            }),
        },
        "gssencmode" if value == "require" => {
            unsupported("gssencmode", value, "GSSAPI encryption is not supported")
        }
        "channel_binding" if value == "require" => {
            unsupported("channel_binding", value, "it needs TLS, which is not supported yet")
        }
        "target_session_attrs" if !matches!(value.as_str(), "" | "any") => {
            unsupported("target_session_attrs", value, "a node follows the server that it is given")
        }
        "service" | "servicefile" => {
            unsupported("service", value, "service files are not read; write the settings out")
        }
        "gssencmode" | "channel_binding" | "target_session_attrs" => Ok(()),
        _ if IGNORED.contains(&keyword) => Ok(()),
        _ => Err(ConnInfoError::UnknownKeyword { keyword: keyword.to_owned() }),
    }
}

/// A plain decimal number.
fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

impl FromStr for ConnInfo {
    type Err = ConnInfoError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() > CONNINFO_BYTES_MAX {
            return Err(ConnInfoError::TooLong);
        }
        if let Some(zero) = text.find('\0') {
            let detail = format!("a zero byte at offset {zero}");
            return Err(ConnInfoError::BadValue { keyword: "text", detail });
        }
        let mut raw = Raw::default();
        let uri = ["postgresql://", "postgres://"].iter().find_map(|p| text.strip_prefix(p));
        match uri {
            Some(rest) => parse_uri(rest, &mut raw)?,
            None => parse_keywords(text, &mut raw)?,
        }
        raw.judge()
    }
}

/// `keyword = value …`. A value may be quoted; a backslash takes the next character as it is.
fn parse_keywords(text: &str, raw: &mut Raw) -> Result<(), ConnInfoError> {
    let mut chars = text.chars().peekable();
    for number in 1.. {
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        if chars.peek().is_none() {
            return Ok(());
        }
        let mut keyword = String::new();
        while let Some(c) = chars.next_if(|c| *c != '=' && !c.is_ascii_whitespace()) {
            keyword.push(c);
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        if chars.next_if_eq(&'=').is_none() {
            return Err(ConnInfoError::NoEquals { number });
        }
        while chars.next_if(|c| c.is_ascii_whitespace()).is_some() {}
        let quoted = chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        loop {
            match chars.next() {
                None if quoted => return Err(ConnInfoError::OpenQuote),
                None => break,
                Some('\\') => value.extend(chars.next()),
                Some('\'') if quoted => break,
                Some(c) if !quoted && c.is_ascii_whitespace() => break,
                Some(c) => value.push(c),
            }
        }
        raw.set(&keyword, value)?;
    }
    Ok(())
}

/// What follows `postgresql://`: `[user[:password]@][host][:port][/dbname][?name=value&…]`.
fn parse_uri(rest: &str, raw: &mut Raw) -> Result<(), ConnInfoError> {
    let (rest, query) = match rest.split_once('?') {
        Some((rest, query)) => (rest, Some(query)),
        None => (rest, None),
    };
    let (authority, dbname) = match rest.split_once('/') {
        Some((authority, dbname)) => (authority, Some(dbname)),
        None => (rest, None),
    };
    let (login, place) = match authority.rsplit_once('@') {
        Some((login, place)) => (Some(login), place),
        None => (None, authority),
    };
    if let Some(login) = login {
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (login, None),
        };
        raw.user = Some(percent_decode(user)?);
        raw.password = password.map(percent_decode).transpose()?;
    }
    let (host, port) = if let Some(inner) = place.strip_prefix('[') {
        let (host, after) = inner
            .split_once(']')
            .ok_or(ConnInfoError::BadUri { detail: "an IPv6 address lacks its ']'" })?;
        match after.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if after.is_empty() => (host, None),
            None => return Err(ConnInfoError::BadUri { detail: "only ':port' may follow ']'" }),
        }
    } else {
        match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        }
    };
    raw.host = Some(percent_decode(host)?);
    raw.port = port.map(percent_decode).transpose()?;
    raw.dbname = dbname.map(percent_decode).transpose()?;
    for setting in query.unwrap_or_default().split('&').filter(|setting| !setting.is_empty()) {
        let (name, value) = setting
            .split_once('=')
            .ok_or(ConnInfoError::BadUri { detail: "a parameter after '?' lacks its '='" })?;
        let (name, value) = (percent_decode(name)?, percent_decode(value)?);
        match (name.as_str(), value.as_str()) {
            // libpq takes this one from JDBC.
            ("ssl", "true") => raw.set("sslmode", "require".to_owned())?,
            _ => raw.set(&name, value)?,
        }
    }
    Ok(())
}

fn percent_decode(text: &str) -> Result<String, ConnInfoError> {
    let bad = ConnInfoError::BadUri { detail: "a '%' must be followed by two hexadecimal digits" };
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let (Some(high), Some(low)) = (bytes.next(), bytes.next()) else { return Err(bad) };
        let digit = |byte: u8| char::from(byte).to_digit(16);
        let (Some(high), Some(low)) = (digit(high), digit(low)) else { return Err(bad) };
        match u8::try_from(high * 16 + low) {
            Ok(0) | Err(_) => return Err(ConnInfoError::BadUri { detail: "%00 is not allowed" }),
            Ok(byte) => out.push(byte),
        }
    }
    String::from_utf8(out).map_err(|_| ConnInfoError::BadUri { detail: "a part is no UTF-8" })
}

impl ConnInfo {
    /// The socket file, for [`Host::Unix`].
    pub fn socket_path(&self) -> Option<PathBuf> {
        match &self.host {
            Host::Unix(directory) => Some(directory.join(format!(".s.PGSQL.{}", self.port))),
            Host::Tcp(_) => None,
        }
    }

    /// Host and port, or the socket file, for messages.
    pub fn address(&self) -> String {
        match (&self.host, self.socket_path()) {
            (_, Some(path)) => path.display().to_string(),
            (Host::Tcp(host), None) if host.contains(':') => format!("[{host}]:{}", self.port),
            (Host::Tcp(host), None) => format!("{host}:{}", self.port),
            (Host::Unix(path), None) => path.display().to_string(),
        }
    }

    fn check_socket_path(&self) -> Result<(), ConnInfoError> {
        match self.socket_path() {
            Some(path) if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX => {
                Err(ConnInfoError::BadValue {
                    keyword: "host",
                    detail: format!(
                        "the socket path {} is longer than {SOCKET_PATH_BYTES_MAX} bytes",
                        path.display()
                    ),
                })
            }
            _ => Ok(()),
        }
    }

    /// Looks the password up in the text of a password file (`hostname:port:database:user:password`
    /// per line, `*` for any, backslash before `:` and `\`). A replication connection looks for
    /// the database `replication`.
    pub fn password_from_passfile(&self, text: &str) -> Option<Secret> {
        let host = match &self.host {
            Host::Tcp(host) => host.clone(),
            // libpq calls a unix socket "localhost" only where the directory is its default one.
            Host::Unix(path) => path.display().to_string(),
        };
        let port = self.port.to_string();
        let wanted = [host.as_str(), &port, "replication", &self.user];
        text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
            let fields = passfile_fields(line);
            let (password, keys) = fields.split_last()?;
            let matches = |(field, want): (&(String, bool), &&str)| field.1 || field.0 == **want;
            let fits = keys.len() == wanted.len() && keys.iter().zip(&wanted).all(matches);
            fits.then(|| Secret(password.0.clone()))
        })
    }
}

/// Fields of a line, each with whether it is a bare `*`. The fifth field takes the rest.
fn passfile_fields(line: &str) -> Vec<(String, bool)> {
    let mut fields = Vec::new();
    let mut field = String::new();
    let mut escaped = false;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => {
                escaped = true;
                field.extend(chars.next());
            }
            ':' if fields.len() < 4 => {
                let any = field == "*" && !escaped;
                fields.push((std::mem::take(&mut field), any));
                escaped = false;
            }
            c => field.push(c),
        }
    }
    fields.push((field, false));
    fields
}

impl fmt::Display for ConnInfo {
    /// A connection string with the password replaced by `***`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quote = |text: &str| format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"));
        match &self.host {
            Host::Tcp(host) => write!(f, "host={}", quote(host))?,
            Host::Unix(path) => write!(f, "host={}", quote(&path.display().to_string()))?,
        }
        write!(f, " port={} user={}", self.port, quote(&self.user))?;
        if self.password.is_some() {
            f.write_str(" password=***")?;
        }
        if let Some(dbname) = &self.dbname {
            write!(f, " dbname={}", quote(dbname))?;
        }
        write!(f, " application_name={}", quote(&self.application_name))
    }
}

#[cfg(test)]
#[path = "conninfo_tests.rs"]
mod tests;

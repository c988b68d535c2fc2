//! TLS on the page service, with libpq as the client: `psql` over it and without it, connections
//! that move to the core of their tenant, and what must be refused.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::*;
use pgstrata::base::RelTag;
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::pg::{command, run};
use pgstrata::cli::verify_files::{ForkFiles, scan};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// A certificate for `localhost` that is its own authority, and its key.
fn certificate(root: &Root, name: &str) -> (PathBuf, PathBuf) {
    let (cert, key) = (root.join(&format!("{name}.crt")), root.join(&format!("{name}.key")));
    let config = root.join("openssl.cnf");
    let text = "[req]\ndistinguished_name=dn\nx509_extensions=ext\nprompt=no\n\
        [dn]\nCN=localhost\n\
        [ext]\nsubjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=critical,CA:FALSE\n";
    std::fs::write(&config, text).unwrap();
    let mut openssl = Command::new("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    openssl.args(["-nodes", "-days", "2", "-config"]).arg(&config);
    openssl.arg("-keyout").arg(&key).arg("-out").arg(&cert);
    run(openssl).unwrap();
    (cert, key)
}

fn psql(node: &DemoNode, options: &str, sql: &str) -> Output {
    let address = node.page_address();
    let port = address.rsplit(':').next().unwrap();
    let mut psql = command("psql");
    let conninfo = format!("hostaddr=127.0.0.1 port={port} user=any dbname=any {options}");
    psql.arg("-XAt").arg("-c").arg("\\conninfo").args(["-c", sql, "-d", &conninfo]);
    no_home(psql).stdin(Stdio::null()).output().unwrap()
}

/// libpq looks for certificates of its user there.
fn no_home(mut psql: Command) -> Command {
    psql.env("HOME", "/nonexistent");
    psql
}

/// The output of what must succeed.
fn answer(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn fails_with(output: &Output, part: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains(part), "{error}");
}

fn connect(node: &DemoNode) -> TcpStream {
    let stream = TcpStream::connect(node.page_address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.extend((body.len() as u32 + 4).to_be_bytes());
    out.extend(body);
    out
}

fn reply(stream: &mut impl Read) -> (u8, Vec<u8>) {
    let mut head = [0; 5];
    stream.read_exact(&mut head).unwrap();
    let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (head[0], body)
}

/// A page stream over TLS, all requests at once: the first of them stand in the records in which
/// the command stands that moves the connection to another core.
fn pages_over_tls(node: &DemoNode, ca: &PathBuf, id: Id, lsn: u64, rel: RelTag, fork: &ForkFiles) {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let mut socket = connect(node);
    socket.write_all(&SSL_REQUEST).unwrap();
    let mut yes = [0];
    socket.read_exact(&mut yes).unwrap();
    assert_eq!(yes, *b"S");
    let tls = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = rustls::StreamOwned::new(tls, socket);
    let body = b"\0\x03\0\0user\0u\0\0";
    let mut out = (body.len() as u32 + 4).to_be_bytes().to_vec();
    out.extend_from_slice(body);
    let query = format!("pagestream_v2 {} {}\0", id.tenant(), id.timeline());
    out.extend(message(b'Q', query.as_bytes()));
    let blocks: Vec<u32> = (0..1000).map(|_| fastrand::u32(0..fork.blocks)).collect();
    for block in &blocks {
        let mut body = vec![2];
        body.extend(u64::MAX.to_be_bytes());
        body.extend(lsn.to_be_bytes());
        for number in [rel.node.spc, rel.node.db, rel.node.rel] {
            body.extend(number.to_be_bytes());
        }
        body.push(rel.fork);
        body.extend(block.to_be_bytes());
        out.extend(message(b'd', &body));
    }
    // In pieces: a client that only sends would block a server that only answers.
    for part in out.chunks(4000) {
        stream.write_all(part).unwrap();
    }
    stream.flush().unwrap();
    while reply(&mut stream).0 != b'W' {}
    for block in blocks {
        let (tag, body) = reply(&mut stream);
        assert_eq!((tag, body[0]), (b'd', 102), "{}", String::from_utf8_lossy(&body));
        assert!(body[1..] == fork.page(block).unwrap().unwrap(), "block {block} is wrong");
    }
    // The end is said by TLS, not by the socket alone.
    stream.write_all(&message(b'X', b"")).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert!(rest.is_empty());
}

#[test]
fn libpq_speaks_tls_with_the_node() {
    let root = Root::new("tls");
    let cluster = root.stopped_cluster();
    let ((cert, key), (_, other_key)) = (certificate(&root, "node"), certificate(&root, "other"));
    let settings =
        [format!("tls_cert_file={}", cert.display()), format!("tls_key_file={}", key.display())];
    let mut node = root.node(&[&settings[0], &settings[1], "log_filter=info"]);
    // Tenants of either core.
    let ids: Vec<Id> = (1..5).map(|number| Id(number, 1)).collect();
    for id in &ids {
        succeeds(&node, "import", *id, &["--pgdata", cluster.data().to_str().unwrap()]);
    }
    let lsn = info(&node, ids[0]).last_record_lsn;
    let files = scan(cluster.data()).unwrap();
    let (rel, fork) = files.forks.iter().max_by_key(|(_, fork)| fork.blocks).unwrap();
    let verified = format!("sslmode=verify-full sslrootcert={} host=localhost", cert.display());
    for id in &ids {
        let lease = format!("lease lsn {} {} {lsn}", id.tenant(), id.timeline());
        for options in ["sslmode=require", "sslmode=prefer", verified.as_str()] {
            let text = answer(&psql(&node, options, &lease));
            assert!(text.contains("SSL connection") && text.contains("TLSv1.3"), "{text}");
        }
        let old = "sslmode=require ssl_max_protocol_version=TLSv1.2";
        assert!(answer(&psql(&node, old, &lease)).contains("TLSv1.2"));
        // Who does not ask for it goes without.
        let text = answer(&psql(&node, "sslmode=disable", &lease));
        assert!(!text.contains("SSL connection"), "{text}");
        for _ in 0..5 {
            pages_over_tls(&node, &cert, *id, lsn.0, *rel, fork);
        }
    }
    let metrics = node.admin().unwrap().metrics().unwrap();
    let moved =
        metrics.lines().filter(|line| line.starts_with("pgstrata_connections_moved_total{"));
    let moved: u64 =
        moved.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum();
    println!("{moved} connections were moved");
    let cores = std::thread::available_parallelism().unwrap().get();
    assert!(cores == 1 || moved > 0, "no connection was moved");
    whole_backup(&node, ids[0]);

    // What is sent in the clear behind the request must not count as encrypted.
    let mut early = connect(&node);
    early.write_all(&[&SSL_REQUEST[..], b"\0\0\0\x08\0\x03\0\0"].concat()).unwrap();
    let (tag, body) = reply(&mut early);
    assert!(tag == b'E' && String::from_utf8_lossy(&body).contains("unencrypted data"));
    // Nonsense instead of a handshake, or half of one, ends the connection and nothing else.
    for round in 0..200 {
        let mut socket = connect(&node);
        socket.write_all(&SSL_REQUEST).unwrap();
        let mut yes = [0];
        socket.read_exact(&mut yes).unwrap();
        let noise: Vec<u8> = (0..round * 3).map(|_| fastrand::u8(..)).collect();
        let _ = socket.write_all(&[b"\x16\x03\x01\x02\0", &noise[..]].concat());
    }
    answer(&psql(&node, "sslmode=require", "set x = 1"));
    let log = std::fs::read_to_string(node.log_path()).unwrap();
    assert!(!log.contains("panic"), "{}", log_tail(&node));

    // Without settings the answer is no.
    node.stop().unwrap();
    let plain = Root::new("no-tls");
    let node = plain.node(&[]);
    fails_with(&psql(&node, "sslmode=require", "set x = 1"), "server does not support SSL");
    answer(&psql(&node, "sslmode=prefer", "set x = 1"));
    // A key of another certificate is found out at start.
    let settings = [settings[0].clone(), format!("tls_key_file={}", other_key.display())];
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_pgstrata"));
    let refused = DemoNode::start_program(program, &plain.join("refused"), &settings);
    let error = refused.err().unwrap().to_string();
    assert!(error.contains("tls_key_file"), "{error}");
}

/// Megabytes in one direction, to a reader that is slower than the node.
fn whole_backup(node: &DemoNode, id: Id) {
    let sql = format!("fullbackup {} {}", id.tenant(), id.timeline());
    let address = node.page_address();
    let port = address.rsplit(':').next().unwrap();
    let mut psql = command("psql");
    let conninfo = format!("host=127.0.0.1 port={port} user=any dbname=any sslmode=require");
    psql.args(["-X", "-c", &sql, "-d", &conninfo]);
    let output = no_home(psql).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut names = Vec::new();
    for entry in tar::Archive::new(&output.stdout[..]).entries().unwrap() {
        names.push(entry.unwrap().path().unwrap().to_string_lossy().into_owned());
    }
    assert!(output.stdout.len() > 20_000_000, "{} bytes", output.stdout.len());
    assert_eq!(names.last().map(String::as_str), Some("global/pg_control"));
}

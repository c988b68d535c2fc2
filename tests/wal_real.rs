//! WAL that a real PostgreSQL 15 wrote, read by us and by `pg_waldump`.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test that runs PostgreSQL and reads its files"
)]

use std::path::Path;
use std::process::Command;

use pgstrata::base::Lsn;
use pgstrata::cli::scratch::Scratch;
use pgstrata::wal::control_file::ControlFile;
use pgstrata::wal::decode::decode;
use pgstrata::wal::names::record_name;
use pgstrata::wal::page::WalLayout;
use pgstrata::wal::record::{RecordHeader, check_crc};
use pgstrata::wal::stream::{Event, WalStream};

const BIN: &str = "/usr/lib/postgresql/15/bin";

fn run(dir: &Path, program: &str, args: &[&str]) -> String {
    let mut all = vec!["--reuid=postgres", "--regid=postgres", "--clear-groups"];
    let path = format!("{BIN}/{program}");
    all.push(&path);
    all.extend(args);
    let out = Command::new("setpriv").args(&all).current_dir(dir).output().unwrap();
    let error = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(out.stdout).unwrap()
}

const WORKLOAD: &str = "create table t(a int primary key, b text, c int[], p point);
create index on t using gin(c); create index on t using gist(p); create index on t using hash(b);
create index on t using brin(a); create index on t using spgist(p);
insert into t select i, repeat(md5(i::text), 1 + i % 200), array[i % 7, i], point(i, i % 100)
  from generate_series(1, 5000) i;
begin; savepoint s; update t set b = 'x' where a % 3 = 0; rollback to s; delete from t where a % 5 = 0; commit;
begin; update t set a = a + 100000 where a < 500; prepare transaction 'g'; commit prepared 'g';
begin; create table gone(a int); prepare transaction 'h'; rollback prepared 'h';
vacuum (freeze) t; create sequence q; select nextval('q'); create unlogged table u(a int);
begin; select * from t where a = 1001 for share; savepoint s; update t set b = 'y' where a = 1001; commit;
truncate t; drop table u; checkpoint; select pg_switch_wal(); insert into t values (1, 'z');
create database d1 strategy wal_log; create database d2 strategy file_copy; drop database d1;\n";

fn check(settings: &[&str]) {
    let root = Scratch::new("wal").unwrap();
    let data = root.join("data");
    let data_text = data.to_str().unwrap();
    run(&root, "initdb", &["-D", data_text, "-N", "-U", "postgres", "-A", "trust"]);
    let socket = format!(
        "-k {} -h '' -c max_prepared_transactions=4 -c fsync=off -c wal_keep_size=2GB {}",
        root.display(),
        settings.iter().map(|s| format!("-c {s} ")).collect::<String>()
    );
    run(&root, "pg_ctl", &["-D", data_text, "-w", "-l", "log", "-o", &socket, "start"]);
    let sql = root.join("w.sql");
    std::fs::write(&sql, WORKLOAD).unwrap();
    let done = std::panic::catch_unwind(|| {
        run(
            &root,
            "psql",
            &[
                "-h",
                root.to_str().unwrap(),
                "-U",
                "postgres",
                "-q",
                "-v",
                "ON_ERROR_STOP=1",
                "-f",
                sql.to_str().unwrap(),
            ],
        )
    });
    run(&root, "pg_ctl", &["-D", data_text, "-w", "-m", "fast", "stop"]);
    done.unwrap();
    compare(&data);
}

fn compare(data: &Path) {
    let control =
        ControlFile::parse(&std::fs::read(data.join("global/pg_control")).unwrap()).unwrap();
    assert!(control.state.is_shut_down());
    let wal = data.join("pg_wal");
    let dump = Command::new(format!("{BIN}/pg_waldump"))
        .args(["-p", wal.to_str().unwrap(), "-s", "0/1000000"])
        .output()
        .unwrap();
    let dump = String::from_utf8(dump.stdout).unwrap();
    let layout =
        WalLayout { segment_bytes: control.wal_segment_bytes, system_id: Some(control.system_id) };
    let mut stream = WalStream::new(Lsn(0x100_0000), layout).unwrap();
    let (mut lines, mut count) = (dump.lines(), 0);
    'segments: for number in 1.. {
        let file = std::fs::read(wal.join(format!("00000001{number:016X}"))).unwrap();
        for mut chunk in file.chunks(4099) {
            loop {
                match stream.next(&mut chunk).unwrap() {
                    Event::NeedInput => break,
                    Event::EndOfWal => break 'segments,
                    Event::Record(record) => {
                        let header = RecordHeader::parse(&record.bytes).unwrap();
                        let line =
                            lines.next().unwrap_or_else(|| panic!("{} is too many", record.start));
                        let name = record_name(&header);
                        let (rmgr, operation) = name.split_once(' ').unwrap();
                        assert!(line.starts_with(&format!("rmgr: {rmgr} ")), "{line} {name}");
                        assert!(line.contains(&format!("desc: {operation}")), "{line} {name}");
                        let mut changes = decode(&record.bytes, record.start, record.end).unwrap();
                        changes.retain(|c| matches!(c, pgstrata::wal::change::Change::Block(_)));
                        let high =
                            |lsn: Lsn| format!("{:X}/{:08X}", lsn.0 >> 32, lsn.0 & 0xFFFF_FFFF);
                        assert!(
                            line.contains(&format!(
                                "lsn: {}, prev {},",
                                high(record.start),
                                high(header.prev)
                            )),
                            "{line} {header:?}"
                        );
                        assert!(line.contains(&format!("tx: {:10},", header.xid)), "{line}");
                        assert!(
                            line.contains(&format!("/{:6}, tx:", header.tot_len)),
                            "{line} {header:?}"
                        );
                        assert_eq!(changes.len(), line.matches("blkref #").count(), "{line}");
                        if count % 97 == 0 {
                            mutate(&record.bytes, record.start, record.end);
                        }
                        count += 1;
                    }
                }
            }
        }
    }
    assert_eq!(lines.next(), None);
    assert!(count > 10_000, "{count}");
}

/// Every flipped byte is found by the checksum, and does not bring the decoder down without it.
fn mutate(record: &[u8], start: Lsn, end: Lsn) {
    for at in (0..record.len()).filter(|at| *at < 400 || at % 61 == 0) {
        for flip in [0x01, 0x80, 0xFF] {
            let mut bad = record.to_vec();
            bad[at] ^= flip;
            // The padding of the header is covered too, its length field is not this check's.
            assert!(check_crc(&bad).is_err(), "byte {at} of the record at {start}");
            let _ = decode(&bad.into(), start, end);
        }
        let mut cut = record[..at].to_vec();
        assert!(decode(&cut.clone().into(), start, end).is_err());
        if let Some(len) = cut.first_chunk_mut::<4>() {
            *len = (at as u32).to_le_bytes();
        }
        let _ = decode(&cut.into(), start, end);
    }
}

#[test]
fn compressed_with_pglz_and_zstd() {
    check(&["wal_compression=pglz", "wal_log_hints=on", "full_page_writes=on"]);
    check(&["wal_compression=zstd", "wal_log_hints=on", "full_page_writes=on", "autovacuum=off"]);
}

#[test]
fn plain() {
    check(&["full_page_writes=on"]);
}

#[test]
fn compressed_and_checked() {
    check(&["wal_compression=lz4", "wal_consistency_checking=all"]);
}

//! The mixed workload: SQL that makes a primary write every kind of WAL record that the proof is
//! about, in parallel sessions.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that drives other programs: no data path, nothing to simulate"
)]

use std::process::Stdio;

use super::pg::{PgCluster, PgError, run};

/// The database that the workload lives in.
pub const DATABASE: &str = "mixed";

/// Runs the workload once. `size` 1 takes some seconds; it scales rows and relations.
/// `say` is told what comes next.
pub fn mixed(primary: &PgCluster, size: u32, say: &(dyn Fn(&str) + Sync)) -> Result<(), PgError> {
    let sized = |sql: &str| sql.replace("@N@", &size.to_string());
    primary.psql("postgres", &format!("CREATE DATABASE {DATABASE}"))?;
    primary.psql(DATABASE, &sized(SETUP))?;
    say("parallel sessions: indexes, DDL, subtransactions, row locks, large values");
    let scripts: [&str; 6] = [INDEXES, CHURN, MANY_RELATIONS, SUBTRANSACTIONS, TOAST, REWRITES];
    std::thread::scope(|scope| {
        let sessions: Vec<_> = scripts
            .iter()
            .map(|script| scope.spawn(|| primary.psql(DATABASE, &sized(script)).map(drop)))
            .chain([
                scope.spawn(|| row_locks(primary)),
                scope.spawn(|| databases(primary)),
                scope.spawn(|| two_phase(primary)),
            ])
            .collect();
        sessions.into_iter().try_for_each(|session| match session.join() {
            Ok(result) => result,
            Err(_) => Err(PgError::Answer { what: "session".into(), answer: "panic".into() }),
        })
    })?;
    say("vacuum, freeze, truncation, cluster, reindex, tablespace moves");
    primary.psql(DATABASE, &sized(CLEANUP))?;
    Ok(())
}

const SETUP: &str = "
CREATE EXTENSION IF NOT EXISTS btree_gin;
CREATE TABLE t (id bigserial PRIMARY KEY, k int, v text, tags int[], p point, r int4range,
    d tsvector) WITH (fillfactor = 80);
CREATE UNLOGGED TABLE u (id int PRIMARY KEY, v text);
CREATE TABLE copied (id int, v text);
CREATE SEQUENCE s CACHE 3;
COPY copied FROM PROGRAM 'seq 1 $((@N@ * 20000)) | sed \"s/.*/&\\t&-copied/\"';
INSERT INTO t (k, v, tags, p, r, d)
SELECT i % 997, md5(i::text), ARRAY[i % 7, i % 31, i % 101], point(i % 317, i % 211),
       int4range(i, i + i % 50), to_tsvector('simple', 'w' || i % 50 || ' x' || i % 1000)
FROM generate_series(1, @N@ * 8000) i;
INSERT INTO u SELECT i, 'u' || i FROM generate_series(1, 5000) i;
";

const INDEXES: &str = "
CREATE INDEX t_btree ON t (k, v);
CREATE INDEX t_hash ON t USING hash (v);
CREATE INDEX t_gin ON t USING gin (tags);
CREATE INDEX t_gin_text ON t USING gin (d) WITH (fastupdate = on);
CREATE INDEX t_gist ON t USING gist (p);
CREATE INDEX t_gist_range ON t USING gist (r);
CREATE INDEX t_spgist ON t USING spgist (p);
CREATE INDEX t_spgist_text ON t USING spgist (v text_ops);
CREATE INDEX t_brin ON t USING brin (id) WITH (pages_per_range = 4, autosummarize = on);
INSERT INTO t (k, v, tags, p, r, d)
SELECT i % 89, md5('b' || i), ARRAY[i % 13, i], point(i % 97, i % 89), int4range(-i, i),
       to_tsvector('simple', 'y' || i % 77)
FROM generate_series(1, @N@ * 4000) i;
UPDATE t SET k = k + 1, p = point(id % 61, id % 53) WHERE id % 5 = 0;
UPDATE t SET v = v WHERE id % 11 = 0;
DELETE FROM t WHERE id % 7 = 0;
VACUUM (INDEX_CLEANUP on) t;
INSERT INTO t (k, v, tags) SELECT i, 'again' || i, ARRAY[i] FROM generate_series(1, 3000) i;
SELECT brin_summarize_new_values('t_brin') IS NULL;
SELECT gin_clean_pending_list('t_gin_text') IS NULL;
DELETE FROM t WHERE k BETWEEN 100 AND 400;
VACUUM t;
REINDEX INDEX t_hash;
REINDEX INDEX CONCURRENTLY t_btree;
DROP INDEX t_spgist_text;
";

const CHURN: &str = "
SELECT count(nextval('s')) FROM generate_series(1, 200);
SELECT setval('s', 5000);
CREATE TABLE churn (id int PRIMARY KEY, n int, pad text) WITH (fillfactor = 60);
INSERT INTO churn SELECT i, 0, repeat('p', 60) FROM generate_series(1, 3000) i;
DO $$ BEGIN FOR i IN 1..40 LOOP
    UPDATE churn SET n = n + 1 WHERE id % 20 = i % 20; COMMIT; END LOOP; END $$;
INSERT INTO churn SELECT i, 1, 'c' FROM generate_series(2500, 3500) i
    ON CONFLICT (id) DO UPDATE SET n = churn.n + 100;
VACUUM churn;
UPDATE copied SET v = v || 'x' WHERE id % 3 = 0;
DELETE FROM copied WHERE id % 2 = 0;
VACUUM copied;
CREATE TABLE part (id int, v text) PARTITION BY RANGE (id);
CREATE TABLE part1 PARTITION OF part FOR VALUES FROM (0) TO (1000);
CREATE TABLE part2 PARTITION OF part FOR VALUES FROM (1000) TO (5000);
INSERT INTO part SELECT i, 'p' || i FROM generate_series(1, 4000) i;
UPDATE part SET id = id + 900 WHERE id < 500;
CREATE TEMP TABLE tmp AS SELECT * FROM churn;
CREATE MATERIALIZED VIEW mv AS SELECT n, count(*) AS c FROM churn GROUP BY n;
CREATE UNIQUE INDEX mv_n ON mv (n);
UPDATE churn SET n = n + 1 WHERE id < 100;
REFRESH MATERIALIZED VIEW CONCURRENTLY mv;
REFRESH MATERIALIZED VIEW mv;
SELECT lo_create(77001); SELECT lo_put(77001, 0, decode(repeat('ab', 20000), 'hex'));
SELECT lo_unlink(77001);
COMMENT ON TABLE churn IS 'churn';
ANALYZE;
";

const MANY_RELATIONS: &str = "
DO $$ BEGIN FOR i IN 1..@N@ * 500 LOOP
    EXECUTE format('CREATE TABLE many_%s (id serial PRIMARY KEY, v text)', i);
    IF i % 10 = 0 THEN EXECUTE format('INSERT INTO many_%s (v) VALUES (''x'')', i); END IF;
    IF i % 50 = 0 THEN COMMIT; END IF;
END LOOP; END $$;
DO $$ BEGIN FOR i IN @N@ * 200 + 1..@N@ * 500 LOOP
    EXECUTE format('DROP TABLE many_%s', i);
    IF i % 50 = 0 THEN COMMIT; END IF;
END LOOP; END $$;
BEGIN; CREATE TABLE gone AS SELECT generate_series(1, 2000) i; ROLLBACK;
";

const SUBTRANSACTIONS: &str = "
CREATE TABLE sub (id int, v int);
DO $$ BEGIN FOR i IN 1..600 LOOP
    BEGIN
        INSERT INTO sub VALUES (i, i);
        IF i % 3 = 0 THEN RAISE EXCEPTION 'no'; END IF;
    EXCEPTION WHEN raise_exception THEN NULL;
    END;
END LOOP; END $$;
BEGIN; INSERT INTO sub VALUES (-1, 0); SAVEPOINT a; INSERT INTO sub VALUES (-2, 0);
SAVEPOINT b; UPDATE sub SET v = -1 WHERE id < 50; ROLLBACK TO b; DELETE FROM sub WHERE id = 7;
RELEASE a; COMMIT;
BEGIN; SAVEPOINT a; CREATE TABLE sub_gone (i int); INSERT INTO sub_gone VALUES (1); ROLLBACK TO a;
CREATE TABLE sub_kept (i int); COMMIT;
";

const TOAST: &str = "
CREATE TABLE toasted (id int PRIMARY KEY, v text);
ALTER TABLE toasted ALTER v SET STORAGE EXTERNAL;
INSERT INTO toasted SELECT i, repeat(md5(i::text), 400 * (i % 9 + 1))
    FROM generate_series(1, @N@ * 60) i;
UPDATE toasted SET v = repeat('z', 300000) WHERE id % 10 = 0;
DELETE FROM toasted WHERE id % 4 = 0;
INSERT INTO toasted SELECT 100000 + i, string_agg(md5(i::text || j), '')
    FROM generate_series(1, 20) i, generate_series(1, 3000) j GROUP BY i;
VACUUM toasted;
";

const REWRITES: &str = "
CREATE TABLE rw (id int PRIMARY KEY, v text);
INSERT INTO rw SELECT i, repeat('r', i % 100) FROM generate_series(1, 6000) i;
CREATE INDEX rw_v ON rw (v);
DELETE FROM rw WHERE id % 3 = 0;
VACUUM FULL rw;
CLUSTER rw USING rw_v;
ALTER TABLE rw ADD COLUMN w int DEFAULT 5;
ALTER TABLE rw ALTER id TYPE bigint;
TRUNCATE rw;
INSERT INTO rw SELECT i, 'after', 1 FROM generate_series(1, 1000) i;
BEGIN; TRUNCATE rw; INSERT INTO rw VALUES (1, 'undone', 1); ROLLBACK;
CREATE TABLE trunc_me AS SELECT i, repeat('t', 200) AS v FROM generate_series(1, 8000) i;
VACUUM trunc_me;
DELETE FROM trunc_me WHERE i > 1500;
VACUUM (TRUNCATE) trunc_me;
INSERT INTO trunc_me SELECT i, 'regrown' FROM generate_series(1, 5000) i;
CREATE TABLESPACE ts LOCATION '';
CREATE TABLE in_ts (id int PRIMARY KEY, v text) TABLESPACE ts;
INSERT INTO in_ts SELECT i, 'ts' || i FROM generate_series(1, 3000) i;
ALTER TABLE rw SET TABLESPACE ts;
ALTER INDEX rw_v SET TABLESPACE ts;
ALTER TABLE in_ts SET TABLESPACE pg_default;
";

/// Run alone: rewrites of catalogs deadlock with DDL of other sessions.
const CLEANUP: &str = "
CLUSTER t USING t_btree;
UPDATE t SET k = k - 1 WHERE id % 13 = 0;
VACUUM FREEZE t;
VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) churn;
UPDATE t SET v = 'late' WHERE id % 101 = 0;
ALTER TABLE u SET LOGGED;
CREATE UNLOGGED TABLE u2 (id int PRIMARY KEY, v text);
INSERT INTO u2 SELECT i, 'u' FROM generate_series(1, 2000) i;
ALTER TABLE copied SET UNLOGGED;
DROP TABLE toasted;
VACUUM pg_class; VACUUM pg_attribute;
VACUUM FULL pg_class;
REINDEX TABLE pg_attribute;
TRUNCATE many_100, many_101;
";

/// Multixacts: sessions that hold locks of several strengths on the same rows.
fn row_locks(primary: &PgCluster) -> Result<(), PgError> {
    let setup = "CREATE TABLE locked (id int PRIMARY KEY, v int);
        INSERT INTO locked SELECT i, 0 FROM generate_series(1, 400) i;
        CREATE TABLE child (id int REFERENCES locked);";
    primary.psql(DATABASE, setup)?;
    let hold = "BEGIN; SELECT count(*) FROM (SELECT 1 FROM locked ORDER BY id @LOCK@) q;
        SELECT pg_sleep(1.5);
        SAVEPOINT a; UPDATE locked SET v = v + 1 WHERE id % 40 = @ME@;
        INSERT INTO child VALUES (@ME@ + 1); COMMIT;";
    std::thread::scope(|scope| {
        let sessions: Vec<_> = (0..4)
            .map(|me| {
                let lock = if me % 2 == 0 { "FOR KEY SHARE" } else { "FOR KEY SHARE OF locked" };
                let sql = hold.replace("@LOCK@", lock).replace("@ME@", &me.to_string());
                scope.spawn(move || primary.psql(DATABASE, &sql).map(drop))
            })
            .collect();
        sessions.into_iter().try_for_each(|session| session.join().unwrap_or(Ok(())))
    })?;
    let shared = "BEGIN; SELECT count(*) FROM (SELECT 1 FROM locked FOR SHARE) q;
        SELECT pg_sleep(0.7); COMMIT;";
    std::thread::scope(|scope| {
        let sessions: Vec<_> =
            (0..3).map(|_| scope.spawn(|| primary.psql(DATABASE, shared).map(drop))).collect();
        sessions.into_iter().try_for_each(|session| session.join().unwrap_or(Ok(())))
    })?;
    primary.psql(DATABASE, "DELETE FROM locked WHERE id > 300; VACUUM locked").map(drop)
}

/// `CREATE DATABASE` with both strategies, `ALTER`, and `DROP`.
fn databases(primary: &PgCluster) -> Result<(), PgError> {
    for strategy in ["wal_log", "file_copy"] {
        for name in ["kept", "dropped"] {
            let database = format!("{name}_{strategy}");
            let create =
                format!("CREATE DATABASE {database} TEMPLATE template0 STRATEGY {strategy}");
            primary.psql("postgres", &create)?;
            primary.psql(&database, "CREATE TABLE here AS SELECT generate_series(1, 3000) i")?;
        }
        primary.psql("postgres", &format!("DROP DATABASE dropped_{strategy}"))?;
    }
    Ok(())
}

/// Prepared transactions: committed, rolled back, and left open.
fn two_phase(primary: &PgCluster) -> Result<(), PgError> {
    let sql = "CREATE TABLE tp (id int PRIMARY KEY, v text);
        BEGIN; INSERT INTO tp SELECT i, 'c' FROM generate_series(1, 500) i;
            CREATE TABLE tp_new (i int); SAVEPOINT a; INSERT INTO tp VALUES (-1, 's');
            PREPARE TRANSACTION 'commit me';
        COMMIT PREPARED 'commit me';
        BEGIN; DELETE FROM tp WHERE id < 100; CREATE TABLE tp_gone (i int);
            PREPARE TRANSACTION 'undo me';
        ROLLBACK PREPARED 'undo me';
        BEGIN; UPDATE tp SET v = 'open' WHERE id BETWEEN 100 AND 200;
            PREPARE TRANSACTION 'left open';";
    primary.psql(DATABASE, sql).map(drop)
}

/// The database that [`rare`] lives in.
pub const RARE_DATABASE: &str = "rare";

/// Kinds of WAL records that [`mixed`] does not bring about, or not reliably: B-tree pages and
/// whole levels that empty, posting lists that are split and thinned, generic WAL, changes of
/// BRIN tuples and ranges, locks on versions that another transaction has updated. Pages are
/// unlinked after a checkpoint, too: then the records have images of their neighbours.
pub fn rare(primary: &PgCluster) -> Result<(), PgError> {
    primary.psql("postgres", &format!("CREATE DATABASE {RARE_DATABASE}"))?;
    primary.psql(RARE_DATABASE, RARE).map(drop)
}

const RARE: &str = "
CREATE TABLE wide (id int, k text, n int) WITH (autovacuum_enabled = off);
INSERT INTO wide SELECT i, repeat(md5(i::text), 20), i FROM generate_series(1, 12000) i;
CREATE INDEX wide_k ON wide (k);
CREATE INDEX wide_id ON wide (id);
DELETE FROM wide WHERE id BETWEEN 1000 AND 9000;
VACUUM wide;
INSERT INTO wide SELECT i, repeat(md5(i::text), 20), i FROM generate_series(20000, 23000) i;
DELETE FROM wide WHERE id <> 22000;
VACUUM wide; VACUUM wide;
INSERT INTO wide SELECT i, repeat(md5(i::text), 20), i FROM generate_series(30000, 36000) i;
CHECKPOINT;
DELETE FROM wide; VACUUM wide; VACUUM wide;
INSERT INTO wide SELECT i, repeat(md5(i::text), 20), i FROM generate_series(1, 3000) i;
CREATE TABLE dup (id int, k int) WITH (autovacuum_enabled = off, fillfactor = 50);
CREATE INDEX dup_k ON dup (k);
INSERT INTO dup SELECT i, i % 10 FROM generate_series(1, 20000) i;
DELETE FROM dup WHERE id % 3 = 0;
VACUUM dup;
INSERT INTO dup SELECT i, i % 10 FROM generate_series(1, 8000) i;
UPDATE dup SET k = k + 1 WHERE id % 7 = 0; VACUUM dup;
CREATE EXTENSION bloom;
CREATE TABLE filtered (a int, b int) WITH (autovacuum_enabled = off);
CREATE INDEX filtered_bloom ON filtered USING bloom (a, b);
INSERT INTO filtered SELECT i, i * 7 FROM generate_series(1, 6000) i;
DELETE FROM filtered WHERE a % 3 = 0; VACUUM filtered;
INSERT INTO filtered SELECT i, i * 7 FROM generate_series(1, 3000) i;
CREATE TABLE ranged (id int, v text) WITH (autovacuum_enabled = off, fillfactor = 50);
CREATE INDEX ranged_v ON ranged USING brin (v) WITH (pages_per_range = 1);
INSERT INTO ranged SELECT i, 'a' FROM generate_series(1, 8000) i;
SELECT brin_summarize_new_values('ranged_v') IS NULL;
UPDATE ranged SET v = 'w' || (SELECT string_agg(md5(id::text || j), '')
    FROM generate_series(1, 25) j) WHERE id % 200 = 0;
SELECT brin_desummarize_range('ranged_v', i) IS NULL FROM generate_series(0, 20, 3) i;
SELECT brin_summarize_new_values('ranged_v') IS NULL;
INSERT INTO ranged SELECT i, repeat('z', 1900) FROM generate_series(1, 100) i;
CREATE TABLE versions (id int PRIMARY KEY, v int);
INSERT INTO versions SELECT i, 0 FROM generate_series(1, 200) i;
BEGIN; UPDATE versions SET v = 1; PREPARE TRANSACTION 'holds versions';
BEGIN; SELECT count(*) FROM (SELECT 1 FROM versions FOR KEY SHARE) q; COMMIT;
COMMIT PREPARED 'holds versions';
BEGIN; SELECT count(*) FROM (SELECT 1 FROM versions FOR KEY SHARE) q;
    PREPARE TRANSACTION 'shares versions';
UPDATE versions SET v = 2 WHERE id % 2 = 0;
BEGIN; SELECT count(*) FROM (SELECT 1 FROM versions FOR KEY SHARE) q; SAVEPOINT s;
    UPDATE versions SET v = 3 WHERE id % 3 = 0; ROLLBACK TO s; COMMIT;
COMMIT PREPARED 'shares versions';
VACUUM (FREEZE) versions;
";

/// Fills pgbench's tables and runs pgbench with progress lines every five seconds.
pub fn pgbench(
    primary: &PgCluster,
    scale: u32,
    seconds: u32,
    say: &dyn Fn(&str),
) -> Result<(), PgError> {
    say(&format!("pgbench -i -s {scale}"));
    primary.pgbench_init("postgres", scale)?;
    let seconds = seconds.to_string();
    say(&format!("pgbench -c 4 -T {seconds}"));
    primary
        .pgbench("postgres", &["-c", "4", "-j", "2", "-P", "5", "-T", &seconds], |line| say(line))
}

/// Ends the prepared transaction that [`mixed`] leaves open.
pub fn finish_two_phase(primary: &PgCluster) -> Result<(), PgError> {
    let mut psql = primary.client("psql", DATABASE);
    psql.args(["-c", "COMMIT PREPARED 'left open'"]).stdout(Stdio::piped());
    run(psql).map(drop)
}

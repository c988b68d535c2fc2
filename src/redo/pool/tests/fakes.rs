//! Against scripts that behave badly, each start of them in its own way.

use super::*;
use crate::limits::{REDO_FAILED_BYTES_MAX, REDO_RECORD_BYTES_MAX};
use crate::redo::record::tests::record;

/// The page that fakes answer with.
const ZEROS: [u8; 8192] = [0; 8192];

/// A program in place of PostgreSQL, in a directory of its own.
struct Fake {
    dir: PathBuf,
    settings: PoolSettings,
}

impl Fake {
    /// `ways`: what a start does after its two pongs, in shell; later starts go the last way.
    fn new(name: &str, ways: &[&str], processes_max: usize) -> Fake {
        let dir = std::env::temp_dir().join(format!("pgstrata-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let program = dir.join("postgres");
        let mut frames = Vec::new();
        protocol::encode_request(&first(1), &mut frames).unwrap();
        let pong = "walredo 2 postgres 150000 sandbox seccomp hint-bits off";
        let numbers: Vec<_> = (1..=ways.len()).map(|n| n.to_string()).collect();
        let cases: Vec<_> =
            ways.iter().zip(&numbers).map(|(way, n)| format!("{n}) {way};;\n")).collect();
        let script = format!(
            "#!/bin/sh\n\
             for n in {}; do mkdir {}/$n 2>/dev/null && break; done\n\
             pong() {{ head -c $1 >/dev/null; printf '\\000\\000\\000\\0{:o}\\002{pong}'; }}\n\
             asked() {{ head -c {} >/dev/null; }}\n\
             page() {{ asked; printf '\\000\\000\\040\\000\\000'; head -c 8192 /dev/zero; }}\n\
             error() {{ asked; printf '\\000\\000\\000\\003\\001%s' $1; }}\n\
             pong 5\npong 6\ncase $n in\n{}esac\ncat >/dev/null\n",
            numbers.join(" "),
            dir.display(),
            pong.len(),
            frames.len(),
            cases.concat(),
        );
        std::fs::write(&program, script).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, mode).unwrap();
        let mut settings = pool_settings(processes_max, 0);
        (settings.postgres_bin, settings.walredo_so) = (program, "".into());
        (settings.scratch_dir, settings.failed_dir) = (dir.clone(), Some(dir.join("failed")));
        Fake { dir, settings }
    }

    fn kept(&self) -> usize {
        std::fs::read_dir(self.dir.join("failed")).map_or(0, Iterator::count)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Answers without their pages, for messages.
fn described(answers: &[Result<Bytes, RedoError>]) -> Vec<Result<usize, &RedoError>> {
    answers.iter().map(|answer| answer.as_ref().map(Bytes::len)).collect()
}

/// An error may be the process's own, such as a want of memory: a fresh one has the last word.
#[test]
fn an_error_of_postgres_is_tried_once_more_on_a_fresh_process() {
    let _lock = lock();
    let fake = Fake::new("refusal", &["error mem", "page; page; page"], 2);
    let pool = Pool::new(fake.settings.clone());
    let redo = tenant(&pool, 1);
    let pages = block_on(join_all((0..3).map(|_| redo.redo(first(1)))));
    assert!(pages.iter().all(|page| page.as_deref() == Ok(&ZEROS)), "{:?}", described(&pages));
    let counters = pool.counters();
    assert_eq!((number(&counters.started), number(&counters.errors)), (2, 0));
    assert_eq!(number(&counters.failures), 0, "the process itself did not fail");
    assert_eq!(fake.kept(), 1);
    assert!(block_on(pool.shutdown()));
    assert_eq!(children(), Vec::<u32>::new());
}

/// What is too large to be kept is not passed over in silence.
#[test]
fn an_input_that_is_too_large_to_be_kept_is_in_the_log() {
    let _lock = lock();
    let fake = Fake::new("large", &["exit 1"], 1);
    let pool = Pool::new(fake.settings.clone());
    let redo = tenant(&pool, 1);
    let image: Bytes = record(0, 0xB0, &vec![7; REDO_RECORD_BYTES_MAX - 1024]).into();
    let request = ask(0, 1, None, (1..=3).map(|n| (n << 24, image.clone())).collect());
    let lines = logged_by(|| {
        let answer = block_on(redo.redo(request));
        assert!(matches!(answer, Err(RedoError::Child { .. })), "{answer:?}");
    });
    let line = lines.lines().find(|line| line.contains("is not kept: it is too large"));
    let line = line.expect(&lines);
    let bound = format!("bytes_max={REDO_FAILED_BYTES_MAX}");
    assert!(line.contains("bytes=25") && line.contains(&bound), "{line}");
    assert_eq!(fake.kept(), 0);
    assert!(block_on(pool.shutdown()));
}

/// The second process fails as well: that is final for this request, and for no other.
#[test]
fn what_fails_on_a_fresh_process_too_is_an_error_and_the_pool_stays_sound() {
    let _lock = lock();
    let refused = |answer: &Result<Bytes, RedoError>| matches!(answer, Err(RedoError::Refused { message, .. }) if message == "two");
    let child = |answer: &Result<Bytes, RedoError>| matches!(answer, Err(RedoError::Child { problem }) if problem.contains("it ended"));
    type IsExpected<'a> = &'a dyn Fn(&Result<Bytes, RedoError>) -> bool;
    let ways: [(&str, &str, u64, IsExpected); 4] = [
        ("error one", "error two", 0, &refused),
        ("asked; exit 1", "asked; exit 1", 2, &child),
        ("asked; exit 1", "error two", 1, &refused),
        ("error one", "asked; exit 1", 1, &child),
    ];
    for (one, two, failures, is_expected) in ways {
        let fake = Fake::new("final", &[one, two, "page; page; page"], 1);
        let pool = Pool::new(fake.settings.clone());
        let (redo, other) = (tenant(&pool, 1), tenant(&pool, 2));
        let answers = block_on(join_all((0..3).map(|_| redo.redo(first(1)))));
        let text = described(&answers);
        assert!(is_expected(&answers[0]), "{one}, {two}: {text:?}");
        assert!(answers[1..].iter().all(|page| page.as_deref() == Ok(&ZEROS)), "{text:?}");
        assert_eq!(block_on(redo.redo(first(1))).as_deref(), Ok(&ZEROS[..]));
        let counters = pool.counters();
        assert_eq!((number(&counters.started), number(&counters.errors)), (3, 1), "{one}, {two}");
        assert_eq!(number(&counters.failures), failures, "{one}, {two}");
        assert_eq!(number(&counters.alive), 1);
        assert_eq!(fake.kept(), 1, "the same input is one file");
        assert_eq!(block_on(other.redo(first(1))).as_deref(), Ok(&ZEROS[..]));
        assert!(block_on(pool.shutdown()));
        assert_eq!(children(), Vec::<u32>::new());
    }
}

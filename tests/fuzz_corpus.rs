//! The kept corpus of the fuzz targets, and mutations of it, in every run of the tests. What a
//! longer search with `cargo fuzz` finds is added to `test_data/fuzz/<target>/`.
//!
//! `FUZZ_RUNS` sets the number of mutations for each target, `FUZZ_SEED` the seed.

#![allow(clippy::disallowed_methods, reason = "it reads the corpus")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use fastrand::Rng;
use pgstrata::fuzz::TARGETS;

/// Mutations for each target.
const RUNS: u64 = 4_000;
/// A run that takes longer has lost its way.
const RUN_TIME_MAX: Duration = Duration::from_secs(5);
/// Largest corpus of all targets together, in bytes.
const CORPUS_BYTES_MAX: usize = 1024 * 1024;
/// Longest input that mutation makes, in bytes.
const INPUT_BYTES_MAX: usize = 64 * 1024;

fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("test_data/fuzz").join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 10] =
    [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, i64::MAX as u64, u64::MAX];

fn mutate(input: &mut Vec<u8>, other: &[u8], rng: &mut Rng) {
    for _ in 0..1 + rng.u32(..4) {
        let at = rng.usize(..=input.len());
        let width = [1, 2, 4, 8][rng.usize(..4)];
        let place = at..input.len().min(at + width);
        match rng.u8(..8) {
            0 | 1 if at < input.len() => input[at] ^= 1 << rng.u8(..8),
            2 | 3 => {
                let bytes = EDGES[rng.usize(..EDGES.len())].to_le_bytes();
                let len = place.len();
                input[place].copy_from_slice(&bytes[..len]);
            }
            4 => input.truncate(at),
            5 => drop(input.drain(place)),
            6 => {
                let from = rng.usize(..=other.len());
                let part = &other[from..other.len().min(from + rng.usize(..300))];
                input.splice(at..at, part.iter().copied());
            }
            _ => {
                let from = rng.usize(..=other.len());
                let part = &other[from..other.len().min(from + rng.usize(..300))];
                let end = input.len().min(at + part.len());
                input.splice(at..end, part.iter().copied());
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
}

/// Runs one input; a panic names it.
fn attempt(target: &str, run: fn(&[u8]), input: &[u8], what: &str) {
    let begin = Instant::now();
    let result = catch_unwind(AssertUnwindSafe(|| run(input)));
    let took = begin.elapsed();
    if result.is_err() || took > RUN_TIME_MAX {
        let path = std::env::temp_dir().join(format!("pgstrata-fuzz-{target}-{}", input.len()));
        std::fs::write(&path, input).unwrap();
        panic!("{target}: {what} took {took:?} or panicked; the input is {}", path.display());
    }
}

#[test]
fn the_corpus_and_its_mutations_do_no_harm() {
    let (runs, seed) = (number("FUZZ_RUNS", RUNS), number("FUZZ_SEED", 1));
    let mut total = 0;
    for (target, run) in TARGETS {
        let corpus = corpus(target);
        assert!(corpus.len() >= 2, "the corpus of {target} is gone");
        total += corpus.iter().map(|(_, bytes)| bytes.len()).sum::<usize>();
        for (path, bytes) in &corpus {
            attempt(target, run, bytes, &path.display().to_string());
        }
        let mut rng = Rng::with_seed(seed);
        for turn in 0..runs {
            let (path, bytes) = &corpus[rng.usize(..corpus.len())];
            let (_, other) = &corpus[rng.usize(..corpus.len())];
            let mut input = bytes.clone();
            mutate(&mut input, other, &mut rng);
            let what = format!("seed {seed}, mutation {turn} of {}", path.display());
            attempt(target, run, &input, &what);
        }
    }
    println!("{} targets, {total} bytes of corpus, {runs} mutations each", TARGETS.len());
    assert!(total <= CORPUS_BYTES_MAX, "the corpus has {total} bytes");
}

/// Every target of `cargo fuzz` is one of ours, and each of ours has one.
#[test]
fn cargo_fuzz_knows_every_target() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    assert_eq!(manifest.matches("[[bin]]").count(), TARGETS.len());
    for (target, _) in TARGETS {
        let path = format!("fuzz_targets/{target}.rs");
        assert!(manifest.contains(&format!("path = \"{path}\"")), "{target}");
        let text = std::fs::read_to_string(root.join(path)).unwrap();
        assert!(text.contains(&format!("pgstrata::fuzz::run(\"{target}\"")), "{target}");
    }
}

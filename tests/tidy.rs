//! Our own rules about the source tree, held by reading it.
//!
//! Each rule is a function from a file's path and text to complaints; `rules_fire` plants one
//! violation of each, so that no rule goes blind.

#![allow(clippy::disallowed_methods, reason = "it reads the source tree")]

use std::fs;
use std::path::Path;

/// Longest source file, in lines; test files may be longer.
const FILE_LINES_MAX: usize = 600;
const TEST_FILE_LINES_MAX: usize = 1200;
/// Least share of code lines outside of `async` functions and blocks, in percent.
const PURE_PERCENT_MIN: usize = 60;

/// Who may import whom: a directory of `src/`, then what it may name after `crate::`.
const IMPORTS: &[(&str, &[&str])] = &[
    ("base", &["base", "limits"]),
    ("io", &["io", "base", "limits"]),
    ("wal", &["wal", "io", "base", "limits"]),
    ("layers", &["layers", "io", "base", "limits"]),
    ("redo", &["redo", "wal", "io", "base", "limits"]),
    ("remote", &["remote", "layers", "io", "base", "limits"]),
    ("shard", &["shard", "layers", "redo", "remote", "wal", "io", "base", "limits", "config"]),
    ("server", &["server", "shard", "redo", "wal", "io", "base", "limits", "config"]),
    ("admin", &["admin", "server", "shard", "base", "limits", "config"]),
    (
        "cli",
        &[
            "cli", "admin", "server", "shard", "layers", "redo", "wal", "io", "base", "limits",
            "config", "sim",
        ],
    ),
    ("sim", &["sim", "shard", "layers", "redo", "remote", "wal", "io", "base", "limits", "config"]),
];

/// Where `glommio::` may appear.
const GLOMMIO: &[&str] = &[
    "io/direct.rs",
    "io/uring.rs",
    "server/",
    "redo/child",
    "wal/receiver",
    "main.rs",
    "cli/",
    "io/conformance",
];

const WORDS: &[&str] = &[
    concat!("FIX", "ME"),
    concat!("TO", "DO"),
    concat!("XX", "X"),
    concat!("db", "g!("),
    concat!("to", "do!("),
    concat!("unimple", "mented!("),
    concat!("#[ign", "ore"),
];

struct Source {
    /// Relative to `src/`, with slashes.
    path: String,
    text: String,
}

impl Source {
    fn is_test(&self) -> bool {
        let name = self.path.rsplit('/').next().unwrap_or_default();
        name == "tests.rs"
            || name.ends_with("_tests.rs")
            || name == "conformance.rs"
            || self.path.contains("/tests/")
    }

    /// The text before the unit tests at its end.
    fn product(&self) -> &str {
        if self.is_test() {
            return "";
        }
        self.text.split("#[cfg(test)]\nmod ").next().unwrap_or_default()
    }

    /// Lines of code, and how many of them stand in `async` functions and blocks.
    fn code_lines(&self) -> (usize, usize) {
        let (mut total, mut waiting) = (0, 0);
        // Depth of braces, and the depth outside of the outermost async body.
        let (mut depth, mut outside) = (0i32, None);
        for line in self.product().lines().map(str::trim) {
            if line.is_empty() || line.starts_with("//") {
                continue;
            }
            if outside.is_none() && line.contains("async ") {
                outside = Some((depth, false));
            }
            let braces = |c: char| line.matches(c).count() as i32;
            depth += braces('{') - braces('}');
            total += 1;
            waiting += usize::from(outside.is_some());
            if let Some((level, entered)) = outside {
                let entered = entered || depth > level || line.contains('{');
                let declared_only = !entered && line.ends_with(';');
                outside =
                    (!(declared_only || entered && depth <= level)).then_some((level, entered));
            }
        }
        (total, waiting)
    }
}

fn sources(dir: &Path, prefix: &str, out: &mut Vec<Source>) {
    let mut entries: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap()).collect();
    entries.sort_by_key(|entry| entry.file_name());
    for entry in entries {
        let name = entry.file_name().into_string().unwrap();
        let path = format!("{prefix}{name}");
        if entry.file_type().unwrap().is_dir() {
            sources(&entry.path(), &format!("{path}/"), out);
        } else if name.ends_with(".rs") {
            out.push(Source { path, text: fs::read_to_string(entry.path()).unwrap() });
        }
    }
}

fn all() -> Vec<Source> {
    let mut found = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), "", &mut found);
    assert!(found.len() > 50, "only {} files found: is this the right tree?", found.len());
    found
}

fn length(source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    let limit = if source.is_test() { TEST_FILE_LINES_MAX } else { FILE_LINES_MAX };
    (lines > limit).then(|| format!("{} lines, the limit is {limit}", lines)).into_iter().collect()
}

fn imports(source: &Source) -> Vec<String> {
    let dir = source.path.split('/').next().unwrap_or_default();
    let Some((_, allowed)) = IMPORTS.iter().find(|(name, _)| *name == dir) else {
        return Vec::new();
    };
    let mut complaints = Vec::new();
    for line in source.product().lines().filter(|line| !line.trim_start().starts_with("//")) {
        for rest in line.split("crate::").skip(1) {
            let module: String =
                rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            let is_module = module.chars().next().is_some_and(|c| c.is_lowercase());
            if is_module && !allowed.contains(&module.as_str()) {
                complaints.push(format!("{dir} must not import {module}"));
            }
        }
    }
    complaints
}

fn glommio(source: &Source) -> Vec<String> {
    let allowed = GLOMMIO.iter().any(|place| source.path.starts_with(place));
    let used = source
        .product()
        .lines()
        .any(|line| !line.trim_start().starts_with("//") && line.contains("glommio::"));
    (used && !allowed).then(|| "glommio is used here".to_owned()).into_iter().collect()
}

fn words(source: &Source) -> Vec<String> {
    let found = WORDS.iter().filter(|word| source.text.contains(**word));
    found.map(|word| format!("contains {word}")).collect()
}

fn header(source: &Source) -> Vec<String> {
    let lines = source.text.lines().take_while(|line| line.starts_with("//!")).count();
    let wanted = if source.path.ends_with("/mod.rs") { 3 } else { 1 };
    let exempt = source.is_test() || source.path.starts_with("cli/demo");
    (lines < wanted && !exempt)
        .then(|| format!("begins with {lines} lines of module text, {wanted} are wanted"))
        .into_iter()
        .collect()
}

const RULES: &[fn(&Source) -> Vec<String>] = &[length, imports, glommio, words, header];

#[test]
fn the_tree_is_tidy() {
    let mut complaints = Vec::new();
    for source in all() {
        for rule in RULES {
            let found = rule(&source);
            complaints.extend(found.into_iter().map(|text| format!("src/{}: {text}", source.path)));
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn most_code_is_pure() {
    let (mut waiting, mut total) = (0, 0);
    for source in all().iter().filter(|source| !source.path.starts_with("cli/")) {
        let (lines, in_async) = source.code_lines();
        total += lines;
        waiting += in_async;
    }
    let percent = 100 * (total - waiting) / total;
    println!("{percent} % of {total} lines of code stand outside of async functions");
    assert!(percent >= PURE_PERCENT_MIN, "{percent} % of the code is pure");
}

#[test]
fn the_directories_of_the_architecture_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/architecture.md")).unwrap();
    let rows: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("| `")).collect();
    assert!(rows.len() >= 8, "the table of directories is gone");
    for row in rows {
        let dir = row.split('/').next().unwrap();
        assert!(root.join("src").join(dir).is_dir(), "docs/architecture.md names src/{dir}");
    }
}

#[test]
fn rules_fire() {
    let source = |path: &str, text: &str| Source { path: path.to_owned(), text: text.to_owned() };
    let long = format!("//! x\n{}", "fn f() {}\n".repeat(FILE_LINES_MAX));
    assert_eq!(length(&source("base/a.rs", &long)).len(), 1);
    assert!(length(&source("base/tests.rs", &long)).is_empty());
    assert_eq!(imports(&source("layers/a.rs", "use crate::shard::x;")).len(), 1);
    assert_eq!(imports(&source("wal/a.rs", "fn f(x: crate::layers::X) {}")).len(), 1);
    assert!(imports(&source("shard/a.rs", "use crate::layers::x;\n// crate::cli")).is_empty());
    assert_eq!(glommio(&source("shard/a.rs", "glommio::executor()")).len(), 1);
    assert!(glommio(&source("server/a.rs", "glommio::executor()")).is_empty());
    assert_eq!(words(&source("base/a.rs", concat!("// TO", "DO: later"))).len(), 1);
    assert_eq!(header(&source("base/mod.rs", "//! One line.\n")).len(), 1);
    assert_eq!(header(&source("base/a.rs", "use x;\n")).len(), 1);
    let text = "fn f() {\n1;\n}\nasync fn g() {\nif x {\n2;\n}\n}\nasync fn h();\nfn i() {\n}\n";
    assert_eq!(source("io/a.rs", text).code_lines(), (11, 6));
}

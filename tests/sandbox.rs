//! The wal-redo process's sandbox, from the inside: every system call number is tried behind the
//! filter that the process installs; what the kernel says of the process; no filter, no process.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc;
use pgstrata::cli::scratch::Scratch;

const SIGILL: i32 = 4;
const SIGSEGV: i32 = 11;
const SIGSYS: i32 = 31;
const NOBODY: u32 = 65534;

/// The child gets this far and no further: the calls of its allow-list.
const ALLOWED: [i64; 4] = [libc::SYS_read, libc::SYS_write, libc::SYS_brk, libc::SYS_exit_group];

/// `uretprobe` and `uprobe` of x86-64, which are no system calls for programs: the kernel lets
/// them past every filter (Linux 6.14, 6.18), and refuses them unless it was itself that put them
/// at the place they come from.
const KERNELS_OWN: [i64; 2] = [335, 336];

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// `neon_walredo.so` and the probe, built outside of the source tree.
fn libraries() -> (PathBuf, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let target = root.join("target/walredo");
    std::fs::create_dir_all(&target).unwrap();
    run(Command::new("make")
        .arg("-C")
        .arg(&target)
        .arg("-f")
        .arg(root.join("pgxn/neon_walredo/Makefile")));
    let probe = target.join(format!("probe-{}.so", std::process::id()));
    let source = root.join("tests/sandbox/probe.c");
    let args = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"];
    run(Command::new("cc").args(args).args([&probe, &source]));
    (target.join("neon_walredo.so"), probe)
}

struct Started {
    child: Child,
    _dir: Scratch,
}

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts the process as `redo::child` does, with the probe before the library.
fn start(preload: &str, probe: Option<&str>, optional: bool) -> Started {
    let dir = Scratch::new("sandbox").unwrap();
    let mut command = command(&dir, preload, probe, optional);
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Started { child: piped.spawn().unwrap(), _dir: dir }
}

fn command(dir: &Path, preload: &str, probe: Option<&str>, optional: bool) -> Command {
    std::fs::set_permissions(dir, PermissionsExt::from_mode(0o700)).unwrap();
    let output = Command::new("pg_config").arg("--bindir").output().unwrap();
    let bin = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    let mut command = Command::new(bin.join("postgres"));
    command.args(["--wal-redo", "--hint-bits=on"]);
    if nix::unistd::geteuid().is_root() {
        chown(dir, Some(NOBODY), Some(NOBODY)).unwrap();
        command.args([format!("--uid={NOBODY}"), format!("--gid={NOBODY}")]);
    }
    if optional {
        command.arg("--sandbox=optional");
    }
    command.env_clear().env("LC_ALL", "C").env("LD_PRELOAD", preload).current_dir(dir);
    if let Some(probe) = probe {
        command.env("WALREDO_PROBE", probe);
    }
    command
}

impl Started {
    /// Closes stdin, and gives what came on stdout and stderr until the end.
    fn finish(mut self) -> (Vec<u8>, String, std::process::ExitStatus) {
        drop(self.child.stdin.take());
        let (mut out, mut err) = (Vec::new(), String::new());
        self.child.stdout.take().unwrap().read_to_end(&mut out).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        (out, err, self.child.wait().unwrap())
    }

    /// It ends soon.
    fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        self.child.stdin.as_mut().unwrap().write_all(bytes).unwrap();
    }

    fn pong(&mut self) -> String {
        let out = self.child.stdout.as_mut().unwrap();
        let mut head = [0; 5];
        out.read_exact(&mut head).unwrap();
        let mut text = vec![0; u32::from_be_bytes(head[..4].try_into().unwrap()) as usize];
        out.read_exact(&mut text).unwrap();
        assert_eq!(head[4], 2, "{head:?}");
        String::from_utf8(text).unwrap()
    }
}

fn paths() -> &'static (String, String) {
    static PATHS: std::sync::OnceLock<(String, String)> = std::sync::OnceLock::new();
    PATHS.get_or_init(|| {
        let (library, probe) = libraries();
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        let (library, probe) = (text(library), text(probe));
        (library.clone(), format!("{probe}:{library}"))
    })
}

/// A process whose filter was tried goes on and answers, so it is the real one.
#[test]
fn only_the_allow_list_survives_of_all_system_calls() {
    let begin = Instant::now();
    let mut started = start(&paths().1, Some("every"), false);
    started.write(b"H\0\0\0\0");
    let (out, err, status) = started.finish();
    assert!(status.success(), "{status}: {err}");
    let end = out.windows(5).position(|window| window == b"done\n").expect(&err);
    let pong = String::from_utf8_lossy(&out[end + 5..]).into_owned();
    assert!(pong.contains("sandbox seccomp"), "{pong}");
    let mut outcomes: BTreeMap<(String, i64), (String, i32)> = BTreeMap::new();
    for line in std::str::from_utf8(&out[..end]).unwrap().lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [table, number, what, code] = words[..] else { panic!("{line}") };
        let outcome = (what.to_owned(), code.parse().unwrap());
        outcomes.insert((table.to_owned(), number.parse().unwrap()), outcome);
    }
    let tables = if cfg!(target_arch = "x86_64") { 3 * 1024 + 1 } else { 1024 + 1 };
    assert_eq!(outcomes.len(), tables);
    let mut survived = Vec::new();
    for ((table, number), (what, code)) in &outcomes {
        match (table.as_str(), what.as_str(), *code) {
            (_, "signal", SIGSYS) => {}
            // A kernel without the calls of 32-bit programs faults instead.
            ("i386", "signal", SIGSEGV) => {}
            ("native", "signal", SIGILL) | ("native", "exit", 43)
                if cfg!(target_arch = "x86_64") && KERNELS_OWN.contains(number) => {}
            ("native", "exit", code) => {
                let expected = if *number == libc::SYS_exit_group { 7 } else { 42 };
                assert_eq!(code, expected, "system call {number}");
                survived.push(*number);
            }
            _ => panic!("{table} {number}: {what} {code}"),
        }
    }
    survived.sort_unstable();
    let mut allowed = ALLOWED.to_vec();
    allowed.sort_unstable();
    assert_eq!(survived, allowed);
    println!("{} calls tried in {:?}", outcomes.len(), begin.elapsed());
}

/// What the kernel says of a process that waits for its first request.
#[test]
fn the_kernel_confirms_it() {
    let mut started = start(&paths().0, None, false);
    // After the answer to a ping the process is where WAL would be read.
    started.write(b"H\0\0\0\0");
    let pong = started.pong();
    assert!(pong.starts_with("walredo 2 postgres 15"), "{pong}");
    assert!(pong.contains(" sandbox seccomp"), "{pong}");
    assert!(pong.ends_with("hint-bits on"), "{pong}");
    let proc = PathBuf::from(format!("/proc/{}", started.child.id()));
    let status = std::fs::read_to_string(proc.join("status")).unwrap();
    let of = |name: &str| -> Vec<String> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(of("Seccomp:"), ["2"]);
    assert_eq!(of("NoNewPrivs:"), ["1"]);
    assert_eq!(of("Threads:"), ["1"]);
    for capabilities in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(of(capabilities), ["0000000000000000"], "{capabilities}");
    }
    assert!(!of("Uid:").contains(&"0".to_owned()), "{status}");
    if nix::unistd::geteuid().is_root() {
        assert_eq!(of("Uid:"), vec![NOBODY.to_string(); 4]);
        assert_eq!(of("Gid:"), vec![NOBODY.to_string(); 4]);
        assert_eq!(of("Groups:"), Vec::<String>::new());
        let open = std::fs::read_dir(proc.join("fd")).unwrap().flatten();
        let mut open: Vec<_> = open.map(|entry| entry.file_name()).collect();
        open.sort();
        assert_eq!(open, ["0", "1", "2"]);
    }
    let limits = std::fs::read_to_string(proc.join("limits")).unwrap();
    for (name, most) in [
        ("Max cpu time", 3600),
        ("Max file size", 0),
        ("Max core file size", 0),
        ("Max open files", 3),
        ("Max address space", 2u64 << 30),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect(name);
        let words: Vec<&str> = line.split_whitespace().collect();
        for bound in &words[..2] {
            assert!(bound.parse::<u64>().unwrap() <= most, "{name} {line}");
        }
    }
    started.write(b"S\0\0\0\x01\0");
    assert!(started.pong().ends_with("hint-bits off"));
    let (_, err, status) = started.finish();
    assert!(status.success() && err.is_empty(), "{status} {err}");
}

/// Landlock is part of it on kernels that have it.
#[test]
fn landlock_where_there_is_landlock() {
    const CREATE_RULESET: i64 = 444;
    const VERSION: u64 = 1;
    // SAFETY: without a ruleset and with this flag the call only tells the version.
    let version = unsafe { libc::syscall(CREATE_RULESET, std::ptr::null::<u8>(), 0usize, VERSION) };
    println!("version {version} of Landlock");
    let mut started = start(&paths().0, None, false);
    started.write(b"H\0\0\0\0");
    let pong = started.pong();
    assert_eq!(pong.contains(" sandbox seccomp+landlock "), version >= 1, "{pong}");
}

/// Without a filter the process ends before it reads; it goes on only where that was asked for.
#[test]
fn no_filter_no_process() {
    let (out, err, status) = start(&paths().1, Some("refuse"), false).finish();
    assert_eq!((status.code(), out.len()), (Some(1), 0), "{err}");
    assert!(err.contains("no sandbox, so it does not run"), "{err}");
    let mut started = start(&paths().1, Some("refuse"), true);
    started.write(b"H\0\0\0\0");
    assert!(started.pong().contains(" sandbox none "));
    let (_, err, status) = started.finish();
    assert!(status.success() && err.contains("RUNS WITHOUT A SANDBOX"), "{status} {err}");
}

/// As [`start`], by a shell that does something first; then it runs `"$@"`.
fn start_by_shell(script: &str) -> Started {
    let dir = Scratch::new("sandbox").unwrap();
    let inner = command(&dir, &paths().0, None, false);
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh", "env", "-i"]);
    for (name, value) in inner.get_envs() {
        shell.arg(format!("{}={}", name.to_str().unwrap(), value.unwrap().to_str().unwrap()));
    }
    shell.arg(inner.get_program()).args(inner.get_args()).current_dir(&*dir);
    let piped = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut started = Started { child: piped.spawn().unwrap(), _dir: dir };
    started.write(b"H\0\0\0\0");
    started.pong();
    started
}

/// Where its memory ends, the process does: refused more by `brk`, malloc asks for it by `mmap`, which
/// the filter has no pardon for.
#[test]
fn it_does_not_outgrow_its_memory() {
    let mut started = start(&paths().0, None, false);
    started.write(b"H\0\0\0\0");
    started.pong();
    let pid = started.child.id();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmPeak:")).expect(&status);
    let peak_kb: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    let mut started = start_by_shell(&format!("ulimit -v {}; exec \"$@\"", peak_kb + 1024));
    started.write(b"B\0\0\0\x11\0\0\0\x06\x7f\0\0\0\x05\0\0\x40\0\0\0\0\x07");
    let record = vec![0; 7 << 20];
    started.write(&[&b"A"[..], &(record.len() as u32 + 8).to_be_bytes(), &[0; 8]].concat());
    // It may have ended before all of it is written.
    let _ = started.child.stdin.as_mut().unwrap().write_all(&record);
    let (out, err, status) = started.finish();
    assert_eq!((status.signal(), out.len()), (Some(SIGSYS), 0), "{err}");
}

/// Where its time ends, the kernel ends the process.
#[test]
fn it_does_not_outlive_its_cpu_time() {
    let mut started = start_by_shell("ulimit -t 2; exec \"$@\"");
    let (mut stdin, mut stdout) =
        (started.child.stdin.take().unwrap(), started.child.stdout.take().unwrap());
    let reader = std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
    let pings = b"H\0\0\0\0".repeat(1000);
    let begin = Instant::now();
    while stdin.write_all(&pings).is_ok() {
        assert!(begin.elapsed() < Duration::from_secs(120), "it lives on");
    }
    let status = started.child.wait().unwrap();
    assert!(matches!(status.signal(), Some(libc::SIGKILL | libc::SIGXCPU)), "{status}");
    assert!(reader.join().unwrap().unwrap() > 0);
}

/// The process ends with the thread that started it, although its stdin stays open.
#[test]
fn it_ends_with_the_thread_that_started_it() {
    let library = &paths().0;
    let start = || {
        let mut started = start(library, None, false);
        started.write(b"H\0\0\0\0");
        started.pong();
        assert!(started.child.try_wait().unwrap().is_none());
        started
    };
    let mut started = std::thread::scope(|scope| scope.spawn(start).join().unwrap());
    assert!(started.child.stdin.is_some());
    assert_eq!(started.wait().signal(), Some(libc::SIGKILL));
}

/// The same, where it is a process that is killed: a shell between.
#[test]
fn it_ends_with_the_process_that_started_it() {
    let mut started = start_by_shell("exec 3<&0; \"$@\" <&3 3<&- & wait");
    started.child.kill().unwrap();
    assert_eq!(started.wait().signal(), Some(libc::SIGKILL));
    // The end of its stdout is the process's own: the shell's is over, and stdin is still open.
    let mut stdout = started.child.stdout.take().unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(stdout.read_to_end(&mut Vec::new()).is_ok()));
    assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(true), "it lives on");
    assert!(started.child.stdin.is_some());
}

/// A process that talks to nobody ends.
#[test]
fn it_ends_with_its_caller() {
    let mut started = start(&paths().0, None, false);
    started.write(b"H\0\0\0\0");
    started.pong();
    drop(started.child.stdin.take());
    started.wait();
}

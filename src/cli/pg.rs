//! Control of stock PostgreSQL 15 clusters: the primaries and stand-bys of the demo, the checks
//! and the tests.
//!
//! A server runs as a direct child of this process. As PostgreSQL refuses to run as root, its
//! programs run as user `postgres` there, through `setpriv`, which also has the kernel stop the
//! server should this process die. Nothing here is on the data path of a node.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a command-line tool that drives other programs: no data path, nothing to simulate"
)]

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::base::{Kind, Lsn};
use crate::limits::{PG_POLL, PG_START_TIMEOUT, PG_STOP_TIMEOUT};

/// Why an outside program could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum PgError {
    /// A program could not be started, or a file not be read or written.
    #[error("{what}: {source}")]
    Os {
        /// What was tried.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A program reported failure.
    #[error("{program} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        program: String,
        /// How it ended.
        status: String,
        /// What it said.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("{what} took longer than {seconds} s; see {log}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// The limit.
        seconds: u64,
        /// Where to look.
        log: String,
    },
    /// An answer of PostgreSQL was not understood.
    #[error("{what}: unexpected answer '{answer}'")]
    Answer {
        /// What was asked.
        what: String,
        /// What came.
        answer: String,
    },
}

impl PgError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            PgError::Os { .. } | PgError::Timeout { .. } => Kind::Retry,
            PgError::Failed { .. } | PgError::Answer { .. } => Kind::Invalid,
        }
    }

    /// Adds what was tried to a system error.
    pub fn os(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> PgError {
        let what = what.into();
        move |source| PgError::Os { what, source }
    }

    fn answer(what: &str, answer: impl Into<String>) -> PgError {
        PgError::Answer { what: what.to_owned(), answer: answer.into() }
    }
}

/// Directory of PostgreSQL 15's programs: `$PGSTRATA_PG_BIN`, else Debian's place.
pub fn bin_dir() -> PathBuf {
    std::env::var_os("PGSTRATA_PG_BIN")
        .map_or_else(|| PathBuf::from("/usr/lib/postgresql/15/bin"), PathBuf::from)
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A program of PostgreSQL; as user `postgres` when this process is root.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    if is_root() {
        command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]);
    }
    command.args(["--pdeathsig", "INT", "--"]).arg(bin_dir().join(program));
    command.env("LC_ALL", "C").env_remove("PGOPTIONS").stdin(Stdio::null());
    command
}

/// Runs a program to its end and gives its standard output.
pub fn run(mut command: Command) -> Result<String, PgError> {
    let name = describe(&command);
    let output = command.output().map_err(PgError::os(&name))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(PgError::Failed {
        program: name,
        status: output.status.to_string(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

fn describe(command: &Command) -> String {
    let words = command.get_args().skip_while(|arg| *arg != OsStr::new("--")).skip(1);
    words.take(2).map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Ports for servers of this program's making.
const FIRST_PORT: u16 = 10_000;
const PORTS: u16 = 22_000;

/// A TCP port of this machine that nobody listens on at the moment.
///
/// It lies below the range from which the kernel takes ports for outgoing connections: one of
/// those could take it away, and a client that polls a port of that range until a server is there
/// may connect to itself.
pub fn free_port() -> Result<u16, PgError> {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    // Processes that run beside each other start far from each other.
    let start = std::process::id().wrapping_mul(7919);
    let mut last = None;
    for _ in 0..PORTS {
        let nth = start.wrapping_add(TAKEN.fetch_add(1, Ordering::Relaxed));
        let port = FIRST_PORT + (nth % u32::from(PORTS)) as u16;
        match TcpListener::bind(("127.0.0.1", port)) {
            Ok(_) => return Ok(port),
            Err(error) => last = Some(error),
        }
    }
    Err(PgError::os("free port")(last.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into())))
}

/// Makes a directory that the servers' user owns and alone can enter.
pub fn make_dir(path: &Path) -> Result<(), PgError> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(path).map_err(PgError::os(path.display().to_string()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
        .map_err(PgError::os(path.display().to_string()))?;
    give_to_servers(path)
}

/// Gives a file or directory to the user that the servers run as.
pub fn give_to_servers(path: &Path) -> Result<(), PgError> {
    if !is_root() {
        return Ok(());
    }
    let user = nix::unistd::User::from_name("postgres")
        .ok()
        .flatten()
        .ok_or_else(|| PgError::answer("user postgres", "no such user; install postgresql-15"))?;
    nix::unistd::chown(path, Some(user.uid), Some(user.gid))
        .map_err(|errno| PgError::os(path.display().to_string())(errno.into()))
}

/// How a server is stopped (the modes of `pg_ctl stop`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Ends sessions, writes a shutdown checkpoint.
    Fast,
    /// Ends at once; the next start runs crash recovery.
    Immediate,
}

/// A cluster on this machine. Dropping it stops its server.
#[derive(Debug)]
pub struct PgCluster {
    data: PathBuf,
    sockets: PathBuf,
    log: PathBuf,
    port: u16,
    child: Option<Child>,
}

impl PgCluster {
    /// Makes a cluster in `dir` (which must not hold one): `dir/data`, `dir/log`, sockets in
    /// `dir`. `settings` are lines of `postgresql.conf`, later ones win.
    pub fn init(dir: &Path, checksums: bool, settings: &[String]) -> Result<PgCluster, PgError> {
        make_dir(dir)?;
        let cluster = PgCluster::at(dir)?;
        let mut initdb = command("initdb");
        initdb.args(["-U", "postgres", "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"]);
        initdb.args(checksums.then_some("-k")).arg("-D").arg(&cluster.data);
        run(initdb)?;
        let base = [
            "wal_level = replica",
            "max_wal_senders = 10",
            "max_replication_slots = 10",
            "max_prepared_transactions = 20",
            "max_connections = 50",
            "allow_in_place_tablespaces = on",
            "fsync = off",
            "max_wal_size = 2GB",
        ];
        cluster.configure(base)?;
        cluster.configure(settings.iter().map(String::as_str))?;
        Ok(cluster)
    }

    /// A cluster whose data directory is (or will be) `dir/data`.
    pub fn at(dir: &Path) -> Result<PgCluster, PgError> {
        Ok(PgCluster {
            data: dir.join("data"),
            sockets: dir.to_owned(),
            log: dir.join("log"),
            port: free_port()?,
            child: None,
        })
    }

    /// Appends settings to `postgresql.conf`.
    pub fn configure<'a>(
        &self,
        settings: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), PgError> {
        let path = self.data.join("postgresql.conf");
        let what = || PgError::os(path.display().to_string());
        let mut file = fs::OpenOptions::new().append(true).open(&path).map_err(what())?;
        for line in settings {
            writeln!(file, "{line}").map_err(what())?;
        }
        Ok(())
    }

    /// The data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// The server's log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Connection string over TCP, without a database.
    pub fn conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres", self.port)
    }

    /// Starts the server without waiting for it.
    pub fn spawn(&mut self) -> Result<(), PgError> {
        let what = || PgError::os(self.log.display().to_string());
        let log =
            fs::OpenOptions::new().create(true).append(true).open(&self.log).map_err(what())?;
        let mut server = command("postgres");
        server.arg("-D").arg(&self.data).arg("-k").arg(&self.sockets);
        server.arg("-p").arg(self.port.to_string()).args(["-h", "127.0.0.1"]);
        server.stdout(log.try_clone().map_err(what())?).stderr(log);
        self.child = Some(server.spawn().map_err(PgError::os("postgres"))?);
        Ok(())
    }

    /// Starts the server and waits until it takes connections.
    pub fn start(&mut self) -> Result<(), PgError> {
        self.spawn()?;
        let begin = Instant::now();
        loop {
            if let Some(status) = self.exited()? {
                return Err(PgError::Failed {
                    program: "postgres".into(),
                    status,
                    stderr: self.log_tail(),
                });
            }
            let mut ready = command("pg_isready");
            ready.args(["-q", "-h", "127.0.0.1", "-p"]).arg(self.port.to_string());
            if ready.status().map_err(PgError::os("pg_isready"))?.success() {
                return Ok(());
            }
            self.check_time("start of postgres", begin, PG_START_TIMEOUT)?;
            std::thread::sleep(PG_POLL);
        }
    }

    fn check_time(&self, what: &str, begin: Instant, limit: Duration) -> Result<(), PgError> {
        if begin.elapsed() < limit {
            return Ok(());
        }
        let log = self.log.display().to_string();
        Err(PgError::Timeout { what: what.into(), seconds: limit.as_secs(), log })
    }

    fn exited(&mut self) -> Result<Option<String>, PgError> {
        let Some(child) = &mut self.child else { return Ok(Some("not running".into())) };
        let status = child.try_wait().map_err(PgError::os("postgres"))?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status.map(|status| status.to_string()))
    }

    /// The end of the server's log.
    pub fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines.get(lines.len().saturating_sub(12)..).unwrap_or_default().join("\n")
    }

    /// Waits until a server that is to end by itself has ended; its exit status as text.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<String, PgError> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.exited()? {
                return Ok(status);
            }
            self.check_time("end of postgres", begin, limit)?;
            std::thread::sleep(PG_POLL);
        }
    }

    /// Stops the server, if it runs, and waits for its end.
    pub fn stop(&mut self, mode: StopMode) -> Result<(), PgError> {
        use nix::sys::signal::{Signal, kill};
        let Some(child) = &self.child else { return Ok(()) };
        let signal = match mode {
            StopMode::Fast => Signal::SIGINT,
            StopMode::Immediate => Signal::SIGQUIT,
        };
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        kill(pid, signal).map_err(|errno| PgError::os("stop of postgres")(errno.into()))?;
        self.wait_exit(PG_STOP_TIMEOUT).map(drop)
    }

    /// A client program with this cluster's address, for `database`.
    pub fn client(&self, program: &str, database: &str) -> Command {
        let mut client = command(program);
        client.arg("-h").arg(&self.sockets).arg("-p").arg(self.port.to_string());
        client.args(["-U", "postgres"]);
        if program == "psql" {
            client.args(["-X", "-q", "-A", "-t", "-F", "\t", "-v", "ON_ERROR_STOP=1"]);
        }
        client.env("PGDATABASE", database);
        client
    }

    /// Runs SQL (several statements, each in its own transaction) and gives the rows, each as
    /// its columns' texts.
    pub fn psql(&self, database: &str, sql: &str) -> Result<Vec<Vec<String>>, PgError> {
        let mut psql = self.client("psql", database);
        psql.args(["-f", "-"]).stdin(Stdio::piped());
        psql.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = psql.spawn().map_err(PgError::os("psql"))?;
        let mut stdin = child.stdin.take();
        let sent = std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let pipe = stdin.take();
                pipe.map_or(Ok(()), |mut pipe| pipe.write_all(sql.as_bytes()))
            });
            let output = child.wait_with_output().map_err(PgError::os("psql"))?;
            let _ = writer.join();
            Ok(output)
        });
        let output = sent?;
        if !output.status.success() {
            let head: String = sql.trim().chars().take(80).collect();
            return Err(PgError::Failed {
                program: format!("psql '{head}…'"),
                status: output.status.to_string(),
                stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let row = |line: &str| line.split('\t').map(str::to_owned).collect();
        Ok(text.lines().map(row).collect())
    }

    /// The single value of a query.
    pub fn value(&self, database: &str, sql: &str) -> Result<String, PgError> {
        let rows = self.psql(database, sql)?;
        rows.into_iter()
            .next()
            .and_then(|row| row.into_iter().next())
            .ok_or_else(|| PgError::answer(sql, "no row"))
    }

    /// The single value of a query, as an LSN.
    pub fn lsn(&self, sql: &str) -> Result<Lsn, PgError> {
        let text = self.value("postgres", sql)?;
        text.parse().map_err(|_| PgError::answer(sql, text.clone()))
    }

    /// Fills a database with pgbench's tables.
    pub fn pgbench_init(&self, database: &str, scale: u32) -> Result<(), PgError> {
        let mut pgbench = self.client("pgbench", database);
        pgbench.args(["-i", "-q", "-s"]).arg(scale.to_string());
        run(pgbench).map(drop)
    }

    /// Runs pgbench and gives each line that it prints to `line`, as it comes.
    pub fn pgbench(
        &self,
        database: &str,
        args: &[&str],
        mut line: impl FnMut(&str),
    ) -> Result<(), PgError> {
        let mut pgbench = self.client("pgbench", database);
        pgbench.args(args).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = pgbench.spawn().map_err(PgError::os("pgbench"))?;
        let mut last = String::new();
        if let Some(stderr) = child.stderr.take() {
            for text in BufReader::new(stderr).lines().map_while(Result::ok) {
                line(&text);
                last = text;
            }
        }
        let status = child.wait().map_err(PgError::os("pgbench"))?;
        if status.success() {
            return Ok(());
        }
        Err(PgError::Failed { program: "pgbench".into(), status: status.to_string(), stderr: last })
    }

    /// Takes a base backup into `dir/data` (plain files, no WAL beside it), fast checkpoint.
    pub fn base_backup(&self, dir: &Path) -> Result<PathBuf, PgError> {
        make_dir(dir)?;
        let target = dir.join("data");
        let mut backup = self.client("pg_basebackup", "postgres");
        backup.args(["--no-sync", "-c", "fast", "-X", "none", "-D"]).arg(&target);
        run(backup)?;
        Ok(target)
    }
}

impl Drop for PgCluster {
    fn drop(&mut self) {
        if self.stop(StopMode::Immediate).is_err()
            && let Some(child) = &mut self.child
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A line of `pg_controldata`, by its name.
pub fn control_data(data: &Path, name: &str) -> Result<String, PgError> {
    let mut program = command("pg_controldata");
    program.arg("-D").arg(data);
    let text = run(program)?;
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim().to_owned())
        .ok_or_else(|| PgError::answer("pg_controldata", format!("no line '{name}'")))
}

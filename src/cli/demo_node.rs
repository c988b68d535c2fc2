//! A node as a child process, for the demo and the tests.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::admin_client::{AdminClient, CommandError};
use super::pg::free_port;

/// Time for a node to start or stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running node; it ends with this value.
pub struct DemoNode {
    program: PathBuf,
    dir: PathBuf,
    settings: Vec<String>,
    page_port: u16,
    admin_port: u16,
    child: Option<Child>,
}

impl DemoNode {
    /// Starts a node of this very program with its data in `dir/data`, at free ports.
    pub fn start(dir: &Path, settings: &[String]) -> Result<DemoNode, CommandError> {
        DemoNode::start_program(&std::env::current_exe()?, dir, settings)
    }

    /// The same with another `program`: tests are no nodes themselves.
    pub fn start_program(
        program: &Path,
        dir: &Path,
        settings: &[String],
    ) -> Result<DemoNode, CommandError> {
        fs::create_dir_all(dir)?;
        let mut node = DemoNode {
            program: program.to_owned(),
            dir: dir.to_owned(),
            settings: settings.to_vec(),
            page_port: free_port()?,
            admin_port: free_port()?,
            child: None,
        };
        node.start_again()?;
        Ok(node)
    }

    /// Starts it again, with the same data and ports.
    pub fn start_again(&mut self) -> Result<(), CommandError> {
        let log = File::options().create(true).append(true).open(self.log_path())?;
        let mut command = Command::new(&self.program);
        command.arg("serve");
        let data = self.data_dir();
        let fixed = [
            format!("data_dir={}", data.display()),
            format!("listen_pg_addr={}", self.page_address()),
            format!("listen_http_addr=127.0.0.1:{}", self.admin_port),
        ];
        for setting in fixed.iter().chain(&self.settings) {
            command.args(["-c", setting]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.child = Some(command.spawn()?);
        let begin = Instant::now();
        while let Err(problem) = self.answers()? {
            if begin.elapsed() > PATIENCE {
                let (threads, log) = (self.threads(), self.log_tail());
                let text = format!("the node does not start: {problem}\n{threads}\n{log}");
                return Err(text.into());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where each of its threads is, for a node that makes no progress.
    fn threads(&self) -> String {
        let Some(pid) = self.pid() else { return String::new() };
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return String::new() };
        let read = |dir: &Path, name: &str| {
            fs::read_to_string(dir.join(name)).unwrap_or_default().trim().to_owned()
        };
        let line = |dir: PathBuf| {
            let (name, place) = (read(&dir, "comm"), read(&dir, "wchan"));
            format!("  thread {name} in {place}, system call {}", read(&dir, "syscall"))
        };
        tasks.flatten().map(|task| line(task.path())).collect::<Vec<_>>().join("\n")
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(10)..].join("\n")
    }

    /// Whether both services answer, and if not, which does not. An error when the process has
    /// ended.
    fn answers(&mut self) -> Result<Result<(), String>, CommandError> {
        if let Some(child) = &mut self.child
            && let Some(status) = child.try_wait()?
        {
            self.child = None;
            return Err(format!("the node ended ({status}): {}", self.log_tail()).into());
        }
        if let Err(error) = TcpStream::connect(self.page_address()) {
            return Ok(Err(format!("page service at {}: {error}", self.page_address())));
        }
        Ok(self.admin()?.status().map(drop).map_err(|error| error.to_string()))
    }

    /// Kills it without warning.
    pub fn kill(&mut self) -> Result<(), CommandError> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Stops it in order (SIGTERM); an error if it does not end well.
    pub fn stop(&mut self) -> Result<(), CommandError> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        let begin = Instant::now();
        loop {
            if let Some(status) = child.try_wait()? {
                let ended = format!("the node ended badly: {status}");
                return if status.success() { Ok(()) } else { Err(ended.into()) };
            }
            if begin.elapsed() > PATIENCE {
                child.kill()?;
                child.wait()?;
                return Err("the node did not stop within a minute of SIGTERM".into());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Address of its page service.
    pub fn page_address(&self) -> String {
        format!("127.0.0.1:{}", self.page_port)
    }

    /// URL of its admin API.
    pub fn admin_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.admin_port)
    }

    /// A client for its admin API.
    pub fn admin(&self) -> Result<AdminClient, CommandError> {
        AdminClient::new(&self.admin_url())
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The directory with its data.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Where its log goes.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }
}

impl Drop for DemoNode {
    fn drop(&mut self) {
        // The process may have ended already.
        let _ = self.kill();
    }
}

//! A node as a process of its own on the server's CPU.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgstrata::base::{Lsn, TenantShardId, TimelineId};
use pgstrata::cli::admin_client::AdminClient;
use pgstrata::cli::pg::{PgCluster, free_port};

use super::{Result, pin, walredo_library};

/// Where servers run.
pub const SERVER_CPU: usize = 0;
/// How long things are waited for that are to come.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A process that ends with this value.
pub struct Process(pub Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a process on the server's CPU.
pub fn spawn(command: &mut Command, client_cpu: usize) -> Result<Process> {
    pin(SERVER_CPU)?;
    let child = command.spawn();
    pin(client_cpu)?;
    Ok(Process(child?))
}

/// A node with one core.
pub struct Node {
    pub process: Process,
    /// Of the page service.
    pub address: String,
    pub admin: AdminClient,
}

/// Starts a node whose files are in `dir`, with these settings beside those that it needs.
pub fn start(dir: &Path, client_cpu: usize, settings: &[&str]) -> Result<Node> {
    std::fs::create_dir(dir)?;
    let (page_port, admin_port) = (free_port()?, free_port()?);
    let address = format!("127.0.0.1:{page_port}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    command.arg("serve");
    let needed = [
        format!("data_dir={}", dir.join("data").display()),
        format!("listen_pg_addr={address}"),
        format!("listen_http_addr=127.0.0.1:{admin_port}"),
        format!("cores=[{SERVER_CPU}]"),
        format!("walredo_library={}", walredo_library()?.display()),
        "log_filter=warn".to_owned(),
    ];
    for setting in needed.iter().map(String::as_str).chain(settings.iter().copied()) {
        command.args(["-c", setting]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(dir.join("log"))?);
    let mut process = spawn(&mut command, client_cpu)?;
    let admin = AdminClient::new(&format!("http://127.0.0.1:{admin_port}"))?;
    let begin = Instant::now();
    while admin.status().is_err() {
        if process.0.try_wait()?.is_some() || begin.elapsed() > PATIENCE {
            let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
            return Err(format!("the node does not start: {log}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Node { process, address, admin })
}

/// A running primary with pgbench's tables, which changes nothing by itself.
pub fn primary(dir: &Path, settings: &[&str], scale: u32) -> Result<PgCluster> {
    // Nodes have no slots, and must still find what a checkpoint would remove.
    let always = ["autovacuum = off", "wal_keep_size = '1GB'", "max_wal_senders = 20"];
    let settings: Vec<String> =
        always.iter().chain(settings).map(|setting| (*setting).to_owned()).collect();
    let mut primary = PgCluster::init(dir, false, &settings)?;
    primary.start()?;
    primary.pgbench_init("postgres", scale)?;
    Ok(primary)
}

/// Waits until a timeline has all that its primary has done; returns the LSN of that.
pub fn catch_up(
    admin: &AdminClient,
    primary: &PgCluster,
    (tenant, timeline): (TenantShardId, TimelineId),
) -> Result<Lsn> {
    let lsn = primary.lsn("SELECT pg_current_wal_insert_lsn()")?;
    // Something behind it, so that the WAL up to there is flushed and sent.
    primary.psql("postgres", "CHECKPOINT")?;
    let begin = Instant::now();
    while admin.timeline(tenant, timeline)?.last_record_lsn < lsn {
        if begin.elapsed() > PATIENCE {
            return Err("the node does not catch up".into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(lsn)
}

/// A counter of the node's metrics page, summed over its lines.
pub fn counter(admin: &AdminClient, name: &str) -> Result<f64> {
    let text = admin.metrics()?;
    let lines = text.lines().filter(|line| line.starts_with(name));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

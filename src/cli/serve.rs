//! `pgstrata serve`: the node.

use std::fs::{File, OpenOptions};
use std::io::IsTerminal;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use super::admin_client::CommandError;
use super::service::{NodeShard, REDO_DIR, find_library, spares};
use crate::admin::{AdminState, serve as serve_admin};
use crate::config::Config;
use crate::limits::{ADMIN_STOP_MAX, OPEN_FILES_FEW};
use crate::server::node::{Node, abort_with_executors};

/// Version of the data directory's layout.
const LAYOUT_VERSION: &str = "1\n";

/// `pgstrata serve`.
#[derive(clap::Args, Debug)]
pub struct ServeArgs {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, over the file's.
    #[arg(short = 'c', value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Runs the node until a signal ends it.
pub fn serve(args: ServeArgs) -> Result<(), CommandError> {
    let mut config = Config::load(args.config.as_deref(), &args.settings)?;
    let filter = EnvFilter::try_new(&config.log_filter)
        .map_err(|error| format!("setting log_filter: {error}"))?;
    // Colours are for people, not for files and journals of services.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_ansi(std::io::stderr().is_terminal()).init();
    config.walredo_library = find_library(&config.walredo_library)?;
    if !config.postgres_bin.is_file() {
        return Err(format!(
            "postgres_bin: {} is no file; install PostgreSQL 15 or set postgres_bin",
            config.postgres_bin.display()
        )
        .into());
    }
    raise_file_limit();
    abort_with_executors();
    let _lock = prepare(&config)?;
    config.data_dir = std::fs::canonicalize(&config.data_dir)?;
    let _trimming = spares(&config).start_trimming()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run(Arc::new(config)))
}

/// Connections and layer files that are read stay open, so the node takes all the files it may have.
fn raise_file_limit() {
    let files = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(files).and_then(|(_, hard)| setrlimit(files, hard, hard).map(|()| hard));
    match raised {
        Ok(hard) if hard < OPEN_FILES_FEW => tracing::warn!(
            "the node may have only {hard} files open, and whoever needs one more gets an error; \
             give it {OPEN_FILES_FEW} or more (ulimit -Hn, or LimitNOFILE= of its service)"
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!("the limit of open files stays as it is: {error}"),
    }
}

/// Creates the data directory if need be, and takes it for this process.
fn prepare(config: &Config) -> Result<Flock<File>, CommandError> {
    let dir = config.data_dir.as_path();
    let fail = |what: &str, error: std::io::Error| format!("{what} {}: {error}", dir.display());
    if !dir.is_dir() {
        std::fs::DirBuilder::new()
            .mode(0o711)
            .create(dir)
            .map_err(|error| fail("cannot create the data directory", error))?;
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    }
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(dir.join("lock"));
    let file = open.map_err(|error| fail("cannot write to the data directory", error))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| format!("{} is used by another node that is running", dir.display()))?;
    let version = dir.join("version");
    match std::fs::read_to_string(&version) {
        Ok(found) if found == LAYOUT_VERSION => {}
        Ok(found) => {
            return Err(format!(
                "{} has layout version {}, this program uses version {}",
                dir.display(),
                found.trim(),
                LAYOUT_VERSION.trim()
            )
            .into());
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // Whole or absent: a version file that is cut off would be taken for another version.
            let temp = dir.join("version.tmp");
            std::fs::write(&temp, LAYOUT_VERSION)?;
            File::open(&temp)?.sync_all()?;
            std::fs::rename(&temp, &version)?;
            File::open(dir)?.sync_all()?;
        }
        Err(error) => return Err(fail("cannot read the version file in", error).into()),
    }
    // Left over from children of a node that was killed.
    let redo = dir.join(REDO_DIR);
    if redo.is_dir() {
        std::fs::remove_dir_all(&redo)?;
    }
    std::fs::DirBuilder::new().mode(0o711).create(&redo)?;
    let prepared = spares(config).prepare();
    prepared.map_err(|error| fail("cannot use the space of removed files in", error))?;
    Ok(lock)
}

async fn run(config: Arc<Config>) -> Result<(), CommandError> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let listener =
        tokio::net::TcpListener::bind(config.listen_http_addr).await.map_err(|error| {
            format!("cannot listen for the admin API at {}: {error}", config.listen_http_addr)
        })?;
    let admin_address = listener.local_addr()?;
    let node = Node::start::<NodeShard>(config.clone()).await?;
    let (stop_admin, admin_stopped) = tokio::sync::oneshot::channel::<()>();
    let spares = spares(&config);
    let spare_bytes = Arc::new(move || spares.kept_bytes());
    let state = AdminState { mesh: node.mesh(), spare_bytes };
    let admin = tokio::spawn(serve_admin(listener, state, async move {
        // A dropped sender means the same as a message.
        let _ = admin_stopped.await;
    }));
    // Programs that start a node read these two lines.
    println!("page service at {}", node.address());
    println!("admin API at http://{admin_address}");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("stopping; a second signal ends the node at once");
    let stopped = tokio::select! {
        stopped = node.stop() => stopped,
        _ = terminate.recv() => return Err("ended at once by a second signal".into()),
        _ = interrupt.recv() => return Err("ended at once by a second signal".into()),
    };
    let _ = stop_admin.send(());
    // A client that never ends its request does not keep the node.
    tokio::select! {
        _ = tokio::time::timeout(ADMIN_STOP_MAX, admin) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    stopped?;
    tracing::info!("stopped; everything is synced");
    Ok(())
}

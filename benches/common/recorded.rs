//! WAL of a real primary, from a base backup to a checkpoint.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::sys::resource::UsageWho;
use pgstrata::base::lsn::Lsn;
use pgstrata::cli::oracle::{self, Mark};
use pgstrata::cli::pg::{PgCluster, StopMode, control_data, give_to_servers};

use super::{Result, cpu_time};

pub const SEGMENT: u64 = 16 << 20;

const PATIENCE: Duration = Duration::from_secs(600);

/// What recovery by PostgreSQL took: CPU time of the server from its start to its end.
pub struct Recovered {
    pub cpu: Duration,
    pub wall: Duration,
}

pub struct Recorded {
    pub primary: PgCluster,
    pub backup: PathBuf,
    pub mark: Mark,
}

impl Recorded {
    /// Runs `prepare`, takes the backup, runs `load`; the primary is stopped afterwards.
    pub fn make(
        root: &Path,
        full_page_writes: bool,
        prepare: impl FnOnce(&PgCluster) -> Result<()>,
        load: impl FnOnce(&PgCluster) -> Result<()>,
    ) -> Result<Recorded> {
        let settings = [
            format!("full_page_writes = {}", if full_page_writes { "on" } else { "off" }),
            "autovacuum = off".to_owned(),
            "checkpoint_timeout = 1h".to_owned(),
            "max_wal_size = 20GB".to_owned(),
        ];
        let mut primary = PgCluster::init(&root.join("primary"), false, &settings)?;
        primary.start()?;
        oracle::keep_wal(&primary)?;
        prepare(&primary)?;
        let backup = root.join("backup");
        primary.base_backup(&backup)?;
        load(&primary)?;
        let mark = oracle::mark(&primary)?;
        primary.stop(StopMode::Fast)?;
        Ok(Recorded { primary, backup, mark })
    }

    /// Where recovery of the backup begins.
    pub fn start(&self) -> Result<Lsn> {
        let label = fs::read_to_string(self.backup.join("data/backup_label"))?;
        let line = label.lines().next().unwrap_or_default();
        let text = line.split_whitespace().nth(3).ok_or("backup_label")?;
        Ok(text.parse().map_err(|_| format!("backup_label: {line}"))?)
    }

    /// The segment files of the WAL.
    pub fn segments(&self) -> Result<Vec<(u64, PathBuf)>> {
        let last = (self.mark.end.0 - 1) / SEGMENT;
        let name = |number: u64| format!("00000001{:08X}{:08X}", number / 256, number % 256);
        let dir = self.primary.data().join("pg_wal");
        Ok((self.start()?.0 / SEGMENT..=last).map(|n| (n, dir.join(name(n)))).collect())
    }

    /// All of it.
    pub fn wal(&self) -> Result<Bytes> {
        let from = self.start()?;
        let mut wal = Vec::new();
        for (number, path) in self.segments()? {
            let segment = fs::read(path)?;
            let begin = from.0.saturating_sub(number * SEGMENT) as usize;
            let end = (self.mark.end.0 - number * SEGMENT).min(SEGMENT) as usize;
            wal.extend_from_slice(&segment[begin..end]);
        }
        Ok(Bytes::from(wal))
    }

    /// Recovery of the backup up to the mark by a stock server.
    pub fn recover(&self, root: &Path) -> Result<Recovered> {
        let (recovered, end) =
            self.recover_to(root, &format!("recovery_target_lsn = '{}'", self.mark.record))?;
        if end != self.mark.end.to_string() {
            return Err(format!("recovery ended at {end}").into());
        }
        Ok(recovered)
    }

    /// CPU time of the same server when it stops as soon as the backup is consistent: start, end,
    /// and nothing between.
    pub fn recover_nothing(&self, root: &Path) -> Result<Duration> {
        Ok(self.recover_to(root, "recovery_target = 'immediate'")?.0.cpu)
    }

    /// Gives "Minimum recovery ending location" too.
    fn recover_to(&self, root: &Path, target: &str) -> Result<(Recovered, String)> {
        let dir = root.join("standby");
        if !Command::new("cp").arg("-a").arg(&self.backup).arg(&dir).status()?.success() {
            return Err("cp of the base backup failed".into());
        }
        // The WAL lies where the server looks by itself: no copying in the time that is measured.
        for (_, segment) in self.segments()? {
            let target = dir.join("data/pg_wal").join(segment.file_name().unwrap_or_default());
            fs::copy(&segment, &target)?;
            give_to_servers(&target)?;
        }
        let settings =
            ["restore_command = 'false'", "shared_buffers = 512MB", "full_page_writes = on"];
        let mut standby = oracle::prepare(&dir, &self.primary, &settings.map(str::to_owned))?;
        standby.configure([target])?;
        let (cpu, begin) = (cpu_time(UsageWho::RUSAGE_CHILDREN)?, Instant::now());
        standby.spawn()?;
        standby.wait_exit(PATIENCE)?;
        let wall = begin.elapsed();
        let cpu = cpu_time(UsageWho::RUSAGE_CHILDREN)?.saturating_sub(cpu);
        let end = control_data(standby.data(), "Minimum recovery ending location")
            .map_err(|error| format!("{error}\n{}", standby.log_tail()))?;
        drop(standby);
        fs::remove_dir_all(&dir)?;
        Ok((Recovered { cpu, wall }, end))
    }
}

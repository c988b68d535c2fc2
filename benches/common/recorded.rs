//! WAL of a real primary, from a base backup to a checkpoint.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use pgstrata::base::lsn::Lsn;
use pgstrata::cli::oracle::{self, Mark};
use pgstrata::cli::pg::{PgCluster, StopMode};

use super::Result;

pub const SEGMENT: u64 = 16 << 20;

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
}

//! Bringing a cluster's data in: from a running primary, from a base backup, from a data
//! directory.
//!
//! Runs on the background executor:
//! 1. a primary sends a base backup, which is unpacked into `import/` in the timeline's directory;
//! 2. the data directory is read in key order into image layers at the LSN where its WAL begins;
//! 3. WAL that came with a backup or data directory is copied into the journal;
//! 4. the result is an index, which the serve executor publishes.
//!
//! A page of a base backup may be newer than the layer's LSN, or torn. The full-page images that
//! a base backup forces make every such page right before the backup's end; reads before that
//! are refused (`start_lsn`).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::{Either, select};
use serde::Deserialize;

use super::control::{ImportProgress, TimelineSource};
use super::index::{
    ClusterIdentity, INDEX_FILE, INDEX_VERSION, IndexLayer, TimelineIndex, WalSourceConfig,
};
use super::load::JOURNAL_DIR;
use super::primary;
use crate::base::{Key, Lsn};
use crate::io::{Io, IoCause, IoError, durable, foreign};
use crate::layers::{ImageWriter, LayerDesc, LayerError, LayerOwner};
use crate::limits::{
    BACKUP_MANIFEST_BYTES_MAX, IMPORT_CANCEL_POLL_MS, IMPORT_READ_BYTES, JOURNAL_SEGMENT_BYTES,
};
use crate::wal::journal::{Journal, JournalError};
use crate::wal::source::SourceError;
use crate::wal::source::base_backup::{BackupEvent, BaseBackup};
use crate::wal::source::connection::SlotName;
use crate::wal::source::conninfo::ConnInfo;
use crate::wal::source::data_dir::{DataDir, DataDirError, FileRef};
use crate::wal::source::staging::Staging;

/// Name of the staging directory within the timeline's.
const STAGING_DIR: &str = "import";

/// How far an import is; written by the background executor, read by the serve executor.
#[derive(Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// The numbers as they are now.
    pub fn read(&self) -> ImportProgress {
        let total = self.total.load(Ordering::Relaxed);
        ImportProgress {
            bytes_done: self.done.load(Ordering::Relaxed),
            bytes_total: (total > 0).then_some(total),
        }
    }

    /// Ends the import as soon as it looks: the node stops.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    fn check(&self) -> Result<(), ImportError> {
        if self.cancelled.load(Ordering::Relaxed) { Err(ImportError::Cancelled) } else { Ok(()) }
    }

    async fn until_cancelled<I: Io>(&self, io: &I) {
        while self.check().is_ok() {
            io.sleep(Duration::from_millis(IMPORT_CANCEL_POLL_MS)).await;
        }
    }

    fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }
}

/// What to import, and where to.
pub struct ImportJob {
    /// The timeline.
    pub owner: LayerOwner,
    /// Its directory, which exists.
    pub dir: PathBuf,
    /// Where the data comes from.
    pub source: TimelineSource,
    /// Image layers are cut at this size, in bytes.
    pub image_layer_bytes: u64,
    /// How far it is.
    pub progress: Arc<Progress>,
}

/// Why an import failed. Nothing of it is kept.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the texts of the variants say it")]
pub enum ImportError {
    #[error("{0}")]
    ConnInfo(#[from] crate::wal::source::conninfo::ConnInfoError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Io(#[from] IoError),
    #[error(
        "{0} has no usable backup_manifest, so the end of the backup is not known; take it with \
         pg_basebackup and without --no-manifest"
    )]
    NoManifest(PathBuf),
    #[error("the base backup has no backup_label")]
    NoLabel,
    #[error("the node was stopped before the import had ended; start it again")]
    Cancelled,
    #[error(
        "WAL segments of {0} bytes can be streamed from a primary, but not be imported from a \
         directory; only segments of 16 MiB can"
    )]
    SegmentSize(u64),
    #[error(
        "the WAL from {start} to {end} that makes the backup consistent is not in it; take it \
         with pg_basebackup -X stream or -X fetch, or name a --primary that still has it"
    )]
    WalMissing { start: Lsn, end: Lsn },
}

/// A data directory and what is known about it.
struct Scanned {
    data: DataDir,
    /// First LSN at which the data is consistent.
    readable_from: Lsn,
    source: Option<WalSourceConfig>,
}

/// Imports; returns the new timeline's index, which is not published yet. [`Progress::cancel`] ends
/// it early. What it leaves in the directory then has no index, so the next start removes it.
pub async fn run<I: Io>(io: I, job: ImportJob) -> Result<TimelineIndex, ImportError> {
    let staging = job.dir.join(STAGING_DIR);
    let scanned = match &job.source {
        TimelineSource::Primary { conninfo, slot } => {
            let source = source_config(conninfo, slot.as_deref())?;
            // This may wait for the primary, and writes nothing that must come to an end.
            let fetch = std::pin::pin!(from_primary(&io, &source, &staging, &job.progress));
            let cancelled = std::pin::pin!(job.progress.until_cancelled(&io));
            let fetched = match select(fetch, cancelled).await {
                Either::Left((fetched, _)) => fetched,
                Either::Right(_) => Err(ImportError::Cancelled),
            };
            if let Err(ImportError::Source(SourceError::Io(error))) = &fetched
                && error.cause == IoCause::NoSpace
            {
                io.make_room().await;
            }
            fetched?
        }
        TimelineSource::Backup { path, primary, slot } => {
            let data = DataDir::scan(Path::new(path))?;
            if data.backup_label.is_none() {
                return Err(ImportError::NoLabel);
            }
            let readable_from = manifest_end(Path::new(path))?;
            let source = optional_source(primary.as_deref(), slot.as_deref())?;
            Scanned { data, readable_from, source }
        }
        TimelineSource::Pgdata { path, primary, slot } => {
            let data = DataDir::scan(Path::new(path))?;
            let readable_from = data.start_lsn;
            let source = optional_source(primary.as_deref(), slot.as_deref())?;
            Scanned { data, readable_from, source }
        }
    };
    let layers = write_layers(&io, &job, &scanned.data).await?;
    copy_wal(&io, &job, &scanned).await?;
    foreign::remove_dir_all(&staging)?;
    let Scanned { data, readable_from, source } = scanned;
    let cluster = data.cluster;
    let data_checksums = cluster.data_checksum_version != 0;
    Ok(TimelineIndex {
        version: INDEX_VERSION,
        tenant: job.owner.shard,
        timeline: job.owner.timeline,
        cluster: ClusterIdentity {
            system_id: cluster.system_id,
            tli: data.timeline,
            wal_segment_bytes: cluster.wal_segment_bytes,
            data_checksums,
            hint_bits_logged: data_checksums || cluster.parameters.wal_log_hints,
        },
        source,
        ancestor: None,
        archived: false,
        start_lsn: readable_from,
        disk_consistent_lsn: data.start_lsn,
        gc_cutoff_lsn: Lsn::INVALID,
        layers,
    })
}

/// Makes an imported timeline exist.
pub async fn publish<I: Io>(io: &I, dir: &Path, index: &TimelineIndex) -> Result<(), IoError> {
    durable::write_file_atomic(io, &dir.join(INDEX_FILE), &index.encode()).await
}

fn source_config(conninfo: &str, slot: Option<&str>) -> Result<WalSourceConfig, ImportError> {
    conninfo.parse::<ConnInfo>()?;
    if let Some(name) = slot {
        name.parse::<SlotName>()?;
    }
    Ok(WalSourceConfig { conninfo: conninfo.to_owned(), slot: slot.map(str::to_owned) })
}

fn optional_source(
    primary: Option<&str>,
    slot: Option<&str>,
) -> Result<Option<WalSourceConfig>, ImportError> {
    primary.map(|conninfo| source_config(conninfo, slot)).transpose()
}

async fn from_primary<I: Io>(
    io: &I,
    source: &WalSourceConfig,
    staging: &Path,
    progress: &Progress,
) -> Result<Scanned, ImportError> {
    let mut connection = primary::open(&source.conninfo).await?;
    if let Some(name) = &source.slot {
        // The slot keeps WAL from here on, so it comes before the backup.
        connection.ensure_slot(&name.parse()?).await?;
    }
    let mut staged = Staging::create(staging)?;
    let mut backup = BaseBackup::start(&mut connection).await?;
    let total = backup.size_kib().saturating_mul(1024);
    let readable_from = loop {
        let event = backup.next().await?;
        staged.apply(&event)?;
        progress.set(staged.bytes_written(), total.max(staged.bytes_written()));
        if let BackupEvent::End(end) = event {
            break end.lsn;
        }
        io.yield_if_needed().await;
    };
    connection.close().await;
    let data = DataDir::scan(staging)?;
    if data.backup_label.is_none() {
        return Err(ImportError::NoLabel);
    }
    Ok(Scanned { data, readable_from, source: Some(source.clone()) })
}

/// End of the WAL that the backup needs, out of its `backup_manifest`.
fn manifest_end(dir: &Path) -> Result<Lsn, ImportError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Manifest {
        #[serde(rename = "WAL-Ranges")]
        wal_ranges: Vec<WalRange>,
    }
    #[derive(Deserialize)]
    struct WalRange {
        #[serde(rename = "End-LSN")]
        end: Lsn,
    }
    let missing = || ImportError::NoManifest(dir.to_owned());
    let path = dir.join("backup_manifest");
    let file = foreign::ForeignFile::open(&path).map_err(|_| missing())?;
    let len = file.len()?;
    if len > BACKUP_MANIFEST_BYTES_MAX {
        return Err(missing());
    }
    let whole = FileRef { path: path.as_path().into(), offset: 0, len };
    let bytes = whole.read(0, len as usize)?;
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|_| missing())?;
    manifest.wal_ranges.iter().map(|range| range.end).max().ok_or_else(missing)
}

/// Writes everything as image layers that together cover all keys.
async fn write_layers<I: Io>(
    io: &I,
    job: &ImportJob,
    data: &DataDir,
) -> Result<Vec<IndexLayer>, ImportError> {
    let (mut layers, mut open) = (Vec::new(), None);
    let written = fill_layers(io, job, data, &mut layers, &mut open).await;
    // After an error. The space of its file may be used again as soon as the directory is removed,
    // so no write may be under way then.
    if let Some(writer) = open {
        writer.abort().await;
    }
    written.map(|()| layers)
}

async fn fill_layers<I: Io>(
    io: &I,
    job: &ImportJob,
    data: &DataDir,
    layers: &mut Vec<IndexLayer>,
    open: &mut Option<ImageWriter<I>>,
) -> Result<(), ImportError> {
    let (dir, lsn, full) = (&job.dir, data.start_lsn, job.image_layer_bytes);
    let create = || ImageWriter::create(io, dir, job.owner, lsn, full / 8);
    let entry = |desc: LayerDesc| IndexLayer { name: desc.name.to_string(), len: desc.file_bytes };
    let mut range_start = Key::MIN;
    let mut values = data.values();
    while let Some(item) = values.next() {
        job.progress.check()?;
        let (key, value) = item?;
        let is_full =
            |writer: &mut ImageWriter<I>| writer.file_bytes() >= full && key > range_start;
        if let Some(writer) = open.take_if(is_full) {
            layers.push(entry(writer.finish(range_start..key).await?));
            range_start = key;
        }
        let writer = match open {
            Some(writer) => writer,
            None => open.insert(create().await?),
        };
        writer.add(key, &value).await?;
        job.progress.set(values.bytes_done(), data.total_bytes());
        io.yield_if_needed().await;
    }
    let writer = match open.take() {
        Some(writer) => writer,
        None => create().await?,
    };
    layers.push(entry(writer.finish(range_start..Key::MAX).await?));
    Ok(())
}

/// Copies the WAL that lies in a backup's or cluster's `pg_wal` into the journal, from the
/// segment on where it is needed.
async fn copy_wal<I: Io>(io: &I, job: &ImportJob, scanned: &Scanned) -> Result<(), ImportError> {
    let Scanned { data, readable_from, source } = scanned;
    let (start, end) = (data.start_lsn, *readable_from);
    let first = Lsn(start.0 - start.segment_offset(JOURNAL_SEGMENT_BYTES));
    let mut at = first;
    if !data.wal.is_empty() {
        let segment_bytes = data.cluster.wal_segment_bytes;
        if segment_bytes != JOURNAL_SEGMENT_BYTES {
            return Err(ImportError::SegmentSize(segment_bytes));
        }
        let journal_dir = job.dir.join(JOURNAL_DIR);
        let journal = Journal::open(io.clone(), &journal_dir, data.timeline, first).await?;
        let copied = copy_segments(io, job, &journal, data, first).await;
        let closed = journal.close().await;
        at = copied?;
        closed?;
    }
    if at < end && source.is_none() {
        return Err(ImportError::WalMissing { start, end });
    }
    Ok(())
}

/// Copies segments from `at` on, as long as there are such; returns where they end.
async fn copy_segments<I: Io>(
    io: &I,
    job: &ImportJob,
    journal: &Journal<I>,
    data: &DataDir,
    mut at: Lsn,
) -> Result<Lsn, ImportError> {
    loop {
        let name = journal.segment_name(at.segment_number(JOURNAL_SEGMENT_BYTES));
        let Some(file) = data.wal.get(&name) else { return Ok(at) };
        let segment_end = Lsn(at.0 + JOURNAL_SEGMENT_BYTES);
        at = copy_segment(io, job, journal, file, at).await?;
        if at < segment_end {
            // A segment that is cut off, or empty: nothing can follow it.
            return Ok(at);
        }
    }
}

async fn copy_segment<I: Io>(
    io: &I,
    job: &ImportJob,
    journal: &Journal<I>,
    file: &FileRef,
    start: Lsn,
) -> Result<Lsn, ImportError> {
    let mut done = 0;
    while done < file.len.min(JOURNAL_SEGMENT_BYTES) {
        job.progress.check()?;
        let bytes = file.read(done, IMPORT_READ_BYTES)?;
        if bytes.is_empty() {
            break;
        }
        let at = Lsn(start.0 + done);
        done += bytes.len() as u64;
        journal.append(at, bytes)?;
        journal.flush().await?;
        io.yield_if_needed().await;
    }
    Ok(Lsn(start.0 + done))
}

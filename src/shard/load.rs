//! Opening a timeline from its directory.
//!
//! 1. Read the index. A directory without one is an import that never ended.
//! 2. Remove what the index does not name: left over from a crash.
//! 3. Read the tracked checkpoint struct and the SLRU sizes as of `disk_consistent_lsn`.
//!    Commit times and leases are read as well.
//! 4. Find the journal's last whole, undamaged record. Everything that was ever acknowledged
//!    lies before its end, because acknowledging waits for the journal's sync. If it was synced
//!    further than that ([`super::journal_mark`]), it is damaged: what is left behind the damage
//!    is kept, and named.
//! 5. Sync the journal up to there: a killed process may have written it without a sync.
//! 6. Ingest it through the same path as live WAL.

use std::path::Path;
use std::rc::Rc;

use super::follow::TakeInError;
use super::history::HISTORY_FILES;
use super::index::{INDEX_FILE, IndexError, TimelineIndex};
use super::journal_mark::JOURNAL_MARK_FILE;
use super::layer_map::LayerMap;
use super::lsns::Advance;
use super::reader::ReadError;
use super::stored::StoredLayer;
use super::timeline::{Opened, Timeline, TimelineContext, wal_layout};
use crate::base::{Key, Kind, Lsn};
use crate::io::{Io, IoError, durable};
use crate::layers::{LayerName, LayerNameError, LayerOwner};
use crate::limits::{JOURNAL_END_LOOKS, JOURNAL_REPLAY_BYTES};
use crate::redo::RedoSettings;
use crate::wal::checkpoint::Checkpoint;
use crate::wal::journal::{Journal, JournalError};
use crate::wal::stream::{Event, StreamError, WalStream};

/// Name of the journal's directory within the timeline's.
pub const JOURNAL_DIR: &str = "wal";

/// Why a timeline cannot be opened.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the texts of the variants say it")]
pub enum LoadError {
    #[error(transparent)]
    Io(#[from] IoError),
    #[error("index: {0}")]
    Container(#[from] durable::DurableError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("the index names a layer that is none: {0}")]
    LayerName(#[from] LayerNameError),
    #[error("the index names layer {name} with {expected} bytes, but it has {found}")]
    LayerLength { name: String, expected: u64, found: u64 },
    #[error("the index names layer {0}, but there is no such file")]
    LayerMissing(String),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("no checkpoint is stored at {0}")]
    NoCheckpoint(Lsn),
    #[error("the checkpoint stored at {0} is cut off")]
    Checkpoint(Lsn),
    #[error("journal: {0}")]
    Journal(#[from] JournalError),
    #[error("journal: {0}")]
    Replay(#[from] TakeInError),
    #[error("journal: {0}")]
    Stream(#[from] StreamError),
    #[error("journal: it became shorter than {at} while it was read")]
    JournalShrank { at: Lsn },
    #[error("the index is that of {found}, not of {expected}")]
    Foreign { found: String, expected: String },
    #[error("its ancestor cannot be read: {reason}")]
    Ancestor { reason: String, kind: Kind },
}

impl LoadError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            LoadError::Io(error) => error.kind(),
            LoadError::Container(error) => error.kind(),
            LoadError::Read(error) => error.kind(),
            LoadError::Journal(error) => error.kind(),
            LoadError::Ancestor { kind, .. } => *kind,
            LoadError::Replay(TakeInError::Ingest(error)) => error.kind(),
            _ => Kind::Corrupt,
        }
    }
}

/// Reads the index in `dir` and makes sure that it is this timeline's.
pub async fn read_index<I: Io>(
    io: &I,
    dir: &Path,
    owner: LayerOwner,
) -> Result<TimelineIndex, LoadError> {
    let bytes = durable::read_file(io, &dir.join(INDEX_FILE)).await?;
    let index = TimelineIndex::decode(&bytes)?;
    if (index.tenant, index.timeline) != (owner.shard, owner.timeline) {
        return Err(LoadError::Foreign {
            found: format!("{}/{}", index.tenant, index.timeline),
            expected: format!("{}/{}", owner.shard, owner.timeline),
        });
    }
    Ok(index)
}

/// Opens the timeline in `dir`. `context` makes the timeline's surroundings once the index has
/// told what redo must know. `ancestor` is the one that the index names, open.
pub async fn load<I: Io>(
    context: impl FnOnce(RedoSettings) -> TimelineContext<I>,
    io: &I,
    dir: &Path,
    owner: LayerOwner,
    ancestor: Option<Rc<Timeline<I>>>,
) -> Result<Rc<Timeline<I>>, LoadError> {
    let index = read_index(io, dir, owner).await?;
    let context = context(RedoSettings { hint_bits_logged: index.cluster.hint_bits_logged });
    let layers = open_layers(&context, &index, owner).await?;
    let journal_dir = dir.join(JOURNAL_DIR);
    let (tli, end) = (index.cluster.tli, index.disk_consistent_lsn);
    let journal = Journal::open(io.clone(), &journal_dir, tli, end).await?;
    let timeline = Timeline::new(context, Opened { index, layers, journal, ancestor })?;
    if let Err(error) = load_state(&timeline).await {
        timeline.abandon().await;
        return Err(error);
    }
    timeline.load_history().await;
    timeline.start_writers();
    timeline.replaying.set(true);
    let replayed = replay(&timeline).await;
    timeline.replaying.set(false);
    if let Err(error) = replayed {
        // Nobody will have the timeline, so its tasks must end here.
        timeline.abandon().await;
        return Err(error);
    }
    let (at, start) = (timeline.lsns().last_record, timeline.start_lsn());
    if at < start && timeline.source.is_none() {
        let journal = journal_dir.display();
        let reason = format!(
            "the WAL in {journal} ends at {at}, but the base backup is consistent only from \
             {start} on, and there is no primary to get the rest from; import it again"
        );
        timeline.set_broken(Kind::Corrupt, reason);
    }
    Ok(timeline)
}

/// The layers that the index names; other files of the directory go.
async fn open_layers<I: Io>(
    context: &TimelineContext<I>,
    index: &TimelineIndex,
    owner: LayerOwner,
) -> Result<LayerMap<Rc<StoredLayer<I>>>, LoadError> {
    let known = |name: &str| {
        name == INDEX_FILE || name == JOURNAL_MARK_FILE || HISTORY_FILES.contains(&name)
    };
    let mut files: std::collections::BTreeMap<String, u64> = context
        .io
        .list(&context.dir)
        .await?
        .into_iter()
        .filter(|entry| !entry.is_dir && !known(&entry.name))
        .map(|entry| (entry.name, entry.len))
        .collect();
    let mut layers = LayerMap::weighing(|layer: &Rc<StoredLayer<I>>| layer.file_bytes());
    for layer in &index.layers {
        let Some(found) = files.remove(&layer.name) else {
            return Err(LoadError::LayerMissing(layer.name.clone()));
        };
        if found != layer.len {
            let (name, expected) = (layer.name.clone(), layer.len);
            return Err(LoadError::LayerLength { name, expected, found });
        }
        let name: LayerName = layer.name.parse()?;
        let stored = StoredLayer::new(context, name, layer.len, owner);
        layers.insert(stored.span(), stored);
    }
    remove_orphans(context, files.into_keys()).await?;
    Ok(layers)
}

async fn remove_orphans<I: Io>(
    context: &TimelineContext<I>,
    names: impl Iterator<Item = String>,
) -> Result<(), IoError> {
    for name in names {
        tracing::info!("removing {name}, left over from a crash");
        context.io.remove(&context.dir.join(Path::new(&name))).await?;
    }
    Ok(())
}

async fn load_state<I: Io>(timeline: &Timeline<I>) -> Result<(), LoadError> {
    let lsn = timeline.lsns().disk_consistent;
    let stored = timeline.metadata(Key::CHECKPOINT, lsn).await?;
    let (_, bytes) = stored.ok_or(LoadError::NoCheckpoint(lsn))?;
    let checkpoint = Checkpoint::parse(&bytes).ok_or(LoadError::Checkpoint(lsn))?;
    timeline.mutable.borrow_mut().checkpoint = Some(checkpoint);
    timeline.load_slru_sizes().await?;
    timeline.load_origins().await?;
    Ok(())
}

/// Steps 4 to 6 of the module's text.
async fn replay<I: Io>(timeline: &Rc<Timeline<I>>) -> Result<(), LoadError> {
    let from = timeline.lsns().disk_consistent;
    let mark = timeline.read_mark().await?;
    let mut end = journal_end(timeline, from).await?;
    for _ in 1..JOURNAL_END_LOOKS {
        if end < mark {
            end = end.max(journal_end(timeline, from).await?);
        }
    }
    if end < mark {
        timeline.journal_is_damaged(end, mark).await?;
    }
    timeline.name_damaged_journal().await?;
    timeline.journal.resume(from, end).await?;
    {
        let mut mutable = timeline.mutable.borrow_mut();
        mutable.lsns.advance(Advance::Received(end));
        mutable.lsns.advance(Advance::Journal(end));
        mutable.flushed_record = end;
    }
    let mut at = from;
    while at < end {
        let len = JOURNAL_REPLAY_BYTES.min(end.bytes_since(at) as usize);
        let bytes = timeline.journal.read(at, len).await?;
        if bytes.is_empty() {
            return Err(LoadError::JournalShrank { at });
        }
        at = Lsn(at.0 + bytes.len() as u64);
        let bytes = timeline.hold(bytes);
        timeline.ingest_bytes(bytes).await?;
    }
    tracing::info!(tenant = %timeline.tenant, timeline = %timeline.id, "replayed the journal from {from} to {end}");
    Ok(())
}

/// End of the last whole, undamaged record of the journal. What follows was never acknowledged:
/// a torn write or an unfinished record.
///
/// What is behind the end is forgotten, so a read that failed silently, of data that are whole on
/// the medium, must not make one: it is an end if a second look at it says so too.
async fn journal_end<I: Io>(timeline: &Timeline<I>, from: Lsn) -> Result<Lsn, LoadError> {
    let layout = wal_layout(&timeline.cluster);
    let mut end = scan_journal(timeline, WalStream::new(from, layout)?).await?;
    #[cfg(test)]
    if crate::wal::journal::planted::READS_BELIEVED.get() {
        return Ok(end.boundary());
    }
    loop {
        let mut stream = WalStream::new(end.boundary(), layout)?;
        if let Some(previous) = end.previous() {
            stream = stream.with_previous(previous);
        }
        let again = scan_journal(timeline, stream).await?;
        if again.boundary() <= end.boundary() {
            return Ok(end.boundary());
        }
        end = again;
    }
}

/// Reads on to where the journal does not go on; the stream stands there.
async fn scan_journal<I: Io>(
    timeline: &Timeline<I>,
    mut stream: WalStream,
) -> Result<WalStream, LoadError> {
    let mut at = stream.boundary();
    loop {
        let bytes = timeline.journal.read(at, JOURNAL_REPLAY_BYTES).await?;
        let mut input = &bytes[..];
        at = Lsn(at.0 + bytes.len() as u64);
        loop {
            match stream.next(&mut input) {
                Ok(Event::Record(_)) => {}
                Ok(Event::NeedInput) if !bytes.is_empty() => break,
                Ok(Event::NeedInput | Event::EndOfWal) => return Ok(stream),
                Err(error) => {
                    let (dir, end) = (timeline.context.dir.join(JOURNAL_DIR), stream.boundary());
                    tracing::warn!("the journal in {} ends at {end}: {error}", dir.display());
                    return Ok(stream);
                }
            }
        }
        timeline.context.io.yield_if_needed().await;
    }
}

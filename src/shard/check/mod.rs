//! Checking a node's files as they stand on disk: `pgstrata check`.
//!
//! For every timeline below `tenants/`:
//! 1. its index: checksum, owner, and what [`structure`] says of the layers that it names;
//! 2. every layer that the index names: it is there, has the length that the index says, belongs
//!    to the timeline, and every checksum and rule of its format holds ([`crate::layers::verify`]);
//! 3. its journal: [`journal`];
//! 4. what else is there: files that the index does not name do not exist as far as the node is
//!    concerned, and are reported as left over.
//!
//! The directory may be that of a running node, which adds and removes files all the time. Nothing
//! is locked and nothing is written. A layer is published before an index names it and removed
//! after the last index that named it, so: what looks damaged is looked at again under the index
//! as it is by then, and is damaged only if that index still names it.

mod journal;
pub mod report;
pub mod structure;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::report::{FileKind, FileReport, Summary};
use super::index::{INDEX_FILE, IndexLayer, TimelineIndex};
use super::load::JOURNAL_DIR;
use crate::base::{TenantShardId, TimelineId};
use crate::io::{ALIGNMENT, DirEntry, File, Io, IoCause, IoError, durable};
use crate::layers::{LayerName, LayerOwner, Verified, verify};
use crate::limits::{CHECK_LOOK_PAUSE_MS, CHECK_LOOKS, CHECK_ROUNDS_MAX};

/// Name of the directory of all tenants within a node's data directory.
const TENANTS_DIR: &str = "tenants";

/// An index, and how long its file is.
struct FoundIndex {
    index: TimelineIndex,
    bytes: u64,
}

/// What reading an index gave.
enum IndexState {
    Found(FoundIndex),
    /// There is none: the timeline is being imported, or was removed.
    Missing,
    /// It cannot be used, and why.
    Bad(String),
}

impl IndexState {
    /// True if the timeline still has this layer, or if nobody can tell.
    fn still_names(&self, layer: &IndexLayer) -> bool {
        match self {
            IndexState::Found(found) => found.index.layers.contains(layer),
            IndexState::Missing => false,
            IndexState::Bad(_) => true,
        }
    }
}

/// Checks everything below `data_dir/tenants`, calling `report` for each file.
///
/// # Errors
/// [`IoError`] if the directory of the tenants cannot be listed, so that nothing was checked.
pub async fn check<I: Io>(
    io: &I,
    data_dir: &Path,
    report: &mut dyn FnMut(&FileReport),
) -> Result<Summary, IoError> {
    let tenants = data_dir.join(TENANTS_DIR);
    let entries = io.list(&tenants).await?;
    let mut check = Check { io, report, summary: Summary::default() };
    for entry in entries {
        let path = tenants.join(&entry.name);
        match entry.name.parse::<TenantShardId>() {
            Ok(shard) if entry.is_dir => check.tenant(shard, &path).await,
            _ => check.unknown(path, &entry),
        }
    }
    Ok(check.summary)
}

struct Check<'a, I: Io> {
    io: &'a I,
    report: &'a mut dyn FnMut(&FileReport),
    summary: Summary,
}

impl<I: Io> Check<'_, I> {
    fn add(&mut self, report: FileReport) {
        self.summary.add(&report);
        (self.report)(&report);
    }

    fn unknown(&mut self, path: PathBuf, entry: &DirEntry) {
        let report = FileReport::new(path, FileKind::Unknown, entry.len);
        self.add(report.note("the node does not know it"));
    }

    /// The entries of a directory; one that has gone has none, one that cannot be read is damage.
    async fn list(&mut self, dir: &Path) -> Vec<DirEntry> {
        match self.io.list(dir).await {
            Ok(entries) => entries,
            Err(error) if error.cause == IoCause::NotFound => Vec::new(),
            Err(error) => {
                let report = FileReport::new(dir.to_owned(), FileKind::Unknown, 0);
                self.add(report.damage(format!("it cannot be read: {error}")));
                Vec::new()
            }
        }
    }

    async fn tenant(&mut self, shard: TenantShardId, dir: &Path) {
        self.summary.tenants += 1;
        for entry in self.list(dir).await {
            let path = dir.join(&entry.name);
            if entry.name == "timelines" && entry.is_dir {
                self.timelines(shard, &path).await;
            } else {
                self.other_file(path, &entry).await;
            }
        }
    }

    async fn timelines(&mut self, shard: TenantShardId, dir: &Path) {
        for entry in self.list(dir).await {
            let path = dir.join(&entry.name);
            match entry.name.parse::<TimelineId>() {
                Ok(timeline) if entry.is_dir => {
                    self.summary.timelines += 1;
                    self.timeline(LayerOwner { shard, timeline }, &path).await;
                }
                _ => self.unknown(path, &entry),
            }
        }
    }

    /// A file that is no layer and no segment: checked if it is in the container of small files.
    async fn other_file(&mut self, path: PathBuf, entry: &DirEntry) {
        if entry.name.ends_with(durable::TEMP_SUFFIX) {
            let report = FileReport::new(path, FileKind::Leftover, entry.len);
            return self.add(report.note("it is being written, or a crash left it over"));
        }
        if entry.is_dir || !self.is_container(&path).await {
            return self.unknown(path, entry);
        }
        let report = FileReport::new(path.clone(), FileKind::SmallFile, entry.len);
        match durable::read_file(self.io, &path).await {
            Ok(_) => self.add(report),
            Err(durable::DurableError::Io(error)) if error.cause == IoCause::NotFound => {}
            Err(error) => self.add(report.damage(error.to_string())),
        }
    }

    async fn is_container(&self, path: &Path) -> bool {
        let Ok(file) = self.io.open(path).await else { return false };
        let begin = file.read_at(0, ALIGNMENT).await;
        let closed = file.close().await;
        begin.is_ok_and(|bytes| durable::is_container(&bytes)) && closed.is_ok()
    }

    async fn read_index(&self, owner: LayerOwner, dir: &Path) -> IndexState {
        let bytes = match durable::read_file(self.io, &dir.join(INDEX_FILE)).await {
            Ok(bytes) => bytes,
            Err(durable::DurableError::Io(error)) if error.cause == IoCause::NotFound => {
                return IndexState::Missing;
            }
            Err(error) => return IndexState::Bad(error.to_string()),
        };
        match TimelineIndex::decode(&bytes) {
            Err(error) => IndexState::Bad(error.to_string()),
            Ok(index) if (index.tenant, index.timeline) != (owner.shard, owner.timeline) => {
                let (tenant, timeline) = (index.tenant, index.timeline);
                IndexState::Bad(format!("it is the index of timeline {timeline} of {tenant}"))
            }
            Ok(index) => {
                let bytes = durable::file_bytes(bytes.len());
                IndexState::Found(FoundIndex { index, bytes })
            }
        }
    }

    async fn timeline(&mut self, owner: LayerOwner, dir: &Path) {
        let path = dir.join(INDEX_FILE);
        match self.read_index(owner, dir).await {
            IndexState::Found(found) => self.indexed_timeline(owner, dir, found).await,
            IndexState::Missing => self.unfinished_timeline(dir).await,
            IndexState::Bad(text) => {
                let bytes =
                    self.list(dir).await.iter().find(|e| e.name == INDEX_FILE).map_or(0, |e| e.len);
                let text = format!(
                    "{text}; without it the timeline cannot be opened. Its layers and journal stay \
                     as they are: stop the node and put an index back that belongs to them, or \
                     delete the timeline and import it again. Until then no other timeline of the \
                     tenant is deleted or collected, because it may be an ancestor of this one"
                );
                self.add(FileReport::new(path, FileKind::Index, bytes).damage(text));
                self.layers_without_index(owner, dir).await;
            }
        }
    }

    /// There is no index: an import, or what is left of a timeline.
    async fn unfinished_timeline(&mut self, dir: &Path) {
        let entries = self.list(dir).await;
        if entries.is_empty() {
            return;
        }
        let bytes = entries.iter().map(|entry| entry.len).sum();
        let note = "it has no index: it is being imported, or its import never ended and the next \
                    start of the node removes it";
        self.add(FileReport::new(dir.to_owned(), FileKind::Leftover, bytes).note(note));
    }

    async fn indexed_timeline(&mut self, owner: LayerOwner, dir: &Path, first: FoundIndex) {
        let mut checked = BTreeSet::new();
        let mut latest = first;
        for _ in 0..CHECK_ROUNDS_MAX {
            let mut any = false;
            for layer in &latest.index.layers {
                if checked.insert(layer.name.clone()) {
                    any = true;
                    self.layer(owner, dir, layer).await;
                }
            }
            match self.read_index(owner, dir).await {
                IndexState::Found(found) if any => latest = found,
                _ => break,
            }
        }
        self.journal(owner, dir, &mut latest).await;
        let index = &latest.index;
        let mut report = FileReport::new(dir.join(INDEX_FILE), FileKind::Index, latest.bytes);
        report = report.content(format!(
            "{} layers, start_lsn {}, disk_consistent_lsn {}",
            index.layers.len(),
            index.start_lsn,
            index.disk_consistent_lsn
        ));
        for problem in structure::problems(index) {
            report = report.damage(problem);
        }
        self.add(report);
        self.unnamed_files(owner, dir, &checked).await;
    }

    /// One layer that an index names.
    async fn layer(&mut self, owner: LayerOwner, dir: &Path, layer: &IndexLayer) {
        let path = dir.join(&layer.name);
        let is_image = layer.name.parse().is_ok_and(|name: LayerName| name.is_image());
        let kind = if is_image { FileKind::ImageLayer } else { FileKind::DeltaLayer };
        let report = FileReport::new(path.clone(), kind, layer.len);
        for look in 1.. {
            let problem = match self.examine(owner, &path, Some(layer.len)).await {
                Ok(verified) => {
                    self.summary.values += verified.desc.value_count;
                    let content = format!("{} values", verified.desc.value_count);
                    return self.add(report.content(content));
                }
                Err(problem) => problem,
            };
            if !self.read_index(owner, dir).await.still_names(layer) {
                // It was compacted away, or the timeline is gone.
                return;
            }
            if look >= CHECK_LOOKS {
                return self.add(report.damage(problem));
            }
            self.io.sleep(Duration::from_millis(CHECK_LOOK_PAUSE_MS)).await;
        }
    }

    async fn examine(
        &self,
        owner: LayerOwner,
        path: &Path,
        len: Option<u64>,
    ) -> Result<Verified, String> {
        let verified = match verify(self.io, path).await {
            Ok(verified) => verified,
            Err(crate::layers::LayerError::Io(error)) if error.cause == IoCause::NotFound => {
                return Err("the index names it, but there is no such file".to_owned());
            }
            Err(error) => return Err(error.to_string()),
        };
        let (found, owner_found) = (verified.desc.file_bytes, verified.owner);
        if owner_found != owner {
            let LayerOwner { shard, timeline } = owner_found;
            return Err(format!("it is a layer of timeline {timeline} of tenant {shard}"));
        }
        match len {
            Some(len) if len != found => {
                Err(format!("it has {found} bytes, the index says {len}: it is another file"))
            }
            _ => Ok(verified),
        }
    }

    async fn journal(&mut self, owner: LayerOwner, dir: &Path, latest: &mut FoundIndex) {
        for look in 1.. {
            let found = journal::check(self.io, dir, &latest.index).await;
            let is_good = found.as_ref().is_ok_and(|journal| !journal.is_damaged);
            if is_good || look >= CHECK_LOOKS {
                match found {
                    Ok(journal) => {
                        self.summary.records += journal.records;
                        journal.files.into_iter().for_each(|file| self.add(file));
                    }
                    Err(error) => {
                        let path = dir.join(JOURNAL_DIR);
                        let report = FileReport::new(path, FileKind::JournalSegment, 0);
                        self.add(report.damage(format!("it cannot be read: {error}")));
                    }
                }
                return;
            }
            self.io.sleep(Duration::from_millis(CHECK_LOOK_PAUSE_MS)).await;
            match self.read_index(owner, dir).await {
                // A checkpoint may have removed segments while they were read.
                IndexState::Found(found) => *latest = found,
                IndexState::Missing => return,
                IndexState::Bad(_) => {}
            }
        }
    }

    /// Files of a timeline that no index named which was read so far.
    async fn unnamed_files(&mut self, owner: LayerOwner, dir: &Path, checked: &BTreeSet<String>) {
        let entries = self.list(dir).await;
        let named = match self.read_index(owner, dir).await {
            IndexState::Found(found) => found.index.layers,
            IndexState::Missing | IndexState::Bad(_) => Vec::new(),
        };
        let named: BTreeSet<String> = named.into_iter().map(|layer| layer.name).collect();
        for entry in entries {
            let path = dir.join(&entry.name);
            let known = entry.name == INDEX_FILE || entry.is_dir && entry.name == JOURNAL_DIR;
            if known || named.contains(&entry.name) {
                continue;
            }
            if entry.name.parse::<LayerName>().is_err() {
                self.other_file(path, &entry).await;
                continue;
            }
            let note = match checked.contains(&entry.name) {
                true => "no index names it any more; it is about to be removed",
                false => "no index names it: it is being published, or a crash left it over",
            };
            self.add(FileReport::new(path, FileKind::Leftover, entry.len).note(note));
        }
    }

    /// What can be said of the layers of a timeline whose index is damaged.
    async fn layers_without_index(&mut self, owner: LayerOwner, dir: &Path) {
        for entry in self.list(dir).await {
            let path = dir.join(&entry.name);
            let Ok(name) = entry.name.parse::<LayerName>() else { continue };
            let kind = match name.is_image() {
                true => FileKind::ImageLayer,
                false => FileKind::DeltaLayer,
            };
            let report = FileReport::new(path.clone(), kind, entry.len);
            match self.examine(owner, &path, None).await {
                Ok(verified) => {
                    self.summary.values += verified.desc.value_count;
                    let content = format!("{} values", verified.desc.value_count);
                    let note = "whether it belongs to the timeline only the index could say";
                    self.add(report.content(content).note(note));
                }
                Err(problem) => self.add(report.damage(problem)),
            }
        }
    }
}

//! Checking a node's files as they stand on disk: `pgstrata check`.
//!
//! For every timeline below `tenants/`:
//! 1. its index: checksum, owner, and what [`structure`] says of the layers that it names;
//! 2. every layer that the index names: it is there, has the length that the index says, belongs
//!    to the timeline, and every checksum and rule of its format holds ([`crate::layers::verify`]);
//! 3. its journal: [`journal`];
//! 4. its small files, each as what its name says ([`small`]);
//! 5. what else is there: files that the index does not name do not exist as far as the node is
//!    concerned, and are reported as left over.
//!
//! And for all timelines of a tenant together, how they hang on each other: [`family`].
//!
//! The directory may be that of a running node, which adds and removes files all the time. Nothing
//! is locked and nothing is written. A layer is published before an index names it and removed
//! after the last index that named it, so: what looks damaged is looked at again under the index
//! as it is by then, and is damaged only if that index still names it. Timelines come and go, too:
//! what seems wrong between two of them is looked at again in the same way.

mod family;
mod journal;
pub mod report;
mod small;
pub mod structure;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::family::{Family, Member, Problems};
use self::report::{FileKind, FileReport, Summary};
use self::small::Place;
use super::index::{DELETED_FILE, INDEX_FILE, IndexLayer, TimelineIndex};
use super::load::JOURNAL_DIR;
use crate::base::{Lsn, TenantShardId, TimelineId};
use crate::io::{DirEntry, Io, IoCause, IoError, durable};
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
    let (summary, strange) = Default::default();
    let mut check = Check { io, report, summary, strange };
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
    /// What is wrong between the timelines of the tenant that is being checked.
    strange: Problems,
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
                self.other_file(Place::Tenant, path, &entry).await;
            }
        }
    }

    async fn timelines(&mut self, shard: TenantShardId, dir: &Path) {
        self.strange = self.family_problems(shard, dir).await;
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

    /// What is wrong between the timelines of a tenant, look after look.
    async fn family_problems(&self, shard: TenantShardId, dir: &Path) -> Problems {
        let mut standing = family::problems(&self.read_family(shard, dir).await);
        for _ in 1..CHECK_LOOKS {
            if standing.is_empty() {
                break;
            }
            self.io.sleep(Duration::from_millis(CHECK_LOOK_PAUSE_MS)).await;
            let mut again = family::problems(&self.read_family(shard, dir).await);
            again.retain(|key, _| standing.contains_key(key));
            standing = again;
        }
        standing
    }

    /// The timelines of a tenant. What cannot be read is reported elsewhere.
    async fn read_family(&self, shard: TenantShardId, dir: &Path) -> Family {
        let mut family = BTreeMap::new();
        for entry in self.io.list(dir).await.unwrap_or_default() {
            let Ok(timeline) = entry.name.parse::<TimelineId>() else { continue };
            let path = dir.join(&entry.name);
            let member = match self.read_index(LayerOwner { shard, timeline }, &path).await {
                IndexState::Missing => continue,
                IndexState::Bad(_) => None,
                IndexState::Found(found) => {
                    Some(Member { index: found.index, journal_end: Lsn::INVALID })
                }
            };
            family.insert(timeline, member);
        }
        // A branch point may lie in what only the journal of the ancestor has. That is read after
        // all indexes: at a branch point that one of them names, it is there by then.
        let points: Vec<_> =
            family.values().flatten().filter_map(|member| member.index.ancestor).collect();
        for point in points {
            if let Some(Some(ancestor)) = family.get_mut(&point.timeline)
                && ancestor.index.disk_consistent_lsn.max(ancestor.journal_end) < point.lsn
            {
                let path = dir.join(point.timeline.to_string());
                let end = journal::end(self.io, &path, &ancestor.index).await;
                // A journal that cannot be read is named as such.
                ancestor.journal_end = end.unwrap_or(Lsn::MAX);
            }
        }
        family
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
            IndexState::Missing => self.unfinished_timeline(owner, dir).await,
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
    async fn unfinished_timeline(&mut self, owner: LayerOwner, dir: &Path) {
        let entries = self.list(dir).await;
        let deleted = entries.iter().find(|entry| entry.name == DELETED_FILE);
        if let Some(deleted) = deleted {
            self.deletion(owner, dir, deleted).await;
        }
        if entries.is_empty() || deleted.is_some() {
            return;
        }
        let bytes = entries.iter().map(|entry| entry.len).sum();
        let note = "it has no index: it is being imported, or its import never ended and the next \
                    start of the node removes it";
        self.add(FileReport::new(dir.to_owned(), FileKind::Leftover, bytes).note(note));
    }

    /// The timeline was deleted: its index has another name, or a mark stands beside it.
    async fn deletion(&mut self, owner: LayerOwner, dir: &Path, mark: &DirEntry) {
        self.other_file(Place::Timeline(owner.timeline), dir.join(DELETED_FILE), mark).await;
        let note =
            "it was deleted; what is left of it goes now, or with the next start of the node";
        self.add(FileReport::new(dir.to_owned(), FileKind::Leftover, 0).note(note));
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
        let of_family =
            self.strange.iter().filter(|((timeline, _), _)| *timeline == owner.timeline);
        let of_family: Vec<String> = of_family.map(|(_, text)| text.clone()).collect();
        for problem in structure::problems(index).into_iter().chain(of_family) {
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
                self.other_file(Place::Timeline(owner.timeline), path, &entry).await;
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

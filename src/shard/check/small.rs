//! Small files: the container of each, and what stands in it, read as the node reads it.
//!
//! What a file is, its name tells, not its content: a file of settings whose first bytes are
//! rubbish is a damaged file of settings. Files of other names are checked if they are in the
//! container, and unknown otherwise.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Check;
use super::report::{FileKind, FileReport};
use crate::base::TimelineId;
use crate::io::{ALIGNMENT, DirEntry, File, Io, IoCause, durable};
use crate::limits::{CHECK_LOOK_PAUSE_MS, CHECK_LOOKS};
use crate::shard::index::{DELETED_FILE, TimelineIndex};
use crate::shard::journal_mark::{self, JOURNAL_MARK_FILE};
use crate::shard::leases::{LEASES_FILE, Leases};
use crate::shard::tenant_config::{CONFIG_FILE, TenantConfig};
use crate::shard::timestamps::{COMMIT_TIMES_FILE, CommitTimes};

/// Whose directory a file stands in.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    Tenant,
    Timeline(TimelineId),
}

/// A small file that the node knows.
#[derive(Clone, Copy, Debug)]
enum Known {
    Config,
    /// The mark of a tenant that is being removed: it is there, and has nothing to say.
    DeletedTenant,
    /// The index of a timeline that is being removed, or nothing.
    DeletedTimeline,
    CommitTimes,
    Leases,
    JournalMark(TimelineId),
}

impl Known {
    fn at(place: Place, name: &str) -> Option<Known> {
        match (place, name) {
            (Place::Tenant, CONFIG_FILE) => Some(Known::Config),
            (Place::Tenant, DELETED_FILE) => Some(Known::DeletedTenant),
            (Place::Timeline(_), DELETED_FILE) => Some(Known::DeletedTimeline),
            (Place::Timeline(_), COMMIT_TIMES_FILE) => Some(Known::CommitTimes),
            (Place::Timeline(_), LEASES_FILE) => Some(Known::Leases),
            (Place::Timeline(id), JOURNAL_MARK_FILE) => Some(Known::JournalMark(id)),
            _ => None,
        }
    }

    /// What the file says, in words, or what is wrong with it.
    fn read(self, body: &[u8]) -> Result<String, String> {
        match self {
            Known::Config => match TenantConfig::decode(body) {
                Ok(_) => Ok("settings of the tenant".to_owned()),
                Err(error) => Err(error.to_string()),
            },
            Known::DeletedTenant if body.is_empty() => Ok("the tenant is being removed".to_owned()),
            Known::DeletedTenant => Err("a mark of deletion has no content".to_owned()),
            Known::DeletedTimeline if body.is_empty() => {
                Ok("the timeline is being removed".to_owned())
            }
            Known::DeletedTimeline => match TimelineIndex::decode(body) {
                Ok(_) => Ok("the index of a timeline that is being removed".to_owned()),
                Err(error) => Err(error.to_string()),
            },
            Known::CommitTimes => match CommitTimes::decode(body) {
                Ok(_) => Ok("times of commits".to_owned()),
                Err(error) => Err(error.to_string()),
            },
            Known::Leases => match Leases::decode(body) {
                Ok(_) => Ok("leases".to_owned()),
                Err(error) => Err(error.to_string()),
            },
            Known::JournalMark(timeline) => match journal_mark::decode(timeline, body) {
                Ok(lsn) => Ok(format!("the journal was synced up to {lsn}")),
                Err(error) => Err(error.to_string()),
            },
        }
    }
}

impl<I: Io> Check<'_, I> {
    /// A file that is no index, no layer and no segment.
    pub(super) async fn other_file(&mut self, place: Place, path: PathBuf, entry: &DirEntry) {
        if entry.name.ends_with(durable::TEMP_SUFFIX) {
            let report = FileReport::new(path, FileKind::Leftover, entry.len);
            return self.add(report.note("it is being written, or a crash left it over"));
        }
        let known = Known::at(place, &entry.name);
        let report = FileReport::new(path.clone(), FileKind::SmallFile, entry.len);
        if known.is_some() && entry.is_dir {
            return self.add(report.damage("it is a directory, where a file should be"));
        }
        if known.is_none() && (entry.is_dir || !self.is_container(&path).await) {
            return self.unknown(path, entry);
        }
        for look in 1.. {
            let problem = match self.read_small(known, &path).await {
                Ok(Some(content)) => return self.add(report.content(content)),
                // It was removed meanwhile.
                Ok(None) => return,
                Err(problem) => problem,
            };
            if look >= CHECK_LOOKS {
                return self.add(report.damage(problem));
            }
            self.io.sleep(Duration::from_millis(CHECK_LOOK_PAUSE_MS)).await;
        }
    }

    /// What is in a small file, in words; `None` if there is no file.
    async fn read_small(
        &self,
        known: Option<Known>,
        path: &Path,
    ) -> Result<Option<String>, String> {
        match durable::read_file(self.io, path).await {
            Ok(body) => known.map_or(Ok(String::new()), |known| known.read(&body)).map(Some),
            Err(durable::DurableError::Io(error)) if error.cause == IoCause::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn is_container(&self, path: &Path) -> bool {
        let Ok(file) = self.io.open(path).await else { return false };
        let begin = file.read_at(0, ALIGNMENT).await;
        let closed = file.close().await;
        begin.is_ok_and(|bytes| durable::is_container(&bytes)) && closed.is_ok()
    }
}

//! What must be true of a disk after a power loss.

use std::cell::RefCell;
use std::rc::Rc;

use super::facts::{Fact, Facts, Known, Presence};
use crate::base::Lsn;
use crate::io::Io;
use crate::shard::control::{CoreControl, TimelineInfo, TimelineState};
use crate::shard::reader::{PageBackend, ReadError, RequestLsn, TimelineReader};
use crate::shard::timeline::Timeline;
use crate::sim::SimIo;
use crate::sim::engine::{
    Outside, SimShard, TENANT, TIMELINE, read_page, start_shard, timeline_dir,
};
use crate::sim::primary::Primary;

/// Records that are new to the node when it catches up.
const NEW_RECORDS: usize = 6;

struct Check {
    io: SimIo,
    facts: Facts,
    outside: Rc<Outside>,
    shard: SimShard,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Starts a node and looks at everything.
pub(super) async fn run(
    io: SimIo,
    facts: Facts,
    primary: Rc<RefCell<Primary>>,
) -> Result<(), String> {
    let end = {
        let primary = primary.borrow();
        let ends = primary.record_ends();
        let known = ends.partition_point(|end| *end <= facts.end_of_wal);
        ends.get(known + NEW_RECORDS).or(ends.last()).copied().unwrap_or(facts.end_of_wal)
    };
    let outside = Outside::of(primary);
    outside.quiet.set(true);
    // One in four compacts while it is looked at.
    let threshold = if io.random_u64().is_multiple_of(4) { 2 } else { usize::MAX };
    outside.compaction.set(Some((threshold, 50)));
    outside.layer_bytes.set(Some((1 << 20, 16 * 1024)));
    // At first there is nothing new, so that what is missing shows.
    outside.visible_end.set(Lsn::INVALID);
    let shard = start_shard(&io, &outside).await?;
    let check = Check { io, facts, outside, shard };
    let there = check.settle()?;
    check.no_litter(there.len()).await?;
    for known in &there {
        check.read_timeline(known).await?;
    }
    check.catch_up(&there, end).await?;
    check.shard.shutdown().await;
    Ok(())
}

impl Check {
    /// What was acknowledged is true, what was asked for may be. Returns what there is.
    fn settle(&self) -> Result<Vec<Known>, String> {
        let infos = self.shard.timelines();
        let mut there = Vec::new();
        for known in &self.facts.timelines {
            let found = infos.iter().find(|info| info.timeline == known.id);
            match (known.presence, found) {
                (Presence::There, None) => return Err(format!("{} is lost", known.id)),
                (Presence::Gone, Some(_)) => return Err(format!("{} is there again", known.id)),
                (_, Some(info)) => there.push(self.settle_one(known, info)?),
                (_, None) => {}
            }
        }
        if there.len() != infos.len() {
            return Err("there are timelines that nobody made".to_owned());
        }
        Ok(there)
    }

    fn settle_one(&self, known: &Known, info: &TimelineInfo) -> Result<Known, String> {
        if info.state == TimelineState::Broken {
            return Err(format!("{} is broken: {:?}", known.id, info.error));
        }
        let (archived, detached) = (info.state == TimelineState::Archived, info.ancestor.is_none());
        if !known.archived.agrees(archived) || !known.detached.agrees(detached) {
            return Err(format!("{known:?} is archived: {archived}, detached: {detached}"));
        }
        let fact = |yes| if yes { Fact::Yes } else { Fact::No };
        Ok(Known { archived: fact(archived), detached: fact(detached), ..known.clone() })
    }

    /// Nothing is left of what was deleted or not made.
    async fn no_litter(&self, timelines: usize) -> Result<(), String> {
        let dir = timeline_dir();
        let entries = self.io.list(dir.parent().unwrap_or(&dir)).await.map_err(text)?;
        match entries.len() {
            found if found == timelines => Ok(()),
            found => Err(format!("{found} directories for {timelines} timelines")),
        }
    }

    async fn open(&self, known: &Known) -> Result<Rc<Timeline<SimIo>>, String> {
        let timeline = self.shard.timeline(TENANT, known.id).await;
        timeline.map_err(|error| format!("{} does not open: {error}", known.id))
    }

    /// What one timeline has before it gets anything new.
    async fn read_timeline(&self, known: &Known) -> Result<(), String> {
        if known.archived == Fact::Yes {
            let refused = matches!(
                self.shard.timeline(TENANT, known.id).await,
                Err(ReadError::Archived { .. })
            );
            return if refused { Ok(()) } else { Err(format!("{} is archived, read", known.id)) };
        }
        let timeline = self.open(known).await?;
        if let Some(reason) = timeline.broken() {
            return Err(format!("{} is broken: {reason}", known.id));
        }
        let last = timeline.lsns().last_record;
        let promised = known.source.as_ref().and_then(|source| self.facts.flushed.get(source));
        let promised = promised.copied().unwrap_or(Lsn::INVALID).max(known.branch_lsn);
        if last < promised || last > self.facts.end_of_wal.max(known.branch_lsn) {
            return Err(format!(
                "{} ends at {last}; WAL up to {promised} was acknowledged, the primary was at {}",
                known.id, self.facts.end_of_wal
            ));
        }
        if known.source.is_none() && last != known.branch_lsn {
            return Err(format!("{} ends at {last}, not at {}", known.id, known.branch_lsn));
        }
        let first = match known.id {
            TIMELINE => self.check_history(&timeline)?,
            _ => known.branch_lsn,
        };
        let between = Lsn(first.0 + self.io.random_u64() % (last.0.saturating_sub(first.0) + 1));
        for lsn in [between, last] {
            self.read_all(known, &timeline, lsn).await?;
        }
        Ok(())
    }

    /// Cut-off and leases of the root; returns from where on it can be read.
    fn check_history(&self, root: &Timeline<SimIo>) -> Result<Lsn, String> {
        let (cutoff, (least, most)) = (root.gc_cutoff(), self.facts.cutoff);
        if cutoff < least || cutoff > most {
            return Err(format!("the cut-off is {cutoff}, not between {least} and {most}"));
        }
        let leases = root.leases();
        for (lsn, until) in &self.facts.leases {
            if !leases.iter().any(|lease| lease.lsn == *lsn && lease.valid_until >= *until) {
                return Err(format!("the lease on {lsn} is lost"));
            }
        }
        Ok(cutoff)
    }

    /// Every page of every fork at one LSN, and one block behind its end.
    async fn read_all(
        &self,
        known: &Known,
        timeline: &Timeline<SimIo>,
        lsn: Lsn,
    ) -> Result<(), String> {
        let request = RequestLsn { request: lsn, not_modified_since: timeline.start_lsn() };
        let forks = self.outside.primary.borrow().forks();
        for rel in forks {
            let expected = self.outside.primary.borrow().size_at(rel, lsn);
            let fail = |what: String| format!("{} of {} at {lsn}: {what}", rel, known.id);
            let size = timeline.rel_size(rel, request).await.map_err(|e| fail(text(e)))?;
            if size != expected {
                return Err(fail(format!("{size} blocks, not {expected}")));
            }
            for block in 0..=expected {
                let page = read_page(timeline, rel, block, request).await?;
                let page = page.map_err(|error| fail(format!("block {block}: {error}")))?;
                if page != self.outside.primary.borrow().page_at(rel, block, lsn) {
                    return Err(fail(format!("block {block} is wrong")));
                }
            }
        }
        Ok(())
    }

    /// Every timeline with a source gets what is new, and writes it to layers; leases are read.
    async fn catch_up(&self, there: &[Known], end: Lsn) -> Result<(), String> {
        self.outside.visible_end.set(end);
        let follows = |known: &&Known| known.source.is_some() && known.archived != Fact::Yes;
        for known in there.iter().filter(follows) {
            let timeline = self.open(known).await?;
            let come = timeline.wait_for_lsn(end).await;
            come.map_err(|error| format!("{}: no progress: {error}", known.id))?;
            self.shard.checkpoint(TENANT, known.id).await.map_err(text)?;
            self.read_all(known, &timeline, end).await?;
            for (lsn, _) in self.facts.leases.iter().filter(|_| known.id == TIMELINE) {
                self.read_all(known, &timeline, *lsn).await?;
            }
        }
        Ok(())
    }
}

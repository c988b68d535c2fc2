//! The script: rounds of ingest, checkpoints, compaction, branches, a lease, a collection,
//! archiving, detaching and deleting, each ended by a restart.

use std::rc::Rc;
use std::time::Duration;

use super::facts::{Fact, Presence, Story};
use crate::base::{Lsn, TimelineId};
use crate::io::Io;
use crate::shard::control::{Change, CoreControl, CreateBranch};
use crate::shard::gc::GcRequest;
use crate::shard::history::{HistoryReply, HistoryRequest};
use crate::shard::index::WalSourceConfig;
use crate::shard::reader::PageBackend;
use crate::shard::timeline::Timeline;
use crate::sim::SimIo;
use crate::sim::engine::{SimShard, TENANT, TIMELINE, start};

/// Rounds of the script.
pub(super) const ROUNDS: u8 = 7;
/// Records between two checkpoints.
const RECORDS: u32 = 25;
/// Length of a lease, in seconds: longer than the script and the checks take.
const LEASE_S: u64 = 3600;

struct Script {
    io: SimIo,
    story: Rc<Story>,
    shard: SimShard,
    root: Rc<Timeline<SimIo>>,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// The timeline of a round.
fn id(kind: u8, round: u8) -> TimelineId {
    TimelineId([kind, round, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
}

/// Kinds of timelines: without a source, with one, and a branch of a branch.
const QUIET: u8 = 0xa;
const FOLLOWER: u8 = 0xb;
const GRANDCHILD: u8 = 0xc;

/// Runs it.
pub(super) async fn run(io: SimIo, story: Rc<Story>) -> Result<(), String> {
    for round in 0..ROUNDS {
        let (shard, root) = start(&io, &story.outside).await?;
        let script = Script { io: io.clone(), story: story.clone(), shard, root };
        script.round(round).await?;
        script.shard.shutdown().await;
    }
    Ok(())
}

impl Script {
    async fn round(&self, round: u8) -> Result<(), String> {
        for _ in 0..3 {
            self.feed(TIMELINE).await?;
            self.shard.checkpoint(TENANT, TIMELINE).await.map_err(text)?;
        }
        self.compacted().await;
        self.feed(TIMELINE).await?;
        self.branch(id(QUIET, round), TIMELINE, false).await?;
        self.branch(id(FOLLOWER, round), TIMELINE, true).await?;
        self.branch(id(GRANDCHILD, round), id(QUIET, round), false).await?;
        self.feed(id(FOLLOWER, round)).await?;
        self.shard.checkpoint(TENANT, id(FOLLOWER, round)).await.map_err(text)?;
        self.lease().await?;
        self.collect().await?;
        self.delete(id(GRANDCHILD, round)).await?;
        self.detach(id(QUIET, round)).await?;
        self.feed(TIMELINE).await?;
        if let Some(before) = round.checked_sub(1) {
            self.archive(id(FOLLOWER, before)).await?;
            self.delete(id(QUIET, before)).await?;
        }
        if let Some(before) = round.checked_sub(2) {
            self.delete(id(FOLLOWER, before)).await?;
        }
        Ok(())
    }

    /// The primary does something, and the timeline gets it.
    async fn feed(&self, timeline: TimelineId) -> Result<(), String> {
        for _ in 0..RECORDS {
            self.story.outside.primary.borrow_mut().step();
        }
        let end = self.last_record();
        let timeline = self.shard.timeline(TENANT, timeline).await.map_err(text)?;
        timeline.wait_for_lsn(end).await.map_err(text)
    }

    fn last_record(&self) -> Lsn {
        let primary = self.story.outside.primary.borrow();
        primary.record_ends().last().copied().unwrap_or(Lsn::INVALID)
    }

    /// Waits until few layers are left, but not for ever.
    async fn compacted(&self) {
        for _ in 0..100 {
            if self.root.l0_count() < 2 {
                break;
            }
            self.io.sleep(Duration::from_millis(2)).await;
        }
        // Images come after merges.
        self.io.sleep(Duration::from_millis(10)).await;
    }

    async fn branch(
        &self,
        id: TimelineId,
        ancestor: TimelineId,
        follows: bool,
    ) -> Result<(), String> {
        let older = self.shard.timeline(TENANT, ancestor).await.map_err(text)?;
        // A branch reads below its own records from the root, which may have collected them.
        let start = older.start_lsn().max(older.gc_cutoff()).max(self.root.gc_cutoff());
        let last = older.lsns().last_record;
        let lsn = {
            let primary = self.story.outside.primary.borrow();
            let ends = primary.record_ends();
            let from = ends.partition_point(|end| *end <= start);
            let to = ends.partition_point(|end| *end <= last);
            // Somewhere in the last quarter.
            let back = self.io.random_u64() as usize % (1 + (to - from) / 4);
            ends.get((to - 1).saturating_sub(back)).copied().unwrap_or(last).max(start)
        };
        let conninfo = format!("host=primary user={id}");
        let source = follows.then_some(WalSourceConfig { conninfo, slot: None });
        self.story.coming(id, lsn, source.as_ref().map(|source| source.conninfo.clone()));
        let request =
            CreateBranch { tenant: TENANT, timeline: id, ancestor, lsn: Some(lsn), source };
        self.shard.change(Change::Branch(request)).await.map_err(text)?;
        self.story.change(id, |known| known.presence = Presence::There);
        Ok(())
    }

    async fn lease(&self) -> Result<(), String> {
        let lsn = Lsn((self.root.gc_cutoff().0 + self.root.lsns().last_record.0) / 2);
        let request = HistoryRequest::Lease(lsn, Some(LEASE_S));
        match self.shard.history(TENANT, TIMELINE, request).await.map_err(text)? {
            HistoryReply::Lease(lease) => self.story.leased(lease.lsn, lease.valid_until),
            other => return Err(format!("a lease was answered by {other:?}")),
        }
        Ok(())
    }

    /// Keeps the later third of what there is.
    async fn collect(&self) -> Result<(), String> {
        let (cutoff, last) = (self.root.gc_cutoff(), self.root.lsns().last_record);
        let target = Lsn(last.0 - last.bytes_since(cutoff) / 3);
        self.story.collecting(target);
        let horizon = Some(last.bytes_since(target));
        let request = GcRequest { gc_horizon_bytes: horizon, pitr_interval_s: Some(0) };
        match self.shard.history(TENANT, TIMELINE, HistoryRequest::Gc(request)).await {
            Ok(HistoryReply::Gc(report)) => self.story.collected(report.gc_cutoff_lsn),
            other => return Err(format!("a collection was answered by {other:?}")),
        }
        Ok(())
    }

    async fn delete(&self, id: TimelineId) -> Result<(), String> {
        self.story.change(id, |known| known.presence = Presence::Going);
        self.shard.change(Change::DeleteTimeline(TENANT, id)).await.map_err(text)?;
        self.story.change(id, |known| known.presence = Presence::Gone);
        Ok(())
    }

    async fn archive(&self, id: TimelineId) -> Result<(), String> {
        self.story.change(id, |known| known.archived = Fact::Open);
        self.shard.change(Change::Archive(TENANT, id, true)).await.map_err(text)?;
        self.story.change(id, |known| known.archived = Fact::Yes);
        Ok(())
    }

    async fn detach(&self, id: TimelineId) -> Result<(), String> {
        self.story.change(id, |known| known.detached = Fact::Open);
        self.shard.change(Change::DetachAncestor(TENANT, id)).await.map_err(text)?;
        loop {
            self.io.sleep(Duration::from_micros(200)).await;
            let infos = self.shard.timelines();
            let info = infos.iter().find(|info| info.timeline == id);
            let info = info.ok_or("a timeline is gone while it is detached")?;
            if let Some(error) = info.detach.as_ref().and_then(|state| state.error.clone()) {
                return Err(format!("detach: {error}"));
            }
            if info.ancestor.is_none() {
                break;
            }
        }
        self.story.change(id, |known| known.detached = Fact::Yes);
        Ok(())
    }
}

//! The engine on a disk with faults.
//!
//! Two kinds of runs ([`FaultClass`]):
//!
//! - *Passing* faults: operations fail, reads come back wrong, the disk fills up; what is on the
//!   medium stays. A read gives the right page or an error. What was acknowledged is there after
//!   every restart, also with faults. When the faults end, everything goes on by itself or, where
//!   the timeline shows as broken, with the next start, and every page is right.
//! - *Damaging* faults: bits turn for good, and writes land in a wrong place and report success.
//!   What was acknowledged may have been destroyed then. A read gives the right page or an error,
//!   for ever; a page that is damaged is named to the operator; a timeline that does not open says
//!   why.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use super::engine::{
    Compared, Outside, START, SimShard, TENANT, TIMELINE, check_page, collect_sometimes,
    compare_page, import, start, start_shard,
};
use super::{Outcome, SimIo, SimOptions, SimWorld};
use crate::io::Io;
use crate::shard::control::{CoreControl, TimelineState};
use crate::shard::reader::{PageBackend, ReadError};
use crate::shard::timeline::Timeline;

/// Reads at the end of a run.
const FINAL_READS: u64 = 120;
/// Reads when the faults end within a life.
const RECOVERED_READS: u64 = 20;
/// Longer than any operation that is under way, and than every pause before a new attempt.
const SETTLE: Duration = Duration::from_secs(3);

/// What a disk does beside losing its power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultClass {
    /// See the module's text.
    Passing,
    /// See the module's text.
    Damaging,
}

impl FaultClass {
    /// The class of a seed: three in eight have faults, one of them damaging.
    pub fn of(seed: u64) -> Option<FaultClass> {
        match seed % 8 {
            1 | 5 => Some(FaultClass::Passing),
            3 => Some(FaultClass::Damaging),
            _ => None,
        }
    }

    fn options(self, seed: u64) -> SimOptions {
        match self {
            FaultClass::Passing => SimOptions::passing_faults(seed),
            FaultClass::Damaging => SimOptions::damaging_faults(seed),
        }
    }
}

/// What happened in runs on this thread, so that a test can see that they are worth something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Pages that were right.
    pub right: u64,
    /// Reads that were refused because of a fault.
    pub refused: u64,
    /// Times that a node could not be started, or a timeline not opened.
    pub unopened: u64,
    /// Timelines that broke.
    pub broken: u64,
    /// Times that a node went on by itself when the faults ended.
    pub recovered: u64,
    /// Pages that were right, and refused, when a run with damage had ended.
    pub at_the_end: (u64, u64),
    /// Runs with damage whose timeline did not open at the end.
    pub lost: u64,
}

thread_local! {
    static SEEN: Cell<Seen> = const {
        Cell::new(Seen {
            right: 0, refused: 0, unopened: 0, broken: 0, recovered: 0, at_the_end: (0, 0), lost: 0,
        })
    };
}

/// What happened on this thread since the last call.
pub fn take_seen() -> Seen {
    SEEN.take()
}

fn note(change: impl FnOnce(&mut Seen)) {
    let mut seen = SEEN.get();
    change(&mut seen);
    SEEN.set(seen);
}

struct Node {
    io: SimIo,
    class: FaultClass,
    outside: Rc<Outside>,
    shard: SimShard,
    timeline: Rc<Timeline<SimIo>>,
}

impl Node {
    /// A node whose timeline is open; `None` if a fault was in the way.
    async fn begin(
        io: &SimIo,
        class: FaultClass,
        outside: &Rc<Outside>,
    ) -> Result<Option<Node>, String> {
        let Ok(shard) = start_shard(io, outside).await else { return Ok(None) };
        let Ok(timeline) = shard.timeline(TENANT, TIMELINE).await else {
            return Ok(None);
        };
        let (found, promised) = (timeline.lsns().last_record, outside.acknowledged.get());
        if class == FaultClass::Passing && found < promised {
            return Err(format!(
                "WAL up to {promised} was acknowledged, after the restart it ends at {found}"
            ));
        }
        let (io, outside) = (io.clone(), outside.clone());
        Ok(Some(Node { io, class, outside, shard, timeline }))
    }

    /// One read: it is right or an error.
    async fn read(&self) -> Result<Option<ReadError>, String> {
        match compare_page(&self.timeline, &self.outside, &self.io).await? {
            Compared::Nothing => Ok(None),
            Compared::Right => {
                note(|seen| seen.right += 1);
                Ok(None)
            }
            Compared::Refused(error) => {
                note(|seen| seen.refused += 1);
                self.is_named(&error)?;
                Ok(Some(error))
            }
        }
    }

    /// What reads find damaged is named to the operator.
    fn is_named(&self, error: &ReadError) -> Result<(), String> {
        let infos = self.shard.timelines();
        let info = infos.iter().find(|info| info.timeline == TIMELINE);
        let damaged = matches!(error, ReadError::Damaged { .. });
        match info {
            Some(info) if damaged && info.damaged.is_empty() => {
                Err(format!("this is not named as damaged: {error}"))
            }
            _ => Ok(()),
        }
    }

    /// A timeline that broke acknowledges nothing that is not synced in its journal.
    async fn is_silent(&self) -> Result<(), String> {
        self.io.sleep(Duration::from_millis(20)).await;
        let (told, synced) = (self.outside.acknowledged.get(), self.timeline.lsns().journal);
        match self.class {
            FaultClass::Passing if told > synced => {
                Err(format!("the journal is synced up to {synced}, {told} was acknowledged"))
            }
            FaultClass::Passing | FaultClass::Damaging => Ok(()),
        }
    }

    /// The faults end for a while: without a restart, everything goes on.
    async fn recover(&self) -> Result<(), String> {
        self.outside.quiet.set(true);
        self.io.set_faults(false);
        self.io.sleep(SETTLE).await;
        let end = last_record(&self.outside);
        if self.timeline.broken().is_none() {
            let come = self.timeline.wait_for_lsn(end).await;
            come.map_err(|error| format!("the faults are over, but: {error}"))?;
            for _ in 0..RECOVERED_READS {
                check_page(&self.timeline, &self.outside, &self.io).await?;
            }
            note(|seen| seen.recovered += 1);
        }
        self.io.set_faults(true);
        self.outside.quiet.set(false);
        Ok(())
    }
}

fn last_record(outside: &Outside) -> crate::base::Lsn {
    outside.primary.borrow().record_ends().last().copied().unwrap_or(START)
}

/// Runs until the node has to be started anew.
async fn live(io: SimIo, class: FaultClass, outside: Rc<Outside>) -> Result<(), String> {
    io.set_faults(true);
    outside.quiet.set(false);
    let Some(node) = Node::begin(&io, class, &outside).await? else {
        note(|seen| seen.unopened += 1);
        return Ok(());
    };
    loop {
        io.sleep(Duration::from_micros(io.random_u64() % 3000)).await;
        node.read().await?;
        // A failed collection takes nothing from anybody.
        let _ = collect_sometimes(&node.timeline, &outside, &io).await;
        if node.timeline.broken().is_some() {
            note(|seen| seen.broken += 1);
            return node.is_silent().await;
        }
        // A full disk does not pass by itself.
        if class == FaultClass::Passing && io.random_u64().is_multiple_of(100) && !io.is_small() {
            node.recover().await?;
        }
    }
}

/// After faults that passed, nothing is left of them.
async fn finish(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let (shard, timeline) = start(&io, &outside).await?;
    let come = timeline.wait_for_lsn(last_record(&outside)).await;
    come.map_err(|error| format!("no progress: {error}"))?;
    for _ in 0..FINAL_READS {
        check_page(&timeline, &outside, &io).await?;
    }
    shard.shutdown().await;
    let (_shard, timeline) = start(&io, &outside).await?;
    check_page(&timeline, &outside, &io).await
}

/// After damage, what is read is right, and what is not says so.
async fn finish_damaged(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let class = FaultClass::Damaging;
    let shard = start_shard(&io, &outside).await?;
    let opened = shard.timeline(TENANT, TIMELINE).await;
    let timeline = match opened {
        Ok(timeline) => timeline,
        Err(_) => {
            let infos = shard.timelines();
            let broken = |state, error: bool| state == TimelineState::Broken && error;
            note(|seen| seen.lost += 1);
            // The directory of the tenant or the timeline may itself be unreadable.
            return match infos.iter().find(|info| info.timeline == TIMELINE) {
                Some(info) if !broken(info.state, info.error.is_some()) => {
                    Err(format!("it does not open, and shows as {:?}", info.state))
                }
                _ => Ok(()),
            };
        }
    };
    let node = Node { io: io.clone(), class, outside: outside.clone(), shard, timeline };
    // Ingest may need what is damaged; then the timeline says that it is broken.
    if node.timeline.wait_for_lsn(last_record(&outside)).await.is_err()
        && node.timeline.broken().is_none()
    {
        return Err("no progress, and not broken".to_owned());
    }
    for _ in 0..FINAL_READS {
        match node.read().await? {
            None => note(|seen| seen.at_the_end.0 += 1),
            Some(_) => note(|seen| seen.at_the_end.1 += 1),
        }
    }
    node.shard.shutdown().await;
    Ok(())
}

/// One run: lives of a node on a disk with faults, then the checks of a quiet end. Returns the
/// hash of the run.
///
/// # Errors
/// What went wrong.
pub fn scenario(seed: u64, class: FaultClass) -> Result<u64, String> {
    let text = |error: super::SimError| error.to_string();
    let mut world = SimWorld::new(seed, class.options(seed));
    let outside = Outside::new(seed);
    outside.collects.set((seed / 8).is_multiple_of(2));
    let begin = |io: SimIo| async move {
        io.set_faults(false);
        import(io).await
    };
    world.run(begin).map_err(text)??;
    for _ in 0..2 + world.draw("lives", 5) {
        let steps = 200 + world.draw("life", 4_000);
        let shared = outside.clone();
        match world.run_steps(steps, move |io| live(io, class, shared)).map_err(text)? {
            Outcome::Finished(ended) => ended?,
            Outcome::Stopped { .. } => {}
        }
        if world.draw("power", 3) > 0 {
            world.crash();
        }
    }
    outside.quiet.set(false);
    let shared = outside.clone();
    let end = move |io: SimIo| async move {
        io.set_faults(false);
        io.set_capacity(None);
        match class {
            FaultClass::Passing => finish(io, shared).await,
            FaultClass::Damaging => finish_damaged(io, shared).await,
        }
    };
    world.run(end).map_err(text)??;
    Ok(world.trace_hash())
}

#[cfg(test)]
mod tests;

//! Garbage collection, carried out. What may go is decided in [`super::plan::gc`].
//!
//! One collection:
//! 1. expired leases are dropped;
//! 2. the new cut-off is computed and becomes the *planned* one: leases and branches below it are
//!    refused from here on, so that the set of read points can only shrink;
//! 3. with no other writer of the index at work (`index_turn`), the layers are listed, and the background
//!    executor plans which of them go;
//! 4. leases are written, if any were dropped; then the index, with the new cut-off and without
//!    the layers. From here on the outcome survives a crash, and nothing was removed yet;
//! 5. in one synchronous step the cut-off rises (reads below it are refused) and the layers leave
//!    the map;
//! 6. files of layers that no read holds are closed and removed; the others later.
//!
//! A crash before 4 leaves everything as it was, one after it leaves files that no index names,
//! which the next start removes. A failed step 4 may have been done on disk: in memory nothing
//! changed, no file was removed, and the planned cut-off stays where it is.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::select;
use serde::{Deserialize, Serialize};

use super::follow::Connector;
use super::index::INDEX_FILE;
use super::plan::gc::{Horizons, TimeHorizon, cutoff, removable};
use super::stored::StoredLayer;
use super::tenants::Shard;
use super::timeline::Timeline;
use super::timestamps::AtTime;
use crate::base::{Kind, Lsn, TimelineId};
use crate::io::{Io, IoError, durable};
use crate::limits::{
    COMMIT_TIME_AHEAD_S_MAX, GC_NAMES_MAX, GC_READERS_POLL_MS, GC_READERS_POLLS, GC_SETTING_LOOK_MS,
};

/// A collection that is asked for; what is not given is as configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GcRequest {
    /// So many bytes of WAL before the newest record stay readable.
    pub gc_horizon_bytes: Option<u64>,
    /// What was committed within this time stays readable, in seconds; 0: no matter when.
    pub pitr_interval_s: Option<u64>,
}

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// The cut-off before.
    pub cutoff_before: Lsn,
    /// The cut-off now: reads before it are refused, unless a lease holds their LSN.
    pub gc_cutoff_lsn: Lsn,
    /// LSNs before the cut-off that branches or leases hold.
    pub retained_lsns: u64,
    /// Layer files before.
    pub layers_before: u64,
    /// Layer files that went.
    pub layers_removed: u64,
    /// Their size.
    pub bytes_removed: u64,
    /// Of these, files that stay until reads that hold them end.
    pub held_by_reads: u64,
    /// Names of the layers that went, the first thousand.
    pub removed: Vec<String>,
}

/// Why a collection did not come to its end. Nothing that a read may need is lost.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GcError {
    /// The files.
    #[error("garbage collection: {0}")]
    Io(#[from] IoError),
    /// Leases are unknown.
    #[error(
        "nothing is collected: the leases of this timeline cannot be read: {0}; restore the file, \
         or remove it while the node is stopped to give them up"
    )]
    LeasesUnknown(String),
    /// A timeline of the tenant cannot be read, and may be a branch of this one.
    #[error(
        "nothing is collected: timeline {0} cannot be read, so that it is not known what it needs; \
         repair it, or delete it"
    )]
    BranchUnknown(TimelineId),
    /// Ingest has stopped for good; an operator may need what is there.
    #[error("nothing is collected: the timeline is broken: {0}")]
    Broken(String),
    /// The node or the timeline is going away.
    #[error("shutting down")]
    Shutdown,
}

impl GcError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            GcError::Io(error) => error.kind(),
            GcError::LeasesUnknown(_) => Kind::Corrupt,
            GcError::Broken(_) | GcError::BranchUnknown(_) => Kind::Invalid,
            GcError::Shutdown => Kind::Shutdown,
        }
    }
}

impl<I: Io> Timeline<I> {
    /// One collection; `branch_points` gives the LSNs at which other timelines branch off, and is
    /// asked in the synchronous step in which the cut-off is planned.
    ///
    /// # Errors
    /// [`GcError`].
    pub async fn collect_garbage(
        &self,
        request: GcRequest,
        branch_points: impl FnOnce() -> Result<Vec<Lsn>, GcError>,
    ) -> Result<GcReport, GcError> {
        let result = self.run_collection(request, branch_points).await;
        let counters = &self.context.counters;
        match &result {
            Ok(report) => {
                counters.gc_runs.add(1);
                counters.gc_layers_removed.add(report.layers_removed);
                counters.gc_bytes_removed.add(report.bytes_removed);
            }
            Err(GcError::Shutdown) => {}
            Err(_) => counters.gc_failures.add(1),
        }
        result
    }

    async fn run_collection(
        &self,
        request: GcRequest,
        branch_points: impl FnOnce() -> Result<Vec<Lsn>, GcError>,
    ) -> Result<GcReport, GcError> {
        let _turn = self.history.gc_turn.acquire().await;
        if self.stopping.get() {
            return Err(GcError::Shutdown);
        }
        if let Some(reason) = self.broken() {
            return Err(GcError::Broken(reason));
        }
        if let Some(problem) = self.history.leases_problem.borrow().clone() {
            return Err(GcError::LeasesUnknown(problem));
        }
        let cutoff_before = self.history.cutoff.get();
        let branch_points = branch_points()?;
        let new = self.next_cutoff(&request);
        let retained = self.read_points(new, branch_points);
        let (removed, layers_before) = self.retire_layers(new, &retained).await?;
        let removed_names = removed.iter().take(GC_NAMES_MAX).map(|l| l.index_entry().name);
        let mut report = GcReport {
            cutoff_before,
            gc_cutoff_lsn: new,
            retained_lsns: retained.len() as u64,
            layers_before: layers_before as u64,
            layers_removed: removed.len() as u64,
            bytes_removed: removed.iter().map(|layer| layer.file_bytes()).sum(),
            held_by_reads: 0,
            removed: removed_names.collect(),
        };
        self.history.times.borrow_mut().trim(new);
        self.history.doomed.borrow_mut().extend(removed);
        report.held_by_reads = self.remove_doomed().await as u64;
        Ok(report)
    }

    /// Step 2: computes the cut-off, which becomes the planned one.
    fn next_cutoff(&self, request: &GcRequest) -> Lsn {
        let (config, now) = (self.context.config.get(), self.wall_clock());
        let interval = request.pitr_interval_s.unwrap_or(config.pitr_interval_s);
        let time = match interval {
            0 => TimeHorizon::Off,
            seconds => match self.history.times.borrow().at_time(now.minus_seconds(seconds)) {
                AtTime::Present(lsn) | AtTime::Future(lsn) => TimeHorizon::At(lsn),
                AtTime::Past | AtTime::NoData => TimeHorizon::Unknown,
            },
        };
        let newest = self.history.times.borrow().newest();
        if let Some(newest) = newest.filter(|t| *t > now.plus_seconds(COMMIT_TIME_AHEAD_S_MAX)) {
            tracing::warn!(
                tenant = %self.tenant, timeline = %self.id,
                "a transaction claims to have ended at {newest}, but it is {now}: one of the clocks \
                 is or was wrong, and history is kept until that time has passed"
            );
        }
        let lsns = self.lsns();
        let new = cutoff(&Horizons {
            current: self.history.planned_cutoff.get(),
            last_record: lsns.last_record,
            disk_consistent: lsns.disk_consistent,
            horizon_bytes: request.gc_horizon_bytes.unwrap_or(config.gc_horizon_bytes),
            time,
        });
        self.history.planned_cutoff.set(new);
        new
    }

    /// Step 1, and the read points before the cut-off. In one step with the planned cut-off:
    /// whoever comes later is refused below it.
    fn read_points(
        &self,
        cutoff: Lsn,
        branch_points: impl IntoIterator<Item = Lsn>,
    ) -> BTreeSet<Lsn> {
        let now = self.wall_clock();
        let mut leases = self.history.leases.borrow_mut();
        if leases.purge(now) {
            self.history.leases_changed();
        }
        let leased = leases.active(now).map(|lease| lease.lsn);
        #[cfg(test)]
        let leased = leased.filter(|_| !planted::LEASES_IGNORED.get());
        leased.chain(branch_points).filter(|lsn| *lsn < cutoff).collect()
    }

    /// Steps 3 to 5. Returns the layers that left the map, and how many there were.
    async fn retire_layers(
        &self,
        cutoff: Lsn,
        retained: &BTreeSet<Lsn>,
    ) -> Result<(Vec<Rc<StoredLayer<I>>>, usize), GcError> {
        let _index = self.index_turn.acquire().await;
        let layers: Vec<Rc<StoredLayer<I>>> =
            self.mutable.borrow().layers.iter().map(|(_, layer)| layer.clone()).collect();
        let spans: Vec<_> = layers.iter().map(|layer| layer.span()).collect();
        let retained = retained.clone();
        let plan = move |_: I| async move { removable(&spans, cutoff, &retained) };
        let places = self.context.background.run(plan).await.map_err(|_| GcError::Shutdown)?;
        let removed: BTreeMap<String, Rc<StoredLayer<I>>> = places
            .into_iter()
            .filter_map(|place| layers.get(place))
            .map(|layer| (layer.index_entry().name, layer.clone()))
            .collect();
        let count = layers.len();
        drop(layers);
        {
            let _lease = self.history.lease_turn.acquire().await;
            if self.history.leases_are_unwritten() {
                self.write_leases().await?;
            }
        }
        if removed.is_empty() && cutoff == self.history.cutoff.get() {
            return Ok((Vec::new(), count));
        }
        let mut index = self.index_with(&[], self.lsns().disk_consistent);
        index.gc_cutoff_lsn = cutoff;
        index.layers.retain(|layer| !removed.contains_key(&layer.name));
        let path = self.context.dir.join(INDEX_FILE);
        #[cfg(test)]
        let unwritten = planted::INDEX_UNWRITTEN.get();
        #[cfg(not(test))]
        let unwritten = false;
        if !unwritten {
            durable::write_file_atomic(&self.context.io, &path, &index.encode()).await?;
        }
        // One synchronous step from here to the end.
        self.history.cutoff.set(cutoff);
        let gone: Vec<_> = removed.values().map(|layer| layer.span()).collect();
        self.mutable.borrow_mut().layers.replace(&gone, Vec::new());
        Ok((removed.into_values().collect(), count))
    }

    /// Step 6: closes and removes files that no index names and no read holds. Returns how many
    /// are left because reads hold them.
    async fn remove_doomed(&self) -> usize {
        for _ in 0..GC_READERS_POLLS {
            let doomed = self.history.doomed.take();
            let (free, held): (Vec<_>, Vec<_>) =
                doomed.into_iter().partition(|layer| Rc::strong_count(layer) == 1);
            *self.history.doomed.borrow_mut() = held;
            for layer in free {
                self.remove_layer(layer).await;
            }
            if self.history.doomed.borrow().is_empty() || self.stopping.get() {
                break;
            }
            self.context.io.sleep(Duration::from_millis(GC_READERS_POLL_MS)).await;
        }
        self.history.doomed.borrow().len()
    }

    /// A failure costs space only: the next start finds the file.
    async fn remove_layer(&self, layer: Rc<StoredLayer<I>>) {
        let name = layer.index_entry().name;
        if let Err(error) = layer.close().await {
            tracing::warn!(tenant = %self.tenant, timeline = %self.id, "closing {name}: {error}");
        }
        let path = self.context.dir.join(&name);
        if let Err(error) = durable::remove_if_there(&self.context.io, &path).await {
            tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{error}");
        }
    }

    /// Closes the files that [`Timeline::remove_doomed`] left.
    pub(super) async fn close_doomed(&self) {
        for layer in self.history.doomed.take() {
            if let Err(error) = layer.close().await {
                tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{error}");
            }
        }
    }
}

impl<I: Io, C: Connector> Shard<I, C> {
    /// Collects a timeline's garbage again and again until the timeline stops. The first pause is
    /// a random part of the period: not all timelines shall collect at once.
    pub(super) async fn gc_loop(self: Rc<Self>, timeline: Rc<Timeline<I>>) {
        let io = timeline.context.io.clone();
        // The settings may change meanwhile.
        let period_ms = || timeline.context.config.get().gc_period_s.saturating_mul(1000);
        let mut pause_ms = io.random_u64() % period_ms().max(1);
        loop {
            let off = period_ms() == 0;
            let pause = if off { GC_SETTING_LOOK_MS } else { pause_ms };
            let sleep = std::pin::pin!(io.sleep(Duration::from_millis(pause)));
            let signal = std::pin::pin!(timeline.history.gc_signal.wait());
            select(sleep, signal).await;
            if timeline.stopping.get() {
                return;
            }
            pause_ms = period_ms();
            if off || pause_ms == 0 {
                continue;
            }
            match self.collect_timeline(&timeline, GcRequest::default()).await {
                Ok(report) if report.layers_removed > 0 => tracing::info!(
                    tenant = %timeline.tenant, timeline = %timeline.id,
                    "removed {} layers with {} bytes; history begins at {}",
                    report.layers_removed, report.bytes_removed, report.gc_cutoff_lsn
                ),
                Ok(_) | Err(GcError::Shutdown | GcError::Broken(_)) => {}
                Err(error) => {
                    tracing::error!(tenant = %timeline.tenant, timeline = %timeline.id, "{error}");
                }
            }
        }
    }

    /// One collection with the branch points that the shard knows.
    pub(super) async fn collect_timeline(
        &self,
        timeline: &Timeline<I>,
        request: GcRequest,
    ) -> Result<GcReport, GcError> {
        let points = || {
            let branches = self.branches_of((timeline.tenant, timeline.id));
            let unknown = branches.iter().find(|(_, lsn)| !lsn.is_valid());
            match unknown {
                Some((branch, _)) => Err(GcError::BranchUnknown(*branch)),
                None => Ok(branches.into_iter().map(|(_, lsn)| lsn).collect()),
            }
        };
        timeline.collect_garbage(request, points).await
    }
}

/// Bugs that tests must find.
#[cfg(test)]
pub(crate) mod planted {
    use std::cell::Cell;

    thread_local! {
        /// Leases do not hold anything.
        pub(crate) static LEASES_IGNORED: Cell<bool> = const { Cell::new(false) };
        /// Files are removed though the index still names them.
        pub(crate) static INDEX_UNWRITTEN: Cell<bool> = const { Cell::new(false) };
        /// A read does not look at the cut-off when it ends.
        pub(crate) static NO_SECOND_LOOK: Cell<bool> = const { Cell::new(false) };
        /// Leases are granted before they are on disk.
        pub(crate) static LEASES_UNWRITTEN: Cell<bool> = const { Cell::new(false) };
    }
}

#[cfg(test)]
mod testing;

//! Changes of tenants and timelines by an operator: branch, delete, archive, detach, configure.
//!
//! The changes of one tenant happen one after the other. What is acknowledged is durable:
//!
//! | change | becomes true with | a crash before leaves | a crash after leaves |
//! |---|---|---|---|
//! | branch | the branch's index | a directory without index, removed at start | the branch |
//! | delete a timeline | its index renamed to `deleted` | the timeline | files, removed at start |
//! | archive, unarchive | the index | the old state | the new state |
//! | detach | the index ([`super::detach`]) | the branch, and files removed at start | the copy |
//! | create a tenant | its directory's final name | a temporary directory, removed at start | the tenant |
//! | configure | the file `config` | the old settings | the new ones |
//! | delete a tenant | its file `deleted` | the tenant | files, removed at start |

use std::rc::Rc;
use std::time::Duration;

use super::activate::{Ancestry, Brief, Slot, TimelineKey};
use super::control::{Change, ControlError, CreateBranch};
use super::follow::Connector;
use super::index::{BranchPoint, DELETED_FILE, INDEX_FILE, INDEX_VERSION, TimelineIndex};
use super::reader::ReadError;
use super::tenant_config::{CONFIG_FILE, TenantConfig};
use super::tenants::{Shard, TIMELINES_DIR};
use super::timeline::Timeline;
use super::timestamps::COMMIT_TIMES_FILE;
use super::turn::Turn;
use crate::base::{Kind, TenantShardId};
use crate::io::{Io, IoCause, IoError, TaskClass, durable};
use crate::limits::{STOP_POLL_MS, STOP_WAIT_MS};

fn refused(message: impl Into<String>) -> ControlError {
    ControlError { kind: Kind::Invalid, message: message.into() }
}

fn later(message: impl Into<String>) -> ControlError {
    ControlError { kind: Kind::Retry, message: message.into() }
}

impl From<ReadError> for ControlError {
    fn from(error: ReadError) -> Self {
        ControlError { kind: error.kind(), message: error.to_string() }
    }
}

impl From<IoError> for ControlError {
    fn from(error: IoError) -> Self {
        ControlError { kind: error.kind(), message: error.to_string() }
    }
}

impl<I: Io, C: Connector> Shard<I, C> {
    /// Carries a change out; it is durable when this returns.
    pub(super) async fn carry_out(self: &Rc<Self>, change: Change) -> Result<(), ControlError> {
        match change {
            Change::Tenant { tenant, config, create: true } => {
                self.create_tenant(tenant, config).await
            }
            Change::Tenant { tenant, config, create: false } => {
                let turn = self.turn_of(tenant)?;
                let _turn = turn.acquire().await;
                self.configure_tenant(tenant, config).await
            }
            Change::DeleteTenant(tenant) => {
                let turn = self.turn_of(tenant)?;
                let _turn = turn.acquire().await;
                self.delete_tenant(tenant).await
            }
            Change::Branch(request) => {
                let turn = self.turn_of(request.tenant)?;
                let _turn = turn.acquire().await;
                self.create_branch(request).await
            }
            Change::DeleteTimeline(tenant, id) => {
                let turn = self.turn_of(tenant)?;
                let _turn = turn.acquire().await;
                self.delete_timeline((tenant, id)).await
            }
            Change::Archive(tenant, id, archived) => {
                let turn = self.turn_of(tenant)?;
                let _turn = turn.acquire().await;
                self.archive((tenant, id), archived).await
            }
            Change::DetachAncestor(tenant, id) => {
                let turn = self.turn_of(tenant)?;
                let _turn = turn.acquire().await;
                let timeline = self.activate((tenant, id)).await?;
                let fail = |error: super::detach::DetachError| ControlError {
                    kind: error.kind(),
                    message: error.to_string(),
                };
                timeline.begin_detach().map_err(fail)?;
                // It may take long; the timeline's own state says how it goes.
                let work = async move {
                    let _ = timeline.detach().await;
                };
                self.context.io.spawn(TaskClass::Background, work);
                Ok(())
            }
        }
    }

    /// The turn of a tenant that exists.
    fn turn_of(&self, tenant: TenantShardId) -> Result<Rc<Turn>, ControlError> {
        let tenants = self.tenants.borrow();
        let slot = tenants.get(&tenant).ok_or(ReadError::TenantNotFound(tenant))?;
        Ok(slot.turn.clone())
    }

    async fn create_branch(self: &Rc<Self>, request: CreateBranch) -> Result<(), ControlError> {
        let key = (request.tenant, request.timeline);
        match self.slots.borrow().get(&key) {
            None | Some(Slot::Failed(_)) => {}
            Some(_) => {
                let (id, tenant) = (key.1, key.0);
                return Err(refused(format!("timeline {id} of tenant {tenant} exists already")));
            }
        }
        self.refuse_existing(key.0, key.1).await?;
        let mut ancestor = self.activate((key.0, request.ancestor)).await?;
        if ancestor.archived.get() {
            let text = format!("timeline {} is archived; unarchive it to branch it", ancestor.id);
            return Err(refused(text));
        }
        let wanted = request.lsn.unwrap_or(ancestor.lsns().last_record);
        ancestor.check_branch_point(wanted).map_err(|error| refused(error.to_string()))?;
        // Invariant 1 of `branch`: what lies before the ancestor's own branch point is not its.
        while let Some(older) = ancestor.ancestor().filter(|older| wanted < older.lsn) {
            ancestor = older.timeline;
        }
        let lsn = ancestor.record_position(wanted);
        ancestor.make_durable().await?;
        // Once more, in one step with what keeps collections away: one may have come between.
        ancestor.check_branch_point(lsn).map_err(|error| refused(error.to_string()))?;
        let index = TimelineIndex {
            version: INDEX_VERSION,
            tenant: key.0,
            timeline: key.1,
            cluster: ancestor.cluster,
            source: request.source,
            ancestor: Some(BranchPoint { timeline: ancestor.id, lsn }),
            archived: false,
            start_lsn: ancestor.start_lsn(),
            gc_cutoff_lsn: ancestor.start_lsn(),
            disk_consistent_lsn: lsn,
            layers: Vec::new(),
        };
        let brief = Brief::of(&index);
        let times = ancestor.commit_times_of_branch(lsn);
        // From here on, nothing that the branch needs is removed or deleted.
        ancestor.set_branch(key.1, Some(lsn));
        self.slots.borrow_mut().insert(key, Slot::Branching(brief.clone()));
        if let Err(error) = self.write_branch(key, &index, times).await {
            self.give_up_branch(key, &ancestor, &brief, &error).await;
            return Err(error.into());
        }
        let follows = index.source.is_some();
        self.slots.borrow_mut().insert(key, Slot::Idle(brief));
        if follows {
            self.activate(key).await?;
        }
        Ok(())
    }

    async fn write_branch(
        &self,
        key: TimelineKey,
        index: &TimelineIndex,
        commit_times: Option<Vec<u8>>,
    ) -> Result<(), IoError> {
        let io = &self.context.io;
        let timelines = self.timelines_dir(key.0);
        let dir = timelines.join(key.1.to_string());
        let change = io.dir_change(&timelines);
        // What an earlier attempt may have left.
        io.remove_dir_all(&dir).await?;
        io.create_dir(&dir).await?;
        io.sync_dir(&change).await?;
        if let Some(times) = commit_times {
            durable::write_file_atomic(io, &dir.join(COMMIT_TIMES_FILE), &times).await?;
        }
        durable::write_file_atomic(io, &dir.join(INDEX_FILE), &index.encode()).await
    }

    /// The branch is not acknowledged, so it must not come up at the next start.
    async fn give_up_branch(
        &self,
        key: TimelineKey,
        ancestor: &Timeline<I>,
        brief: &Brief,
        error: &IoError,
    ) {
        let timelines = self.timelines_dir(key.0);
        let io = &self.context.io;
        let removed = async {
            let change = io.dir_change(&timelines);
            io.remove_dir_all(&timelines.join(key.1.to_string())).await?;
            io.sync_dir(&change).await
        };
        match removed.await {
            Ok(()) => {
                self.slots.borrow_mut().remove(&key);
                ancestor.set_branch(key.1, None);
            }
            // It may be there after all: what it needs is kept until somebody deletes it.
            Err(_) => {
                let slot =
                    Slot::Damaged(format!("it was not made: {error}"), brief.ancestor.into());
                self.slots.borrow_mut().insert(key, slot);
            }
        }
    }

    async fn delete_timeline(self: &Rc<Self>, key: TimelineKey) -> Result<(), ControlError> {
        self.until_opened(key.0).await;
        let (open, ancestry) = {
            let slots = self.slots.borrow();
            match slots.get(&key) {
                None => return Err(ReadError::TimelineNotFound(key.0, key.1).into()),
                Some(Slot::Importing(_)) => {
                    let text = format!("timeline {} is being imported; wait for its end", key.1);
                    return Err(later(text));
                }
                Some(slot @ Slot::Ready(timeline)) => (Some(timeline.clone()), slot.ancestry()),
                Some(slot) => (None, slot.ancestry()),
            }
        };
        self.refuse_branches(key)?;
        if let Some(timeline) = &open {
            self.close_gate(timeline).await?;
        }
        self.slots.borrow_mut().insert(key, Slot::Deleting(ancestry));
        let removed = async {
            if let Some(timeline) = &open {
                self.end_following(timeline).await?;
                timeline.abandon().await;
            }
            self.remove_timeline(key).await.map_err(ControlError::from)
        };
        if let Err(error) = removed.await {
            let reason = format!("its deletion failed ({}); delete it again", error.message);
            self.slots.borrow_mut().insert(key, Slot::Damaged(reason, ancestry));
            return Err(error);
        }
        self.slots.borrow_mut().remove(&key);
        if let Ancestry::Branch(point) = ancestry
            && let Some(Slot::Ready(older)) = self.slots.borrow().get(&(key.0, point.timeline))
        {
            older.set_branch(key.1, None);
        }
        Ok(())
    }

    /// A timeline is not deleted while others need it.
    fn refuse_branches(&self, key: TimelineKey) -> Result<(), ControlError> {
        let branches = self.branches_of(key);
        if branches.is_empty() {
            return Ok(());
        }
        let names: Vec<String> = branches
            .iter()
            .map(|(id, lsn)| match lsn.is_valid() {
                true => format!("{id} (at {lsn})"),
                false => format!("{id} (damaged: it may be one)"),
            })
            .collect();
        Err(refused(format!(
            "timeline {} has branches: {}; delete or detach them first",
            key.1,
            names.join(", ")
        )))
    }

    /// Lets no read in any more, and waits until none is under way.
    async fn close_gate(&self, timeline: &Timeline<I>) -> Result<(), ControlError> {
        timeline.deleting.set(true);
        timeline.gate.close();
        timeline.waiters.fail_all();
        if self.wait_until(|| timeline.gate.is_idle() && !timeline.is_detaching()).await {
            return Ok(());
        }
        timeline.reopen();
        Err(later(format!("reads of timeline {} do not end; try again", timeline.id)))
    }

    async fn end_following(&self, timeline: &Timeline<I>) -> Result<(), ControlError> {
        timeline.stop_following();
        match self.wait_until(|| timeline.has_stopped_following()).await {
            true => Ok(()),
            false => Err(later(format!("timeline {} does not stop following", timeline.id))),
        }
    }

    pub(super) async fn wait_until(&self, done: impl Fn() -> bool) -> bool {
        let mut waited_ms = 0;
        while !done() && waited_ms < STOP_WAIT_MS {
            self.context.io.sleep(Duration::from_millis(STOP_POLL_MS)).await;
            waited_ms += STOP_POLL_MS;
        }
        done()
    }

    /// Waits until no timeline of the tenant is being opened.
    async fn until_opened(&self, tenant: TenantShardId) {
        let opening = |slot: &Slot<I>| matches!(slot, Slot::Loading(_));
        while self.of_tenant(tenant, |_, slot| opening(slot)).contains(&true) {
            self.context.io.sleep(Duration::from_millis(STOP_POLL_MS)).await;
        }
    }

    /// The timeline ceases to exist with the rename; what remains after that is only space.
    async fn remove_timeline(&self, key: TimelineKey) -> Result<(), IoError> {
        let io = &self.context.io;
        let timelines = self.timelines_dir(key.0);
        let dir = timelines.join(key.1.to_string());
        match durable::publish(io, &dir.join(INDEX_FILE), &dir.join(DELETED_FILE)).await {
            Ok(()) => {}
            // An import that failed, or a deletion that failed after this step: the new name may
            // not be durable. To sync the directory once more would prove nothing, for the kernel
            // forgets what it could not write; so a mark is made that was not there before.
            Err(error) if error.cause == IoCause::NotFound => {
                match durable::write_file_atomic(io, &dir.join(DELETED_FILE), b"").await {
                    // The directory is not there, either.
                    Err(error) if error.cause == IoCause::NotFound => return Ok(()),
                    written => written?,
                }
            }
            Err(error) => return Err(error),
        }
        let removed = async {
            let change = io.dir_change(&timelines);
            io.remove_dir_all(&dir).await?;
            io.sync_dir(&change).await
        };
        if let Err(error) = removed.await {
            tracing::warn!(tenant = %key.0, timeline = %key.1, "{error}; the next start goes on");
        }
        Ok(())
    }

    async fn archive(
        self: &Rc<Self>,
        key: TimelineKey,
        archived: bool,
    ) -> Result<(), ControlError> {
        let timeline = self.activate(key).await?;
        if timeline.archived.get() == archived {
            return Ok(());
        }
        timeline.archived.set(archived);
        if archived {
            timeline.waiters.fail_all();
            timeline.stop_signal.set();
            if !self.wait_until(|| timeline.has_stopped_following()).await {
                self.set_archived(&timeline, false);
                return Err(later(format!("timeline {} does not stop following", key.1)));
            }
            // What is in memory only need not be replayed when a branch needs the timeline.
            if let Err(error) = timeline.checkpoint_now().await {
                tracing::warn!("{error}; the journal has what is missing");
            }
        }
        match timeline.rewrite_index().await {
            Ok(()) => {
                if !archived {
                    self.start_following(&timeline);
                }
                Ok(())
            }
            Err(error) => {
                self.set_archived(&timeline, !archived);
                Err(error.into())
            }
        }
    }

    /// Takes a change back that did not become durable.
    fn set_archived(&self, timeline: &Rc<Timeline<I>>, archived: bool) {
        timeline.archived.set(archived);
        if !archived && timeline.has_stopped_following() {
            self.start_following(timeline);
        }
    }

    async fn create_tenant(
        self: &Rc<Self>,
        tenant: TenantShardId,
        config: TenantConfig,
    ) -> Result<(), ControlError> {
        config.check().map_err(|error| refused(error.to_string()))?;
        let slot = self.new_tenant(config);
        let turn = slot.turn.clone();
        let _turn = turn.acquire().await;
        if self.tenants.borrow().contains_key(&tenant) {
            return Err(refused(format!("tenant {tenant} exists already")));
        }
        self.tenants.borrow_mut().insert(tenant, slot);
        let (io, dir) = (&self.context.io, self.tenant_dir(tenant));
        // Under another name until it is whole.
        let temp = durable::temp_path(&dir);
        let made = async {
            io.remove_dir_all(&temp).await?;
            io.create_dir(&temp).await?;
            io.create_dir(&temp.join(TIMELINES_DIR)).await?;
            // A sync of the directory comes with it.
            durable::write_file_atomic(io, &temp.join(CONFIG_FILE), &config.encode()).await?;
            durable::publish(io, &temp, &dir).await
        };
        if let Err(error) = made.await {
            self.tenants.borrow_mut().remove(&tenant);
            let _ = io.remove_dir_all(&temp).await;
            let _ = io.remove_dir_all(&dir).await;
            return Err(error.into());
        }
        Ok(())
    }

    async fn configure_tenant(
        &self,
        tenant: TenantShardId,
        config: TenantConfig,
    ) -> Result<(), ControlError> {
        config.check().map_err(|error| refused(error.to_string()))?;
        let dir = self.tenant_dir(tenant);
        self.context.io.create_dir(&dir).await?;
        durable::write_file_atomic(&self.context.io, &dir.join(CONFIG_FILE), &config.encode())
            .await?;
        if let Some(slot) = self.tenants.borrow_mut().get_mut(&tenant) {
            slot.overrides = config;
            slot.config.set(config.over(self.context.config));
        }
        Ok(())
    }

    async fn delete_tenant(self: &Rc<Self>, tenant: TenantShardId) -> Result<(), ControlError> {
        self.until_opened(tenant).await;
        let mut open = Vec::new();
        for slot in self.of_tenant(tenant, |_, slot| match slot {
            Slot::Importing(_) => Err(()),
            Slot::Ready(timeline) => Ok(Some(timeline.clone())),
            _ => Ok(None),
        }) {
            let text =
                || format!("a timeline of tenant {tenant} is being imported; wait for its end");
            open.extend(slot.map_err(|()| later(text()))?);
        }
        for (number, timeline) in open.iter().enumerate() {
            if let Err(error) = self.close_gate(timeline).await {
                open.iter().take(number).for_each(|other| other.reopen());
                return Err(error);
            }
        }
        let ids = self.of_tenant(tenant, |id, slot| (id, slot.ancestry()));
        for (id, ancestry) in &ids {
            self.slots.borrow_mut().insert((tenant, *id), Slot::Deleting(*ancestry));
        }
        let removed = async {
            for timeline in &open {
                self.end_following(timeline).await?;
            }
            for timeline in &open {
                timeline.abandon().await;
            }
            self.remove_tenant(tenant).await.map_err(ControlError::from)
        };
        if let Err(error) = removed.await {
            let reason = format!("deleting its tenant failed ({}); do it again", error.message);
            for (id, ancestry) in ids {
                let slot = Slot::Damaged(reason.clone(), ancestry);
                self.slots.borrow_mut().insert((tenant, id), slot);
            }
            return Err(error);
        }
        for (id, _) in ids {
            self.slots.borrow_mut().remove(&(tenant, id));
        }
        self.tenants.borrow_mut().remove(&tenant);
        self.forget_redo(tenant).await;
        Ok(())
    }

    /// The tenant ceases to exist with its mark; what remains after that is only space.
    async fn remove_tenant(&self, tenant: TenantShardId) -> Result<(), IoError> {
        let (io, dir) = (&self.context.io, self.tenant_dir(tenant));
        io.create_dir(&dir).await?;
        durable::write_file_atomic(io, &dir.join(DELETED_FILE), b"").await?;
        let removed = async {
            let change = io.dir_change(&self.context.data_dir.join("tenants"));
            io.remove_dir_all(&dir).await?;
            io.sync_dir(&change).await
        };
        if let Err(error) = removed.await {
            tracing::warn!(%tenant, "{error}; the next start goes on");
        }
        Ok(())
    }
}

impl<I: Io> Timeline<I> {
    /// Writes the journal: a branch point must not lie after what a restart finds.
    async fn make_durable(&self) -> Result<(), ControlError> {
        let lsn = self.lsns().last_record;
        while self.lsns().journal < lsn {
            self.flush_journal()
                .await
                .map_err(|error| ControlError { kind: error.kind(), message: error.to_string() })?;
        }
        Ok(())
    }

    /// It is not deleted after all.
    fn reopen(&self) {
        self.deleting.set(false);
        self.gate.reopen();
    }

    /// A detaching is under way; it ends soon when the gate is closed.
    fn is_detaching(&self) -> bool {
        self.mutable.borrow().detach.as_ref().is_some_and(|state| state.error.is_none())
    }

    /// Writes the index as the timeline stands.
    async fn rewrite_index(&self) -> Result<(), IoError> {
        let _checkpoint = self.checkpoint_turn.acquire().await;
        let _index = self.index_turn.acquire().await;
        let index = self.index_with(&[], self.lsns().disk_consistent);
        let path = self.context.dir.join(INDEX_FILE);
        durable::write_file_atomic(&self.context.io, &path, &index.encode()).await
    }
}

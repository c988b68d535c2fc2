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
use std::sync::Arc;
use std::time::Duration;

use super::activate::{Brief, Slot, TimelineKey};
use super::control::{Change, ControlError, CreateBranch, CreateTimeline};
use super::follow::Connector;
use super::import::Progress;
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

pub(super) fn refused(message: impl Into<String>) -> ControlError {
    ControlError { kind: Kind::Invalid, message: message.into() }
}

pub(super) fn later(message: impl Into<String>) -> ControlError {
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
                self.in_turn(tenant, self.configure_tenant(tenant, config)).await
            }
            Change::DeleteTenant(tenant) => self.in_turn(tenant, self.delete_tenant(tenant)).await,
            Change::Branch(request) => {
                self.in_turn(request.tenant, self.create_branch(request)).await
            }
            Change::DeleteTimeline(tenant, id) => {
                self.in_turn(tenant, self.delete_timeline((tenant, id))).await
            }
            Change::Archive(tenant, id, archived) => {
                self.in_turn(tenant, self.archive((tenant, id), archived)).await
            }
            Change::DetachAncestor(tenant, id) => {
                self.in_turn(tenant, self.begin_detaching((tenant, id))).await
            }
        }
    }

    async fn begin_detaching(self: &Rc<Self>, key: TimelineKey) -> Result<(), ControlError> {
        let timeline = self.activate(key).await?;
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

    /// The turn of a tenant that exists.
    fn turn_of(&self, tenant: TenantShardId) -> Result<Rc<Turn>, ControlError> {
        let tenants = self.tenants.borrow();
        let slot = tenants.get(&tenant).ok_or(ReadError::TenantNotFound(tenant))?;
        Ok(slot.turn.clone())
    }

    /// Carries a change out when all that came before it have been.
    async fn in_turn(
        &self,
        tenant: TenantShardId,
        change: impl Future<Output = Result<(), ControlError>>,
    ) -> Result<(), ControlError> {
        let turn = self.turn_of(tenant)?;
        let _turn = turn.acquire().await;
        // It may have been deleted meanwhile, and made anew.
        match self.turn_of(tenant) {
            Ok(now) if Rc::ptr_eq(&now, &turn) => change.await,
            _ => Err(ReadError::TenantNotFound(tenant).into()),
        }
    }

    /// Begins to make a timeline from a cluster, and its tenant if there is none.
    pub(super) async fn import_in_turn(
        self: &Rc<Self>,
        request: CreateTimeline,
    ) -> Result<(), ControlError> {
        let tenant = request.tenant;
        loop {
            let is_new = !self.tenants.borrow().contains_key(&tenant);
            self.config_of(tenant);
            let turn = self.turn_of(tenant)?;
            let _turn = turn.acquire().await;
            if !self.turn_of(tenant).is_ok_and(|now| Rc::ptr_eq(&now, &turn)) {
                // Deleted meanwhile.
                continue;
            }
            let begun = self.begin_import(request).await;
            if begun.is_err() && is_new {
                self.tenants.borrow_mut().remove(&tenant);
            }
            return begun;
        }
    }

    async fn begin_import(self: &Rc<Self>, request: CreateTimeline) -> Result<(), ControlError> {
        let (tenant, id) = (request.tenant, request.timeline);
        if self.stopping.get() {
            let message = "the node is shutting down".to_owned();
            return Err(ControlError { kind: Kind::Shutdown, message });
        }
        // What is left of a tenant of the same name would take the new one along.
        let dir = self.tenant_dir(tenant);
        match self.context.io.list(&dir).await {
            Ok(entries) if entries.iter().any(|entry| entry.name == DELETED_FILE) => {
                self.remove_deleted(&dir).await?;
            }
            Err(error) if error.cause != IoCause::NotFound => return Err(error.into()),
            Ok(_) | Err(_) => {}
        }
        self.refuse_existing(tenant, id).await?;
        let name = format!("timeline {id} of tenant {tenant}");
        match self.slots.borrow().get(&(tenant, id)) {
            None | Some(Slot::Failed(_)) => {}
            Some(Slot::Damaged(reason, _)) => {
                return Err(refused(format!("{name} exists but cannot be opened: {reason}")));
            }
            Some(_) => return Err(refused(format!("{name} exists already"))),
        }
        let progress = Arc::new(Progress::default());
        self.slots.borrow_mut().insert((tenant, id), Slot::Importing(progress.clone()));
        self.context.io.spawn(TaskClass::Background, self.clone().create(request, progress));
        Ok(())
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

    pub(super) async fn wait_until(&self, done: impl Fn() -> bool) -> bool {
        let mut waited_ms = 0;
        while !done() && waited_ms < STOP_WAIT_MS {
            self.context.io.sleep(Duration::from_millis(STOP_POLL_MS)).await;
            waited_ms += STOP_POLL_MS;
        }
        done()
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

    /// Writes the index as the timeline stands.
    async fn rewrite_index(&self) -> Result<(), IoError> {
        let _checkpoint = self.checkpoint_turn.acquire().await;
        let _index = self.index_turn.acquire().await;
        let index = self.index_with(&[], self.lsns().disk_consistent);
        let path = self.context.dir.join(INDEX_FILE);
        durable::write_file_atomic(&self.context.io, &path, &index.encode()).await
    }
}

//! Tenants and timelines go: first nobody may ask them anything, then they end what they do of
//! themselves, then their mark says that they are gone, and then so is their space.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use super::activate::{Ancestry, Slot, TimelineKey};
use super::control::ControlError;
use super::follow::Connector;
use super::index::{DELETED_FILE, INDEX_FILE};
use super::lifecycle::{later, refused};
use super::reader::ReadError;
use super::tenants::Shard;
use super::timeline::Timeline;
use crate::base::TenantShardId;
use crate::io::{Io, IoCause, IoError, durable};
use crate::limits::STOP_POLL_MS;

impl<I: Io, C: Connector> Shard<I, C> {
    pub(super) async fn delete_timeline(
        self: &Rc<Self>,
        key: TimelineKey,
    ) -> Result<(), ControlError> {
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
            self.bring_to_rest(std::slice::from_ref(timeline)).await?;
        }
        self.slots.borrow_mut().insert(key, Slot::Deleting(ancestry));
        let removed = async {
            if let Some(timeline) = &open {
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

    /// Ends all that others ask of timelines that are to go, then what they do of themselves. Where
    /// that takes too long they stay open: they have tasks that write.
    async fn bring_to_rest(&self, timelines: &[Rc<Timeline<I>>]) -> Result<(), ControlError> {
        for (number, timeline) in timelines.iter().enumerate() {
            if let Err(error) = self.close_gate(timeline).await {
                timelines.iter().take(number).for_each(|other| other.reopen());
                return Err(error);
            }
        }
        timelines.iter().for_each(|timeline| timeline.stop_following());
        for timeline in timelines {
            if !self.wait_until(|| timeline.has_stopped_following()).await {
                let text = format!("timeline {} does not stop following; try again", timeline.id);
                return Err(later(text));
            }
        }
        Ok(())
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

    pub(super) async fn delete_tenant(
        self: &Rc<Self>,
        tenant: TenantShardId,
    ) -> Result<(), ControlError> {
        self.until_opened(tenant).await;
        if self.of_tenant(tenant, |_, slot| matches!(slot, Slot::Importing(_))).contains(&true) {
            let text = format!("a timeline of tenant {tenant} is being imported; wait for its end");
            return Err(later(text));
        }
        let (mut open, mut closed) = (Vec::new(), Vec::new());
        for (id, ancestry) in self.of_tenant(tenant, |id, slot| (id, slot.ancestry())) {
            let mut slots = self.slots.borrow_mut();
            match slots.get_mut(&(tenant, id)) {
                Some(Slot::Ready(timeline)) => open.push(timeline.clone()),
                // So that nobody opens it from here on.
                Some(slot) => {
                    closed.push((id, std::mem::replace(slot, Slot::Deleting(ancestry))));
                }
                None => {}
            }
        }
        if let Err(error) = self.bring_to_rest(&open).await {
            for (id, slot) in closed {
                self.slots.borrow_mut().insert((tenant, id), slot);
            }
            return Err(error);
        }
        let ids = self.of_tenant(tenant, |id, slot| (id, slot.ancestry()));
        for (id, ancestry) in &ids {
            self.slots.borrow_mut().insert((tenant, *id), Slot::Deleting(*ancestry));
        }
        for timeline in &open {
            timeline.abandon().await;
        }
        if let Err(error) = self.remove_tenant(tenant).await {
            let reason = format!("deleting its tenant failed ({error}); do it again");
            for (id, ancestry) in ids {
                let slot = Slot::Damaged(reason.clone(), ancestry);
                self.slots.borrow_mut().insert((tenant, id), slot);
            }
            return Err(error.into());
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
        if let Err(error) = self.remove_deleted(&dir).await {
            tracing::warn!(%tenant, "{error}; the next start goes on");
        }
        Ok(())
    }

    /// Removes what has the mark of a deleted tenant. The mark goes last: without it, what is left
    /// would be a tenant again.
    pub(super) async fn remove_deleted(&self, dir: &Path) -> Result<(), IoError> {
        let io = &self.context.io;
        let change = io.dir_change(dir);
        for entry in io.list(dir).await? {
            let path = dir.join(&entry.name);
            match (entry.is_dir, entry.name == DELETED_FILE) {
                (true, _) => io.remove_dir_all(&path).await?,
                (false, true) => {}
                (false, false) => io.remove(&path).await?,
            }
        }
        io.sync_dir(&change).await?;
        let change = io.dir_change(&self.context.data_dir.join("tenants"));
        io.remove_dir_all(dir).await?;
        io.sync_dir(&change).await
    }
}

impl<I: Io> Timeline<I> {
    /// It is not deleted after all.
    fn reopen(&self) {
        self.deleting.set(false);
        self.gate.reopen();
    }

    /// A detaching is under way; it ends soon when the gate is closed.
    fn is_detaching(&self) -> bool {
        self.mutable.borrow().detach.as_ref().is_some_and(|state| state.error.is_none())
    }
}

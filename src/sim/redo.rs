//! Redo in the simulator: [`super::primary::mix`] instead of PostgreSQL.

use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

use super::primary::mix;
use crate::base::TenantShardId;
use crate::redo::{Redo, RedoError, RedoMaker, RedoRequest, RedoSettings};
use crate::shard::control::CoreMetrics;
use crate::shard::tenants::RedoFactory;

/// See the module's text.
pub struct ToyRedo;

impl Redo for ToyRedo {
    fn redo(&self, request: RedoRequest) -> LocalBoxFuture<'_, Result<Bytes, RedoError>> {
        Box::pin(async move {
            let mut page = request.base.map(|base| base.to_vec());
            for (lsn, record) in &request.records {
                let target = (request.rel, request.block);
                page = Some(mix(page.as_deref(), *lsn, record, target));
            }
            let (rel, block) = (request.rel, request.block);
            page.map(Bytes::from).ok_or(RedoError::NoRecords { rel, block })
        })
    }
}

/// Gives every tenant a [`ToyRedo`].
pub struct ToyRedoFactory;

impl RedoFactory for ToyRedoFactory {
    fn start(&self, _: TenantShardId, _: RedoSettings) -> Rc<dyn Redo> {
        Rc::new(ToyRedo)
    }

    fn background(&self, _: TenantShardId, _: RedoSettings) -> RedoMaker {
        Box::new(|| Rc::new(ToyRedo))
    }

    fn stop(&self, _: TenantShardId) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn stop_all(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn metrics(&self, _: &mut CoreMetrics) {}
}

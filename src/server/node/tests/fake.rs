//! A core without a shard behind it.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use crate::base::{BlockNumber, Lsn, RelTag, SlruKind, TenantShardId, TimelineId, Timestamp};
use crate::server::node::{CoreContext, CoreService};
use crate::server::page_protocol::PAGE_BYTES;
use crate::server::router;
use crate::shard::base_backup::{BackupError, BackupRequest, BackupSink};
use crate::shard::control::{
    Change, ControlError, CoreControl, CoreMetrics, CreateTimeline, TenantInfo, TimelineInfo,
};
use crate::shard::history::{HistoryReply, HistoryRequest};
use crate::shard::leases::LeaseError;
use crate::shard::reader::{PageBackend, ReadError, RequestLsn, TimelineReader};

/// A page that is not there before [`WAKING`] was asked for.
pub(super) const WAITING: u32 = 1002;
/// See [`WAITING`].
pub(super) const WAKING: u32 = 1003;

thread_local! {
    static WOKEN: Cell<bool> = const { Cell::new(false) };
}

/// Every tenant whose first byte is not 0xff exists; a page's bytes name the core and the block.
pub(super) struct Fake(pub(super) usize);

impl Fake {
    fn page(&self, block: BlockNumber) -> Bytes {
        let mut page = vec![self.0 as u8; PAGE_BYTES];
        page[..4].copy_from_slice(&block.to_be_bytes());
        page.into()
    }
}

impl TimelineReader for Fake {
    async fn get_page(
        &self,
        _rel: RelTag,
        block: BlockNumber,
        _lsn: RequestLsn,
    ) -> Result<Bytes, ReadError> {
        match block {
            13 => return Err(ReadError::BadRequest("thirteen".to_owned())),
            WAITING => {
                while !WOKEN.replace(false) {
                    glommio::timer::sleep(Duration::from_millis(1)).await;
                }
            }
            WAKING => WOKEN.set(true),
            _ => {}
        }
        Ok(self.page(block))
    }
    fn held_page(&self, _rel: RelTag, block: BlockNumber, _lsn: RequestLsn) -> Option<Bytes> {
        (block % 4 < 2 && block != 13).then(|| self.page(block))
    }
    async fn rel_exists(&self, _rel: RelTag, _lsn: RequestLsn) -> Result<bool, ReadError> {
        Ok(true)
    }
    async fn rel_size(&self, _rel: RelTag, _lsn: RequestLsn) -> Result<u32, ReadError> {
        Ok(99)
    }
    async fn db_size(&self, db: u32, _lsn: RequestLsn) -> Result<i64, ReadError> {
        Ok(i64::from(db))
    }
    async fn slru_segment(&self, _: SlruKind, _: u32, _: RequestLsn) -> Result<Bytes, ReadError> {
        Ok(vec![3; PAGE_BYTES].into())
    }
    async fn lease_lsn(&self, lsn: Lsn) -> Result<Timestamp, LeaseError> {
        match lsn {
            Lsn(1) => Err(LeaseError::BelowStart { lsn, start: Lsn(2) }),
            Lsn(2) => Err(LeaseError::NotThereYet { lsn, last_record_lsn: Lsn(1) }),
            _ => Ok(Timestamp(1_234_567_899)),
        }
    }
    async fn backup<S: BackupSink>(
        &self,
        request: BackupRequest,
        sink: &mut S,
    ) -> Result<Lsn, BackupError> {
        let lsn = request.lsn.unwrap_or(Lsn(7));
        if lsn == Lsn(1) {
            return Err(ReadError::BelowStart { request: lsn, start: Lsn(2) }.into());
        }
        for n in 0..40u8 {
            sink.write(&[n; 10_000]).await?;
            if lsn == Lsn(2) && n == 20 {
                return Err(ReadError::BadRequest("half way".to_owned()).into());
            }
        }
        Ok(lsn)
    }
}

impl PageBackend for Fake {
    type Timeline = Fake;
    async fn timeline(&self, tenant: TenantShardId, _: TimelineId) -> Result<Rc<Fake>, ReadError> {
        assert_eq!(router::owner(&tenant, 2), self.0, "a tenant of another core");
        match tenant.tenant.0[0] {
            0xff => Err(ReadError::TenantNotFound(tenant)),
            _ => Ok(Rc::new(Fake(self.0))),
        }
    }
}

impl CoreControl for Fake {
    fn timelines(&self) -> Vec<TimelineInfo> {
        Vec::new()
    }
    fn metrics(&self) -> CoreMetrics {
        CoreMetrics::default()
    }
    fn tenants(&self) -> Vec<TenantInfo> {
        Vec::new()
    }
    async fn change(&self, _: Change) -> Result<(), ControlError> {
        Ok(())
    }
    async fn create_timeline(&self, _: CreateTimeline) -> Result<(), ControlError> {
        Ok(())
    }
    async fn checkpoint(&self, _: TenantShardId, _: TimelineId) -> Result<(), ControlError> {
        Ok(())
    }
    async fn history(
        &self,
        _: TenantShardId,
        _: TimelineId,
        _: HistoryRequest,
    ) -> Result<HistoryReply, ControlError> {
        Ok(HistoryReply::TimestampOfLsn { timestamp: None })
    }
    async fn shutdown(&self) {}
}

impl CoreService for Fake {
    async fn start(context: CoreContext) -> Result<Self, String> {
        let six = context.background.run(|| async { 6 }).await;
        assert_eq!(six, Ok(6));
        Ok(Fake(context.core))
    }
}

//! One request of a page stream.

use super::Service;
use crate::base::{Kind, Lsn};
use crate::server::counters::count;
use crate::server::page_protocol::{
    Answer, Header, Query, Request, RequestError, Version, decode_request,
};
use crate::shard::reader::{PageBackend, RequestLsn, TimelineReader};

/// Stands where version 2 does not send a header.
pub(super) const ANY_HEADER: Header =
    Header { id: 0, lsn: RequestLsn { request: Lsn::INVALID, not_modified_since: Lsn::INVALID } };

/// What becomes of a request.
pub(super) enum Reply {
    Answer(Request, Answer),
    Malformed(RequestError),
    Shutdown,
}

/// Carries one request out.
pub(super) async fn handle<B: PageBackend>(
    service: &Service<B>,
    timeline: &B::Timeline,
    version: Version,
    message: &[u8],
) -> Reply {
    let request = match decode_request(version, message) {
        Ok(request) => request,
        Err(error) => return Reply::Malformed(error),
    };
    let lsn = request.header.lsn;
    let counters = &service.counters;
    let result = match request.query {
        Query::GetPage { rel, block } => {
            count(&counters.get_page_requests);
            let start = (service.now)();
            let page = timeline.get_page(rel, block, lsn).await;
            let spent = (service.now)().saturating_sub(start);
            counters.get_page_time.set(counters.get_page_time.get() + spent);
            page.map(Answer::GetPage)
        }
        Query::Exists { rel } => timeline.rel_exists(rel, lsn).await.map(Answer::Exists),
        Query::Nblocks { rel } => timeline.rel_size(rel, lsn).await.map(Answer::Nblocks),
        Query::DbSize { db } => timeline.db_size(db, lsn).await.map(Answer::DbSize),
        Query::GetSlruSegment { kind, segment } => {
            timeline.slru_segment(kind, segment, lsn).await.map(Answer::GetSlruSegment)
        }
    };
    if !matches!(request.query, Query::GetPage { .. }) {
        count(&counters.other_requests);
    }
    match result {
        Ok(answer) => Reply::Answer(request, answer),
        Err(error) if error.kind() == Kind::Shutdown => Reply::Shutdown,
        Err(error) => {
            count(&counters.request_errors);
            Reply::Answer(request, Answer::Error(error.to_string()))
        }
    }
}

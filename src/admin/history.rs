//! Routes that ask about a timeline's history and contents, hold it and cut it.

use axum::Router;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Json, Path, Query, State};
use axum::routing::{get, put};
use serde::Deserialize;

use super::routes::{AdminState, ApiError, bad_request, told};
use crate::base::{Lsn, TenantShardId, TimelineId, Timestamp};
use crate::server::mesh::Control;
use crate::server::router::owner;
use crate::shard::gc::GcRequest;
use crate::shard::history::{HistoryReply, HistoryRequest};

/// The routes; see the table in [`super::routes`].
pub(super) fn routes() -> Router<AdminState> {
    let at = |name| format!("/v1/tenant/{{tenant}}/timeline/{{timeline}}/{name}");
    Router::new()
        .route(&at("get_lsn_by_timestamp"), get(lsn_by_timestamp))
        .route(&at("get_timestamp_of_lsn"), get(timestamp_of_lsn))
        .route(&at("lsn_lease"), get(leases).post(lease))
        .route(&at("do_gc"), put(gc))
        .route(&at("keyspace"), get(keyspace))
}

/// Tenant and timeline of the path.
type Names = Path<(String, String)>;

pub(super) type Reply = Result<Json<HistoryReply>, ApiError>;

pub(super) async fn ask(
    state: &AdminState,
    names: &(String, String),
    request: HistoryRequest,
) -> Reply {
    let tenant: TenantShardId = names.0.parse().map_err(bad_request)?;
    let timeline: TimelineId = names.1.parse().map_err(bad_request)?;
    let core = owner(&tenant, state.mesh.cores());
    let question = |reply| Control::History(tenant, timeline, request, reply);
    match state.ask(core, question).await? {
        Ok(reply) => Ok(Json(reply)),
        Err(error) => Err(told(state, names, error).await),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TimeQuery {
    timestamp: Timestamp,
}

async fn lsn_by_timestamp(
    State(state): State<AdminState>,
    Path(names): Names,
    query: Result<Query<TimeQuery>, QueryRejection>,
) -> Reply {
    let Query(query) = query.map_err(|error| bad_request(error.body_text()))?;
    ask(&state, &names, HistoryRequest::LsnByTimestamp(query.timestamp)).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LsnQuery {
    lsn: Lsn,
}

async fn timestamp_of_lsn(
    State(state): State<AdminState>,
    Path(names): Names,
    query: Result<Query<LsnQuery>, QueryRejection>,
) -> Reply {
    let Query(query) = query.map_err(|error| bad_request(error.body_text()))?;
    ask(&state, &names, HistoryRequest::TimestampOfLsn(query.lsn)).await
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyspaceQuery {
    at_lsn: Option<Lsn>,
}

async fn keyspace(
    State(state): State<AdminState>,
    Path(names): Names,
    query: Result<Query<KeyspaceQuery>, QueryRejection>,
) -> Reply {
    let Query(query) = query.map_err(|error| bad_request(error.body_text()))?;
    ask(&state, &names, HistoryRequest::Keyspace(query.at_lsn)).await
}

async fn leases(State(state): State<AdminState>, Path(names): Names) -> Reply {
    ask(&state, &names, HistoryRequest::Leases).await
}

/// Body of a POST that takes a lease.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewLease {
    lsn: Lsn,
    seconds: Option<u64>,
}

async fn lease(
    State(state): State<AdminState>,
    Path(names): Names,
    body: Result<Json<NewLease>, JsonRejection>,
) -> Reply {
    let Json(body) = body.map_err(|error| bad_request(error.body_text()))?;
    ask(&state, &names, HistoryRequest::Lease(body.lsn, body.seconds)).await
}

async fn gc(
    State(state): State<AdminState>,
    Path(names): Names,
    body: Result<Json<GcRequest>, JsonRejection>,
) -> Reply {
    let Json(body) = body.map_err(|error| bad_request(error.body_text()))?;
    ask(&state, &names, HistoryRequest::Gc(body)).await
}

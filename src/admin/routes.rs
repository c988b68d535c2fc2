//! Routes of the admin API.
//!
//! | method and path | does |
//! |---|---|
//! | GET `/v1/status` | version, cores, number of timelines |
//! | GET `/v1/tenant` | tenants with their timelines and settings |
//! | POST `/v1/tenant` | makes a tenant: `{"tenant": …, "config": {…}}` |
//! | GET `/v1/tenant/{tenant}` | one tenant: settings, ids of its timelines |
//! | DELETE `/v1/tenant/{tenant}` | removes a tenant with all its timelines |
//! | PUT `/v1/tenant/{tenant}/config` | replaces the tenant's settings; what is left out follows the node |
//! | GET `/v1/tenant/{tenant}/timeline` | timelines of a tenant |
//! | POST `/v1/tenant/{tenant}/timeline` | makes a timeline: `{"timeline": …, "source": …}` |
//! | POST the same | makes a branch: `{"timeline": …, "branch": {"ancestor": …, "lsn": …}}` |
//! | GET `/v1/tenant/{tenant}/timeline/{timeline}` | one timeline |
//! | DELETE the same | removes a timeline that has no branches |
//! | PUT `/v1/tenant/{tenant}/timeline/{timeline}/archive` | no WAL, no reads but by branches |
//! | PUT `/v1/tenant/{tenant}/timeline/{timeline}/unarchive` | takes that back |
//! | PUT `/v1/tenant/{tenant}/timeline/{timeline}/detach_ancestor` | starts to copy what the branch needs; done when `ancestor` is null |
//! | PUT `/v1/tenant/{tenant}/timeline/{timeline}/checkpoint` | writes memory to layer files |
//! | GET `…/{timeline}/get_lsn_by_timestamp?timestamp=` | `{"lsn", "kind"}`: the LSN of a time |
//! | GET `…/{timeline}/get_timestamp_of_lsn?lsn=` | `{"timestamp"}`: when the last commit was |
//! | GET `…/{timeline}/lsn_lease` | `{"gc_cutoff_lsn", "leases"}` |
//! | POST `…/{timeline}/lsn_lease` | takes or prolongs a lease: `{"lsn": …, "seconds": …}` |
//! | GET `…/{timeline}/keyspace?at_lsn=` | `{"keys", "sparse_keys", "at_lsn"}`: ranges of the keys of pages |
//! | PUT `…/{timeline}/do_gc` | collects garbage: `{"gc_horizon_bytes": …, "pitr_interval_s": …}` |
//! | GET `/v1/redo` | wal-redo processes by core: tenant, pid, age, requests, last redo |
//! | GET `/metrics` | Prometheus text |
//!
//! Points in time are RFC 3339. Errors are `{"error": "what happened"}` with 400, 404, 409, 500 or 503,
//! and the same once more as `msg`, where clients of other pageservers look for it. They also send
//! bodies (`null`) with GET and DELETE, which are read and not looked at. What replies have for
//! them: [`super::wire`].

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::rejection::JsonRejection;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Json, Path, Query, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use futures_channel::oneshot;
use serde::{Deserialize, Serialize};

use super::{history, metrics, wire};
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
use crate::limits::{ADMIN_BODY_BYTES_MAX, ADMIN_LOOK_MS, CONTROL_REPLY_MS_MAX};
use crate::server::mesh::{Control, Mesh, Message};
use crate::server::router::owner;
use crate::shard::control::{
    Change, ChildStatus, ControlError, CoreMetrics, CreateBranch, CreateTimeline, TenantInfo,
    TimelineInfo, TimelineSource,
};
use crate::shard::history::HistoryRequest;
use crate::shard::index::WalSourceConfig;
use crate::shard::tenant_config::TenantConfig;

/// What the routes need.
#[derive(Clone)]
pub struct AdminState {
    /// The cores' inboxes.
    pub mesh: Mesh,
    /// Says how many bytes of removed files the node keeps; blocks.
    pub spare_bytes: Arc<dyn Fn() -> u64 + Send + Sync>,
}

/// An error as the client gets it.
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": self.message, "msg": self.message });
        (self.status, Json(body)).into_response()
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> Self {
        let status = match error.kind {
            Kind::Invalid => StatusCode::CONFLICT,
            Kind::Retry | Kind::Shutdown => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Corrupt => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError { status, message: error.message }
    }
}

pub(super) fn bad_request(message: impl ToString) -> ApiError {
    ApiError { status: StatusCode::BAD_REQUEST, message: message.to_string() }
}

fn not_found(message: impl ToString) -> ApiError {
    ApiError { status: StatusCode::NOT_FOUND, message: message.to_string() }
}

fn unavailable(message: impl ToString) -> ApiError {
    ApiError { status: StatusCode::SERVICE_UNAVAILABLE, message: message.to_string() }
}

impl AdminState {
    /// Asks one core and waits for its reply.
    pub(super) async fn ask<T>(
        &self,
        core: usize,
        question: impl FnOnce(oneshot::Sender<T>) -> Control,
    ) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        self.mesh.send(core, Message::Control(question(reply))).map_err(unavailable)?;
        let limit = Duration::from_millis(CONTROL_REPLY_MS_MAX);
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(_)) => Err(unavailable(format!("core {core} has stopped"))),
            Err(_) => Err(unavailable(format!("core {core} did not answer in time"))),
        }
    }

    async fn change(&self, tenant: &TenantShardId, change: Change) -> Result<(), ApiError> {
        let core = owner(tenant, self.mesh.cores());
        Ok(self.ask(core, |reply| Control::Change(change, reply)).await??)
    }

    async fn timelines(&self) -> Result<Vec<TimelineInfo>, ApiError> {
        let mut all = Vec::new();
        for core in 0..self.mesh.cores() {
            all.extend(self.ask(core, Control::Timelines).await?);
        }
        Ok(all)
    }
}

/// Serves the admin API until `stop` resolves.
pub async fn serve(
    listener: tokio::net::TcpListener,
    state: AdminState,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    axum::serve(listener, router(state)).with_graceful_shutdown(stop).await
}

fn router(state: AdminState) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/tenant", get(tenants).post(create_tenant))
        .route("/v1/tenant/{tenant}", get(tenant).delete(delete_tenant))
        .route("/v1/tenant/{tenant}/config", put(configure_tenant))
        .route("/v1/tenant/{tenant}/timeline", get(tenant_timelines).post(create_timeline))
        .route("/v1/tenant/{tenant}/timeline/{timeline}", get(timeline).delete(delete_timeline))
        .route("/v1/tenant/{tenant}/timeline/{timeline}/archive", put(archive))
        .route("/v1/tenant/{tenant}/timeline/{timeline}/unarchive", put(unarchive))
        .route("/v1/tenant/{tenant}/timeline/{timeline}/detach_ancestor", put(detach_ancestor))
        .route("/v1/tenant/{tenant}/timeline/{timeline}/checkpoint", put(checkpoint))
        .merge(history::routes())
        .route("/v1/redo", get(redo_children))
        .route("/metrics", get(metrics_text))
        .fallback(|| async { not_found("there is no such path; see /v1/status, /v1/tenant") })
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(ADMIN_BODY_BYTES_MAX))
        .layer(from_fn(drop_body))
        .with_state(state)
}

/// The allowed methods stand in the header `allow`.
async fn wrong_method(method: Method, path: Uri) -> ApiError {
    let message = format!("{} is nothing to {method}; see the header allow", path.path());
    ApiError { status: StatusCode::METHOD_NOT_ALLOWED, message }
}

/// Takes the body of a request that means nothing by it off the connection, so that it is not in
/// the way of the next request.
async fn drop_body(request: Request, next: Next) -> Response {
    if !matches!(*request.method(), Method::GET | Method::HEAD | Method::DELETE) {
        return next.run(request).await;
    }
    let (head, body) = request.into_parts();
    match to_bytes(body, ADMIN_BODY_BYTES_MAX).await {
        Ok(_) => next.run(Request::from_parts(head, Body::empty())).await,
        Err(error) => bad_request(format!("the body of the request: {error}")).into_response(),
    }
}

#[derive(Serialize)]
struct Status {
    version: &'static str,
    cores: usize,
    timelines: usize,
}

async fn status(State(state): State<AdminState>) -> Result<Json<Status>, ApiError> {
    let timelines = state.timelines().await?.len();
    let cores = state.mesh.cores();
    Ok(Json(Status { version: env!("CARGO_PKG_VERSION"), cores, timelines }))
}

async fn tenants(State(state): State<AdminState>) -> Result<Json<Vec<wire::Tenant>>, ApiError> {
    let mut by_tenant: BTreeMap<TenantShardId, Vec<TimelineInfo>> = BTreeMap::new();
    for info in state.timelines().await? {
        by_tenant.entry(info.tenant).or_default().push(info);
    }
    let mut list = Vec::new();
    for core in 0..state.mesh.cores() {
        for info in state.ask(core, Control::Tenants).await? {
            let timelines = by_tenant.remove(&info.tenant).unwrap_or_default();
            list.push(wire::Tenant::new(info, timelines));
        }
    }
    list.sort_unstable_by_key(wire::Tenant::id);
    Ok(Json(list))
}

async fn find_tenant(state: &AdminState, tenant: &str) -> Result<TenantInfo, ApiError> {
    let tenant: TenantShardId = tenant.parse().map_err(bad_request)?;
    let core = owner(&tenant, state.mesh.cores());
    let all = state.ask(core, Control::Tenants).await?;
    let found = all.into_iter().find(|info| info.tenant == tenant);
    found.ok_or_else(|| not_found(format!("tenant {tenant} is not on this node")))
}

async fn tenant(
    State(state): State<AdminState>,
    Path(tenant): Path<String>,
) -> Result<Json<wire::TenantDetails>, ApiError> {
    let info = find_tenant(&state, &tenant).await?;
    let timelines = of_tenant(&state, &tenant).await?;
    Ok(Json(wire::TenantDetails::new(info, &timelines)))
}

/// Body of a POST that makes a tenant.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTenant {
    tenant: TenantShardId,
    #[serde(default)]
    config: TenantConfig,
}

async fn create_tenant(
    State(state): State<AdminState>,
    body: Result<Json<NewTenant>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(NewTenant { tenant, config }) =
        body.map_err(|error| bad_request(error.body_text()))?;
    config.check().map_err(bad_request)?;
    state.change(&tenant, Change::Tenant { tenant, config, create: true }).await?;
    Ok(StatusCode::CREATED)
}

async fn configure_tenant(
    State(state): State<AdminState>,
    Path(tenant): Path<String>,
    body: Result<Json<TenantConfig>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(config) = body.map_err(|error| bad_request(error.body_text()))?;
    config.check().map_err(bad_request)?;
    let TenantInfo { tenant, .. } = find_tenant(&state, &tenant).await?;
    state.change(&tenant, Change::Tenant { tenant, config, create: false }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn delete_tenant(
    State(state): State<AdminState>,
    Path(tenant): Path<String>,
) -> Result<StatusCode, ApiError> {
    let TenantInfo { tenant, .. } = find_tenant(&state, &tenant).await?;
    state.change(&tenant, Change::DeleteTenant(tenant)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn of_tenant(state: &AdminState, tenant: &str) -> Result<Vec<TimelineInfo>, ApiError> {
    let TenantInfo { tenant, core, .. } = find_tenant(state, tenant).await?;
    let mut found = state.ask(core, Control::Timelines).await?;
    found.retain(|info| info.tenant == tenant);
    Ok(found)
}

async fn tenant_timelines(
    State(state): State<AdminState>,
    Path(tenant): Path<String>,
) -> Result<Json<Vec<wire::Timeline>>, ApiError> {
    let timelines = of_tenant(&state, &tenant).await?;
    Ok(Json(timelines.into_iter().map(wire::Timeline::new).collect()))
}

async fn find_timeline(
    state: &AdminState,
    (tenant, timeline): (String, String),
) -> Result<TimelineInfo, ApiError> {
    let id: TimelineId = timeline.parse().map_err(bad_request)?;
    let found = of_tenant(state, &tenant).await?.into_iter().find(|info| info.timeline == id);
    found.ok_or_else(|| not_found(format!("timeline {id} of tenant {tenant} is not on this node")))
}

/// Other parameters that clients send (`include-non-incremental-logical-size`) change nothing.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct TimelineQuery {
    #[serde(default)]
    force_await_logical_size: bool,
}

async fn timeline(
    State(state): State<AdminState>,
    Path(names): Path<(String, String)>,
    query: Result<Query<TimelineQuery>, QueryRejection>,
) -> Result<Json<wire::Timeline>, ApiError> {
    let Query(query) = query.map_err(|error| bad_request(error.body_text()))?;
    let mut info = find_timeline(&state, names.clone()).await?;
    if query.force_await_logical_size && info.logical_bytes.is_none() {
        // Opens a timeline that is closed; each look at an open one asks for its size.
        let _ = history::ask(&state, &names, HistoryRequest::Leases).await?;
        let mut waited_ms = 0;
        while info.logical_bytes.is_none() && waited_ms < CONTROL_REPLY_MS_MAX {
            tokio::time::sleep(Duration::from_millis(ADMIN_LOOK_MS)).await;
            waited_ms += ADMIN_LOOK_MS;
            info = find_timeline(&state, names.clone()).await?;
        }
    }
    Ok(Json(wire::Timeline::new(info)))
}

/// Body of a POST that makes a timeline: exactly one of `source` and `branch` is given.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTimeline {
    timeline: TimelineId,
    source: Option<TimelineSource>,
    branch: Option<NewBranch>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NewBranch {
    ancestor: TimelineId,
    lsn: Option<Lsn>,
    source: Option<WalSourceConfig>,
}

async fn create_timeline(
    State(state): State<AdminState>,
    Path(tenant): Path<String>,
    body: Result<Json<NewTimeline>, JsonRejection>,
) -> Result<StatusCode, ApiError> {
    let Json(NewTimeline { timeline, source, branch }) =
        body.map_err(|error| bad_request(error.body_text()))?;
    match (source, branch) {
        (Some(source), None) => {
            let tenant: TenantShardId = tenant.parse().map_err(bad_request)?;
            source.check().map_err(bad_request)?;
            let request = CreateTimeline { tenant, timeline, source };
            let core = owner(&tenant, state.mesh.cores());
            state.ask(core, |reply| Control::CreateTimeline(request, reply)).await??;
            Ok(StatusCode::ACCEPTED)
        }
        (None, Some(NewBranch { ancestor, lsn, source })) => {
            if let Some(source) = &source {
                source.check().map_err(bad_request)?;
            }
            let names = (tenant, ancestor.to_string());
            let TimelineInfo { tenant, .. } = find_timeline(&state, names).await?;
            let request = CreateBranch { tenant, timeline, ancestor, lsn, source };
            state.change(&tenant, Change::Branch(request)).await?;
            Ok(StatusCode::CREATED)
        }
        _ => Err(bad_request("give either \"source\" or \"branch\"")),
    }
}

async fn delete_timeline(
    State(state): State<AdminState>,
    Path(names): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let TimelineInfo { tenant, timeline, .. } = find_timeline(&state, names).await?;
    state.change(&tenant, Change::DeleteTimeline(tenant, timeline)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn archive(
    State(state): State<AdminState>,
    Path(names): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let TimelineInfo { tenant, timeline, .. } = find_timeline(&state, names).await?;
    state.change(&tenant, Change::Archive(tenant, timeline, true)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn unarchive(
    State(state): State<AdminState>,
    Path(names): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let TimelineInfo { tenant, timeline, .. } = find_timeline(&state, names).await?;
    state.change(&tenant, Change::Archive(tenant, timeline, false)).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn detach_ancestor(
    State(state): State<AdminState>,
    Path(names): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let TimelineInfo { tenant, timeline, .. } = find_timeline(&state, names).await?;
    state.change(&tenant, Change::DetachAncestor(tenant, timeline)).await?;
    Ok(StatusCode::ACCEPTED)
}

/// What is said when something about a timeline failed: if there is none, that.
pub(super) async fn told(
    state: &AdminState,
    names: &(String, String),
    error: ControlError,
) -> ApiError {
    match find_timeline(state, names.clone()).await {
        Err(missing) if missing.status == StatusCode::NOT_FOUND => missing,
        Ok(_) | Err(_) => error.into(),
    }
}

async fn checkpoint(
    State(state): State<AdminState>,
    Path(names): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let tenant: TenantShardId = names.0.parse().map_err(bad_request)?;
    let timeline: TimelineId = names.1.parse().map_err(bad_request)?;
    let core = owner(&tenant, state.mesh.cores());
    match state.ask(core, |reply| Control::Checkpoint(tenant, timeline, reply)).await? {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(error) => Err(told(&state, &names, error).await),
    }
}

/// The wal-redo processes of one core that are bound to a tenant.
#[derive(Serialize)]
struct RedoChildren {
    core: usize,
    /// Spares included.
    alive: u64,
    children: Vec<ChildStatus>,
}

async fn redo_children(
    State(state): State<AdminState>,
) -> Result<Json<Vec<RedoChildren>>, ApiError> {
    let mut all = Vec::new();
    for core in 0..state.mesh.cores() {
        let CoreMetrics { redo_children_alive: alive, redo_children: children, .. } =
            state.ask(core, Control::Metrics).await?;
        all.push(RedoChildren { core, alive, children });
    }
    Ok(Json(all))
}

async fn metrics_text(State(state): State<AdminState>) -> Result<Response, ApiError> {
    let mut cores: Vec<CoreMetrics> = Vec::new();
    for core in 0..state.mesh.cores() {
        cores.push(state.ask(core, Control::Metrics).await?);
    }
    let timelines = state.timelines().await?;
    let spare_bytes = state.spare_bytes.clone();
    let spare_bytes =
        tokio::task::spawn_blocking(move || spare_bytes()).await.map_err(unavailable)?;
    let text = metrics::text(&cores, &timelines, spare_bytes);
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([("content-type", content_type)], text).into_response())
}

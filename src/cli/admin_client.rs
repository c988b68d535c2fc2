//! The commands' end of the admin API.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::base::{Lsn, TenantShardId, TimelineId};
use crate::shard::control::{TenantInfo, TimelineInfo, TimelineSource};
use crate::shard::gc::{GcReport, GcRequest};
use crate::shard::index::WalSourceConfig;
use crate::shard::leases::Lease;
use crate::shard::tenant_config::TenantConfig;

/// Time to get a connection.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);

/// Time for an answer that needs no work.
const STATUS_TIME_MAX: Duration = Duration::from_secs(5);

/// Why a command failed. The text is for the operator.
pub type CommandError = Box<dyn std::error::Error + Send + Sync>;

/// Talks to one node's admin API; blocks the calling thread.
pub struct AdminClient {
    base: String,
    client: reqwest::Client,
    runtime: tokio::runtime::Runtime,
}

impl AdminClient {
    /// A client for the node at `base`, such as `http://127.0.0.1:9898`.
    pub fn new(base: &str) -> Result<Self, CommandError> {
        let is_http = |url: reqwest::Url| url.scheme() == "http" || url.scheme() == "https";
        if !base.parse().is_ok_and(is_http) {
            return Err(format!("--admin {base}: write it as a URL: http://HOST:PORT").into());
        }
        let base = base.trim_end_matches('/').to_owned();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client =
            reqwest::Client::builder().no_proxy().connect_timeout(CONNECT_TIME_MAX).build()?;
        Ok(AdminClient { base, client, runtime })
    }

    fn send(&self, request: reqwest::RequestBuilder) -> Result<Vec<u8>, CommandError> {
        self.runtime.block_on(async {
            let unreachable = |error: reqwest::Error| {
                format!("the node at {} cannot be reached: {error}; is it running?", self.base)
            };
            let response = request.send().await.map_err(unreachable)?;
            let status = response.status();
            let body = response.bytes().await?.to_vec();
            if status.is_success() {
                return Ok(body);
            }
            let parsed: Option<Value> = serde_json::from_slice(&body).ok();
            let message = parsed.as_ref().and_then(|value| value.get("error")?.as_str());
            Err(message.map_or_else(|| format!("the node answered {status}"), str::to_owned).into())
        })
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, CommandError> {
        let body = self.send(self.client.get(format!("{}{path}", self.base)))?;
        Ok(serde_json::from_slice(&body)?)
    }

    /// Asks for the node's status.
    ///
    /// # Errors
    /// The node does not answer within [`STATUS_TIME_MAX`].
    pub fn status(&self) -> Result<Value, CommandError> {
        let request = self.client.get(format!("{}/v1/status", self.base)).timeout(STATUS_TIME_MAX);
        Ok(serde_json::from_slice(&self.send(request)?)?)
    }

    /// All timelines of the node.
    pub fn timelines(&self) -> Result<Vec<TimelineInfo>, CommandError> {
        #[derive(serde::Deserialize)]
        struct Tenant {
            timelines: Vec<TimelineInfo>,
        }
        let tenants: Vec<Tenant> = self.get("/v1/tenant")?;
        Ok(tenants.into_iter().flat_map(|tenant| tenant.timelines).collect())
    }

    /// One timeline.
    pub fn timeline(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<TimelineInfo, CommandError> {
        self.get(&format!("/v1/tenant/{tenant}/timeline/{timeline}"))
    }

    /// Starts to make a timeline.
    pub fn create_timeline(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        source: &TimelineSource,
    ) -> Result<(), CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline", self.base);
        let body = serde_json::json!({ "timeline": timeline, "source": source });
        self.send(self.client.post(url).json(&body)).map(|_| ())
    }

    /// Makes a branch of `ancestor`, at `lsn` or at its end; `source` gives the branch WAL of its
    /// own.
    pub fn create_branch(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        ancestor: TimelineId,
        lsn: Option<Lsn>,
        source: Option<&WalSourceConfig>,
    ) -> Result<(), CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline", self.base);
        let branch = serde_json::json!({ "ancestor": ancestor, "lsn": lsn, "source": source });
        let body = serde_json::json!({ "timeline": timeline, "branch": branch });
        self.send(self.client.post(url).json(&body)).map(|_| ())
    }

    /// Timelines of one tenant.
    pub fn timelines_of(&self, tenant: TenantShardId) -> Result<Vec<TimelineInfo>, CommandError> {
        self.get(&format!("/v1/tenant/{tenant}/timeline"))
    }

    /// Removes a timeline.
    pub fn delete_timeline(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<(), CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline/{timeline}", self.base);
        self.send(self.client.delete(url)).map(|_| ())
    }

    /// One of `archive`, `unarchive`, `detach_ancestor`.
    pub fn change_timeline(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        what: &str,
    ) -> Result<(), CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline/{timeline}/{what}", self.base);
        self.send(self.client.put(url)).map(|_| ())
    }

    /// All tenants.
    pub fn tenants(&self) -> Result<Vec<TenantInfo>, CommandError> {
        self.get("/v1/tenant")
    }

    /// One tenant.
    pub fn tenant(&self, tenant: TenantShardId) -> Result<TenantInfo, CommandError> {
        self.get(&format!("/v1/tenant/{tenant}"))
    }

    /// Makes a tenant.
    pub fn create_tenant(
        &self,
        tenant: TenantShardId,
        config: &TenantConfig,
    ) -> Result<(), CommandError> {
        let body = serde_json::json!({ "tenant": tenant, "config": config });
        let url = format!("{}/v1/tenant", self.base);
        self.send(self.client.post(url).json(&body)).map(|_| ())
    }

    /// Replaces the settings of a tenant.
    pub fn configure_tenant(
        &self,
        tenant: TenantShardId,
        config: &TenantConfig,
    ) -> Result<(), CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/config", self.base);
        self.send(self.client.put(url).json(config)).map(|_| ())
    }

    /// Removes a tenant with all its timelines.
    pub fn delete_tenant(&self, tenant: TenantShardId) -> Result<(), CommandError> {
        let url = format!("{}/v1/tenant/{tenant}", self.base);
        self.send(self.client.delete(url)).map(|_| ())
    }

    /// Writes a timeline's memory to layer files.
    pub fn checkpoint(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<(), CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline/{timeline}/checkpoint", self.base);
        self.send(self.client.put(url)).map(|_| ())
    }

    /// Answers of a timeline's history: `path` is what follows the timeline's.
    pub fn history<T: DeserializeOwned>(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        path: &str,
        query: &[(&str, String)],
    ) -> Result<T, CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline/{timeline}/{path}", self.base);
        Ok(serde_json::from_slice(&self.send(self.client.get(url).query(query))?)?)
    }

    /// Takes or prolongs a lease.
    pub fn lease(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        lsn: Lsn,
        seconds: Option<u64>,
    ) -> Result<Lease, CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline/{timeline}/lsn_lease", self.base);
        let body = serde_json::json!({ "lsn": lsn, "seconds": seconds });
        Ok(serde_json::from_slice(&self.send(self.client.post(url).json(&body))?)?)
    }

    /// Collects a timeline's garbage.
    pub fn collect_garbage(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        request: GcRequest,
    ) -> Result<GcReport, CommandError> {
        let url = format!("{}/v1/tenant/{tenant}/timeline/{timeline}/do_gc", self.base);
        Ok(serde_json::from_slice(&self.send(self.client.put(url).json(&request))?)?)
    }

    /// The wal-redo processes, by core, as the node describes them.
    pub fn redo(&self) -> Result<Value, CommandError> {
        self.get("/v1/redo")
    }

    /// The page of metrics.
    pub fn metrics(&self) -> Result<String, CommandError> {
        let body = self.send(self.client.get(format!("{}/metrics", self.base)))?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}

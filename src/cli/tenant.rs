//! `pgstrata tenant`: make, remove and configure tenants of a running node.

use super::admin_client::{AdminClient, CommandError};
use super::attach::random_id;
use crate::base::{TenantId, TenantShardId};
use crate::shard::tenant_config::TenantConfig;

/// `pgstrata tenant`.
#[derive(clap::Args, Debug)]
pub struct TenantArgs {
    #[command(subcommand)]
    command: TenantCommand,
}

#[derive(clap::Subcommand, Debug)]
enum TenantCommand {
    /// Make a tenant without timelines.
    Create(CreateArgs),
    /// Remove a tenant with all its timelines.
    Delete(OneArgs),
    /// Show a tenant's settings, or change some.
    Config(ConfigArgs),
    /// Show all tenants.
    List(ListArgs),
}

#[derive(clap::Args, Debug)]
struct ListArgs {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    admin: String,
}

#[derive(clap::Args, Debug)]
struct OneArgs {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    admin: String,
    /// Tenant, 32 hexadecimal digits.
    #[arg(long)]
    tenant: TenantShardId,
}

#[derive(clap::Args, Debug)]
struct CreateArgs {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    admin: String,
    /// Tenant, 32 hexadecimal digits; a random one if not given.
    #[arg(long)]
    tenant: Option<TenantShardId>,
    /// A setting of the tenant over the node's, such as checkpoint_timeout_s=60.
    #[arg(short = 'c', value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

#[derive(clap::Args, Debug)]
struct ConfigArgs {
    #[command(flatten)]
    target: OneArgs,
    /// Give the tenant a setting of its own; an empty value takes it back to the node's.
    #[arg(short = 'c', value_name = "KEY=VALUE")]
    settings: Vec<String>,
}

/// Runs `pgstrata tenant`.
pub fn run(args: TenantArgs) -> Result<(), CommandError> {
    match args.command {
        TenantCommand::Create(args) => {
            let tenant =
                args.tenant.unwrap_or_else(|| TenantShardId::unsharded(TenantId(random_id())));
            let config = with_settings(TenantConfig::default(), &args.settings)?;
            AdminClient::new(&args.admin)?.create_tenant(tenant, &config)?;
            println!("tenant {tenant}");
            Ok(())
        }
        TenantCommand::Delete(args) => AdminClient::new(&args.admin)?.delete_tenant(args.tenant),
        TenantCommand::Config(args) => config(&args),
        TenantCommand::List(args) => list(&args),
    }
}

fn config(args: &ConfigArgs) -> Result<(), CommandError> {
    let (client, tenant) = (AdminClient::new(&args.target.admin)?, args.target.tenant);
    if !args.settings.is_empty() {
        let config = with_settings(client.tenant(tenant)?.config, &args.settings)?;
        client.configure_tenant(tenant, &config)?;
    }
    let info = client.tenant(tenant)?;
    let own = serde_json::to_value(info.config)?;
    let all = serde_json::to_value(info.effective_config)?;
    for (key, value) in all.as_object().into_iter().flatten() {
        let whose = if own.get(key).is_some() { "tenant" } else { "node" };
        println!("{key:<28} {value:>14}   {whose}");
    }
    Ok(())
}

fn list(args: &ListArgs) -> Result<(), CommandError> {
    let tenants = AdminClient::new(&args.admin)?.tenants()?;
    println!("{:<37} {:>4} {:>9}", "tenant", "core", "timelines");
    for info in tenants {
        println!("{:<37} {:>4} {:>9}", info.tenant.to_string(), info.core, info.timeline_count);
        if let Some(error) = info.error {
            println!("  {error}");
        }
    }
    Ok(())
}

/// `config` with each `key=value` in it; a misspelt key is an error.
fn with_settings(config: TenantConfig, pairs: &[String]) -> Result<TenantConfig, CommandError> {
    let mut object = serde_json::to_value(config)?;
    for pair in pairs {
        let (key, value) = pair.split_once('=').ok_or(format!("-c {pair}: write KEY=VALUE"))?;
        let value = match value.trim() {
            "" => serde_json::Value::Null,
            text => {
                serde_json::from_str(text).map_err(|_| format!("-c {pair}: that is no number"))?
            }
        };
        if let Some(fields) = object.as_object_mut() {
            fields.insert(key.trim().to_owned(), value);
        }
    }
    let config: TenantConfig =
        serde_json::from_value(object).map_err(|error| format!("settings: {error}"))?;
    config.check()?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_added_and_taken_back() {
        let given = |pairs: &[&str], before| {
            let owned: Vec<String> = pairs.iter().map(|pair| (*pair).to_owned()).collect();
            with_settings(before, &owned).map_err(|error| error.to_string())
        };
        let none = TenantConfig::default();
        let some = given(&["checkpoint_timeout_s=7", "wait_lsn_timeout_ms = 5"], none).unwrap();
        assert_eq!((some.checkpoint_timeout_s, some.wait_lsn_timeout_ms), (Some(7), Some(5)));
        let less = given(&["checkpoint_timeout_s="], some).unwrap();
        assert_eq!((less.checkpoint_timeout_s, less.wait_lsn_timeout_ms), (None, Some(5)));
        assert!(given(&["chekpoint=1"], none).unwrap_err().contains("chekpoint"));
        assert!(given(&["checkpoint_timeout_s=soon"], none).unwrap_err().contains("no number"));
        assert!(given(&["checkpoint_timeout_s"], none).unwrap_err().contains("KEY=VALUE"));
    }
}

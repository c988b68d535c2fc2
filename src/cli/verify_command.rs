//! `pgstrata verify`: compares a data directory with what a node serves.

use std::path::PathBuf;

use super::admin_client::CommandError;
use super::page_client::PageClient;
use super::verify::verify;
use super::verify_files::scan;
use crate::base::{Lsn, TenantId, TimelineId};

/// `pgstrata verify`.
#[derive(clap::Args, Debug)]
pub struct VerifyArgs {
    /// Data directory of a PostgreSQL 15 that is shut down and stands exactly at the LSN.
    #[arg(long, value_name = "DIR")]
    pgdata: PathBuf,
    /// Address of the node's page service.
    #[arg(long, default_value = "127.0.0.1:6400")]
    node: String,
    /// Tenant.
    #[arg(long)]
    tenant: TenantId,
    /// Timeline.
    #[arg(long)]
    timeline: TimelineId,
    /// LSN to read at.
    #[arg(long)]
    lsn: Lsn,
    /// Leave `pd_checksum` out: the cluster has data checksums.
    #[arg(long)]
    ignore_checksum: bool,
}

/// Compares every block of every fork; fails if any differs.
pub fn run(args: VerifyArgs) -> Result<(), CommandError> {
    let oracle = scan(&args.pgdata)?;
    let mut client = PageClient::connect(&args.node, args.tenant, args.timeline, args.lsn)?;
    let report = verify(&mut client, &oracle, args.ignore_checksum, &[])?;
    print!("{}", report.table());
    if report.is_equal() { Ok(()) } else { Err("the node differs from the data directory".into()) }
}

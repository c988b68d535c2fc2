//! `pgstrata verify`: compares a data directory with what a node serves.

use std::path::PathBuf;

use super::admin_client::CommandError;
use super::page_client::PageClient;
use super::verify::verify;
use super::verify_files::scan;
use crate::base::{Lsn, TenantId, TimelineId};
use crate::wal::control_file::ControlFile;

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

/// What is compared must be a cluster at rest; a directory without any would be equal to anything.
fn check_cluster(args: &VerifyArgs) -> Result<(), CommandError> {
    let dir = args.pgdata.display();
    let control = std::fs::read(args.pgdata.join("global/pg_control"))
        .map_err(|error| format!("{dir} is no data directory: global/pg_control: {error}"))?;
    let control = ControlFile::parse(&control).map_err(|error| format!("{dir}: {error}"))?;
    if !control.state.is_shut_down() {
        let state = control.state;
        let problem = "was not shut down; stop it with pg_ctl stop -m fast";
        return Err(format!("{dir}: the server (state {state:?}) {problem}").into());
    }
    if control.data_checksum_version != 0 && !args.ignore_checksum {
        let problem = "has data checksums, which a node does not keep; give --ignore-checksum";
        return Err(format!("{dir}: the cluster {problem}").into());
    }
    Ok(())
}

/// Compares every block of every fork; fails if any differs.
pub fn run(args: VerifyArgs) -> Result<(), CommandError> {
    check_cluster(&args)?;
    let oracle = scan(&args.pgdata)?;
    let mut client = PageClient::connect(&args.node, args.tenant, args.timeline, args.lsn)?;
    let report = verify(&mut client, &oracle, args.ignore_checksum, &[])?;
    print!("{}", report.table());
    if report.is_equal() { Ok(()) } else { Err("the node differs from the data directory".into()) }
}

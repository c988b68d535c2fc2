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
    ///
    /// Bytes are compared, also those that no WAL record tells: hint bits, which queries set, and
    /// what lies in the unused space of a page. So the directory must have begun as the one that
    /// the node imported, and have changed by replay alone: a stand-by that nobody queried.
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
    /// LSN to read at; without it that which the directory's `pg_control` says.
    #[arg(long)]
    lsn: Option<Lsn>,
    /// Leave `pd_checksum` out: the cluster has data checksums.
    #[arg(long)]
    ignore_checksum: bool,
}

/// The control file. What is compared must be a cluster at rest; a directory without any would be
/// equal to anything.
fn check_cluster(args: &VerifyArgs) -> Result<ControlFile, CommandError> {
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
    Ok(control)
}

/// Compares every block of every fork; fails if any differs.
pub fn run(args: VerifyArgs) -> Result<(), CommandError> {
    let control = check_cluster(&args)?;
    let lsn = args.lsn.or_else(|| control.stands_at()).ok_or_else(|| {
        let problem = "the stand-by went on after its last checkpoint, so not all pages may be in \
            its files: shut the primary down before it, or give --lsn";
        format!("{}: {problem}", args.pgdata.display())
    })?;
    let oracle = scan(&args.pgdata)?;
    let mut client = PageClient::connect(&args.node, args.tenant, args.timeline, lsn)?;
    let report = verify(&mut client, &oracle, args.ignore_checksum, &[])?;
    println!("at {lsn}");
    print!("{}", report.table());
    if report.is_equal() {
        return Ok(());
    }
    let problem = "the node differs from the data directory; if that has changed by more than \
        replay since the node imported it, differences mean nothing (see --help)";
    Err(problem.into())
}

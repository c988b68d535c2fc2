//! `pgstrata bench`: load generators.
//!
//! [`getpage`] needs nothing of a server but its page service, whoever wrote it. [`ingest`] watches
//! a node take in WAL, [`redo`] measures redo without a node.

pub mod client;
pub mod distribution;
pub mod getpage;
pub mod ingest;
pub mod pages;
pub mod redo;
pub mod report;

use super::admin_client::CommandError;

/// `pgstrata bench`.
#[derive(clap::Subcommand, Debug)]
pub enum BenchCommand {
    /// Read pages from a page service, as many as it can give or at a given rate.
    Getpage(getpage::GetPageArgs),
    /// Watch a node take in WAL, and print how fast it is.
    Ingest(ingest::IngestArgs),
    /// Rebuild a page from records, in this process or by PostgreSQL.
    Redo(redo::RedoArgs),
}

/// Runs a load generator.
///
/// # Errors
/// What the generator says.
pub fn run(command: BenchCommand) -> Result<(), CommandError> {
    match command {
        BenchCommand::Getpage(args) => getpage::run(&args),
        BenchCommand::Ingest(args) => ingest::run(&args),
        BenchCommand::Redo(args) => redo::run(&args),
    }
}

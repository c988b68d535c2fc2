//! The commands of the `pgstrata` program.
//!
//! Only `serve` is the node; the others talk to a running node, or bring everything they need
//! (`demo`). For proofs, [`pg`] controls stock PostgreSQL clusters, [`workload`] puts load on
//! them, [`oracle`] makes the data directory to compare with, [`page_client`] asks a node for
//! pages and [`verify`] does the comparison.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "commands run on ordinary threads, beside or before the executors"
)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod admin_client;
pub mod attach;
pub mod bench;
pub mod check;
pub mod demo;
pub mod demo_node;
pub mod history;
mod kills;
pub mod layer;
pub mod oracle;
pub mod page_client;
pub mod pg;
pub mod redo_command;
pub mod redo_compare;
pub mod redo_excerpts;
pub mod redo_recovery;
mod redo_replay;
pub mod scratch;
pub mod serve;
mod service;
pub mod simulate;
pub mod tenant;
pub mod timeline;
pub mod tpcc;
pub mod verify;
pub mod verify_command;
pub mod verify_files;
pub mod verify_wal;
pub mod workload;

use admin_client::CommandError;

/// A pageserver for PostgreSQL 15.
#[derive(Parser, Debug)]
#[command(version, about)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the node.
    Serve(serve::ServeArgs),
    /// Make a timeline from a running primary, and follow it.
    Attach(attach::AttachArgs),
    /// Make a timeline from a base backup or a data directory.
    Import(attach::ImportArgs),
    /// Show it all: a node, a primary, load, and a byte-for-byte proof.
    Demo(demo::DemoArgs),
    /// Check redo.
    Redo(redo_command::RedoArgs),
    /// Run the engine in the simulator.
    Simulate(simulate::SimulateArgs),
    /// Compare a data directory with what a node serves.
    Verify(verify_command::VerifyArgs),
    /// Check every file of a node's data directory; the node may be running.
    Check(check::CheckArgs),
    /// Look into a layer file.
    #[command(subcommand)]
    Layer(layer::LayerCommand),
    /// Show the timelines of a running node.
    Status(attach::StatusArgs),
    /// Branch, delete, archive, detach timelines; ask about their history, hold it, cut it.
    Timeline(timeline::TimelineArgs),
    /// Make, remove, configure tenants.
    Tenant(tenant::TenantArgs),
    /// Put load on a page service, measure ingest and redo.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Runs the command that the arguments name.
pub fn main() -> ExitCode {
    let result: Result<(), CommandError> = match Args::parse().command {
        Command::Serve(args) => serve::serve(args),
        Command::Attach(args) => attach::attach(args),
        Command::Import(args) => attach::import(args),
        Command::Demo(args) => demo::demo(args),
        Command::Redo(args) => redo_command::run(args),
        Command::Simulate(args) => simulate::simulate(args),
        Command::Verify(args) => verify_command::run(args),
        Command::Check(args) => return check::run(&args),
        Command::Layer(command) => layer::run(command),
        Command::Status(args) => attach::status(args),
        Command::Timeline(args) => timeline::run(args),
        Command::Tenant(args) => tenant::run(args),
        Command::Bench(command) => bench::run(command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pgstrata: {error}");
            ExitCode::FAILURE
        }
    }
}

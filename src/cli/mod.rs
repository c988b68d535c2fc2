//! The program's commands.
//!
//! [`pg`] controls stock PostgreSQL clusters, [`workload`] puts load on them, [`oracle`] makes
//! the data directory to compare with, [`page_client`] asks a node for pages, [`verify`] does the
//! comparison, and [`demo`] puts all of it together.

pub mod oracle;
pub mod page_client;
pub mod pg;
pub mod verify;
pub mod verify_files;
pub mod workload;

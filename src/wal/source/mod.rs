//! How the data of a stock PostgreSQL 15 comes in, up to but without ingest.
//!
//! 1. [`conninfo`] says where the primary is and who we are there.
//! 2. [`connection`] speaks the replication protocol over any byte stream.
//! 3. [`base_backup`] takes a base backup; its tar archives are read by [`tar_stream`].
//! 4. [`staging`] unpacks it into a directory of plain files.
//! 5. [`data_dir`] reads that directory, or one that an operator brings, in key order.
//! 6. [`pace`] decides when to reconnect and when a silent peer counts as dead.
//!
//! Only `wal/receiver.rs` opens sockets; everything here is independent of the executor.

pub mod base_backup;
pub mod connection;
pub mod conninfo;
pub mod data_dir;
pub mod error;
mod message;
pub mod pace;
pub mod staging;
pub mod tar_stream;

pub use conninfo::ConnInfo;
pub use data_dir::DataDir;
pub use error::{ServerError, SourceError};

#[cfg(test)]
mod postgres_tests;

//! pgstrata: a pageserver for PostgreSQL.
//!
//! ```text
//! WAL in:   wal/receiver -> wal/decode -> shard/ingest -> layers/open -> layers/frozen
//!           -> shard/checkpoint -> layers/delta, layers/image
//! page out: server/page_service -> shard/get_page -> layers/* -> redo -> page
//! ```
//!
//! Modules stand here in the order in which they build on each other; imports run one way.

#![deny(missing_docs)]
#![deny(unsafe_code)]
#![warn(clippy::too_many_lines)]
#![cfg_attr(
    test,
    allow(
        clippy::disallowed_methods,
        clippy::disallowed_types,
        clippy::too_many_lines,
        reason = "tests run PostgreSQL, read its files and start threads"
    )
)]

pub mod admin;
pub mod base;
pub mod cli;
pub mod config;
#[doc(hidden)]
pub mod fuzz;
pub mod io;
pub mod layers;
pub mod limits;
pub mod redo;
pub mod server;
pub mod shard;
pub mod sim;
pub mod wal;

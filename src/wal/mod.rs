//! PostgreSQL's write-ahead log: framing, records, what they change, how they come in.
//!
//! ```text
//! bytes -> stream (page, record) -> decode (rmgr/*, image) -> change -> shard/ingest
//! ```
//!
//! All of this is pure, bytes in, values out, but for [`journal`], [`journal_aside`], [`receiver`] and the
//! connections in [`source`]. `docs/wal.md` has the overview.

pub mod backup_label;
mod bytes;
pub mod change;
pub mod checkpoint;
mod compose;
pub mod control_file;
pub mod decode;
pub mod image;
pub mod journal;
pub mod journal_aside;
pub mod names;
pub mod page;
mod pglz;
pub mod receiver;
pub mod record;
pub mod rmgr;
pub mod source;
pub mod start_point;
pub mod stream;

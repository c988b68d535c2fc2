//! PostgreSQL's write-ahead log: framing, records, what they change, how they come in.

pub mod change;
pub mod journal;
pub mod receiver;
pub mod source;

//! Decisions about layers: pure functions from what is there to what shall be done.

pub mod compaction;

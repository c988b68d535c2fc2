//! Plans: pure functions that say what is to be done with the layers of a timeline.
//!
//! - [`compaction`]: which layers become which others.
//! - [`gc`]: how far history goes, and which layers nobody can need.
//! - [`pressure`]: how fast WAL may come in.
//!
//! Carrying a plan out is the work of `shard::compact`, `shard::gc` and `shard::pressure`.

pub mod compaction;
pub mod gc;
pub mod pressure;

//! Plans: pure functions that say what is to be done with the layers of a timeline.
//!
//! - [`compaction`]: which layers become which others.
//! - [`gc`]: how far history goes, and which layers nobody can need.
//!
//! Carrying a plan out is the work of `shard::compact` and `shard::gc`.

pub mod compaction;
pub mod gc;

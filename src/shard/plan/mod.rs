//! Plans: pure functions that say what is to be done with the layers of a timeline.
//!
//! - [`gc`]: how far history goes, and which layers nobody can need.
//!
//! Carrying a plan out is the work of the module of the same name in `shard`.

pub mod gc;

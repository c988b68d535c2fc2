//! Form of layer files (being filled in).

/// Format version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

//! What records mean beyond the blocks that they name, one file per resource manager.
//!
//! The structs that these files read are those of PostgreSQL 15's headers named in each; all
//! numbers are little-endian, structs have C alignment.

pub mod clog;
pub mod dbase;
pub mod heap;
pub mod multixact;
pub mod relmap;
pub mod replorigin;
pub mod smgr;
pub mod standby;
pub mod xact;
pub mod xlog;

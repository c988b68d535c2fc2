//! The repository slice of one core: tenants, timelines, ingest, reads, checkpoint.

pub mod apply;
pub mod background;
pub mod checkpoint;
pub mod control;
pub mod follow;
pub mod get_page;
pub mod import;
pub mod index;
pub mod ingest;
pub mod layer_map;
pub mod load;
pub mod lsns;
pub mod metrics;
pub mod primary;
pub mod reader;
pub mod sizes;
pub mod stored;
pub mod tenants;
pub mod timeline;
mod turn;

//! The repository slice of one core: tenants, timelines, ingest, reads, checkpoint.

pub mod control;
pub mod reader;

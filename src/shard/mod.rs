//! The repository slice of one core: tenants and their timelines.
//!
//! [`tenants`] holds them, [`timeline`] is one of them. WAL comes in through [`follow`], which
//! gives records to [`ingest`] and [`apply`], as fast as [`pressure`] lets it; [`checkpoint`] moves
//! values from memory to files, [`compact`] merges these; [`get_page`] reads; [`import`] makes a
//! timeline, [`load`] opens one again. [`history`] says how far back it can be read, [`gc`] removes
//! what nobody can need. A timeline that nobody uses is closed again (`idle`).
//!
//! Synchronous methods change state, asynchronous ones wait; no borrow lives across an `.await`.

pub mod activate;
pub mod apply;
pub mod background;
pub mod base_backup;
pub mod branch;
pub mod check;
pub mod checkpoint;
pub mod compact;
pub mod control;
mod copy_database;
mod delete;
mod detach;
pub mod follow;
pub mod gate;
pub mod gc;
pub mod get_page;
pub mod health;
pub mod held;
pub mod history;
mod idle;
mod image_job;
pub mod import;
pub mod index;
pub mod ingest;
pub mod journal_mark;
pub mod keyspace;
pub mod layer_map;
pub mod leases;
pub mod lifecycle;
pub mod load;
pub mod logical_size;
pub mod lsns;
pub mod memory;
pub mod metrics;
pub mod pages;
pub mod plan;
pub mod pressure;
pub mod primary;
pub mod reader;
pub mod readers;
pub mod sizes;
pub mod stored;
pub mod tenant_config;
pub mod tenants;
pub mod timeline;
pub mod timestamps;
mod turn;
pub mod warm;

#[cfg(test)]
pub(crate) use idle::CANARY_CLOSE_IN_USE;

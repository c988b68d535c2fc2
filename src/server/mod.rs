//! The node's data side: connections, the page service, cores and how they talk.
//!
//! ```text
//! listener -> (command names the tenant) -> router -> mesh -> page_service on the owning core
//! ```
//!
//! 1. [`pq`] (pure) frames PostgreSQL's client/server protocol, [`page_protocol`] (pure) the
//!    page requests that travel inside it.
//! 2. [`router`] (pure) says which core owns a tenant shard.
//! 3. [`fair`] (pure) says whose requests go next on a core; [`admission`] makes tasks wait for it.

pub mod admission;
pub mod buffers;
pub mod counters;
pub mod fair;
pub mod listener;
pub mod mesh;
pub mod node;
pub mod page_protocol;
pub mod page_service;
pub mod pq;
pub mod priority;
pub mod router;
pub mod socket;

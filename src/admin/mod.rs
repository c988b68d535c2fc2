//! The HTTP admin API, on the control thread.
//!
//! It owns nothing: every request becomes messages to the cores, and their replies become JSON.
//! The control thread is the only one with a tokio runtime.

mod history;
mod metrics;
mod routes;
mod wire;

pub use routes::{AdminState, serve};

//! Which pages of relations there are at an LSN, as ranges of keys.
//!
//! One range for each fork with blocks, from its first block to its size: a client may walk them
//! key by key, so no range has a key without a page. The directory of relations names the forks;
//! each fork's size is read at the same LSN.

use std::time::Duration;

use futures_util::future::{Either, select};

use super::reader::{ReadError, RequestLsn};
use super::timeline::Timeline;
use crate::base::{Key, Lsn, RelTag, Value};
use crate::io::Io;
use crate::limits::KEYSPACE_WAIT_MS_MAX;

/// The ranges, and the LSN that they are of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyspace {
    /// The LSN.
    pub lsn: Lsn,
    /// The forks that have blocks, in key order, with their sizes in blocks.
    pub forks: Vec<(RelTag, u32)>,
}

impl Keyspace {
    /// First key and end (exclusive) of each range, in hexadecimal digits.
    pub fn ranges(&self) -> Vec<(String, String)> {
        let text = |fork, block| Key::rel_block(fork, block).to_string();
        self.forks.iter().map(|(fork, blocks)| (text(*fork, 0), text(*fork, *blocks))).collect()
    }
}

impl<I: Io> Timeline<I> {
    /// The pages of relations at an LSN, which is waited for, but not for long; `None`: that of the
    /// newest record.
    ///
    /// # Errors
    /// As of a page read.
    pub async fn keyspace(&self, lsn: Option<Lsn>) -> Result<Keyspace, ReadError> {
        let request = match lsn {
            Some(lsn) => RequestLsn { request: lsn, not_modified_since: lsn },
            None => RequestLsn { request: Lsn::MAX, not_modified_since: Lsn::INVALID },
        };
        let _read = self.enter()?;
        let lsn = {
            let effective = std::pin::pin!(self.effective_lsn(request));
            let limit = Duration::from_millis(KEYSPACE_WAIT_MS_MAX);
            let limit = std::pin::pin!(self.context.io.sleep(limit));
            match select(effective, limit).await {
                Either::Left((lsn, _)) => lsn?,
                // Said before whoever asks gives up.
                Either::Right(_) => {
                    return Err(match lsn {
                        Some(lsn) => self.still_to_come(lsn),
                        None => ReadError::LsnTimeout {
                            wanted: self.start_lsn(),
                            last_record_lsn: self.lsns().last_record,
                            waited_ms: KEYSPACE_WAIT_MS_MAX,
                        },
                    });
                }
            }
        };
        let forks = self.forks_with_blocks(lsn).await;
        self.noted(self.still_retained(lsn, forks)).map(|forks| Keyspace { lsn, forks })
    }

    async fn forks_with_blocks(&self, lsn: Lsn) -> Result<Vec<(RelTag, u32)>, ReadError> {
        let entries = self.scan(&Key::rel_dir_all(), lsn).await?;
        // An empty entry says that the fork is gone.
        let is_there = |value: &Value| matches!(value, Value::Image(bytes) if !bytes.is_empty());
        let there = entries.into_iter().filter(|(_, (_, value))| is_there(value));
        let mut forks = Vec::new();
        for fork in there.filter_map(|(key, _)| key.as_rel_dir()) {
            let blocks = self.fork_size(fork, lsn).await?.unwrap_or(0);
            if blocks > 0 {
                forks.push((fork, blocks));
            }
            self.context.io.yield_if_needed().await;
        }
        Ok(forks)
    }
}

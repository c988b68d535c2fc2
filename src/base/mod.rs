//! The words of the trade: LSNs, keys, values, names, page headers, error kinds, the checksum.
//!
//! Everything here is pure and knows nothing of the rest of the program. What stands here is
//! what several other directories must agree on; what only one of them needs stands there.

pub mod checksum;
pub mod error;
pub mod id;
pub mod key;
pub mod lsn;
pub mod page;
pub mod page_checksum;
pub mod raw_wal;
pub mod seldom;
pub mod slru;
pub mod timestamp;
pub mod value;
pub mod wal_record;
pub mod xid;

pub use error::Kind;
pub use id::{TenantId, TenantShardId, TimelineId};
pub use key::{BlockNumber, Key, KeyKind, KeyRange, RelNode, RelTag, SlruKind};
pub use lsn::{Lsn, LsnRange};
pub use seldom::Seldom;
pub use timestamp::Timestamp;
pub use value::{SmallRecord, Value};

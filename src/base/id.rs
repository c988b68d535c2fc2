//! Names of tenants and timelines.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no {what}; {expected}")]
pub struct IdParseError {
    /// What was to be read.
    pub what: &'static str,
    /// The text that was given.
    pub text: String,
    /// How it should look.
    pub expected: &'static str,
}

macro_rules! id_type {
    ($name:ident, $what:literal, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdParseError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let mut id = [0; 16];
                match hex::decode_to_slice(text, &mut id) {
                    Ok(()) => Ok($name(id)),
                    Err(_) => Err(IdParseError {
                        what: $what,
                        text: text.to_owned(),
                        expected: "write 32 hexadecimal digits",
                    }),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id_type!(TenantId, "tenant id", "A tenant: one PostgreSQL cluster's data with all its branches.");
id_type!(TimelineId, "timeline id", "A timeline (branch) of a tenant.");

/// One shard of a tenant: the unit of placement on cores and nodes.
///
/// Text form: the tenant id, and for a tenant of several shards `-NNCC` (shard number and shard
/// count, two hexadecimal digits each).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantShardId {
    /// The tenant.
    pub tenant: TenantId,
    /// Number of the shard, from 0.
    pub number: u8,
    /// Number of shards; 0 for a tenant that is not sharded.
    pub count: u8,
}

impl TenantShardId {
    /// The only shard of a tenant that is not sharded.
    pub fn unsharded(tenant: TenantId) -> Self {
        TenantShardId { tenant, number: 0, count: 0 }
    }
}

impl fmt::Display for TenantShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.tenant, f)?;
        if self.count != 0 {
            write!(f, "-{:02x}{:02x}", self.number, self.count)?;
        }
        Ok(())
    }
}

impl fmt::Debug for TenantShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TenantShardId {
    type Err = IdParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || IdParseError {
            what: "tenant shard id",
            text: text.to_owned(),
            expected: "write 32 hexadecimal digits, and -NNCC for a sharded tenant",
        };
        let (tenant, number, count) = match text.split_once('-') {
            None => (text, 0, 0),
            Some((tenant, slug)) => {
                let mut parts = [0u8; 2];
                hex::decode_to_slice(slug, &mut parts).map_err(|_| error())?;
                if parts[0] >= parts[1] {
                    return Err(error());
                }
                (tenant, parts[0], parts[1])
            }
        };
        let tenant = tenant.parse().map_err(|_| error())?;
        Ok(TenantShardId { tenant, number, count })
    }
}

impl Serialize for TenantShardId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TenantShardId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_round_trip_and_bad_text_is_refused() {
        let text = "11223344556677881122334455667788";
        assert_eq!(text.parse::<TenantId>().unwrap().to_string(), text);
        let sharded = format!("{text}-0104");
        let id: TenantShardId = sharded.parse().unwrap();
        assert_eq!((id.number, id.count), (1, 4));
        assert_eq!(id.to_string(), sharded);
        for bad in ["", "11", &format!("{text}-"), &format!("{text}-0404"), &format!("{text}-04")] {
            assert!(bad.parse::<TenantShardId>().is_err(), "{bad:?} was taken");
        }
    }
}

//! Which core owns a tenant shard.
//!
//! The owner is found by rendezvous hashing: every core gets a score from the hash of the shard
//! and the core, the highest score owns. The mapping is in memory only; files know nothing of it.

use crate::base::TenantShardId;

/// The core, from `0` to `cores - 1`, that owns `shard`. The same on every run and machine.
///
/// # Panics
/// There are no cores: a bug of the caller.
pub fn owner(shard: &TenantShardId, cores: usize) -> usize {
    assert!(cores > 0, "a node has cores");
    let seed = shard_hash(shard);
    let score = |core: &usize| mix(seed ^ mix(*core as u64 + 1));
    (0..cores).max_by_key(score).unwrap_or(0)
}

/// FNV-1a over the 18 bytes of the id.
fn shard_hash(shard: &TenantShardId) -> u64 {
    let bytes = shard.tenant.0.iter().chain([&shard.number, &shard.count]);
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// The finalizer of SplitMix64: every bit of the input moves every bit of the output. Ids are
/// often anything but random, and FNV alone leaves its low bits weak.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::TenantId;

    fn shard(number: u64) -> TenantShardId {
        let mut id = [0; 16];
        id[8..].copy_from_slice(&number.to_be_bytes());
        TenantShardId::unsharded(TenantId(id))
    }

    #[test]
    fn owners_never_change_between_versions() {
        let owners: Vec<usize> = (0..16).map(|n| owner(&shard(n), 4)).collect();
        assert_eq!(owners, [0, 3, 3, 2, 3, 3, 2, 3, 0, 3, 0, 0, 1, 3, 3, 3]);
    }

    #[test]
    fn cores_get_equal_parts_even_of_consecutive_ids() {
        for cores in [1, 2, 3, 8] {
            let mut counts = vec![0; cores];
            for number in 0..8000 {
                counts[owner(&shard(number), cores)] += 1;
            }
            let fair = 8000 / cores;
            let even = counts.iter().all(|c| (fair * 8 / 10..=fair * 12 / 10).contains(c));
            assert!(even, "{counts:?}");
        }
    }

    #[test]
    fn shards_of_one_tenant_spread() {
        let of_tenant = |number| TenantShardId { number, count: 64, ..shard(7) };
        let on_first = (0..64).filter(|n| owner(&of_tenant(*n), 2) == 0).count();
        assert!((20..=44).contains(&on_first), "{on_first} of 64");
    }
}

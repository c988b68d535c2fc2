//! Where the newest version of each key stands: a table from keys to numbers.
//!
//! Neighbouring blocks share one small array of 64 numbers, and a hash table has the arrays, by the
//! part of the key that their blocks have in common. So a table of a million blocks that lie
//! together has 16,000 entries, a row of neighbours needs one search, and sorting the keys means
//! sorting the arrays. Keys that lie far apart take an array each, 256 bytes, which is about what
//! a version takes.

use std::collections::HashMap;

use foldhash::fast::RandomState;

use crate::base::Key;

/// Blocks that share an array.
const SLOTS: usize = 64;
/// Arrays that are found without a search.
const RECENT: usize = 16;
/// "There is no such key."
const NONE: u32 = u32::MAX;
/// Memory that an array takes with its place in a table that is half full.
const ARRAY_BYTES: usize = SLOTS * size_of::<u32>() + 2 * (size_of::<Key>() + size_of::<u32>());

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Places {
    arrays: Vec<[u32; SLOTS]>,
    /// By key, with its number of the array in place of the block.
    numbers: HashMap<Key, u32, RandomState>,
    /// Of each of some relations, the array that was asked for last, at the place that
    /// [`recent`] tells.
    recent: [Option<(Key, u32)>; RECENT],
}

/// Place in `Places::recent` of the array with this key.
fn recent(array: Key) -> usize {
    array.field4.wrapping_add(u32::from(array.field5)) as usize % RECENT
}

/// The key of the array, and the place in it.
fn split(key: Key) -> (Key, usize) {
    let slots = SLOTS as u32;
    (Key { field6: key.field6 / slots, ..key }, (key.field6 % slots) as usize)
}

/// The key at a place of an array.
fn join(array: Key, slot: usize) -> Key {
    Key { field6: array.field6 * SLOTS as u32 + slot as u32, ..array }
}

impl Places {
    /// Puts in a number below `u32::MAX` for a key; gives the one that was there before.
    pub(super) fn replace(&mut self, key: Key, place: u32) -> Option<u32> {
        let (array_key, slot) = split(key);
        let recent = &mut self.recent[recent(array_key)];
        let number = match *recent {
            Some((last, number)) if last == array_key => number,
            _ => {
                let next = self.arrays.len() as u32;
                let number = *self.numbers.entry(array_key).or_insert(next);
                if number == next {
                    self.arrays.push([NONE; SLOTS]);
                }
                *recent = Some((array_key, number));
                number
            }
        };
        let old = self.arrays.get_mut(number as usize).and_then(|array| array.get_mut(slot));
        let old = old.map_or(NONE, |old| std::mem::replace(old, place));
        (old != NONE).then_some(old)
    }

    /// The number of a key.
    pub(super) fn get(&self, key: Key) -> Option<u32> {
        let (array_key, slot) = split(key);
        let number = self.numbers.get(&array_key)?;
        let place = *self.arrays.get(*number as usize)?.get(slot)?;
        (place != NONE).then_some(place)
    }

    fn keys_of(&self, array: Key, number: u32) -> impl Iterator<Item = (Key, u32)> {
        let places = self.arrays.get(number as usize).into_iter().flatten().enumerate();
        places
            .filter(|(_, place)| **place != NONE)
            .map(move |(slot, place)| (join(array, slot), *place))
    }

    /// All keys with their numbers, in no order that may matter to anybody.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Key, u32)> {
        self.numbers.iter().flat_map(|(array, number)| self.keys_of(*array, *number))
    }

    /// All keys with their numbers, in order of the keys.
    pub(super) fn sorted(&self) -> impl Iterator<Item = (Key, u32)> {
        let mut arrays: Vec<(Key, u32)> = self.numbers.iter().map(|(k, n)| (*k, *n)).collect();
        arrays.sort_unstable();
        arrays.into_iter().flat_map(|(array, number)| self.keys_of(array, number))
    }

    /// Memory in use, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.arrays.len() * ARRAY_BYTES
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn it_is_a_map() {
        let (mut places, mut map) = (Places::default(), BTreeMap::new());
        let mut random = 1u64;
        for place in 0..20_000u32 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bits = random >> 33;
            // A few relations; blocks near each other, far apart, and the last one, of the size.
            let field6 = match bits % 3 {
                0 => (bits >> 8) as u32 % 300,
                1 => u32::MAX - (bits >> 8) as u32 % 3,
                _ => (bits >> 4) as u32,
            };
            let key = Key {
                field1: 0,
                field2: 1663,
                field3: 5,
                field4: 16384 + bits as u32 % 5,
                field5: bits as u8 % 2,
                field6,
            };
            assert_eq!(places.get(key), map.get(&key).copied());
            assert_eq!(places.replace(key, place), map.insert(key, place));
        }
        assert!(places.sorted().eq(map.iter().map(|(key, place)| (*key, *place))));
        let mut all: Vec<_> = places.iter().collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(map));
        assert!(places.memory_bytes() >= places.arrays.len() * 256);
    }
}

//! `pd_checksum` of a page (`src/include/storage/checksum_impl.h`, `pg_checksum_page`).
//!
//! The page, with zero in the place of the checksum, is a matrix of little-endian u32, 32 to a
//! row. Each column is hashed from the top by a variant of FNV-1a, from a start value of its own,
//! and twice more with zero. The 32 results are put together by exclusive or, so is the block's
//! number, and the sum is brought into the range 1 to 65,535.
//!
//! Redo does not keep checksums: whoever writes pages to files must set them.

use super::key::BlockNumber;
use super::page::{PAGE_SIZE, PD_CHECKSUM, Page, page_is_new};

const COLUMNS: usize = 32;
const ROW_BYTES: usize = COLUMNS * 4;
const FNV_PRIME: u32 = 16_777_619;
/// Start values of the columns (`checksumBaseOffsets`).
const START: [u32; COLUMNS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

fn step(sum: u32, value: u32) -> u32 {
    let mixed = sum ^ value;
    mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17)
}

/// The checksum that the page has to have as this block of its fork.
pub fn page_checksum(page: &Page, block: BlockNumber) -> u16 {
    let mut sums = START;
    for (number, row) in page.chunks_exact(ROW_BYTES).enumerate() {
        for (column, (sum, word)) in sums.iter_mut().zip(row.chunks_exact(4)).enumerate() {
            let mut value = word.first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
            if number == 0 && column == PD_CHECKSUM.start / 4 {
                // The checksum is the low half of this word.
                value &= 0xFFFF_0000;
            }
            *sum = step(*sum, value);
        }
    }
    let sum = sums.into_iter().fold(0, |all, sum| all ^ step(step(sum, 0), 0));
    ((sum ^ block) % 65_535 + 1) as u16
}

/// Sets the checksum of a page that is going to be this block of its fork. A page that was never
/// initialised has none.
pub fn set_page_checksum(page: &mut Page, block: BlockNumber) {
    if page_is_new(page) {
        return;
    }
    let sum = page_checksum(page, block).to_le_bytes();
    let [low, high] = sum;
    page[PD_CHECKSUM.start] = low;
    page[PD_CHECKSUM.start + 1] = high;
}

const _: () = assert!(PAGE_SIZE.is_multiple_of(ROW_BYTES) && PD_CHECKSUM.start.is_multiple_of(4));

#[cfg(test)]
mod tests {
    use super::*;

    /// Checked against PostgreSQL 15's own function on the same bytes.
    #[test]
    fn checksums_are_postgres_own() {
        let mut page: Page = [0; PAGE_SIZE];
        for (at, byte) in page.iter_mut().enumerate() {
            *byte = (at * 7 + at / 251) as u8;
        }
        for (block, golden) in [(0, GOLDEN[0]), (1, GOLDEN[1]), (4_000_000_000, GOLDEN[2])] {
            assert_eq!(page_checksum(&page, block), golden, "block {block}");
        }
        let before = page_checksum(&page, 7);
        set_page_checksum(&mut page, 7);
        assert_eq!(page[PD_CHECKSUM], before.to_le_bytes());
        assert_eq!(page_checksum(&page, 7), before, "the checksum is not part of itself");
        let mut new: Page = [0; PAGE_SIZE];
        set_page_checksum(&mut new, 7);
        assert_eq!(new, [0; PAGE_SIZE]);
    }

    const GOLDEN: [u16; 3] = [62_802, 62_803, 18_299];
}

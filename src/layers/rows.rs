//! A list that grows without being moved.
//!
//! A plain vector of some million entries is copied whenever it has to grow, into memory that the
//! kernel has to find first. This one is made of pieces of one size.

/// Entries of a piece.
const PIECE: usize = 1 << 13;

/// See the module's text.
#[derive(Debug)]
pub(super) struct Rows<T> {
    /// All full but the last.
    pieces: Vec<Vec<T>>,
    len: usize,
}

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Rows { pieces: Vec::new(), len: 0 }
    }
}

impl<T> Rows<T> {
    /// Adds an entry at the end.
    pub(super) fn push(&mut self, entry: T) {
        self.len += 1;
        match self.pieces.last_mut() {
            Some(last) if last.len() < PIECE => last.push(entry),
            Some(_) => {
                let mut piece = Vec::with_capacity(PIECE);
                piece.push(entry);
                self.pieces.push(piece);
            }
            // The first one grows: most lists are short.
            None => self.pieces.push(vec![entry]),
        }
    }

    /// The entry with this number.
    pub(super) fn get(&self, number: usize) -> Option<&T> {
        self.pieces.get(number / PIECE)?.get(number % PIECE)
    }

    /// Number of entries.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// True without entries.
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_stand_where_they_were_put() {
        let mut rows = Rows::default();
        assert!(rows.is_empty() && rows.get(0).is_none());
        for n in 0..3 * PIECE + 5 {
            rows.push(n);
            assert_eq!((rows.len(), rows.get(n), rows.get(n + 1)), (n + 1, Some(&n), None));
        }
        assert!((0..rows.len()).all(|n| rows.get(n) == Some(&n)) && !rows.is_empty());
    }
}

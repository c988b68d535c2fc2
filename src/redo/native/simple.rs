//! Sequences (`seq_redo` in `src/backend/commands/sequence.c`) and generic WAL (`generic_redo` in
//! `src/backend/access/transam/generic_xlog.c`).

use super::Redoing;
use super::page::{
    Add, Fit, add_item, bounds, init, put, put_u32, rest_at, size_at, slice_at, special,
};

/// Size of `sequence_magic`.
const SEQUENCE_SPECIAL: usize = 4;
/// `SEQ_MAGIC`.
const SEQUENCE_MAGIC: u32 = 0x1717;
/// Size of `xl_seq_rec`, the relation's numbers.
const SEQUENCE_HEADER: usize = 12;

/// A sequence's only page, made anew. Main data: 12 bytes of relation, the tuple.
pub(super) fn sequence(at: &mut Redoing<'_>) -> Fit<()> {
    if at.view.operation() != 0 || at.view.id != 0 {
        return Err("sequences have no such record");
    }
    at.will_init()?;
    init(at.page, SEQUENCE_SPECIAL)?;
    let magic = special(at.page, SEQUENCE_SPECIAL)?;
    put_u32(at.page, magic, SEQUENCE_MAGIC)?;
    add_item(at.page, rest_at(at.view.main, SEQUENCE_HEADER)?, 1, Add::Shift)?;
    at.set_lsn();
    Ok(())
}

/// Pieces that overwrite the page: u16 offset, u16 length, bytes; the hole becomes zeros.
pub(super) fn generic(at: &mut Redoing<'_>) -> Fit<()> {
    if !at.needs_redo()? {
        return Ok(());
    }
    let data = at.view.data;
    let mut from = 0;
    while from < data.len() {
        let (offset, len) = (size_at(data, from)?, size_at(data, from + 2)?);
        put(at.page, offset, slice_at(data, from + 4, len)?)?;
        from += 4 + len;
    }
    let hole = bounds(at.page)?;
    at.page.get_mut(hole.lower..hole.upper).ok_or("the hole is outside of the page")?.fill(0);
    at.set_lsn();
    Ok(())
}

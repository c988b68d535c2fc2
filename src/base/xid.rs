//! Arithmetic on transaction numbers, which wrap around (`src/include/access/transam.h`).

/// The first number that a transaction can have (`FirstNormalTransactionId`); those below stand
/// for "none", the bootstrap transaction and "frozen".
pub const FIRST_NORMAL_XID: u32 = 3;
/// The first multixact (`FirstMultiXactId`); 0 stands for "none".
pub const FIRST_MULTI: u32 = 1;

/// True if the transaction `a` is older than `b` (`TransactionIdPrecedes`).
pub fn xid_precedes(a: u32, b: u32) -> bool {
    if a < FIRST_NORMAL_XID || b < FIRST_NORMAL_XID { a < b } else { precedes(a, b) }
}

/// True if `a` is before `b` on the circle of 2^32 numbers (`MultiXactIdPrecedes`,
/// `MultiXactOffsetPrecedes`).
pub fn precedes(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

/// The later of two transactions.
pub fn later_xid(a: u32, b: u32) -> u32 {
    if xid_precedes(a, b) { b } else { a }
}

/// The transaction before this one, past the special ones (`TransactionIdRetreat`).
pub fn xid_before(xid: u32) -> u32 {
    let before = xid.wrapping_sub(1);
    if before < FIRST_NORMAL_XID { u32::MAX } else { before }
}

/// The multixact after this one, past the special one.
pub fn multi_after(multi: u32) -> u32 {
    multi.wrapping_add(1).max(FIRST_MULTI)
}

/// The multixact before this one, past the special one (`PreviousMultiXactId`).
pub fn multi_before(multi: u32) -> u32 {
    if multi <= FIRST_MULTI { u32::MAX } else { multi - 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_wrap_and_special_ones_are_oldest() {
        assert!(xid_precedes(u32::MAX, 3));
        assert!(!xid_precedes(3, u32::MAX));
        assert!(xid_precedes(2, u32::MAX), "the frozen transaction is older than all");
        assert!(precedes(u32::MAX, 0));
        assert_eq!(later_xid(u32::MAX, 5), 5);
        assert_eq!((xid_before(3), xid_before(4)), (u32::MAX, 3));
        assert_eq!((multi_after(u32::MAX), multi_after(7)), (1, 8));
        assert_eq!((multi_before(1), multi_before(8)), (u32::MAX, 7));
    }
}

use super::*;

#[test]
fn record_ends_are_found_in_the_dump() {
    let text = "rmgr: XLOG        len (rec/tot):    114/   114, tx:          0, lsn: 0/02000110, prev 0/020000D8, desc: CHECKPOINT_ONLINE redo 0/20000D8;\n\
                rmgr: Standby     len (rec/tot):     50/    50, tx:          0, lsn: 0/02000188, prev 0/02000110, desc: RUNNING_XACTS\n";
    assert_eq!(wal_starts(text), [Lsn(0x200_0110), Lsn(0x200_0188)]);
    assert_eq!(strip_page_header(Lsn(0x200_0188)), Lsn(0x200_0188));
    assert_eq!(strip_page_header(Lsn(0x200_2018)), Lsn(0x200_2000));
    assert_eq!(strip_page_header(Lsn(0x300_0028)), Lsn(0x300_0000));
}

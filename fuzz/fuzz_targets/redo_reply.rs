//! Replies of a wal-redo process.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("redo_reply", data));

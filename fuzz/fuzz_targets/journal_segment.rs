//! WAL as it stands in a journal segment.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("journal_segment", data));

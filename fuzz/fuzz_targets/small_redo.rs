//! Small records and the pages that they change.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("small_redo", data));

//! A WAL record and the page that native redo applies it to.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("native_redo", data));

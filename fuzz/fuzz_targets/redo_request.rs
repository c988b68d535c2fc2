//! Requests of redo, and inputs of failed ones that were kept.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("redo_request", data));

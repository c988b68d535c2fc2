//! A packed block of a delta layer or page of an image layer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("packed_block", data));

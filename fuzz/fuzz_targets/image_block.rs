//! A packed block of a delta layer or page of an image layer.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("image_block", data));

//! Header and footer of a layer file.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgstrata::fuzz::run("layer_frame", data));

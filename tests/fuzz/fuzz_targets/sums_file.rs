#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| virtseal::fuzz::read("sums_file", bytes));

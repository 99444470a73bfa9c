//! Packets: `cargo +nightly fuzz run wire`.
#![no_main]

libfuzzer_sys::fuzz_target!(|packet: &[u8]| tokio_shm::fuzzing::wire(packet));

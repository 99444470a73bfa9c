//! A link page that somebody scribbles on: `cargo +nightly fuzz run page`.
#![no_main]

use tokio_shm::fuzzing::{Op, page};

libfuzzer_sys::fuzz_target!(|input: (u8, Vec<Op>)| page(input.0, &input.1));

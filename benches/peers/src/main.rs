//! This crate beside its peers and the floor, over the same work in the same run. `docs/benchmarks.md` has the method.
//!
//! ```sh
//! cargo run --release --manifest-path benches/peers/Cargo.toml             # all, some minutes; writes docs/benchmarks.md
//! cargo run --release --manifest-path benches/peers/Cargo.toml -- --quick  # shortened, prints only
//! ```
#![deny(unsafe_code)]

mod board;
mod case;
mod options;
mod payload;
mod peers;
mod plan;
mod process;
mod report;
mod scratch;
mod stats;
mod suite;
mod work;

use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some((case, side)) = process::child() {
        peers::run(&case, side);
        return ExitCode::SUCCESS;
    }
    let done = options::Options::parse().and_then(|options| suite::run(&options));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

//! Publishers and subscribers that come, go, stall and are killed, for as long as you like, with every promise checked.
//!
//! Dear newcomer, this one needs one terminal, and patience:
//!
//! ```text
//! cargo run --release --example soak -- --seconds 600
//! ```
//!
//! The parent starts publishers and subscribers as processes of their own, on topics of all policies. Some of them it
//! keeps for the whole time; others it stops politely, stalls with SIGSTOP, or kills with SIGKILL, at random. Meanwhile
//! each subscriber keeps exact books of what it received and what it was told to have missed, and checks every byte, once more
//! when it lets go of a message; each publisher checks its pool against its cap; and the parent checks what its processes have
//! open and mapped, and what is in the runtime directory and in `/dev/shm`. At the first thing that is wrong it says
//! what and where, and ends with exit code 1. It measures no speed: that is what `demo` is for.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the examples are programs for a terminal")]

mod books;
mod footprint;
mod payload;
mod peers;
#[path = "../support/mod.rs"]
mod support;
mod world;

use std::process::ExitCode;
use std::time::Duration;

use lexopt::ValueExt as _;
use support::Result;
use tokio_shm::{Backing, OnFull, ShmPoolConfig};

/// No pool may have more, in bytes.
const POOL_CAP: u64 = 16 << 20;

/// What a topic's publishers do, and how a subscriber that cannot keep up fares.
struct Topic {
    name: &'static str,
    on_full: OnFull,
    evict_after: Option<Duration>,
    backing: Backing,
    history: usize,
}

const TOPICS: [Topic; 4] = [
    Topic {
        name: "soak/wait",
        on_full: OnFull::Wait,
        evict_after: None,
        backing: Backing::Memfd,
        history: 0,
    },
    Topic {
        name: "soak/drop/oldest",
        on_full: OnFull::DropOldest,
        evict_after: None,
        backing: Backing::PosixShm,
        history: 4,
    },
    Topic {
        name: "soak/drop/newest",
        on_full: OnFull::DropNewest,
        evict_after: None,
        backing: Backing::Memfd,
        history: 0,
    },
    Topic {
        name: "soak/evict",
        on_full: OnFull::Wait,
        evict_after: Some(Duration::from_millis(700)),
        backing: Backing::Memfd,
        history: 2,
    },
];

impl Topic {
    fn pool(&self) -> ShmPoolConfig {
        ShmPoolConfig::new().max_bytes(POOL_CAP).backing(self.backing)
    }
}

fn main() -> ExitCode {
    support::exit(run())
}

fn run() -> Result {
    let mut parser = lexopt::Parser::from_env();
    let mut seconds = 60;
    let mut words = Vec::new();
    while let Some(argument) = parser.next()? {
        match argument {
            lexopt::Arg::Long("seconds") => seconds = parser.value()?.parse()?,
            // What the parent says to its children.
            lexopt::Arg::Value(word) => words.push(word.string()?),
            other => return Err(other.unexpected().into()),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        [] => world::run(Duration::from_secs(seconds)),
        ["publisher", dir, topic, seed] => {
            peers::publish(dir.as_ref(), &TOPICS[topic.parse::<usize>()?], seed.parse()?)
        }
        ["subscriber", dir, topic, seed] => {
            peers::subscribe(dir.as_ref(), &TOPICS[topic.parse::<usize>()?], seed.parse()?)
        }
        _ => Err("usage: soak [--seconds N]".into()),
    }
}

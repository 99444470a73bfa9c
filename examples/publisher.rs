//! Says something once a second, to whoever listens.
//!
//! Dear newcomer, open two terminals. In the first, type
//!
//! ```text
//! cargo run --example publisher
//! ```
//!
//! and in the second
//!
//! ```text
//! cargo run --example subscriber
//! ```
//!
//! The subscriber prints what the publisher says. Start a third terminal with another subscriber, and it listens too:
//! the message is written once, and both read it where it is. Now try what usually hurts:
//!
//! - Stop the publisher with Ctrl-C and start it again. The subscribers wait, and go on.
//! - Kill it with `kill -9`. The subscribers are told that it was lost, wait, and go on.
//! - Suspend a subscriber with Ctrl-Z for ten seconds and bring it back with `fg`. It is told how many messages it missed.
//! - Start two publishers. Every subscriber hears both.
//!
//! Both programs take a topic's name as argument, if you want a topic of your own:
//! `cargo run --example publisher -- weather/today`.
#![allow(clippy::print_stdout, reason = "the examples are programs for a terminal")]

mod support;

use std::process::ExitCode;
use std::time::Duration;

use support::{Interrupt, Result};
use tokio_shm::{OnFull, ShmPublisher};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    let topic = std::env::args().nth(1).unwrap_or_else(|| "greetings".to_owned());
    let mut interrupt = Interrupt::new()?;

    // A subscriber that does not keep up loses its oldest messages. Without this line we would wait for it.
    let publisher = ShmPublisher::builder(&topic).on_full(OnFull::DropOldest).bind()?;
    println!("publishing to {topic:?}; Ctrl-C ends it");

    let mut second = tokio::time::interval(Duration::from_secs(1));
    for number in 1_u64.. {
        tokio::select! {
            _ = second.tick() => {}
            () = interrupt.wait() => break,
        }
        let text = format!("hello number {number} from process {}", std::process::id());
        println!("{text} (to {} subscribers)", publisher.subscriber_count());
        publisher.send(text).await?;
    }

    // So that subscribers know: nothing is missing, we have merely left.
    publisher.close().await?;
    Ok(())
}

//! Prints what the publishers of a topic say.
//!
//! Dear newcomer, this is the other half of `publisher.rs`, whose first lines say what there is to try. In short:
//!
//! ```text
//! cargo run --example publisher       # in one terminal
//! cargo run --example subscriber      # in another, or in several
//! ```
//!
//! The order does not matter: a subscriber may come before its publisher. Look at the `match` below: these arms are what a
//! program that is to run for months is made of. Most errors are *notices*, after which receiving goes on; only an end is final.
#![allow(clippy::print_stdout, reason = "the examples are programs for a terminal")]

mod support;

use std::process::ExitCode;

use support::{Interrupt, Result};
use tokio_shm::{RecvError, ShmSubscriber};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    let topic = std::env::args().nth(1).unwrap_or_else(|| "greetings".to_owned());
    let mut interrupt = Interrupt::new()?;

    // Room for four messages: few, so that you can see what happens when they are not read in time. And we want to be told
    // when a publisher says good-bye, not only when one is lost.
    let mut subscriber = ShmSubscriber::builder(&topic).depth(4).publisher_events(true).connect()?;
    println!("listening to {topic:?}; Ctrl-C ends it");

    loop {
        let received = tokio::select! {
            received = subscriber.recv() => received,
            () = interrupt.wait() => return Ok(()),
        };
        match received {
            // `sample` is the publisher's own memory, read in place; dropping it gives it back.
            Ok(sample) => println!("{}", String::from_utf8_lossy(&sample)),
            Err(RecvError::Lagged { missed, .. }) => {
                println!("… {missed} messages missed: we were too slow, or came later")
            }
            Err(RecvError::PublisherClosed { .. }) => println!("… a publisher has left; waiting for another"),
            Err(RecvError::PublisherLost { .. }) => println!("… a publisher was killed; waiting for another"),
            // Nothing will ever come any more.
            Err(end) if end.is_terminal() => return Err(end.into()),
            // What else there is to know: receiving goes on.
            Err(notice) => println!("… {notice}"),
        }
    }
}

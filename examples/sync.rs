//! Sends and receives from plain threads: not an `async` in sight.
//!
//! Dear newcomer, this one needs one terminal:
//!
//! ```text
//! cargo run --release --example sync
//! ```
//!
//! Perhaps your program is not an async one, or only part of it is. Every waiting call has a sister whose name begins with
//! `blocking_`. A subscriber that is used only through these needs no runtime at all. A publisher does need one, for
//! the small task that delivers while you do other things, so we build one and give the publisher its handle. That is
//! the last we see of it.
//!
//! (Threads are used here so that it fits in one program. The subscriber could as well be another process.)
#![allow(clippy::print_stdout, reason = "the examples are programs for a terminal")]

mod support;

use std::process::ExitCode;
use std::thread;
use std::time::Instant;

use support::Result;
use tokio::runtime::Runtime;
use tokio_shm::{RecvError, ShmPublisher, ShmSubscriber};

const MESSAGES: u64 = 100_000;

fn main() -> ExitCode {
    support::exit(run())
}

fn run() -> Result {
    // A name of our own, in case this example runs twice at once.
    let topic = format!("examples/sync/{}", std::process::id());
    // It must outlive the publisher's messages; here it lives until both threads have ended.
    let runtime = Runtime::new()?;
    let started = Instant::now();

    let publisher = ShmPublisher::builder(&topic).runtime(runtime.handle().clone()).bind()?;
    let subscriber = ShmSubscriber::builder(&topic).end_with_last_publisher(true).connect()?;
    // Whoever joins in the middle misses the beginning, and is told how much; here nobody shall.
    runtime.block_on(publisher.wait_for_subscribers(1));

    let received = thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(subscriber));
        let sender = scope.spawn(|| send(publisher));
        sender.join().expect("the sender does not panic")?;
        receiver.join().expect("the receiver does not panic")
    })?;

    if received != MESSAGES {
        return Err(format!("{MESSAGES} messages were sent, {received} received").into());
    }
    println!("{received} messages from thread to thread, in order, in {:.0?}", started.elapsed());
    Ok(())
}

fn send(publisher: ShmPublisher) -> Result {
    for number in 0..MESSAGES {
        // Waits, on this thread, while the receiver has no room.
        publisher.blocking_send(number.to_le_bytes())?;
    }
    // Dropping the publisher delivers what it has accepted, and tells the receiver that this was all.
    Ok(())
}

fn receive(mut subscriber: ShmSubscriber) -> Result<u64> {
    for number in 0_u64.. {
        match subscriber.blocking_recv() {
            Ok(sample) if *sample == number.to_le_bytes() => {}
            Ok(sample) => return Err(format!("expected message {number}, got {:?}", &*sample).into()),
            Err(RecvError::Closed) => return Ok(number),
            Err(error) => return Err(error.into()),
        }
    }
    unreachable!("nobody counts that far")
}

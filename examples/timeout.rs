//! Meets a slow subscriber with a deadline instead of with patience.
//!
//! Dear newcomer, this one needs one terminal:
//!
//! ```text
//! cargo run --example timeout
//! ```
//!
//! A subscriber that does not keep up makes `send` wait (unless you chose to drop messages instead). Often you have
//! something better to do than wait. Then put a `timeout` around the `send`, or let it race against something else in a
//! `select!`. Losing such a race has a clear meaning here: a `send` that did not return `Ok` has sent nothing, now or
//! later, and a `send` that did return `Ok` will arrive. This program gives up many times, keeps the books, and at the
//! end compares them with the subscriber's.
#![allow(clippy::print_stdout, reason = "the examples are programs for a terminal")]

mod support;

use std::process::ExitCode;
use std::time::Duration;

use support::Result;
use tokio::time::{sleep, timeout};
use tokio_shm::{RecvError, ShmPublisher, ShmSubscriber};

const PATIENCE: Duration = Duration::from_millis(5);
const READING_TAKES: Duration = Duration::from_millis(20);

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    // A name of our own, in case this example runs twice at once.
    let topic = format!("examples/timeout/{}", std::process::id());
    // Little room on both sides, so that it is soon full.
    let publisher = ShmPublisher::builder(&topic).queue(2).bind()?;
    let subscriber = ShmSubscriber::builder(&topic).depth(4).end_with_last_publisher(true).connect()?;
    publisher.wait_for_subscribers(1).await;
    let mut accepted = Vec::new();
    let mut next = 0_u32;

    // 1. Nobody reads. We send until a message is not taken in time.
    let unsent = loop {
        let message = next.to_le_bytes();
        // The message is lent to `send` by reference: if time runs out it is still ours.
        match timeout(PATIENCE, publisher.send(&message)).await {
            Ok(sent) => sent?,
            Err(_) => break message,
        }
        accepted.push(next);
        next += 1;
    };
    println!("nobody reads: {} messages were accepted, number {next} was not", accepted.len());

    // 2. The subscriber wakes up, and we send the very message that was not sent before.
    let reader = tokio::spawn(read_slowly(subscriber));
    publisher.send(unsent).await?;
    accepted.push(next);
    println!("the subscriber reads again: number {next} went out at the second try");

    // 3. It reads too slowly. We skip what it cannot take, as one does with pictures of a camera.
    let mut skipped = 0;
    for _ in 0..50 {
        next += 1;
        match timeout(PATIENCE, publisher.send(next.to_le_bytes())).await {
            Ok(sent) => {
                sent?;
                accepted.push(next);
            }
            Err(_) => skipped += 1,
        }
    }
    println!("a deadline for each of 50 messages: {skipped} skipped, {} sent", 50 - skipped);

    // 4. The same with `select!`: send as much as can be sent until something else happens.
    let before = accepted.len();
    let end_of_work = sleep(10 * READING_TAKES);
    tokio::pin!(end_of_work);
    loop {
        next += 1;
        tokio::select! {
            sent = publisher.send(next.to_le_bytes()) => {
                sent?;
                accepted.push(next);
            }
            () = &mut end_of_work => break,
        }
    }
    println!("until it was time to go: {} sent, number {next} not", accepted.len() - before);

    // 5. Everything accepted arrives, nothing else does.
    publisher.close().await?;
    let received = reader.await??;
    if received != accepted {
        return Err(format!("accepted {accepted:?}, but received {received:?}").into());
    }
    if skipped == 0 {
        return Err("the subscriber was never too slow".into());
    }
    println!("accepted {}, received {}: the same, in the same order", accepted.len(), received.len());
    Ok(())
}

/// The numbers of all messages, read one at a time.
async fn read_slowly(mut subscriber: ShmSubscriber) -> Result<Vec<u32>> {
    let mut received = Vec::new();
    loop {
        match subscriber.recv().await {
            Ok(sample) => {
                received.push(u32::from_le_bytes((*sample).try_into()?));
                // The sample is held meanwhile, and its place with it.
                sleep(READING_TAKES).await;
            }
            Err(RecvError::Closed) => return Ok(received),
            Err(error) => return Err(error.into()),
        }
    }
}

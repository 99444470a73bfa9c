//! Topics on two hosts, bridged by zenoh, without a second host.
//!
//! Dear newcomer, this program plays a host: it has a runtime directory of its own, a publisher and a subscriber in it, and a
//! bridge. Open two terminals. In the first, type
//!
//! ```text
//! cargo run --features zenoh --example bridge -- robot1 --listen tcp/127.0.0.1:7447
//! ```
//!
//! and in the second
//!
//! ```text
//! cargo run --features zenoh --example bridge -- robot2 --connect tcp/127.0.0.1:7447
//! ```
//!
//! Each says something once a second to its own topic `say/<name>`, and prints what it hears from the other's. Neither knows
//! that the other is not on its host. Stop one and start it again: the other goes on, and its bridge counts what was missed.
//!
//! On real hosts the bridge is a process beside your programs, and those stay as they are:
//! `tokio-shm bridge --topic 'say/*' --zenoh 'demo/say/*' --connect tcp/robot1:7447`.
#![allow(clippy::print_stdout, reason = "the examples are programs for a terminal")]

mod support;

use std::process::ExitCode;
use std::time::Duration;

use support::{Interrupt, Result};
use tokio_shm::bridge::{Bridge, Route};
use tokio_shm::{OnFull, ShmPublisher, ShmSubscriber};

#[tokio::main]
async fn main() -> ExitCode {
    support::exit(run().await)
}

async fn run() -> Result {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [name, how, endpoint] = &arguments[..] else {
        return Err("say a name, then --listen or --connect, then an endpoint".into());
    };
    let mut interrupt = Interrupt::new()?;

    // This host's topics. (Yours are where they always are; see `builder().runtime_dir`.)
    let host = std::env::temp_dir().join(format!("tokio-shm-bridge-{}-{name}", std::process::id()));
    let bridge = Bridge::builder().runtime_dir(&host).route(Route::new("say/*", "demo/say/*")?);
    let bridge = match how.as_str() {
        "--listen" => bridge.listen(endpoint),
        _ => bridge.connect(endpoint),
    };
    let bridge = bridge.start().await?;

    let publisher = ShmPublisher::builder(&format!("say/{name}"))
        .runtime_dir(&host)
        .on_full(OnFull::DropOldest)
        .bind()?;
    let other = if name == "robot1" { "robot2" } else { "robot1" };
    let mut subscriber = ShmSubscriber::builder(&format!("say/{other}")).runtime_dir(&host).connect()?;
    println!("I am {name}; Ctrl-C ends me");

    let mut second = tokio::time::interval(Duration::from_secs(1));
    let mut number = 0;
    loop {
        tokio::select! {
            _ = second.tick() => {
                number += 1;
                publisher.send(format!("{name} says {number}")).await?;
            }
            heard = subscriber.recv() => match heard {
                Ok(sample) => println!("{}", String::from_utf8_lossy(&sample)),
                Err(error) => println!("{error}"),
            },
            () = interrupt.wait() => break,
        }
    }

    drop(subscriber);
    publisher.close().await?;
    println!("{:?}", bridge.close().await);
    // The host is gone, and its directory with it.
    let _ = std::fs::remove_dir(&host);
    Ok(())
}

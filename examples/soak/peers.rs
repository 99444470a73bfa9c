//! The children: a publisher and a subscriber, each until its parent says nothing more or is gone.
//!
//! They say on their standard output how far they are, a line now and then, and at a polite end what their last count was.

use std::collections::VecDeque;
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use tokio_shm::{OnFull, RecvError, ShmPublisher, ShmSample, ShmSubscriber};

use crate::books::Books;
use crate::payload::{self, Random};
use crate::support::Result;
use crate::{POOL_CAP, Topic};

const EVERY: Duration = Duration::from_millis(500);

/// Set once our standard input has ended.
fn end_of_input() -> Arc<AtomicBool> {
    let ended = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&ended);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        flag.store(true, Ordering::Relaxed);
    });
    ended
}

pub(crate) fn publish(dir: &Path, topic: &Topic, seed: u64) -> Result {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let ended = end_of_input();
        let mut random = Random::new(seed);
        let mut builder = ShmPublisher::builder(topic.name)
            .runtime_dir(dir)
            .pool(topic.pool())
            .on_full(topic.on_full)
            .history(topic.history)
            .queue(8);
        if let Some(time) = topic.evict_after {
            builder = builder.evict_after(time);
        }
        let publisher = builder.bind()?;
        let id = publisher.id();
        let mut sent = 0;
        let mut said = Instant::now();
        while !ended.load(Ordering::Relaxed) {
            for _ in 0..random.below(32) {
                sent += u64::from(send(&publisher, sent, &mut random).await?);
            }
            let pool = publisher.pool().stats();
            if pool.bytes > POOL_CAP {
                return Err(format!("{}: {} bytes in the pool of {POOL_CAP}", topic.name, pool.bytes).into());
            }
            if said.elapsed() > EVERY {
                said = Instant::now();
                println!("sent {sent}");
            }
            sleep(Duration::from_micros(random.below(4_000))).await;
        }
        // Where a subscriber is stalled this waits for it, or for its end.
        publisher.flush().await?;
        let stats = publisher.stats();
        if (stats.published, stats.queued) != (sent, 0) {
            return Err(format!("{}: {sent} accepted, but {stats:?}", topic.name).into());
        }
        publisher.close().await?;
        println!("sent {sent}");
        println!("closed {id:032x}:{sent}");
        Ok(())
    })
}

/// Sends message `seq` in one way or another; `false` if it gave up before it was accepted.
async fn send(publisher: &ShmPublisher, seq: u64, random: &mut Random) -> Result<bool> {
    let len = random.len();
    let patience = Duration::from_micros(100 + random.below(20_000));
    let sent = match random.below(4) {
        0 => {
            let mut bytes = vec![0; len];
            payload::write(&mut bytes, publisher.id(), seq);
            timeout(patience, publisher.send(bytes)).await.map(|sent| sent.map_err(|error| error.to_string()))
        }
        1 => {
            let Ok(mut loan) = publisher.try_loan(len) else { return Ok(false) };
            payload::write(&mut loan, publisher.id(), seq);
            match publisher.try_send(loan) {
                Err(error) if error.is_full() => return Ok(false),
                sent => Ok(sent.map_err(|error| error.to_string())),
            }
        }
        _ => {
            let Ok(loan) = timeout(patience, publisher.loan(len)).await else { return Ok(false) };
            let mut loan = loan?;
            payload::write(&mut loan, publisher.id(), seq);
            timeout(patience, publisher.send(loan)).await.map(|sent| sent.map_err(|error| error.to_string()))
        }
    };
    match sent {
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Ok(false),
    }
}

pub(crate) fn subscribe(dir: &Path, topic: &Topic, seed: u64) -> Result {
    let ended = end_of_input();
    let mut random = Random::new(seed);
    // Those with an even seed wait on a runtime, the others on their thread.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let depth = 1 + random.below(64) as u32;
    let is_patient = std::env::var_os(PATIENT).is_some();
    let mut builder = ShmSubscriber::builder(topic.name).runtime_dir(dir).depth(depth);
    if topic.on_full == OnFull::Wait && random.below(4) == 0 {
        builder = builder.on_full([OnFull::DropOldest, OnFull::DropNewest][random.below(2) as usize]);
    }
    let mut subscriber = builder.connect()?;
    let mut books = Books::default();
    let mut held = VecDeque::new();
    let mut said = Instant::now();
    let mut idle_since = None;
    loop {
        let patience = Duration::from_millis(50);
        let received = if seed.is_multiple_of(2) {
            runtime
                .block_on(async { timeout(patience, subscriber.recv()).await })
                .unwrap_or(Err(RecvError::TimedOut))
        } else {
            subscriber.blocking_recv_timeout(patience)
        };
        if said.elapsed() > EVERY {
            said = Instant::now();
            println!("received {} {}", books.received, books.lagged);
        }
        let ending = ended.load(Ordering::Relaxed);
        if ending && !is_patient {
            break;
        }
        match received {
            Ok(sample) => {
                idle_since = None;
                check(&sample, "received")?;
                books.received(sample.publisher(), sample.seq())?;
                // What is held counts against the depth.
                if held.len() < depth as usize / 2 && random.below(8) == 0 {
                    held.push_back(sample);
                }
                if held.len() > random.below(8) as usize
                    && let Some(sample) = held.pop_front()
                {
                    check(&sample, "held")?;
                }
            }
            Err(RecvError::Lagged { missed, .. }) => books.lagged(missed)?,
            Err(RecvError::PublisherLost { publisher } | RecvError::Evicted { publisher }) => {
                println!("lost {publisher:032x}");
                books.lost(publisher);
            }
            Err(RecvError::TimedOut | RecvError::AllHeld { .. }) => {
                // With its depth held, nothing comes.
                if let Some(sample) = held.pop_front() {
                    check(&sample, "held")?;
                }
                let since = *idle_since.get_or_insert_with(Instant::now);
                if ending && held.is_empty() && since.elapsed() > Duration::from_millis(500) {
                    break;
                }
            }
            Err(error) => return Err(format!("{}: {error}", topic.name).into()),
        }
    }
    for sample in held {
        check(&sample, "held")?;
    }
    println!("received {} {}", books.received, books.lagged);
    println!("read {}", books.close());
    Ok(())
}

/// Set where the parent wants to know all that there was to read; it ends the publishers first.
pub(crate) const PATIENT: &str = "TOKIO_SHM_SOAK_PATIENT";

fn check(sample: &ShmSample, when: &str) -> Result {
    let (publisher, seq) = (sample.publisher(), sample.seq());
    if payload::is_intact(sample, publisher, seq) {
        return Ok(());
    }
    Err(format!("publisher {publisher:032x}: message {seq} of {} bytes is wrong when {when}", sample.len())
        .into())
}

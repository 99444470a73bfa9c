//! Round trips between two threads on one core that both fall asleep: the event beside a bare futex and a bare `Notify`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::futex;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;
use tokio_shm::event::event;

use super::Timed;

pub(super) fn items() -> [(&'static str, Timed); 4] {
    [
        ("across_event", Box::new(by_event)),
        ("across_futex", Box::new(by_futex)),
        ("across_event_async", Box::new(by_event_async)),
        ("across_notify", Box::new(by_notify)),
    ]
}

fn by_event(count: u64) -> Duration {
    let (ping, pinged) = event();
    let (pong, ponged) = event();
    let echo = thread::spawn(move || {
        while pinged.wait().is_ok() {
            let _ = pong.notify();
        }
    });
    let start = Instant::now();
    for _ in 0..count {
        ping.notify().expect("a waiter");
        ponged.wait().expect("a notifier");
    }
    let took = start.elapsed();
    drop(ping);
    echo.join().expect("no panic");
    took
}

fn by_event_async(count: u64) -> Duration {
    let (ping, pinged) = event();
    let (pong, ponged) = event();
    let echo = thread::spawn(move || {
        runtime().block_on(async {
            while pinged.wait_async().await.is_ok() {
                let _ = pong.notify();
            }
        });
    });
    let took = runtime().block_on(async {
        let start = Instant::now();
        for _ in 0..count {
            ping.notify().expect("a waiter");
            ponged.wait_async().await.expect("a notifier");
        }
        start.elapsed()
    });
    drop(ping);
    echo.join().expect("no panic");
    took
}

fn by_notify(count: u64) -> Duration {
    let both = Arc::new((Notify::new(), Notify::new()));
    let echo = thread::spawn({
        let both = Arc::clone(&both);
        move || {
            runtime().block_on(async {
                for _ in 0..count {
                    both.0.notified().await;
                    both.1.notify_one();
                }
            });
        }
    });
    let took = runtime().block_on(async {
        let start = Instant::now();
        for _ in 0..count {
            both.0.notify_one();
            both.1.notified().await;
        }
        start.elapsed()
    });
    echo.join().expect("no panic");
    took
}

fn by_futex(count: u64) -> Duration {
    let both = Arc::new((RawEvent::default(), RawEvent::default()));
    let echo = thread::spawn({
        let both = Arc::clone(&both);
        move || {
            for _ in 0..count {
                both.0.wait();
                both.1.notify();
            }
        }
    });
    let start = Instant::now();
    for _ in 0..count {
        both.0.notify();
        both.1.wait();
    }
    let took = start.elapsed();
    echo.join().expect("no panic");
    took
}

fn runtime() -> Runtime {
    Builder::new_current_thread().build().expect("a runtime without drivers needs nothing")
}

/// The least that a futex can be used for as an event.
#[derive(Default)]
struct RawEvent(AtomicU32);

impl RawEvent {
    const SET: u32 = 1;
    const ASLEEP: u32 = 2;

    fn notify(&self) {
        if self.0.swap(Self::SET, Ordering::Release) == Self::ASLEEP {
            futex::wake(&self.0, futex::Flags::PRIVATE, 1).expect("wake");
        }
    }

    fn wait(&self) {
        loop {
            if self.0.compare_exchange(Self::SET, 0, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return;
            }
            let _ = self.0.compare_exchange(0, Self::ASLEEP, Ordering::Relaxed, Ordering::Relaxed);
            let _ = futex::wait(&self.0, futex::Flags::PRIVATE, Self::ASLEEP, None);
        }
    }
}

//! How often to look for what nobody tells: at first after 20 µs, then after twice as long each time, up to 4 ms.
//!
//! So whoever waits notices after at most twice the time that it took, or 4 ms late.

use std::os::fd::OwnedFd;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use crate::reactor::Watched;

const FIRST: Duration = Duration::from_micros(20);
const LONGEST: Duration = Duration::from_millis(4);

/// The interval, growing.
#[derive(Debug)]
pub(super) struct Pace(Duration);

impl Pace {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    pub(super) fn interval(&mut self) -> Duration {
        let interval = self.0;
        self.0 = LONGEST.min(interval * 2);
        interval
    }
}

/// Intervals of a [`Pace`] on tokio's reactor. (tokio's own timers know milliseconds only.)
pub(super) struct Ticks {
    pace: Pace,
    timer: Watched<OwnedFd>,
    running: bool,
}

impl Ticks {
    /// # Panics
    /// Outside a tokio runtime, or in one whose I/O is not enabled.
    pub(super) fn new() -> std::io::Result<Self> {
        let timer =
            timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self { pace: Pace::new(), timer: Watched::register(timer)?, running: false })
    }

    /// Ready at the end of the interval, which the first call after that begins.
    pub(super) fn poll_tick(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if !self.running {
            let interval = self.pace.interval();
            let once = Itimerspec {
                it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
                it_value: Timespec { tv_sec: 0, tv_nsec: i64::from(interval.subsec_nanos()) },
            };
            timerfd_settime(self.timer.get(), TimerfdTimerFlags::empty(), &once)?;
            self.running = true;
        }
        // Edge-triggered, and set anew for each interval: need not be read.
        ready!(self.timer.poll_read_ready(cx))?.clear_ready();
        self.running = false;
        Poll::Ready(Ok(()))
    }
}

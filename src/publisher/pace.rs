//! How often a publisher reads the clock: for each message while they come slowly, for every sixteenth while they come fast.
//!
//! The clock is for the join log, and to know when a publisher was quiet. Reading it costs more than everything else that a
//! message costs its sender (about 50 ns on a virtual machine, where the rest is 20). A message whose time is not noted
//! is taken by the log for one sent at the next time that is: whoever connects in between then counts up to fifteen
//! messages as missed that were sent in the microseconds before it did, and never one too few.
//!
//! So that it stays with microseconds, the tx task notes the time of the last ones when the rush is over.

/// Messages to one reading of the clock during a rush.
const STRIDE: u32 = 16;
/// A rush is when so many readings in a row find messages …
const READINGS: u32 = 16;
/// … no further apart than this, in nanoseconds.
const APART_NS: u64 = 2_000;

/// The state of one publisher; see the module. It reads no clock itself.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Messages that go without a reading before the next one.
    free: u32,
    /// Readings in a row that found messages close together.
    close: u32,
    /// When the clock was last read.
    last: u64,
}

impl Pace {
    /// Whether the clock is to be read for the message that is about to be sent.
    #[inline]
    pub(super) fn is_due(&mut self) -> bool {
        match self.free.checked_sub(1) {
            Some(free) => {
                self.free = free;
                false
            }
            None => true,
        }
    }

    /// Takes note of the clock's reading; `true` if a rush has begun with it, whose end somebody has to see to.
    pub(super) fn read(&mut self, now: u64) -> bool {
        let messages = if self.close == READINGS { STRIDE } else { 1 };
        let is_close = now.saturating_sub(self.last) < APART_NS * u64::from(messages);
        self.last = now;
        if !is_close {
            self.rest();
            return false;
        }
        let rushed = self.close == READINGS;
        self.close = (self.close + 1).min(READINGS);
        let rushes = self.close == READINGS;
        self.free = if rushes { STRIDE - 1 } else { 0 };
        rushes && !rushed
    }

    /// The rush is over: the clock is read for each message again.
    pub(super) fn rest(&mut self) {
        (self.free, self.close) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends `count` messages, `apart` nanoseconds one after the other; how many readings that took, and rushes that began.
    fn send(pace: &mut Pace, clock: &mut u64, count: u32, apart: u64) -> (u32, u32) {
        let (mut readings, mut rushes) = (0, 0);
        for _ in 0..count {
            *clock += apart;
            if pace.is_due() {
                readings += 1;
                rushes += u32::from(pace.read(*clock));
            }
        }
        (readings, rushes)
    }

    #[test]
    fn clock_is_read_for_each_message_that_comes_slowly() {
        let (mut pace, mut clock) = (Pace::default(), 1 << 40);
        assert_eq!(send(&mut pace, &mut clock, 1_000, APART_NS), (1_000, 0));
    }

    #[test]
    fn clock_is_read_for_every_sixteenth_message_of_a_rush() {
        let (mut pace, mut clock) = (Pace::default(), 1 << 40);
        let (readings, rushes) = send(&mut pace, &mut clock, 16_000, 50);
        assert_eq!(rushes, 1);
        assert!(readings < 1_020, "{readings}");
    }

    #[test]
    fn clock_is_read_for_each_message_soon_after_a_rush_that_nobody_ended() {
        let (mut pace, mut clock) = (Pace::default(), 1 << 40);
        send(&mut pace, &mut clock, 1_000, 50);
        send(&mut pace, &mut clock, STRIDE, 1_000_000);
        assert_eq!(send(&mut pace, &mut clock, 100, 1_000_000), (100, 0));
    }

    #[test]
    fn clock_is_read_for_the_first_message_after_a_rest() {
        let (mut pace, mut clock) = (Pace::default(), 1 << 40);
        send(&mut pace, &mut clock, 1_000, 50);
        pace.rest();
        assert!(pace.is_due());
        assert_eq!(send(&mut pace, &mut clock, 1_000, 50).1, 1, "the next rush begins anew");
    }
}

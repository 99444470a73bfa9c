//! What the demo sends: a timestamp, a number, and words that follow from the number, so that each can be checked.
//!
//! Both sides touch every byte, as a program with a use for the bytes would.

use rustix::time::{ClockId, clock_gettime};

type Word = [u8; 8];

/// Nanoseconds on a clock that all processes of the host share.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Writes message `number` in place, and returns its timestamp, which is taken last.
pub(crate) fn write(message: &mut [u8], number: u64) -> u64 {
    let (words, _) = message.as_chunks_mut::<8>();
    let [time, own_number, body @ ..] = words else { panic!("a message has at least 16 bytes") };
    *own_number = number.to_ne_bytes();
    for (word, expected) in body.iter_mut().zip(pattern(number)) {
        *word = expected.to_ne_bytes();
    }
    let now = now();
    *time = now.to_ne_bytes();
    now
}

/// The timestamp of message `number`, if every other word of it is as it was written.
pub(crate) fn check(message: &[u8], number: u64) -> Option<u64> {
    let (words, rest) = message.as_chunks::<8>();
    let [time, own_number, body @ ..] = words else { return None };
    // No early exit: the compiler can then compare many words at once, and every byte is read.
    let differences =
        body.iter().zip(pattern(number)).fold(0, |all, (word, expected)| all | (value(word) ^ expected));
    (differences == 0 && value(own_number) == number && rest.is_empty()).then(|| value(time))
}

/// Words that depend on the message's number and on their place in it.
fn pattern(number: u64) -> impl Iterator<Item = u64> {
    let first = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0_u64..).map(move |place| first.wrapping_add(place))
}

fn value(word: &Word) -> u64 {
    u64::from_ne_bytes(*word)
}

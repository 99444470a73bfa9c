//! The stand-in for `Notify` against the original: every short history, step by step.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::{Notified, Notify};

const OPERATIONS: usize = 8;
const FUTURES: usize = 2;
const LENGTH: u32 = 5;

type Pair<'a> = (Pin<Box<tokio::sync::futures::Notified<'a>>>, Pin<Box<Notified<'a>>>);

#[derive(Debug, Clone, Copy)]
enum Operation {
    NotifyOne,
    NotifyWaiters,
    /// Makes the future, which replaces (drops) the one before.
    Make(usize),
    Enable(usize),
    Poll(usize),
}

impl Operation {
    fn decode(code: usize) -> Self {
        match code {
            0 => Self::NotifyOne,
            1 => Self::NotifyWaiters,
            2 | 3 => Self::Make(code - 2),
            4 | 5 => Self::Enable(code - 4),
            _ => Self::Poll(code - 6),
        }
    }
}

fn run(history: &[Operation]) {
    let (original, stand_in) = (tokio::sync::Notify::new(), Notify::new());
    let mut futures: [Option<Pair<'_>>; FUTURES] = [None, None];
    let mut cx = Context::from_waker(Waker::noop());
    for operation in history {
        match *operation {
            Operation::NotifyOne => {
                original.notify_one();
                stand_in.notify_one();
            }
            Operation::NotifyWaiters => {
                original.notify_waiters();
                stand_in.notify_waiters();
            }
            Operation::Make(at) => {
                futures[at] = Some((Box::pin(original.notified()), Box::pin(stand_in.notified())));
            }
            Operation::Enable(at) => {
                let Some((one, other)) = &mut futures[at] else { return };
                assert_eq!(one.as_mut().enable(), other.as_mut().enable(), "{history:?}");
            }
            Operation::Poll(at) => {
                let Some((one, other)) = &mut futures[at] else { return };
                let (one, other): (Poll<()>, Poll<()>) =
                    (one.as_mut().poll(&mut cx), other.as_mut().poll(&mut cx));
                assert_eq!(one, other, "{history:?}");
            }
        }
    }
}

#[test]
fn loom_notify_stand_in_behaves_like_the_original() {
    // Both futures exist and one is enabled: what comes before that is dull, and this makes room for what comes after.
    let prefix = [Operation::Make(0), Operation::Make(1), Operation::Enable(0)];
    for code in 0..OPERATIONS.pow(LENGTH) {
        let tail = (0..LENGTH).map(|at| Operation::decode(code / OPERATIONS.pow(at) % OPERATIONS));
        let history: Vec<_> = prefix.into_iter().chain(tail).collect();
        loom::model(move || run(&history));
    }
}

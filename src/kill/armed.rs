//! The one point at which this process is to die, if any. In tests only.

use std::cell::RefCell;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::process::{Signal, getpid, kill_process};

use crate::sys::clock::monotonic_ns;

struct Armed {
    point: String,
    /// Counts down; whoever takes it to 0 dies.
    passages: AtomicU32,
}

static ARMED: OnceLock<Armed> = OnceLock::new();

/// Has this process die when it comes to `point` for the `passage`th time, counted from 1.
pub(super) fn arm(point: &str, passage: u32) {
    let armed = Armed { point: point.to_owned(), passages: AtomicU32::new(passage) };
    assert!(ARMED.set(armed).is_ok(), "a process dies once");
}

type Detour = (&'static str, Box<dyn FnOnce()>);

thread_local! {
    static DETOUR: RefCell<Option<Detour>> = const { RefCell::new(None) };
}

/// Has this thread call `act` when it comes to `point` next, as if another had run between the two steps.
pub(crate) fn detour(point: &'static str, act: impl FnOnce() + 'static) {
    DETOUR.with(|detour| *detour.borrow_mut() = Some((point, Box::new(act))));
}

/// Comes by a point.
pub(crate) fn pass(point: &str) {
    let due = DETOUR.try_with(|detour| {
        detour.try_borrow_mut().ok().and_then(|mut detour| detour.take_if(|(at, _)| *at == point))
    });
    if let Ok(Some((_, act))) = due {
        act();
    }
    if let Some(armed) = ARMED.get()
        && armed.point == point
        && armed.passages.fetch_sub(1, Ordering::Relaxed) == 1
    {
        die();
    }
}

/// As if somebody else had killed the process at this very instant, except that it says when.
fn die() -> ! {
    // Not by `println`: another thread may have its lock.
    let last_word = format!("> dying {}\n", monotonic_ns());
    rustix::io::write(std::io::stdout(), last_word.as_bytes()).expect("the parent listens");
    kill_process(getpid(), Signal::KILL).expect("a process may kill itself");
    unreachable!("a process does not return from its own SIGKILL")
}

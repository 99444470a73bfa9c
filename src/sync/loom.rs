//! Stand-ins under loom, with the API of the real primitives.
//!
//! Locks and `Notify` are a loom mutex around plain data, which orders *more* than the original does: a model can show that our code
//! misuses one of them, not that one of them is broken. What our code publishes itself must go through its own
//! atomics. The futex and the queue have the steps and orderings of the real ones.

use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

mod queue;

pub(crate) use ::loom::cell::UnsafeCell;
use ::loom::sync as mock;
pub(crate) use ::loom::sync::Arc;
use ::loom::sync::atomic::{AtomicU32, Ordering};

pub(crate) use self::queue::ArrayQueue;

/// `parking_lot::Mutex`: no poisoning.
pub(crate) struct Mutex<T>(mock::Mutex<T>);

/// `parking_lot::MutexGuard`. Empty only while a [`Condvar`] has taken the lock away.
pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a Mutex<T>,
    held: Option<mock::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(mock::Mutex::new(value))
    }

    #[track_caller]
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        let held = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        MutexGuard { mutex: self, held: Some(held) }
    }

    #[track_caller]
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let held = self.0.try_lock().ok()?;
        Some(MutexGuard { mutex: self, held: Some(held) })
    }

    pub(crate) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mutex").finish_non_exhaustive()
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect("the guard holds the lock outside of a condvar")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("the guard holds the lock outside of a condvar")
    }
}

/// `parking_lot::Condvar`.
#[derive(Debug)]
pub(crate) struct Condvar(mock::Condvar);

/// `parking_lot::WaitTimeoutResult`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    pub(crate) fn timed_out(self) -> bool {
        self.0
    }
}

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(mock::Condvar::new())
    }

    #[track_caller]
    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.held.take().expect("the guard holds the lock outside of a condvar");
        guard.held = Some(self.0.wait(held).unwrap_or_else(|poisoned| poisoned.into_inner()));
    }

    /// Always times out, after everybody else had a chance at the lock. Loom has no clock, and to be woken in time
    /// is what [`wait`](Self::wait) models already.
    #[track_caller]
    pub(crate) fn wait_until<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        _deadline: Instant,
    ) -> WaitTimeoutResult {
        guard.held = None;
        ::loom::thread::yield_now();
        guard.held = guard.mutex.lock().held.take();
        WaitTimeoutResult(true)
    }

    #[track_caller]
    pub(crate) fn notify_one(&self) -> bool {
        self.0.notify_one();
        true
    }

    #[track_caller]
    pub(crate) fn notify_all(&self) -> usize {
        self.0.notify_all();
        0
    }
}

/// The facade's own futex, with the orderings of the real one. The kernel compares the word under a lock, as this does.
#[derive(Debug)]
pub(crate) struct Futex {
    word: AtomicU32,
    queue: Mutex<()>,
    asleep: Condvar,
}

impl Futex {
    pub(crate) fn new() -> Self {
        Self { word: AtomicU32::new(0), queue: Mutex::new(()), asleep: Condvar::new() }
    }

    pub(crate) fn wakes(&self) -> u32 {
        self.word.load(Ordering::Acquire)
    }

    #[track_caller]
    pub(crate) fn sleep(&self, wakes: u32, deadline: Option<Instant>) -> bool {
        let mut queue = self.queue.lock();
        if self.word.load(Ordering::Relaxed) != wakes {
            return false;
        }
        match deadline {
            Some(deadline) => self.asleep.wait_until(&mut queue, deadline).timed_out(),
            None => {
                self.asleep.wait(&mut queue);
                false
            }
        }
    }

    #[track_caller]
    pub(crate) fn wake(&self, count: usize) {
        self.word.fetch_add(1, Ordering::Release);
        drop(self.queue.lock());
        for _ in 0..count {
            self.asleep.notify_one();
        }
    }

    #[track_caller]
    pub(crate) fn wake_all(&self) {
        self.word.fetch_add(1, Ordering::Release);
        drop(self.queue.lock());
        self.asleep.notify_all();
    }
}

/// `tokio::sync::Notify`, down to what it forgets: a permit that `enable` took goes with its future.
pub(crate) struct Notify(Mutex<NotifyState>);

#[derive(Default)]
struct NotifyState {
    permit: bool,
    /// How often `notify_waiters` was called. A [`Notified`] made before such a call is done, enabled or not.
    broadcasts: usize,
    next_id: usize,
    /// Enabled and not chosen yet, oldest first.
    waiting: VecDeque<(usize, Option<Waker>)>,
    /// Chosen, and have not looked yet.
    chosen: Vec<(usize, Chosen)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Chosen {
    One,
    All,
}

impl Notify {
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    pub(crate) fn notified(&self) -> Notified<'_> {
        let broadcasts = self.0.lock().broadcasts;
        Notified { notify: self, broadcasts, step: Step::Init }
    }

    pub(crate) fn notify_one(&self) {
        let waker = self.0.lock().choose_one();
        // Outside of the lock, as tokio does it: a waker may run anything.
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(crate) fn notify_waiters(&self) {
        let mut state = self.0.lock();
        state.broadcasts += 1;
        let waiting = std::mem::take(&mut state.waiting);
        state.chosen.extend(waiting.iter().map(|(id, _)| (*id, Chosen::All)));
        drop(state);
        waiting.into_iter().filter_map(|(_, waker)| waker).for_each(Waker::wake);
    }
}

impl NotifyState {
    fn choose_one(&mut self) -> Option<Waker> {
        let Some((id, waker)) = self.waiting.pop_front() else {
            self.permit = true;
            return None;
        };
        self.chosen.push((id, Chosen::One));
        waker
    }

    fn take_chosen(&mut self, id: usize) -> Option<Chosen> {
        let at = self.chosen.iter().position(|(chosen, _)| *chosen == id)?;
        Some(self.chosen.swap_remove(at).1)
    }
}

/// `tokio::sync::futures::Notified`.
#[must_use = "futures do nothing unless polled"]
pub(crate) struct Notified<'a> {
    notify: &'a Notify,
    broadcasts: usize,
    step: Step,
}

enum Step {
    Init,
    Waiting(usize),
    Done,
}

impl Notified<'_> {
    pub(crate) fn enable(self: Pin<&mut Self>) -> bool {
        self.get_mut().advance(None)
    }

    /// Whether it has been notified.
    fn advance(&mut self, waker: Option<&Waker>) -> bool {
        match self.step {
            Step::Done => return true,
            Step::Init => {
                let mut state = self.notify.0.lock();
                // A broadcast comes first and leaves the permit to somebody else.
                if state.broadcasts == self.broadcasts && !std::mem::take(&mut state.permit) {
                    let id = state.next_id;
                    state.next_id += 1;
                    state.waiting.push_back((id, waker.cloned()));
                    self.step = Step::Waiting(id);
                    return false;
                }
            }
            Step::Waiting(id) => {
                let mut state = self.notify.0.lock();
                if state.take_chosen(id).is_none() {
                    let entry = state.waiting.iter_mut().find(|(waiting, _)| *waiting == id);
                    if let (Some((_, slot)), Some(waker)) = (entry, waker) {
                        *slot = Some(waker.clone());
                    }
                    return false;
                }
            }
        }
        self.step = Step::Done;
        true
    }
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.get_mut().advance(Some(cx.waker())) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Notified<'_> {
    fn drop(&mut self) {
        let Step::Waiting(id) = self.step else { return };
        let mut state = self.notify.0.lock();
        state.waiting.retain(|(waiting, _)| *waiting != id);
        let next = match state.take_chosen(id) {
            Some(Chosen::One) => state.choose_one(),
            Some(Chosen::All) | None => None,
        };
        drop(state);
        if let Some(waker) = next {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod loom_tests;

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::*;

#[test]
fn enter_when_empty_gives_the_value() {
    let mut turnstile = Turnstile::new(1);
    let mut inside = turnstile.enter().unwrap();
    *inside += 1;
    assert_eq!(*inside, 2);
    assert!(!inside.leave());
    assert_eq!(*turnstile.get_mut(), 2);
}

#[test]
fn enter_when_taken_is_told_on_leave_once() {
    let turnstile = Turnstile::new(());
    let inside = turnstile.enter().unwrap();
    assert!(turnstile.enter().is_none());
    assert!(turnstile.enter().is_none());
    assert!(inside.leave());
    assert!(!turnstile.enter().unwrap().leave());
}

#[test]
fn drop_without_leave_opens_and_keeps_the_knock() {
    let turnstile = Turnstile::new(());
    let inside = turnstile.enter().unwrap();
    assert!(turnstile.enter().is_none());
    drop(inside);
    assert!(turnstile.enter().unwrap().leave());
    assert!(!turnstile.enter().unwrap().leave());
}

#[test]
fn panic_inside_poisons_for_ever() {
    let mut turnstile = Turnstile::new(1);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut inside = turnstile.enter().unwrap();
        *inside = 2;
        assert!(turnstile.enter().is_none());
        panic!("inside");
    }));
    assert!(panicked.is_err());
    assert!(turnstile.is_poisoned());
    assert!(turnstile.enter().is_none());
    assert!(turnstile.enter().is_none());
    assert!(turnstile.is_poisoned());
    assert_eq!(*turnstile.get_mut(), 2);
}

#[test]
fn entering_while_a_panic_unwinds_does_not_poison() {
    struct EntersOnDrop<'a>(&'a Turnstile<u32>);
    impl Drop for EntersOnDrop<'_> {
        fn drop(&mut self) {
            *self.0.enter().unwrap() += 1;
        }
    }

    let turnstile = Turnstile::new(1);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let _cleanup = EntersOnDrop(&turnstile);
        panic!("outside");
    }));
    assert!(panicked.is_err());
    assert!(!turnstile.is_poisoned());
    assert_eq!(*turnstile.enter().unwrap(), 2);
}

#[test]
fn threads_that_race_for_it_are_counted_without_a_lock() {
    const THREADS: usize = 4;
    const ROUNDS: usize = if cfg!(miri) { 100 } else { 20_000 };

    let todo = std::sync::atomic::AtomicUsize::new(0);
    let mut turnstile = Turnstile::new(0usize);
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..ROUNDS {
                    todo.fetch_add(1, Ordering::Relaxed);
                    while let Some(mut done) = turnstile.enter() {
                        *done += todo.swap(0, Ordering::Relaxed);
                        if !done.leave() {
                            break;
                        }
                    }
                }
            });
        }
    });
    assert_eq!(*turnstile.get_mut(), THREADS * ROUNDS);
}

#[test]
fn bounds_are_those_of_exclusive_access() {
    fn send<T: Send>() {}
    fn sync<T: Sync>() {}
    // `Cell` is `Send` and not `Sync`: behind a turnstile it may be shared, the access to it may not.
    send::<Turnstile<std::cell::Cell<u32>>>();
    sync::<Turnstile<std::cell::Cell<u32>>>();
    send::<Inside<'_, std::cell::Cell<u32>>>();
    sync::<Inside<'_, u32>>();
}

#[test]
fn what_a_panic_left_is_salvaged_once_and_the_alarm_is_given() {
    let alarms = std::sync::Arc::new(AtomicU32::new(0));
    let counted = std::sync::Arc::clone(&alarms);
    let turnstile = Turnstile::new(1).with_alarm(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(turnstile.salvage(|value| *value), None);
    let inside = turnstile.enter().unwrap();
    assert_eq!(turnstile.salvage(|value| *value), None);
    assert!(!inside.leave());
    assert_eq!(alarms.load(Ordering::Relaxed), 0);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut inside = turnstile.enter().unwrap();
        *inside = 2;
        panic!("inside");
    }));
    assert!(panicked.is_err());
    assert_eq!(alarms.load(Ordering::Relaxed), 1);
    assert_eq!(turnstile.salvage(|value| *value), Some(2));
    assert_eq!(turnstile.salvage(|value| *value), None);
    assert!(turnstile.enter().is_none());
}

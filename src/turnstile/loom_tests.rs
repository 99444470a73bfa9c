//! Models of the turnstile: one at a time, no knock lost, everything written is handed over.
#![allow(unsafe_code)]

use loom::thread;

use super::Turnstile;
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Arc, UnsafeCell};

/// A cell that loom watches: two accesses that are not ordered are an error.
struct Watched(UnsafeCell<u32>);

impl Watched {
    fn bump(&mut self) {
        self.0.with_mut(|cell| {
            // SAFETY: inside the turnstile; loom checks that this is so.
            unsafe { *cell += 1 }
        });
    }
}

/// Leaves an item at the door, then clears the door for as long as it is asked to.
fn leave_and_clear(turnstile: &Turnstile<(Watched, u32)>, item: &AtomicU32, items: &[AtomicU32]) {
    // Relaxed on purpose: the knock has to publish it. Tried: with `Relaxed` in place of `AcqRel` in `enter`, loom finds an
    // item that nobody cleared.
    item.store(1, Ordering::Relaxed);
    while let Some(mut inside) = turnstile.enter() {
        inside.0.bump();
        for item in items {
            // A look first, so that a stale one is possible.
            if item.load(Ordering::Relaxed) == 1 {
                item.store(2, Ordering::Relaxed);
                inside.1 += 1;
            }
        }
        if !inside.leave() {
            break;
        }
    }
}

fn everything_is_cleared(threads: usize) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(move || {
        let turnstile = Arc::new(Turnstile::new((Watched(UnsafeCell::new(0)), 0)));
        let items: Arc<[AtomicU32; 3]> = Arc::new(std::array::from_fn(|_| AtomicU32::new(0)));
        let others: Vec<_> = (1..threads)
            .map(|mine| {
                let (turnstile, items) = (turnstile.clone(), items.clone());
                thread::spawn(move || leave_and_clear(&turnstile, &items[mine], &items[..threads]))
            })
            .collect();
        leave_and_clear(&turnstile, &items[0], &items[..threads]);
        for other in others {
            other.join().unwrap();
        }
        let inside = turnstile.enter().expect("everybody has left");
        assert_eq!(inside.1, threads as u32, "an item was left at the door");
        assert!(!inside.leave());
    });
}

#[test]
fn loom_no_knock_is_lost_between_two() {
    everything_is_cleared(2);
}

#[test]
fn loom_no_knock_is_lost_among_three() {
    everything_is_cleared(3);
}

#[test]
fn loom_knock_survives_a_mere_drop() {
    loom::model(|| {
        let turnstile = Arc::new(Turnstile::new(0));
        let knocker = thread::spawn({
            let turnstile = turnstile.clone();
            move || match turnstile.enter() {
                Some(inside) => {
                    // Told of the other one, who does not mind.
                    let _ = inside.leave();
                    false
                }
                None => true,
            }
        });
        drop(turnstile.enter());
        let turned_away = knocker.join().unwrap();
        let told = turnstile.enter().expect("everybody has left").leave();
        assert!(!turned_away || told, "somebody was turned away, and nobody heard of it");
    });
}

//! Who waits for a place.

use std::os::unix::fs::PermissionsExt;

use tokio_test::{assert_pending, assert_ready, task};

use super::*;
use crate::ShmSubscriber;

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < limit, "{what}: not in time");
        std::thread::yield_now();
    }
}

#[test]
fn senders_that_wait_for_a_place_are_served_in_the_order_in_which_they_came() {
    const FIRST: u32 = 3;
    const WAITING: u32 = 12;
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_io().build().unwrap();
    let publisher = ShmPublisher::builder("order").runtime_dir(dir.path()).queue(1);
    let publisher = publisher.runtime(runtime.handle().clone()).bind().unwrap();
    let subscriber = ShmSubscriber::builder("order").runtime_dir(dir.path()).depth(1);
    let mut subscriber = subscriber.connect().unwrap();
    runtime.block_on(publisher.wait_for_subscribers(1));
    // On the link, at the head, and in line.
    (0..FIRST).for_each(|number| publisher.try_send(number.to_le_bytes()).unwrap());
    std::thread::scope(|scope| {
        let mut tasks = Vec::new();
        let mut given_up = task::spawn(publisher.send(b"never sent"));
        assert_pending!(given_up.poll());
        for number in FIRST..FIRST + WAITING {
            let sender = publisher.clone();
            if number % 2 == 0 {
                scope.spawn(move || sender.blocking_send(number.to_le_bytes()).unwrap());
            } else {
                let mut task = task::spawn(async move { sender.send(number.to_le_bytes()).await.unwrap() });
                assert_pending!(task.poll());
                tasks.push(task);
            }
            let before = 1 + number - FIRST;
            wait_until("it waits", || publisher.shared.room.waiters() as u32 > before);
        }
        drop(given_up);
        for number in 0..FIRST + WAITING {
            let sample = subscriber.blocking_recv_timeout(Duration::from_secs(20)).unwrap();
            assert_eq!(sample[..], number.to_le_bytes());
            if publisher.shared.room.waiters() > 0 {
                let barging = publisher.try_send(b"not before those who wait");
                assert!(matches!(barging.unwrap_err().kind(), SendErrorKind::Full));
            }
            drop(sample);
            // Tasks have nobody but this thread to poll them.
            wait_until("the next one is accepted", || {
                let next = (FIRST + number + 1).min(FIRST + WAITING);
                tasks.retain_mut(|task| !task.is_woken() || task.poll().is_pending());
                publisher.shared.room.waiters() as u32 <= FIRST + WAITING - next
            });
        }
        assert!(tasks.is_empty());
    });
    assert_ready!(task::spawn(publisher.send(b"nobody waits")).poll()).unwrap();
}

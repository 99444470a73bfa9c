//! A subscriber that is awaited in one runtime and then in another, while the first one is alive and not driven.
//!
//! Nothing polls before it was woken: that would find what a wake-up that was lost should have told.

mod support;

use tokio::runtime::Runtime;
use tokio_shm::{RecvError, ShmPublisher};

use support::{Dir, spawn_bounded, until};

fn current_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

fn multi_thread() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime")
}

fn publisher(dir: &Dir, runtime: &Runtime) -> ShmPublisher {
    dir.publisher("t").runtime(runtime.handle().clone()).bind().unwrap()
}

#[test]
fn recv_awaited_in_one_runtime_and_then_another_is_woken() {
    let dir = Dir::new();
    let publishing = multi_thread();
    let publisher = publisher(&dir, &publishing);
    let mut subscriber = dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
    let done = spawn_bounded("nine messages and the end", move || {
        let runtimes = [current_thread(), current_thread(), multi_thread()];
        for (round, runtime) in (0_u8..).zip(runtimes.iter().cycle()).take(9) {
            let publisher = publisher.clone();
            runtime.block_on(async {
                let mut recv = tokio_test::task::spawn(subscriber.recv());
                until("it sleeps", || recv.poll().is_pending() && !recv.is_woken()).await;
                publishing.spawn(async move { publisher.send([round]).await.unwrap() });
                until("it is woken", || recv.is_woken()).await;
                assert_eq!(*recv.await.unwrap(), [round]);
            });
        }
        // Sockets are heard as well as bells.
        runtimes[0].block_on(async {
            let mut recv = tokio_test::task::spawn(subscriber.recv());
            until("it sleeps", || recv.poll().is_pending() && !recv.is_woken()).await;
            publishing.spawn(publisher.close());
            until("it is woken", || recv.is_woken()).await;
            assert!(matches!(recv.await, Err(RecvError::Closed)));
        });
        publishing
    });
    drop(done());
    dir.assert_empties();
}

#[test]
fn publisher_that_comes_is_found_in_whichever_runtime_it_is_waited_for() {
    let dir = Dir::new();
    let mut subscriber = dir.subscriber("t").connect().unwrap();
    let (publishing, first, second) = (multi_thread(), current_thread(), current_thread());
    let done = spawn_bounded("a publisher", move || {
        for runtime in [&first, &second] {
            runtime.block_on(async {
                let mut waiting = tokio_test::task::spawn(subscriber.wait_for_publishers(1));
                until("it sleeps", || waiting.poll().is_pending() && !waiting.is_woken()).await;
            });
        }
        let bound = second.block_on(async {
            let mut waiting = tokio_test::task::spawn(subscriber.wait_for_publishers(1));
            until("it sleeps", || waiting.poll().is_pending() && !waiting.is_woken()).await;
            let bound = publisher(&dir, &publishing);
            until("it is woken", || waiting.is_woken()).await;
            waiting.await.unwrap();
            bound
        });
        publishing.block_on(bound.close()).unwrap();
        drop(subscriber);
        dir.assert_empties();
    });
    done();
}

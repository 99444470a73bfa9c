//! What `fork` leaves a child: nothing of its parent's, and all that it makes itself. Each test forks in a process of its own, in which no
//! other thread does anything, so that all of the child's state is defined.
#![allow(unsafe_code)]

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio_shm::{
    BindError, FlushError, LoanError, RecvError, SendErrorKind, ShmPublisher, ShmSubscriber, TakeError,
    TryRecvError,
};

use support::{Dir, LIMIT, Peer, Role, until, within};

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// A process forked from this one.
struct Forked(libc::pid_t);

/// Forks; the child runs `body` and ends, well or not.
fn fork(body: impl FnOnce()) -> Forked {
    // SAFETY: no other thread of this process is in the middle of anything: the child has all that it may use.
    match unsafe { libc::fork() } {
        0 => {
            let ended = catch_unwind(AssertUnwindSafe(body));
            // SAFETY: ends the process without the destructors of what is its parent's.
            unsafe { libc::_exit(i32::from(ended.is_err())) }
        }
        pid => {
            assert!(pid > 0, "cannot fork");
            Forked(pid)
        }
    }
}

impl Forked {
    fn finish(self) {
        let mut status = 0;
        // SAFETY: `status` is there to be written.
        let waited = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        assert_eq!((waited, status), (self.0, 0), "the forked process failed");
    }
}

/// Whether `read` panics for the reason that what it reads was inherited.
fn is_refused<T>(read: impl FnOnce() -> T) -> bool {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let panicked = catch_unwind(AssertUnwindSafe(read));
    std::panic::set_hook(hook);
    let Err(panic) = panicked else { return false };
    let said = panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned());
    said.is_some_and(|said| said.contains("before this process was forked"))
}

#[tokio::test]
async fn workers_forked_after_a_first_connect_all_receive() {
    let dir = Dir::new();
    let mut peer = Peer::start("role_parent_of_workers", &dir);
    for _ in 0..6 {
        assert_eq!(peer.hear(), "connected");
    }
    // Found by the watch alone.
    let publisher = dir.publisher("t").bind().unwrap();
    within("workers", publisher.wait_for_subscribers(6)).await;
    publisher.send(&b"work"[..]).await.unwrap();
    within("workers", tokio::task::spawn_blocking(move || peer.finish())).await.unwrap();
    within("close", publisher.close()).await.unwrap();
    dir.assert_empties();
}

#[test]
fn role_parent_of_workers() {
    let Some(role) = Role::of("role_parent_of_workers") else { return };
    let inherited = role.subscriber("other").connect().unwrap();
    let children: Vec<_> = (0..6)
        .map(|worker| {
            fork(|| {
                let mut subscriber = role.subscriber("t").connect().unwrap();
                role.say("connected");
                let sample = if worker % 2 == 0 {
                    runtime().block_on(async { within("recv", subscriber.recv()).await.unwrap() })
                } else {
                    subscriber.blocking_recv_timeout(LIMIT).unwrap()
                };
                assert_eq!(&*sample, b"work");
            })
        })
        .collect();
    children.into_iter().for_each(Forked::finish);
    drop(inherited);
}

#[test]
fn child_of_a_publisher_receives_from_it() {
    let dir = Dir::new();
    Peer::start("role_publisher_with_a_child", &dir).finish();
    dir.assert_empties();
}

#[test]
fn role_publisher_with_a_child() {
    let Some(role) = Role::of("role_publisher_with_a_child") else { return };
    let parent = runtime();
    let publisher = parent.block_on(async { role.publisher("t").bind().unwrap() });
    let children: Vec<_> = (0..4)
        .map(|_| {
            fork(|| {
                let mut subscriber = role.subscriber("t").end_with_last_publisher(true).connect().unwrap();
                runtime().block_on(async {
                    for n in 0..100 {
                        assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [n]);
                    }
                    assert!(matches!(within("end", subscriber.recv()).await, Err(RecvError::Closed)));
                });
            })
        })
        .collect();
    parent.block_on(async {
        within("children", publisher.wait_for_subscribers(4)).await;
        for n in 0..100 {
            within("send", publisher.send([n])).await.unwrap();
        }
        within("close", publisher.close()).await.unwrap();
    });
    children.into_iter().for_each(Forked::finish);
}

#[test]
fn handles_inherited_are_errors_in_the_child_and_untouched_in_the_parent() {
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let publisher = runtime.block_on(async { dir.publisher("to the parent").queue(4).bind().unwrap() });
    let mut peer = Peer::start("role_parent_of_heirs", &dir);
    runtime.block_on(async {
        within("a subscriber", publisher.wait_for_subscribers(1)).await;
        within("send", publisher.send(vec![7; 20_000])).await.unwrap();
    });
    assert_eq!(peer.hear(), "forked");
    // What the parent holds stays, through many turns of the memory that there is.
    runtime.block_on(async {
        for n in 0..200_u8 {
            within("send", publisher.send(vec![n; 20_000])).await.unwrap();
        }
        within("close", publisher.close()).await.unwrap();
    });
    peer.finish();
    dir.assert_empties();
}

/// Each handle there is, used in a process that only inherited it.
fn use_as_heir(role: &Role, publisher: ShmPublisher, mut subscriber: ShmSubscriber) {
    assert!(matches!(publisher.try_send([1]).unwrap_err().kind(), SendErrorKind::Forked));
    assert!(matches!(publisher.blocking_send([1]).unwrap_err().kind(), SendErrorKind::Forked));
    assert!(matches!(publisher.try_loan(1), Err(LoanError::Forked)));
    assert!(matches!(publisher.blocking_loan(1 << 20), Err(LoanError::Forked)));
    assert!(publisher.is_closed());
    let pool = publisher.pool().clone();
    assert!(matches!(pool.try_take(1), Err(TakeError::Forked)));
    assert!(matches!(pool.blocking_take(1), Err(TakeError::Forked)));
    assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Recv(RecvError::Forked))));
    assert!(matches!(subscriber.blocking_recv(), Err(RecvError::Forked)));
    runtime().block_on(async {
        assert!(matches!(publisher.send([1]).await.unwrap_err().kind(), SendErrorKind::Forked));
        assert!(matches!(publisher.loan(1).await, Err(LoanError::Forked)));
        assert!(matches!(pool.take(1).await, Err(TakeError::Forked)));
        assert!(matches!(subscriber.recv().await, Err(RecvError::Forked)));
        assert!(matches!(subscriber.wait_for_publishers(1).await, Err(RecvError::Forked)));
        let mut sink = publisher.clone();
        let error = futures::SinkExt::send(&mut sink, vec![1_u8]).await.unwrap_err();
        assert!(matches!(error.kind(), SendErrorKind::Forked), "{error}");
        publisher.wait_for_subscribers(99).await;
        let shared = role.publisher("mine").shared_pool(&pool).bind();
        assert!(matches!(shared, Err(BindError::Forked)));
        assert!(matches!(publisher.close().await, Err(FlushError::Forked)));
        // What it makes itself is as good as anywhere.
        let mine = role.publisher("mine").bind().unwrap();
        let mut subscriber = role.subscriber("mine").connect().unwrap();
        within("send", mine.send([9])).await.unwrap();
        assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [9]);
        within("close", mine.close()).await.unwrap();
    });
}

#[test]
fn role_parent_of_heirs() {
    let Some(role) = Role::of("role_parent_of_heirs") else { return };
    let parent = runtime();
    let mut subscriber = role.subscriber("to the parent").depth(2).connect().unwrap();
    let (publisher, held, mut local) = parent.block_on(async {
        let held = within("recv", subscriber.recv()).await.unwrap();
        let publisher = role.publisher("of the parent").bind().unwrap();
        let local = role.subscriber("of the parent").connect().unwrap();
        within("itself", publisher.wait_for_subscribers(1)).await;
        (publisher, held, local)
    });
    let mut loan = publisher.try_loan(5_000).unwrap();
    loan.fill(3);
    let (mut parent, mut loan, mut publisher, mut held) =
        (Some(parent), Some(loan), Some(publisher), Some(held));
    let mut subscriber = Some(subscriber);
    // Both ways to part: with everything dropped, and with nothing.
    for dropping in [false, true] {
        let child = fork(|| {
            let (mut loan, held) = (loan.take().unwrap(), held.take().unwrap());
            assert!(is_refused(|| held[0]) && is_refused(|| held.to_vec()));
            assert!(is_refused(|| loan[0]) && is_refused(|| loan.fill(4)));
            let publisher = publisher.take().unwrap();
            assert!(is_refused(|| publisher.try_send(&*loan)));
            use_as_heir(&role, publisher, subscriber.take().unwrap());
            if dropping {
                drop((held.clone(), held, loan));
                drop(parent.take());
            } else {
                std::mem::forget((held, loan));
            }
        });
        child.finish();
    }
    let (parent, mut subscriber, publisher) = (parent.unwrap(), subscriber.unwrap(), publisher.unwrap());
    role.say("forked");
    parent.block_on(async {
        // Nothing of the parent's was disturbed: its registrations, its loan, its sample, its name.
        within("send", publisher.send(loan.take().unwrap())).await.unwrap();
        assert_eq!(*within("recv", local.recv()).await.unwrap(), [3; 5_000]);
        let mut late = role.subscriber("of the parent").connect().unwrap();
        within("another", publisher.wait_for_subscribers(2)).await;
        within("send", publisher.send([5])).await.unwrap();
        assert_eq!(*within("recv", late.recv()).await.unwrap(), [5]);
        for n in 0..200_u8 {
            assert_eq!(*within("recv", subscriber.recv()).await.unwrap(), [n; 20_000]);
        }
        assert_eq!(*held.take().unwrap(), [7; 20_000]);
        within("close", publisher.close()).await.unwrap();
    });
}

#[tokio::test]
async fn daemon_that_connected_before_it_forked_is_told_and_what_it_holds_is_not_overwritten() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").bind().unwrap();
    let mut peer = Peer::start("role_daemon", &dir);
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    within("send", publisher.send(vec![7; 20_000])).await.unwrap();
    assert_eq!(peer.hear(), "daemonized");
    until("its parent is gone", || publisher.subscriber_count() == 0).await;
    for n in 0..200_u8 {
        within("send", publisher.send(vec![n; 20_000])).await.unwrap();
    }
    assert_eq!(peer.ask("look"), "intact");
    assert_eq!(peer.ask("receive"), "forked");
    assert_eq!(peer.ask("connect"), "connected");
    within("the daemon", publisher.wait_for_subscribers(1)).await;
    within("send", publisher.send(&b"again"[..])).await.unwrap();
    assert_eq!(peer.hear(), "again");
    until("its memory is free", || publisher.pool().stats().in_use() == 0).await;
    within("close", publisher.close()).await.unwrap();
    peer.finish();
    dir.assert_empties();
}

#[test]
fn role_daemon() {
    let Some(role) = Role::of("role_daemon") else { return };
    let before = runtime();
    let mut subscriber = role.subscriber("t").connect().unwrap();
    let held = Bytes::from(before.block_on(async { within("recv", subscriber.recv()).await.unwrap() }));
    fork(|| {
        // SAFETY: no more than a system call.
        unsafe { libc::setsid() };
        let mut anew = None;
        role.say("daemonized");
        while let Some(line) = role.hear() {
            match &*line {
                "look" => role.say(if held.iter().all(|byte| *byte == 7) { "intact" } else { "overwritten" }),
                "receive" => match subscriber.blocking_recv_timeout(LIMIT) {
                    Err(RecvError::Forked) => role.say("forked"),
                    other => role.say(&format!("{other:?}")),
                },
                "connect" => {
                    let subscriber = anew.insert(role.subscriber("t").connect().unwrap());
                    role.say("connected");
                    // Of what was sent in a rush right before it connected it may be told a few too many.
                    let sample = match subscriber.blocking_recv_timeout(LIMIT) {
                        Err(RecvError::Lagged { .. }) => subscriber.blocking_recv_timeout(LIMIT).unwrap(),
                        received => received.unwrap(),
                    };
                    role.say(std::str::from_utf8(&sample).unwrap());
                }
                other => panic!("{other}"),
            }
        }
    });
    // The parent ends as one that daemonizes does, without a word.
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

#[tokio::test]
async fn forks_in_the_middle_of_a_stream_lose_and_release_nothing() {
    let dir = Dir::new();
    let publisher = dir.publisher("t").queue(16).bind().unwrap();
    let peer = Peer::start("role_forking_receiver", &dir);
    within("a subscriber", publisher.wait_for_subscribers(1)).await;
    for n in 0..20_000_u32 {
        within("send", publisher.send(n.to_ne_bytes())).await.unwrap();
    }
    within("close", publisher.close()).await.unwrap();
    within("receiver", tokio::task::spawn_blocking(move || peer.finish())).await.unwrap();
    dir.assert_empties();
}

#[test]
fn role_forking_receiver() {
    let Some(role) = Role::of("role_forking_receiver") else { return };
    let parent = runtime();
    let mut subscriber = Some(role.subscriber("t").depth(8).end_with_last_publisher(true).connect().unwrap());
    let mut children = Vec::new();
    let mut held = std::collections::VecDeque::new();
    for n in 0..20_000_u32 {
        let sample =
            parent.block_on(async { within("recv", subscriber.as_mut().unwrap().recv()).await.unwrap() });
        assert_eq!(*sample, n.to_ne_bytes());
        held.push_back((n, sample));
        if held.len() > 5 {
            let (n, sample) = held.pop_front().unwrap();
            assert_eq!(*sample, n.to_ne_bytes());
        }
        if n % 200 == 0 {
            // Each takes all along when it goes.
            children.push(fork(|| {
                let mut subscriber = subscriber.take().unwrap();
                assert!(matches!(subscriber.try_recv(), Err(TryRecvError::Recv(RecvError::Forked))));
                held.clear();
                drop(subscriber);
            }));
        }
    }
    let subscriber = subscriber.as_mut().unwrap();
    held.clear();
    let end =
        parent.block_on(async { tokio::time::timeout(Duration::from_secs(60), subscriber.recv()).await });
    assert!(matches!(end, Ok(Err(RecvError::Closed))));
    children.into_iter().for_each(Forked::finish);
}

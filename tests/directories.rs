//! The runtime directory as others treat it: mounted read-only, cleaned up, removed, full of what killed processes left.

mod support;

use std::fs::Permissions;
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use support::limits::assert_says;
use support::{Dir, LIMIT, Peer, Role, is_allowed, skipped, until, wait_until, within};
use tokio_shm::{ConnectError, RecvError, ShmSubscriber, TopicError};

/// What a read-only subscriber is sent: more than is read in one go.
const MESSAGES: u64 = 2_000;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// The sockets below a directory.
fn sockets(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => found.extend(sockets(&entry.path())),
            Ok(kind) if kind.is_socket() => found.push(entry.path()),
            _ => {}
        }
    }
    found
}

/// Starts `role` in a mount namespace where the runtime directory is read-only; `None` where that is not permitted.
fn start_read_only(role: &str, dir: &Dir) -> Option<Peer> {
    let path = dir.path().display();
    let script =
        format!("mount --bind {path} {path} && mount -o remount,bind,ro {path} && exec \"$0\" \"$@\"");
    start_in_namespaces(&["--mount"], &script, role, dir)
}

/// Starts `role` by a shell's `script`, in namespaces of these kinds where it may do as root does; `None` where that is not permitted.
fn start_in_namespaces(kinds: &[&str], script: &str, role: &str, dir: &Dir) -> Option<Peer> {
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--map-root-user"] };
    let command = [&["unshare"], kinds, user, &["sh", "-c", script]].concat();
    is_allowed(&command).then(|| Peer::start_under(&command, role, dir))
}

#[test]
fn subscriber_that_may_write_nothing_reads_everything_of_a_publisher_that_closes() {
    for way in ["awaits", "blocks"] {
        // There before the subscriber, or only after it.
        for early in [true, false] {
            let dir = Dir::new();
            let runtime = runtime();
            let bind = || dir.publisher("a/t").runtime(runtime.handle().clone()).bind().unwrap();
            let before = early.then(bind);
            let Some(mut peer) = start_read_only("role_reads_everything", &dir) else { return };
            assert_eq!(peer.ask(way), "connected");
            let publisher = before.unwrap_or_else(bind);
            runtime.block_on(async {
                within("the subscriber", publisher.wait_for_subscribers(1)).await;
                for number in 0..MESSAGES {
                    publisher.send(number.to_le_bytes()).await.unwrap();
                }
                within("close", publisher.close()).await.unwrap();
            });
            // Its directory is gone before the subscriber has read anything.
            dir.assert_empties();
            assert_eq!(peer.ask("read"), format!("{MESSAGES}, then closed"));
            peer.finish();
        }
    }
}

#[test]
fn role_reads_everything() {
    let Some(role) = Role::of("role_reads_everything") else { return };
    let way = role.hear().unwrap();
    let denied = std::fs::create_dir(role.dir.join("x")).unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::ReadOnlyFilesystem);
    let mut subscriber = role.subscriber("a/t").depth(4_096).end_with_last_publisher(true).connect().unwrap();
    let mut read = 0_u64;
    let runtime = runtime();
    if way == "awaits" {
        // It notices the publisher, and what is mounted over it, by its own wait.
        role.say("connected");
        runtime.block_on(within("a publisher", subscriber.wait_for_publishers(1))).unwrap();
    } else {
        role.say("connected");
        while subscriber.publisher_count() == 0 {
            if let Ok(sample) = subscriber.try_recv() {
                assert_eq!(*sample, read.to_le_bytes());
                read += 1;
            }
        }
    }
    assert_eq!(role.hear().unwrap(), "read");
    let end = loop {
        let item = match way.as_str() {
            "awaits" => runtime.block_on(within("recv", subscriber.recv())),
            _ => subscriber.blocking_recv_timeout(LIMIT),
        };
        match item {
            Ok(sample) => assert_eq!(*sample, read.to_le_bytes()),
            Err(error) => break error,
        }
        read += 1;
    };
    let end = if matches!(end, RecvError::Closed) { "closed".to_owned() } else { format!("{end:?}") };
    role.say(&format!("{read}, then {end}"));
}

/// What is on the links, and what still comes over them, goes before what makes it impossible to find other publishers.
#[test]
fn directory_that_is_not_to_be_trusted_any_more_ends_nothing_before_the_links_end() {
    for blocks in [false, true] {
        let dir = Dir::new();
        let runtime = runtime();
        let publisher = dir.publisher("a/t").runtime(runtime.handle().clone()).bind().unwrap();
        let mut subscriber = dir.subscriber("a/t").connect().unwrap();
        runtime.block_on(within("a publisher", subscriber.wait_for_publishers(1))).unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
        // What has it looked at.
        std::fs::write(dir.path().join("a/new"), b"").unwrap();
        std::fs::rename(dir.path().join("a/new"), dir.path().join("a/t/news")).unwrap();
        for number in 0..20_u64 {
            // As long as nothing is there it looks at all else.
            if blocks {
                let nothing = subscriber.blocking_recv_timeout(Duration::from_millis(1));
                assert!(matches!(nothing, Err(RecvError::TimedOut)), "{nothing:?}");
            } else {
                runtime.block_on(async {
                    let next = tokio::time::timeout(Duration::from_millis(1), subscriber.recv());
                    assert!(next.await.is_err(), "it waits");
                });
            }
            runtime.block_on(publisher.send(number.to_le_bytes())).unwrap();
            assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), number.to_le_bytes());
        }
        runtime.block_on(within("close", publisher.close())).unwrap();
        let end = if blocks {
            subscriber.blocking_recv_timeout(LIMIT)
        } else {
            runtime.block_on(within("the end", subscriber.recv()))
        };
        let end = end.unwrap_err();
        assert!(end.is_terminal(), "{end}");
        assert_says(&end, &["mode 0777"]);
    }
}

/// Publishes nothing until told to, and says how many subscribers it has.
#[test]
fn role_publishes() {
    let Some(role) = Role::of("role_publishes") else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let publisher = role.publisher("a/t").history(1).runtime(runtime.handle().clone()).bind().unwrap();
    publisher.blocking_send([7]).unwrap();
    role.say("bound");
    while let Some(line) = role.hear() {
        match line.as_str() {
            "send" => publisher.blocking_send([8]).unwrap(),
            "kill" => rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
                .unwrap(),
            _ => {}
        }
        role.say(&publisher.subscriber_count().to_string());
    }
    runtime.block_on(within("close", publisher.close())).unwrap();
}

fn start_publishers(count: usize, dir: &Dir) -> Vec<Peer> {
    let start = |_| {
        let mut peer = Peer::start("role_publishes", dir);
        assert_eq!(peer.hear(), "bound");
        peer
    };
    (0..count).map(start).collect()
}

/// A subscriber that comes now finds all of them.
fn assert_found(count: usize, dir: &Dir) {
    let mut subscriber = dir.subscriber("a/t").connect().unwrap();
    runtime().block_on(within("publishers", subscriber.wait_for_publishers(count))).unwrap();
    for _ in 0..count {
        assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [7]);
    }
}

#[test]
fn publishers_whose_sockets_or_directories_are_removed_are_found_again() {
    let dir = Dir::new();
    let mut peers = start_publishers(3, &dir);
    let mut early = dir.subscriber("a/t").connect().unwrap();
    for _ in 0..3 {
        assert_eq!(*early.blocking_recv_timeout(LIMIT).unwrap(), [7]);
    }
    let remove_sockets = || sockets(dir.path()).iter().for_each(|path| std::fs::remove_file(path).unwrap());
    let remove_topic = || {
        // They come back while it is being removed.
        while std::fs::remove_dir_all(dir.path().join("a")).is_err_and(|e| e.kind() != ErrorKind::NotFound) {}
    };
    let move_topic = || std::fs::rename(dir.path().join("a/t"), dir.path().join("elsewhere")).unwrap();
    let ways: [&dyn Fn(); 3] = [&remove_sockets, &remove_topic, &move_topic];
    for _ in 0..3 {
        for way in ways {
            way();
            wait_until("all sockets are there again", || sockets(&dir.path().join("a")).len() == 3);
            assert_found(3, &dir);
            let _ = std::fs::remove_dir(dir.path().join("elsewhere"));
        }
    }
    // Who was there before has not noticed.
    for peer in &mut peers {
        peer.ask("send");
        assert_eq!(*early.blocking_recv_timeout(LIMIT).unwrap(), [8]);
    }
    assert_eq!((early.stats().lagged, early.stats().publishers), (0, 3));
    peers.into_iter().for_each(Peer::finish);
    drop(early);
    dir.assert_empties();
}

#[test]
fn publisher_that_closes_while_its_directory_is_removed_does_not_bring_it_back() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for round in 0..200 {
        let dir = Dir::new();
        let publisher = dir.publisher("a/t").runtime(runtime.handle().clone()).bind().unwrap();
        let topic = dir.path().join("a");
        let cleaner = std::thread::spawn(move || {
            while std::fs::remove_dir_all(&topic).is_err_and(|error| error.kind() != ErrorKind::NotFound) {}
        });
        if round % 2 == 0 {
            std::thread::yield_now();
        }
        runtime.block_on(within("close", publisher.close())).unwrap();
        cleaner.join().unwrap();
        dir.assert_empties();
    }
}

/// As `systemd-tmpfiles --clean` does it, for things that are old enough.
fn clean_as_tmpfiles(dir: &Path) {
    let known = std::fs::read_to_string("/proc/net/unix").unwrap();
    for entry in std::fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            let open = std::fs::File::open(&path).unwrap();
            if flock(&open, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            clean_as_tmpfiles(&path);
            let _ = std::fs::remove_dir(&path);
        } else if !(kind.is_socket() && known.contains(path.to_str().unwrap())) {
            std::fs::remove_file(&path).unwrap();
        }
    }
}

#[test]
fn publisher_is_left_alone_by_tmpfiles_which_removes_what_the_dead_left() {
    let really = |dir: &Path| {
        let config = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(config.path(), format!("d {} 0700 - - 0\n", dir.display())).unwrap();
        Command::new("systemd-tmpfiles").arg("--clean").arg(config.path()).status()
    };
    for real in [true, false] {
        let dir = Dir::new();
        let mut peers = start_publishers(2, &dir);
        let mut victim = Peer::start("role_publishes_elsewhere", &dir);
        assert_eq!(victim.hear(), "bound");
        victim.kill();
        // A socket of the kind that it takes for dead, beside them.
        let socket = std::os::unix::net::UnixListener::bind(dir.path().join("new")).unwrap();
        std::fs::rename(dir.path().join("new"), dir.path().join("old")).unwrap();
        let before = sockets(&dir.path().join("a"));
        if real {
            match really(dir.path()) {
                Ok(status) => assert!(status.success()),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    skipped("systemd-tmpfiles is not installed");
                    continue;
                }
                Err(error) => panic!("{error}"),
            }
        } else {
            clean_as_tmpfiles(dir.path());
        }
        assert!(!dir.path().join("old").exists() && !dir.path().join("dead").exists(), "it has cleaned up");
        assert_eq!(sockets(&dir.path().join("a")), before);
        assert_found(2, &dir);
        for peer in &mut peers {
            peer.tell("kill");
        }
        drop((peers, socket));
    }
}

#[test]
fn role_publishes_elsewhere() {
    let Some(role) = Role::of("role_publishes_elsewhere") else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let _publisher = role.publisher("dead/t").runtime(runtime.handle().clone()).bind().unwrap();
    role.say("bound");
    while role.hear().is_some() {}
}

#[test]
fn connect_to_a_topic_whose_publishers_were_killed_leaves_none_of_it() {
    let dir = Dir::new();
    for mut peer in start_publishers(3, &dir) {
        peer.kill();
    }
    assert_eq!(sockets(dir.path()).len(), 3);
    let subscriber = dir.subscriber("a/t").connect().unwrap();
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        0,
        "no directory for a topic without a publisher"
    );
    drop(subscriber);
}

#[test]
fn subscriber_of_a_publisher_that_is_killed_removes_what_it_left() {
    let dir = Dir::new();
    let mut peers = start_publishers(1, &dir);
    let mut subscriber = dir.subscriber("a/t").connect().unwrap();
    assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [7]);
    peers[0].kill();
    assert!(matches!(subscriber.blocking_recv_timeout(LIMIT), Err(RecvError::PublisherLost { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    // And the next one is found.
    let _peers = start_publishers(1, &dir);
    assert_eq!(*subscriber.blocking_recv_timeout(LIMIT).unwrap(), [7]);
}

#[test]
fn pattern_as_a_topic_is_refused_with_its_position() {
    let dir = Dir::new();
    let runtime = runtime();
    for (name, at) in [("*", 0), ("md/*", 3), ("md/**", 3), ("a*", 1)] {
        let bound = dir.publisher(name).runtime(runtime.handle().clone()).bind();
        let bound = bound.unwrap_err().to_string();
        let connected = dir.subscriber(name).connect().unwrap_err();
        assert!(
            matches!(connected, ConnectError::Topic(TopicError::Pattern { at: found, .. }) if found == at),
            "{connected:?}"
        );
        assert!(bound.contains("kept for patterns"), "{bound}");
    }
    assert!(ShmSubscriber::connect("md/*").is_err() && std::fs::read_dir(dir.path()).unwrap().count() == 0);
}

/// Starts a publisher that is busy, in a network namespace, which has its own `net.core.somaxconn`; `None` where that is not permitted.
fn start_with_a_line_of(length: u32, role: &str, dir: &Dir) -> Option<Peer> {
    let script = format!("echo {length} > /proc/sys/net/core/somaxconn && exec \"$0\" \"$@\"");
    start_in_namespaces(&["--net"], &script, role, dir)
}

#[test]
fn subscribers_that_find_a_full_line_are_served_once_there_is_room() {
    let dir = Dir::new();
    let Some(mut publisher) = start_with_a_line_of(4, "role_is_busy", &dir) else { return };
    assert_eq!(publisher.hear(), "bound");
    let runtime = runtime();
    let mut awaiting = Vec::new();
    let mut blocking = Vec::new();
    for number in 0..20 {
        let subscriber = dir.subscriber("t").connect().unwrap();
        if number % 2 == 0 { awaiting.push(subscriber) } else { blocking.push(subscriber) }
    }
    // Sent while most of them are not in line yet: received, or counted.
    publisher.tell("send");
    let blocking: Vec<_> = blocking
        .into_iter()
        .map(|mut subscriber| {
            std::thread::spawn(move || {
                let mut told = 0;
                while told < 30 {
                    told += worth(subscriber.blocking_recv_timeout(LIMIT));
                }
                told
            })
        })
        .collect();
    runtime.block_on(async {
        let tasks: Vec<_> = awaiting
            .into_iter()
            .map(|mut subscriber| {
                tokio::spawn(async move {
                    let mut told = 0;
                    while told < 30 {
                        told += worth(within("recv", subscriber.recv()).await);
                    }
                    told
                })
            })
            .collect();
        for task in tasks {
            assert_eq!(task.await.unwrap(), 30);
        }
    });
    for thread in blocking {
        assert_eq!(thread.join().unwrap(), 30);
    }
    assert_eq!(publisher.hear(), "20");
    publisher.finish();
}

/// How many messages that tells of.
fn worth(received: Result<tokio_shm::ShmSample, RecvError>) -> u64 {
    match received {
        Ok(_) => 1,
        Err(RecvError::Lagged { missed, .. }) => missed,
        Err(error) => panic!("{error}"),
    }
}

/// Looks at no connection until it is told to send. Then it sends ten messages at once, serves all, and sends twenty more.
#[test]
fn role_is_busy() {
    let Some(role) = Role::of("role_is_busy") else { return };
    let runtime = runtime();
    runtime.block_on(async {
        let publisher = role.publisher("t").bind().unwrap();
        role.say("bound");
        assert_eq!(role.hear().unwrap(), "send");
        for number in 0..10 {
            publisher.try_send([number]).unwrap();
        }
        within("subscribers", publisher.wait_for_subscribers(20)).await;
        for number in 10..30 {
            publisher.send([number]).await.unwrap();
        }
        role.say(&publisher.subscriber_count().to_string());
        until("they have gone", || publisher.subscriber_count() == 0).await;
        within("close", publisher.close()).await.unwrap();
    });
}

/// Runs nothing until it is told to close.
#[test]
fn role_is_busy_and_closes() {
    let Some(role) = Role::of("role_is_busy_and_closes") else { return };
    let runtime = runtime();
    let publisher = role.publisher("t").runtime(runtime.handle().clone()).bind().unwrap();
    role.say("bound");
    role.hear();
    runtime.block_on(publisher.close()).unwrap();
}

/// One that is waited for and then gone without having served is told of, and what is told is true of either end.
#[test]
fn subscriber_in_a_full_line_is_told_when_the_publisher_goes() {
    for killed in [true, false] {
        let dir = Dir::new();
        let Some(mut publisher) = start_with_a_line_of(1, "role_is_busy_and_closes", &dir) else { return };
        assert_eq!(publisher.hear(), "bound");
        let connect = || dir.subscriber("t").end_with_last_publisher(true).connect().unwrap();
        let mut subscribers: Vec<_> = (0..5).map(|_| connect()).collect();
        if killed {
            publisher.kill();
        } else {
            publisher.finish();
        }
        let (mut in_line, mut turned_away) = (0, 0);
        for subscriber in &mut subscribers {
            match (killed, subscriber.blocking_recv_timeout(LIMIT)) {
                (true, Err(RecvError::PublisherLost { .. })) => in_line += 1,
                (false, Err(RecvError::Closed)) => {
                    in_line += 1;
                    continue;
                }
                (_, Err(RecvError::Refused { reason, .. })) => {
                    assert!(reason.contains("gone before it had room"), "{reason}");
                    turned_away += 1;
                }
                (_, other) => panic!("{other:?}"),
            }
            let end = subscriber.blocking_recv_timeout(LIMIT);
            assert!(matches!(end, Err(RecvError::Closed)), "{end:?}");
        }
        assert!(in_line + turned_away == 5 && turned_away >= 3, "{in_line}, {turned_away}");
        drop(subscribers);
        dir.assert_empties();
    }
}

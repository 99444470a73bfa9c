//! Publishers and subscribers in different namespaces: each kind alone and all together, on either side and on both; and what comes of it
//! when they are killed.
//!
//! Needs `unshare` of util-linux, and the right to make namespaces: what is not allowed here is skipped, with a word.
#![allow(unsafe_code)]
#![allow(clippy::print_stdout)] // says which pair of places it is at

mod support;

use std::error::Error;

use support::{Dir, LIMIT, Peer, Role, is_allowed, skipped, wait_until, within};
use tokio_shm::{RecvError, ShmPoolConfig, ShmSample, ShmSubscriber};

const MESSAGES: u32 = 100;
const LARGE: usize = 1 << 20;
/// Names a user that a publisher lets in.
const ALLOWED: &str = "TOKIO_SHM_TEST_ALLOWED";

/// A pid namespace needs a first process, and all of it ends with that one: so it outlives the role, until nobody speaks to it.
const FIRST: [&str; 4] = ["sh", "-c", "\"$@\"; cat >/dev/null", "sh"];

/// Where a process may be, and the command that brings it there.
const PLACES: &[(&str, &[&str])] = &[
    ("the same namespaces", &[]),
    ("a pid namespace, with the /proc of the one outside", &["unshare", "--pid", "--fork", "--kill-child"]),
    ("a pid namespace", &["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]),
    ("a user namespace", &["unshare", "--map-current-user"]),
    ("a user namespace as its root", &["unshare", "--map-root-user"]),
    ("a mount namespace", &["unshare", "--mount"]),
    ("an ipc namespace", &["unshare", "--ipc"]),
    ("a net namespace", &["unshare", "--net"]),
    ("a cgroup and a uts namespace", &["unshare", "--cgroup", "--uts"]),
    (
        "namespaces of its own of every kind",
        &[
            "unshare",
            "--map-current-user",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--mount",
            "--ipc",
            "--net",
            "--cgroup",
            "--uts",
        ],
    ),
];

type Place = (&'static str, Vec<&'static str>);

fn places() -> Vec<Place> {
    let allowed = |(_, command): &&(&str, &[&str])| command.is_empty() || is_allowed(command);
    PLACES.iter().filter(allowed).map(|(name, command)| (*name, [command, &FIRST[..]].concat())).collect()
}

/// Each place with the one outside, both ways, with another of its kind, and with namespaces of every kind.
fn pairs() -> Vec<(Place, Place)> {
    let places = places();
    let (outside, last) = (&places[0], places.last().expect("one at least"));
    let mut pairs = Vec::new();
    for place in &places {
        for (publishing, subscribing) in [(place, outside), (outside, place), (place, place), (place, last)] {
            pairs.push((publishing.clone(), subscribing.clone()));
        }
    }
    pairs
}

fn chain(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn start(role: &str, (_, command): &Place, dir: &Dir) -> Peer {
    Peer::start_under(command, role, dir)
}

/// A publisher and a subscriber, in these places, and the directory that they share.
fn meet(publishing: &Place, subscribing: &Place) -> (Dir, Peer, Peer) {
    let dir = Dir::new();
    let mut publisher = start("role_publishes", publishing, &dir);
    assert_eq!(publisher.hear(), "bound");
    let mut subscriber = start("role_subscribes", subscribing, &dir);
    assert_eq!(subscriber.hear(), "connected");
    (dir, publisher, subscriber)
}

/// Messages of several sizes from the one to the other, all of them received.
fn stream(publisher: &mut Peer, subscriber: &mut Peer) {
    publisher.tell("stream");
    assert_eq!(subscriber.ask("stream"), "received");
    assert_eq!(publisher.hear(), "streamed");
}

/// Kills this process as `kill -9` does, at once or with a child that holds all that it has open.
fn die(with_child: bool) -> ! {
    // SAFETY: the child makes system calls only, below, and needs no lock that another thread could have held.
    if with_child && unsafe { libc::fork() } == 0 {
        let mut byte = 0_u8;
        // SAFETY: `byte` is a live local of this process, and one byte long.
        while unsafe { libc::read(0, (&raw mut byte).cast(), 1) } > 0 {}
        // SAFETY: ends the process without running what its parent has registered.
        unsafe { libc::_exit(0) };
    }
    // SAFETY: always sound; it does not return.
    unsafe { libc::raise(libc::SIGKILL) };
    unreachable!("killed")
}

#[test]
fn role_publishes() {
    let Some(role) = Role::of("role_publishes") else { return };
    // What was accepted goes on while this thread listens.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut builder = role.publisher("a/t").queue(1).pool(ShmPoolConfig::new().max_bytes(8 << 20));
        if let Ok(uid) = std::env::var(ALLOWED) {
            builder = builder.allow_uid(uid.parse().unwrap());
        }
        let publisher = match builder.bind() {
            Ok(publisher) => publisher,
            Err(error) => return role.say(&chain(&error)),
        };
        role.say("bound");
        while let Some(line) = role.hear() {
            match line.as_str() {
                "stream" => {
                    within("a subscriber", publisher.wait_for_subscribers(1)).await;
                    for number in 0..MESSAGES {
                        let len = if number % 10 == 9 { LARGE } else { 64 };
                        let mut loan = publisher.loan(len).await.unwrap();
                        loan.fill(0);
                        loan[..4].copy_from_slice(&number.to_le_bytes());
                        publisher.send(loan).await.unwrap();
                    }
                    role.say("streamed");
                }
                // More than the link, or the pool, has room for.
                "small" | "large" => {
                    within("a subscriber", publisher.wait_for_subscribers(1)).await;
                    role.say("sending");
                    let len = if line == "large" { LARGE } else { 64 };
                    for _ in 0..20 {
                        within("a send", async {
                            let mut loan = publisher.loan(len).await.unwrap();
                            loan[0] = 1;
                            publisher.send(loan).await.unwrap();
                        })
                        .await;
                    }
                    role.say("sent");
                }
                "die" => die(false),
                "die with a child" => die(true),
                other => panic!("{other}"),
            }
        }
        within("close", publisher.close()).await.unwrap();
    });
}

fn receive(role: &Role, subscriber: &mut ShmSubscriber) -> Option<ShmSample> {
    match subscriber.blocking_recv_timeout(LIMIT) {
        Ok(sample) => return Some(sample),
        Err(RecvError::Closed) => role.say("closed"),
        Err(RecvError::PublisherLost { .. }) => role.say("lost"),
        Err(error) => role.say(&chain(&error)),
    }
    None
}

#[test]
fn role_subscribes() {
    let Some(role) = Role::of("role_subscribes") else { return };
    let builder = role.subscriber("a/t").depth(4).end_with_last_publisher(true);
    let mut subscriber = match builder.connect() {
        Ok(subscriber) => subscriber,
        Err(error) => return role.say(&chain(&error)),
    };
    role.say("connected");
    let mut held = Vec::new();
    while let Some(line) = role.hear() {
        match line.as_str() {
            "stream" => {
                for number in 0..MESSAGES {
                    let Some(sample) = receive(&role, &mut subscriber) else { return };
                    assert_eq!(sample[..4], number.to_le_bytes());
                }
                role.say("received");
            }
            "hold" => {
                for _ in 0..4 {
                    let Some(sample) = receive(&role, &mut subscriber) else { return };
                    held.push(sample);
                }
                role.say("held");
            }
            "end" => assert!(receive(&role, &mut subscriber).is_none()),
            "die" => die(false),
            "die with a child" => die(true),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn messages_pass_between_any_two_namespaces_in_order_and_to_the_end() {
    for (publishing, subscribing) in pairs() {
        println!("from {} to {}", publishing.0, subscribing.0);
        let (dir, mut publisher, mut subscriber) = meet(&publishing, &subscribing);
        stream(&mut publisher, &mut subscriber);
        subscriber.tell("end");
        publisher.finish();
        assert_eq!(subscriber.hear(), "closed");
        subscriber.finish();
        dir.assert_empties();
    }
}

/// Whether the kernel gives a descriptor of a socket's peer, whatever pid namespace that is in.
fn has_peer_pidfds() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < (6, 5) {
        skipped("before Linux 6.5 the death of a forked process in another pid namespace is not told");
    }
    version >= (6, 5)
}

/// By the death alone, whatever holds the socket.
fn deaths() -> Vec<&'static str> {
    if has_peer_pidfds() { vec!["die", "die with a child"] } else { vec!["die"] }
}

#[test]
fn publisher_killed_in_any_namespace_is_told_as_lost() {
    for death in deaths() {
        for (publishing, subscribing) in pairs() {
            println!("{death}: from {} to {}", publishing.0, subscribing.0);
            let (dir, mut publisher, mut subscriber) = meet(&publishing, &subscribing);
            stream(&mut publisher, &mut subscriber);
            subscriber.tell("end");
            publisher.tell(death);
            assert_eq!(subscriber.hear(), "lost");
            // The child goes on until here.
            publisher.close_stdin();
            publisher.kill();
            subscriber.finish();
            // Its socket's name is removed by the next one, once the child has gone as well, which nobody here is told of.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            wait_until("the runtime directory is empty", || {
                let publisher = dir.publisher("a/t");
                runtime.block_on(async { publisher.bind().unwrap().close().await.unwrap() });
                std::fs::read_dir(dir.path()).unwrap().next().is_none()
            });
        }
    }
}

/// What it held comes back, and nothing waits for it any more. With a child of it alive, what that may read does not come back;
/// senders go on all the same.
#[test]
fn subscriber_killed_in_any_namespace_gives_back_what_it_held_at_once() {
    for death in deaths() {
        for (publishing, subscribing) in pairs() {
            println!("{death}: from {} to {}", publishing.0, subscribing.0);
            let (dir, mut publisher, mut subscriber) = meet(&publishing, &subscribing);
            publisher.tell(if death == "die" { "large" } else { "small" });
            assert_eq!(publisher.hear(), "sending");
            assert_eq!(subscriber.ask("hold"), "held");
            subscriber.tell(death);
            assert_eq!(publisher.hear(), "sent");
            subscriber.close_stdin();
            subscriber.kill();
            publisher.finish();
            dir.assert_empties();
        }
    }
}

/// The first process of a pid namespace takes all of it along.
#[test]
fn pid_namespace_killed_as_a_whole_is_told_as_lost() {
    let command = ["unshare", "--pid", "--fork", "--kill-child"];
    if !is_allowed(&command) {
        return;
    }
    let dir = Dir::new();
    let mut publisher = Peer::start_under(&command, "role_publishes", &dir);
    assert_eq!(publisher.hear(), "bound");
    let mut subscriber = Peer::start("role_subscribes", &dir);
    assert_eq!(subscriber.hear(), "connected");
    stream(&mut publisher, &mut subscriber);
    subscriber.tell("end");
    publisher.kill();
    assert_eq!(subscriber.hear(), "lost");
    subscriber.finish();
}

/// In a user namespace without its user all users look alike, so that none may be let in: said in words, on both sides.
#[test]
fn user_without_a_number_in_its_namespace_is_told_to_map_it() {
    if !is_allowed(&["unshare", "--user"]) {
        return;
    }
    let dir = Dir::new();
    for role in ["role_publishes", "role_subscribes"] {
        let mut peer = Peer::start_under(&["unshare", "--user"], role, &dir);
        let said = peer.hear();
        assert!(said.contains(dir.path().to_str().unwrap()), "{said}");
        assert!(said.contains("--map-current-user") && said.contains("keep-id"), "{said}");
        peer.finish();
    }
    dir.assert_empties();
}

/// The other way round: who has no number in our user namespace is not let in, whatever number stands in its place.
#[test]
fn hostile_stranger_without_a_number_in_our_namespace_is_refused() {
    let stranger = ["setpriv", "--reuid=64001", "--clear-groups"];
    let inside = ["env", "TOKIO_SHM_TEST_ALLOWED=65534", "unshare", "--map-current-user"];
    if !is_allowed(&stranger) || !is_allowed(&inside) {
        return;
    }
    let base = Dir::new();
    // Open to all from where the stranger stands: the directory is not what keeps it out.
    let mut publisher = Peer::start_under(&inside, "role_publishes", &base);
    assert_eq!(publisher.hear(), "bound");
    let socket = std::fs::read_dir(base.path().join("a/t")).unwrap().next().unwrap().unwrap().path();
    let open_to_all = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    };
    for path in socket.ancestors().take_while(|path| *path != base.path()) {
        open_to_all(path);
    }
    open_to_all(base.path());
    let mut child = Peer::start_under(&stranger, "role_knocks", &base);
    assert_eq!(child.hear(), "knocked");
    assert_eq!(child.ask(socket.to_str().unwrap()), "refused");
    child.finish();
    std::fs::set_permissions(base.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    publisher.finish();
}

/// Connects past the library, and says what the first byte of the answer means.
#[test]
fn role_knocks() {
    use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketType, connect, recv, socket};
    let Some(role) = Role::of("role_knocks") else { return };
    role.say("knocked");
    let path = role.hear().unwrap();
    let fd = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    connect(&fd, &SocketAddrUnix::new(path.as_str()).unwrap()).unwrap();
    let mut answer = [0; 256];
    let (len, _) = recv(&fd, &mut answer, RecvFlags::empty()).unwrap();
    role.say(if len > 0 { "refused" } else { "ended" });
}

/// Says how binding and connecting went, with what the environment says.
#[test]
fn role_uses_the_environment() {
    let Some(role) = Role::of("role_uses_the_environment") else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let bound = tokio_shm::ShmPublisher::builder("t").bind();
    role.say(&bound.map_or_else(|error| chain(&error), |_| "bound".to_owned()));
    let connected = ShmSubscriber::builder("t").connect();
    role.say(&connected.map_or_else(|error| chain(&error), |_| "connected".to_owned()));
}

/// What both answers of that role have in common.
fn expect_in_both(command: &[&str], dir: &Dir, words: &[&str]) {
    let mut peer = Peer::start_under(command, "role_uses_the_environment", dir);
    for _ in 0..2 {
        let said = peer.hear();
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
    }
    peer.finish();
}

#[test]
fn process_without_proc_is_told_to_mount_it() {
    // The test's own files are to be found, and nothing under /proc.
    let command = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /proc && exec \"$@\"", "sh"];
    if !is_allowed(&command) {
        return;
    }
    let dir = Dir::new();
    let variable = format!("TOKIO_SHM_DIR={}", dir.path().display());
    let command = [&["env", &variable], &command[..]].concat();
    expect_in_both(&command, &dir, &["/proc/self/fd", "mount -t proc"]);
}

#[test]
fn root_with_a_users_environment_makes_nothing_that_locks_the_user_out() {
    let user = ["setpriv", "--reuid=64001", "--regid=64001", "--clear-groups"];
    let exe = std::env::current_exe().unwrap();
    let is_runnable = ["test", "-x", exe.to_str().unwrap(), "-a"];
    if !rustix::process::geteuid().is_root() || !is_allowed(&[&user[..], &is_runnable].concat()) {
        return skipped(
            "only root can become another user, who must be able to enter the folder of this test",
        );
    }
    let dir = Dir::new();
    std::os::unix::fs::chown(dir.path(), Some(64_001), Some(64_001)).unwrap();
    let variable = format!("XDG_RUNTIME_DIR={}", dir.path().display());
    let as_root = ["env", "-u", "TOKIO_SHM_DIR", &variable];
    expect_in_both(
        &as_root,
        &dir,
        &["belongs to user 64001", "runs as user 0", "tokio-shm", "TOKIO_SHM_DIR"],
    );
    dir.assert_empties();
    // What an earlier one has left is named with its owner.
    std::fs::create_dir(dir.path().join("tokio-shm")).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(dir.path().join("tokio-shm"), mode).unwrap();
    let as_user = [&user[..], &as_root[..]].concat();
    expect_in_both(&as_user, &dir, &["belongs to user 0", "runs as user 64001", "sudo", "remove it"]);
    std::fs::remove_dir(dir.path().join("tokio-shm")).unwrap();
}

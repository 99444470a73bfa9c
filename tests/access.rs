//! Other users: refused on both ends unless both let them in, and what they then share belongs to them alone.
//!
//! Needs root, to become other users; says so and does nothing without.
#![allow(clippy::print_stderr)] // says what is skipped

mod support;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use rustix::fs::{Gid, Mode, Uid};
use rustix::thread::{set_thread_gid, set_thread_groups, set_thread_uid};
use support::{Dir, LIMIT, Peer, Role, wait_until, within};
use tokio_shm::{RecvError, ShmPublisherBuilder, ShmSubscriberBuilder};

const GROUP: u32 = 64_242;
const OTHER_GROUP: u32 = 64_243;
const ANNA: u32 = 64_001;
const BERTA: u32 = 64_002;

/// Who a role is, and whom it lets in.
#[derive(Clone, Copy)]
struct Who {
    uid: u32,
    gid: u32,
    /// The supplementary group.
    also: u32,
    allow_uid: Option<u32>,
    allow_gid: Option<u32>,
}

impl Who {
    fn of(uid: u32, gid: u32) -> Self {
        Self { uid, gid, also: gid, allow_uid: None, allow_gid: None }
    }

    fn tell(self, peer: &mut Peer) {
        let number = |id: Option<u32>| id.map_or("-".to_owned(), |id| id.to_string());
        let (uid, gid) = (number(self.allow_uid), number(self.allow_gid));
        peer.tell(&format!("{} {} {} {uid} {gid}", self.uid, self.gid, self.also));
    }

    /// Becomes what the parent says; for this thread, which is the role's only one.
    fn become_told(role: &Role) -> Self {
        let line = role.hear().expect("who to be");
        let mut ids = line.split(' ').map(|id| id.parse().ok());
        let mut next = || ids.next().expect("five words");
        let (uid, gid, also) = (next().unwrap(), next().unwrap(), next().unwrap());
        set_thread_groups(&[Gid::from_raw(also)]).unwrap();
        set_thread_gid(Gid::from_raw(gid)).unwrap();
        set_thread_uid(Uid::from_raw(uid)).unwrap();
        // An awkward one: what a group is to use must not depend on it.
        rustix::process::umask(Mode::from_raw_mode(0o077));
        Self { uid, gid, also, allow_uid: next(), allow_gid: next() }
    }

    fn publisher(self, mut builder: ShmPublisherBuilder) -> ShmPublisherBuilder {
        if let Some(uid) = self.allow_uid {
            builder = builder.allow_uid(uid);
        }
        self.allow_gid.into_iter().fold(builder, ShmPublisherBuilder::allow_gid)
    }

    fn subscriber(self, mut builder: ShmSubscriberBuilder) -> ShmSubscriberBuilder {
        if let Some(uid) = self.allow_uid {
            builder = builder.allow_uid(uid);
        }
        self.allow_gid.into_iter().fold(builder, ShmSubscriberBuilder::allow_gid)
    }
}

/// `None`, and a word about it, where we cannot become others. Else a runtime directory of this owner, group and mode.
fn directory(uid: u32, gid: u32, mode: u32) -> Option<Dir> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: tests of other users need root");
        return None;
    }
    let dir = Dir::new();
    chown(dir.path(), Some(uid), Some(gid)).unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(mode)).unwrap();
    Some(dir)
}

/// Publishes what it is told, line by line.
#[test]
fn role_publishes() {
    let Some(role) = Role::of("role_publishes") else { return };
    let who = Who::become_told(&role);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let publisher = match who.publisher(role.publisher("a/t")).bind() {
            Ok(publisher) => publisher,
            Err(error) => return role.say(&chain(&error)),
        };
        role.say("bound");
        while let Some(line) = role.hear() {
            match line.as_str() {
                "subscribed" => within("a subscriber", publisher.wait_for_subscribers(1)).await,
                // Turns of the runtime, for what has connected meanwhile to be looked at.
                "look" => {
                    for _ in 0..1_000 {
                        tokio::task::yield_now().await;
                    }
                }
                message => publisher.send(message.as_bytes()).await.unwrap(),
            }
            role.say(&publisher.subscriber_count().to_string());
        }
        within("close", publisher.close()).await.unwrap();
    });
}

/// Says each message it gets, until there is no more to come or it is refused.
#[test]
fn role_subscribes() {
    let Some(role) = Role::of("role_subscribes") else { return };
    let who = Who::become_told(&role);
    let builder = who.subscriber(role.subscriber("a/t").end_with_last_publisher(true));
    let mut subscriber = match builder.connect() {
        Ok(subscriber) => subscriber,
        Err(error) => return role.say(&chain(&error)),
    };
    role.say("connected");
    loop {
        match subscriber.blocking_recv_timeout(LIMIT) {
            Ok(sample) => role.say(std::str::from_utf8(&sample).unwrap()),
            Err(RecvError::Closed) => return role.say("closed"),
            Err(error) => return role.say(&chain(&error)),
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn start(role: &str, dir: &Dir, who: Who) -> (Peer, String) {
    let mut peer = Peer::start(role, dir);
    who.tell(&mut peer);
    let said = peer.hear();
    (peer, said)
}

/// One message from `publisher` to `subscriber`; what it makes belongs to `owner`, and for a group to that one.
fn exchange(dir: &Dir, publisher: Who, subscriber: Who, owner: u32, group: Option<u32>) {
    exchange_beside(dir, publisher, subscriber, || {
        for made in below(dir.path()) {
            let found = made.symlink_metadata().unwrap();
            let mode = found.mode() & 0o7777;
            assert_eq!(found.uid(), owner, "{made:?}");
            match group {
                Some(group) => {
                    assert_eq!((found.gid(), mode & 0o7, mode & 0o60), (group, 0, 0o60), "{made:?} {mode:o}")
                }
                None => assert_eq!(mode & 0o77, 0, "{made:?} {mode:o}"),
            }
        }
    });
}

/// One message from `publisher` to `subscriber`, and then `look` while both are there.
fn exchange_beside(dir: &Dir, publisher: Who, subscriber: Who, look: impl FnOnce()) {
    let (mut publishing, said) = start("role_publishes", dir, publisher);
    assert_eq!(said, "bound");
    let (mut subscribing, said) = start("role_subscribes", dir, subscriber);
    assert_eq!(said, "connected");
    publishing.tell("subscribed");
    assert_eq!(publishing.hear(), "1");
    publishing.tell("hello");
    assert_eq!(subscribing.hear(), "hello");
    assert_eq!(publishing.hear(), "1");
    look();
    publishing.close_stdin();
    assert_eq!(subscribing.hear(), "closed");
    publishing.finish();
    subscribing.finish();
    dir.assert_empties();
}

fn below(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(below(&path));
        }
        found.push(path);
    }
    assert!(!found.is_empty());
    found
}

#[test]
fn members_of_a_group_that_is_let_in_publish_and_subscribe() {
    let Some(dir) = directory(0, GROUP, 0o770) else { return };
    let member = |uid| Who { allow_gid: Some(GROUP), ..Who::of(uid, GROUP) };
    exchange(&dir, member(ANNA), member(BERTA), ANNA, Some(GROUP));
}

#[test]
fn root_and_a_user_who_let_each_other_in_share_the_users_directory() {
    let Some(dir) = directory(ANNA, GROUP, 0o700) else { return };
    let root = Who { allow_uid: Some(ANNA), ..Who::of(0, 0) };
    let anna = Who { allow_uid: Some(0), ..Who::of(ANNA, GROUP) };
    exchange(&dir, root, anna, ANNA, None);
    exchange(&dir, anna, root, ANNA, None);
}

#[test]
fn hostile_stranger_who_can_enter_the_directory_is_refused_by_the_publisher() {
    let Some(dir) = directory(0, GROUP, 0o770) else { return };
    let anna = Who { allow_gid: Some(GROUP), ..Who::of(ANNA, GROUP) };
    let (mut publishing, said) = start("role_publishes", &dir, anna);
    assert_eq!(said, "bound");
    // A member by a supplementary group only, which the kernel does not tell of.
    let berta = Who { also: GROUP, allow_gid: Some(GROUP), ..Who::of(BERTA, OTHER_GROUP) };
    let (mut stranger, said) = start("role_subscribes", &dir, berta);
    assert_eq!(said, "connected");
    publishing.tell("look");
    assert_eq!(publishing.hear(), "0");
    let said = stranger.hear();
    assert!(said.contains("this user may not subscribe"), "{said}");
    stranger.finish();
    // The others do not suffer.
    let (mut member, said) =
        start("role_subscribes", &dir, Who { allow_gid: Some(GROUP), ..Who::of(BERTA, GROUP) });
    assert_eq!(said, "connected");
    publishing.tell("subscribed");
    assert_eq!(publishing.hear(), "1");
    publishing.tell("hello");
    assert_eq!(member.hear(), "hello");
}

#[test]
fn hostile_stranger_who_publishes_is_refused_by_the_subscriber() {
    let Some(dir) = directory(0, GROUP, 0o770) else { return };
    let berta = Who { also: GROUP, allow_gid: Some(GROUP), ..Who::of(BERTA, OTHER_GROUP) };
    let (mut stranger, said) = start("role_publishes", &dir, berta);
    assert_eq!(said, "bound");
    let (mut subscribing, said) =
        start("role_subscribes", &dir, Who { allow_gid: Some(GROUP), ..Who::of(ANNA, GROUP) });
    assert_eq!(said, "connected");
    stranger.tell("look");
    assert_eq!(stranger.hear(), "0");
    let said = subscribing.hear();
    assert!(said.contains(&format!("runs as user {BERTA} with group {OTHER_GROUP}")), "{said}");
}

#[test]
fn hostile_directory_open_to_a_group_that_was_not_let_in_is_refused() {
    let Some(dir) = directory(ANNA, GROUP, 0o770) else { return };
    for role in ["role_publishes", "role_subscribes"] {
        let (_peer, said) = start(role, &dir, Who::of(ANNA, GROUP));
        assert!(said.contains("mode 0770") && said.contains("chmod 700"), "{said}");
        let (_peer, said) = start(role, &dir, Who { allow_gid: Some(GROUP), ..Who::of(BERTA, GROUP) });
        assert!(said.contains(&format!("belongs to user {ANNA}")) && said.contains("allow_uid"), "{said}");
    }
}

/// Binds and closes again and again until it is killed, and says so after the first times.
#[test]
fn role_binds_and_closes() {
    let Some(role) = Role::of("role_binds_and_closes") else { return };
    let who = Who::become_told(&role);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        for round in 0.. {
            match who.publisher(role.publisher("a/t")).bind() {
                Ok(publisher) => within("close", publisher.close()).await.unwrap(),
                Err(error) => return role.say(&chain(&error)),
            }
            if round == 10 {
                role.say("goes on");
            }
        }
    });
}

/// Connects as often as it is told, and says how that went.
#[test]
fn role_connects() {
    let Some(role) = Role::of("role_connects") else { return };
    let who = Who::become_told(&role);
    role.say("ready");
    while let Some(times) = role.hear() {
        let connect = |_| who.subscriber(role.subscriber("a/t")).connect().map(drop);
        match (0..times.parse().unwrap()).try_for_each(connect) {
            Ok(()) => role.say("connected"),
            Err(error) => role.say(&chain(&error)),
        }
    }
}

/// What is made for another user is that user's from the first instant that it can be seen: one who connects meanwhile is not refused
/// by what is unfinished, nor is anyone by what a killed process has left so.
fn bind_beside_connects(dir: &Dir, binder: Who, user: Who) {
    const CONNECTS: u32 = 300;
    let (mut connecting, said) = start("role_connects", dir, user);
    assert_eq!(said, "ready");
    for round in 0..10 {
        let (mut binding, said) = start("role_binds_and_closes", dir, binder);
        assert_eq!(said, "goes on", "round {round}");
        assert_eq!(connecting.ask(&CONNECTS.to_string()), "connected", "round {round}");
        // Wherever it is just now.
        binding.kill();
        assert_eq!(connecting.ask("1"), "connected", "round {round}");
        let (publishing, said) = start("role_publishes", dir, user);
        assert_eq!(said, "bound", "round {round}");
        publishing.finish();
    }
    connecting.finish();
    // What it has left unfinished it completes itself.
    let (mut last, said) = start("role_publishes", dir, binder);
    assert_eq!(said, "bound");
    last.close_stdin();
    last.finish();
    dir.assert_empties();
}

#[test]
fn connects_of_a_member_go_on_while_root_binds_and_is_killed() {
    let Some(dir) = directory(0, GROUP, 0o770) else { return };
    let root = Who { allow_uid: Some(BERTA), allow_gid: Some(GROUP), ..Who::of(0, 0) };
    let berta = Who { allow_uid: Some(0), allow_gid: Some(GROUP), ..Who::of(BERTA, GROUP) };
    bind_beside_connects(&dir, root, berta);
    bind_beside_connects(&dir, berta, root);
}

#[test]
fn connects_of_a_user_go_on_while_root_binds_in_the_users_directory_and_is_killed() {
    let Some(dir) = directory(ANNA, GROUP, 0o700) else { return };
    let root = Who { allow_uid: Some(ANNA), ..Who::of(0, 0) };
    let anna = Who { allow_uid: Some(0), ..Who::of(ANNA, GROUP) };
    bind_beside_connects(&dir, root, anna);
}

/// Keeps all that it gets, and says each.
#[test]
fn role_holds() {
    let Some(role) = Role::of("role_holds") else { return };
    let who = Who::become_told(&role);
    let mut subscriber = who.subscriber(role.subscriber("a/t").depth(1)).connect().unwrap();
    role.say("connected");
    let mut held = Vec::new();
    while let Ok(sample) = subscriber.blocking_recv_timeout(LIMIT) {
        role.say(std::str::from_utf8(&sample).unwrap());
        held.push(sample);
    }
}

/// Kills on either side between two users, who publish in turn.
fn kill_each_other(dir: &Dir, one: Who, other: Who) {
    for (publisher, subscriber) in [(one, other), (other, one)] {
        let (mut publishing, said) = start("role_publishes", dir, publisher);
        assert_eq!(said, "bound");
        let (mut holding, said) = start("role_holds", dir, subscriber);
        assert_eq!(said, "connected");
        assert_eq!(publishing.ask("subscribed"), "1");
        assert_eq!(publishing.ask("first"), "1");
        assert_eq!(holding.hear(), "first");
        // It has no room for more than one.
        assert_eq!(publishing.ask("second"), "1");
        assert_eq!(publishing.ask("third"), "1");
        holding.kill();
        wait_until("the dead one is gone", || publishing.ask("look") == "0");
        let (mut subscribing, said) = start("role_subscribes", dir, subscriber);
        assert_eq!(said, "connected");
        assert_eq!(publishing.ask("subscribed"), "1");
        assert_eq!(publishing.ask("fourth"), "1");
        assert_eq!(subscribing.hear(), "fourth");
        publishing.kill();
        let said = subscribing.hear();
        assert!(said.contains("was lost"), "{said}");
        subscribing.finish();
        // The other user takes over the topic, and what the dead one has left of it is gone.
        exchange_beside(dir, subscriber, publisher, || ());
    }
}

#[test]
fn members_of_a_group_outlive_each_other() {
    let Some(dir) = directory(0, GROUP, 0o770) else { return };
    let member = |uid| Who { allow_gid: Some(GROUP), ..Who::of(uid, GROUP) };
    kill_each_other(&dir, member(ANNA), member(BERTA));
}

#[test]
fn root_and_a_user_outlive_each_other() {
    let Some(dir) = directory(ANNA, GROUP, 0o700) else { return };
    let root = Who { allow_uid: Some(ANNA), ..Who::of(0, 0) };
    let anna = Who { allow_uid: Some(0), ..Who::of(ANNA, GROUP) };
    kill_each_other(&dir, root, anna);
}

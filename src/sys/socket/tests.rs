use super::connection::MAX_FDS;
use super::*;
use crate::sys::testing::run_alone;
use rustix::fs::{OFlags, open, statat};
use rustix::net::SendFlags;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

fn open_dir(path: &std::path::Path) -> OwnedFd {
    open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

struct Place {
    _keep: tempfile::TempDir,
    dir: OwnedFd,
}

impl Place {
    fn new() -> Self {
        let keep = tempfile::tempdir().unwrap();
        let dir = open_dir(keep.path());
        Self { _keep: keep, dir }
    }

    fn pair(&self) -> (Connection, Connection) {
        let listener = Listener::bind(self.dir.as_fd(), "pair").unwrap();
        let ours = connect(self.dir.as_fd(), "pair").unwrap();
        let theirs = listener.accept().unwrap().unwrap();
        unlinkat(&self.dir, "pair", AtFlags::empty()).unwrap();
        (ours, theirs)
    }
}

fn packet(connection: &Connection, buf: &mut [u8]) -> (usize, Vec<OwnedFd>, bool) {
    match connection.recv(buf).unwrap() {
        Received::Packet { len, fds, truncated } => (len, fds, truncated),
        other => panic!("{other:?}"),
    }
}

#[test]
fn packets_keep_their_bounds_and_their_descriptors() {
    let (ours, theirs) = Place::new().pair();
    let mut buf = [0; 64];
    assert!(matches!(theirs.recv(&mut buf).unwrap(), Received::WouldBlock));
    let (reader, writer) = std::io::pipe().unwrap();
    assert!(ours.send(b"one", &[]).unwrap());
    assert!(ours.send(b"three", &[reader.as_fd(), writer.as_fd(), reader.as_fd(), reader.as_fd()]).unwrap());
    let (len, fds, truncated) = packet(&theirs, &mut buf);
    assert_eq!((&buf[..len], fds.len(), truncated), (&b"one"[..], 0, false));
    let (len, fds, truncated) = packet(&theirs, &mut buf);
    assert_eq!((&buf[..len], fds.len(), truncated), (&b"three"[..], 4, false));
    for fd in &fds {
        assert!(rustix::io::fcntl_getfd(fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }
    rustix::io::write(&fds[1], b"!").unwrap();
    assert_eq!(rustix::io::read(&reader, &mut buf).unwrap(), 1);
    assert!(matches!(theirs.recv(&mut buf).unwrap(), Received::WouldBlock));
    drop(ours);
    assert!(matches!(theirs.recv(&mut buf).unwrap(), Received::Eof));
    assert!(theirs.send(b"x", &[]).is_err());
}

#[test]
fn packets_sent_before_the_end_arrive_even_if_the_peer_left_some_unread() {
    let (ours, theirs) = Place::new().pair();
    assert!(ours.send(b"never read", &[]).unwrap());
    assert!(theirs.send(b"last words", &[]).unwrap());
    drop(theirs);
    let mut buf = [0; 64];
    assert_eq!(packet(&ours, &mut buf).0, 10);
    assert!(matches!(ours.recv(&mut buf).unwrap(), Received::Eof));
}

#[test]
fn packet_longer_than_the_buffer_is_reported_truncated_with_its_length() {
    let (ours, theirs) = Place::new().pair();
    ours.send(&[7; 65], &[]).unwrap();
    let mut buf = [0; 64];
    let (len, fds, truncated) = packet(&theirs, &mut buf);
    assert_eq!((len, fds.len(), truncated), (65, 0, true));
}

#[test]
fn empty_packet_counts_as_the_end() {
    let (ours, theirs) = Place::new().pair();
    assert_eq!(ours.send(b"", &[]).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    rustix::net::send(&ours, b"", SendFlags::empty()).unwrap();
    assert!(matches!(theirs.recv(&mut [0; 8]).unwrap(), Received::Eof));
}

#[test]
fn send_to_a_peer_that_never_reads_would_block_and_sends_again_after_it_did() {
    let (ours, theirs) = Place::new().pair();
    let mut sent = 0;
    while ours.send(&[1; 512], &[]).unwrap() {
        sent += 1;
        assert!(sent < 1_000_000);
    }
    let mut buf = [0; 512];
    for _ in 0..sent {
        assert_eq!(packet(&theirs, &mut buf).0, 512);
    }
    assert!(matches!(theirs.recv(&mut buf).unwrap(), Received::WouldBlock));
    assert!(ours.send(&[1; 512], &[]).unwrap());
}

#[test]
fn peer_credentials_name_this_process() {
    let (ours, theirs) = Place::new().pair();
    let me = PeerCredentials {
        pid: Some(rustix::process::getpid()),
        uid: Some(rustix::process::geteuid().as_raw()),
        gid: Some(rustix::process::getegid().as_raw()),
    };
    assert_eq!(ours.peer_credentials().unwrap(), me);
    assert_eq!(theirs.peer_credentials().unwrap(), me);
}

#[test]
fn name_is_alive_dead_or_gone() {
    let place = Place::new();
    let dir = place.dir.as_fd();
    assert_eq!(liveness(dir, "x").unwrap(), Liveness::Gone);
    assert!(matches!(connect(dir, "x"), Err(ConnectFailed::Gone)));
    let listener = Listener::bind(dir, "x").unwrap();
    assert_eq!(liveness(dir, "x").unwrap(), Liveness::Alive);
    assert!(listener.accept().unwrap().is_none(), "a probe must not be seen");
    let early = connect(dir, "x").unwrap();
    assert_eq!(liveness(dir, "x").unwrap(), Liveness::Alive);
    drop(listener);
    assert_eq!(liveness(dir, "x").unwrap(), Liveness::Dead);
    assert!(matches!(connect(dir, "x"), Err(ConnectFailed::Dead)));
    // A connection that was never accepted ends like any other.
    assert!(matches!(early.recv(&mut [0; 8]), Ok(Received::Eof)));
    std::fs::File::create(place._keep.path().join("file")).unwrap();
    assert_eq!(liveness(dir, "file").unwrap(), Liveness::Dead);
}

#[test]
fn socket_bound_but_not_listening_is_alive() {
    let place = Place::new();
    let fd = new_socket(SocketType::SEQPACKET).unwrap();
    bind(&fd, &address(place.dir.as_fd(), ".new-x").unwrap()).unwrap();
    assert_eq!(liveness(place.dir.as_fd(), ".new-x").unwrap(), Liveness::Alive);
    drop(fd);
    assert_eq!(liveness(place.dir.as_fd(), ".new-x").unwrap(), Liveness::Dead);
}

#[test]
fn connect_to_a_full_queue_is_busy() {
    let place = Place::new();
    let fd = new_socket(SocketType::SEQPACKET).unwrap();
    bind(&fd, &address(place.dir.as_fd(), "x").unwrap()).unwrap();
    listen(&fd, 0).unwrap();
    let _waiting = connect(place.dir.as_fd(), "x").unwrap();
    assert!(matches!(connect(place.dir.as_fd(), "x"), Err(ConnectFailed::Busy)));
    assert_eq!(liveness(place.dir.as_fd(), "x").unwrap(), Liveness::Alive);
}

#[test]
fn bind_leaves_one_name_and_fails_in_a_removed_directory() {
    let place = Place::new();
    let _listener = Listener::bind(place.dir.as_fd(), "x").unwrap();
    let names: Vec<_> =
        std::fs::read_dir(place._keep.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["x"]);
    let gone = tempfile::tempdir().unwrap();
    let dir = open_dir(gone.path());
    drop(gone);
    assert_eq!(Listener::bind(dir.as_fd(), "x").unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn directory_deeper_than_a_socket_address_is_long_works() {
    let place = Place::new();
    let mut path = place._keep.path().to_owned();
    for _ in 0..10 {
        path.push("d".repeat(200));
    }
    std::fs::create_dir_all(&path).unwrap();
    let dir = open_dir(&path);
    let listener = Listener::bind(dir.as_fd(), "x").unwrap();
    let _ours = connect(dir.as_fd(), "x").unwrap();
    assert!(listener.accept().unwrap().is_some());
}

/// Sets the flag when dropped, so that a thread that loops until then ends also if the test fails.
struct OnDrop<'a>(&'a AtomicBool);

impl Drop for OnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn bind_survives_cleaners_that_remove_it_half_made() {
    let place = Place::new();
    let (done, now) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let name = now.load(Ordering::Relaxed);
                for name in [format!(".new-0-{name}"), format!(".new-1-{name}"), name.to_string()] {
                    if liveness(place.dir.as_fd(), &name).unwrap() == Liveness::Dead {
                        let _ = unlinkat(&place.dir, name, AtFlags::empty());
                    }
                }
            }
        });
        let _done = OnDrop(&done);
        for round in 0..1_000 {
            // A name each, as names are never used twice: one that was found dead once may be removed at any time after.
            now.store(round, Ordering::Relaxed);
            let listener = Listener::bind(place.dir.as_fd(), &round.to_string()).unwrap();
            // Once it is named it stays, however often it is looked at.
            assert!(connect(place.dir.as_fd(), &round.to_string()).is_ok());
            drop(listener);
        }
    });
}

/// The umask and the table of descriptors belong to the process.
#[test]
fn socket_mode_is_owner_only_at_every_instant_whatever_the_umask() {
    run_alone("sys::socket::tests::child_socket_mode");
}

#[test]
#[ignore = "the child half of socket_mode_is_owner_only_at_every_instant_whatever_the_umask"]
fn child_socket_mode() {
    if !crate::sys::testing::is_alone() {
        return;
    }
    let place = Place::new();
    let mode_of = |name: &str| statat(&place.dir, name, AtFlags::empty()).map(|stat| stat.st_mode & 0o7777);
    for mask in [0o000, 0o022, 0o077, 0o177, 0o277, 0o777] {
        rustix::process::umask(Mode::from_raw_mode(mask));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    for mode in [".new-0-x", "x"].map(mode_of).into_iter().flatten() {
                        assert_eq!(mode & !0o600, 0, "{mode:o}");
                    }
                }
            });
            let _done = OnDrop(&done);
            for _ in 0..200 {
                let _listener = Listener::bind(place.dir.as_fd(), "x").unwrap();
                assert_eq!(mode_of("x").unwrap(), 0o600);
            }
        });
    }
}

#[test]
fn descriptors_of_hostile_packets_are_closed() {
    run_alone("sys::socket::tests::child_hostile_packets");
}

#[test]
#[ignore = "the child half of descriptors_of_hostile_packets_are_closed"]
fn child_hostile_packets() {
    if !crate::sys::testing::is_alone() {
        return;
    }
    use crate::sys::testing::{open_descriptors, set_limit};
    use rustix::io::IoSlice;
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, sendmsg};
    use std::mem::MaybeUninit;

    let (ours, theirs) = Place::new().pair();
    let null = std::fs::File::open("/dev/null").unwrap();
    let before = open_descriptors();
    let send_many = |count: usize, bytes: &[u8]| {
        let fds = vec![null.as_fd(); count];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        sendmsg(&ours, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    };
    let mut buf = [0; 8];
    for count in [5, 6, 7, 8, 64, 253] {
        send_many(count, b"x");
        let (_, fds, truncated) = packet(&theirs, &mut buf);
        assert_eq!((fds.len(), truncated), (MAX_FDS, true));
        drop(fds);
        assert_eq!(open_descriptors(), before);
    }
    send_many(4, b"");
    assert!(matches!(theirs.recv(&mut buf).unwrap(), Received::Eof));
    assert_eq!(open_descriptors(), before);

    // A table without room for all of them.
    for room in 0..4 {
        send_many(4, b"x");
        let lowest = null.as_fd().try_clone_to_owned().unwrap();
        let limit = lowest.as_raw_fd() as u64 + room;
        drop(lowest);
        set_limit(rustix::process::Resource::Nofile, limit);
        let received = theirs.recv(&mut buf);
        set_limit(rustix::process::Resource::Nofile, 1024);
        assert_eq!(received.unwrap_err().raw_os_error(), Some(Errno::MFILE.raw_os_error()));
        assert_eq!(open_descriptors(), before);
    }
    // Left in the queue, they are the kernel's to close.
    send_many(4, b"x");
    drop(theirs);
    assert_eq!(open_descriptors(), before - 1);
}

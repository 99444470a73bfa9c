//! Unix sockets that keep message boundaries and carry descriptors: how peers meet, and how each learns that the other is gone.
//!
//! `SOCK_SEQPACKET`, always nonblocking. Sockets are named relative to a directory's descriptor, through `/proc/self/fd`,
//! because a socket address holds 108 bytes only and a directory may be anywhere. (So `/proc` must be mounted.)
//!
//! Knows nothing of what is said over a connection, and waits for nothing: that is for the layers above.

mod connection;
mod peer;
#[cfg(test)]
mod tests;

pub(crate) use connection::{Connection, Received};
pub(crate) use peer::PeerCredentials;

use super::fork::Origin;
use super::ownership::Ownership;
use super::{again, again_if_interrupted};
use rustix::fs::{AtFlags, FileType, Mode, fchmod, renameat, unlinkat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect as connect_to, listen,
    socket_with,
};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Before a name of a socket that does not accept yet.
pub(crate) const NEW_PREFIX: &str = ".new-";

/// As many as the kernel lets wait by default (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// How often a name may be taken away before it is ready. Each time takes another process that cleans up at just that instant.
const BIND_ATTEMPTS: usize = 64;

const OWNER_ONLY: Mode = Mode::RUSR.union(Mode::WUSR);

/// A socket that accepts connections under a name.
///
/// Dropping it makes the name refuse; it does not remove it.
#[derive(Debug)]
pub(crate) struct Listener {
    fd: OwnedFd,
    /// A child has it open as well, and takes no connection from its parent.
    origin: Origin,
}

impl Listener {
    /// Listens under `name` in `dir`.
    ///
    /// Binds under another name and renames: a name without `.new-` in front has accepted connections from the instant it
    /// appeared, so whoever finds it refusing knows that its owner is dead.
    ///
    /// # Errors
    /// `NotFound` when `dir` itself has been removed (or `/proc` is not mounted); `AddrInUse` when somebody uses the same name.
    pub(crate) fn bind(dir: BorrowedFd<'_>, name: &str) -> io::Result<Self> {
        for attempt in 0..BIND_ATTEMPTS {
            // A name for each attempt: whoever found the last one dead may be about to remove it only now.
            let new_name = format!("{NEW_PREFIX}{attempt}-{name}");
            let listener = Self::bind_new(dir, &new_name)?;
            kill_point!("bind: listening");
            match renameat(dir, &*new_name, dir, name) {
                Ok(()) => {
                    kill_point!("bind: renamed");
                    return Ok(listener);
                }
                // The kernel makes the file first and ties the socket to it next. Who looked in between saw a dead
                // socket and removed it. (`bind_new` tells a removed directory: nothing can be bound there.)
                Err(Errno::NOENT) => {}
                Err(errno) => {
                    let _ = unlinkat(dir, &*new_name, AtFlags::empty());
                    return Err(errno.into());
                }
            }
        }
        Err(Errno::NOENT.into())
    }

    /// Refuses further connections; those in line can still be accepted.
    pub(crate) fn shutdown(&self) {
        if !self.origin.is_here() {
            return;
        }
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// The next connection, or `None` when nobody is waiting.
    ///
    /// # Errors
    /// Without a descriptor to spare (`EMFILE`, `ENFILE`) the connection stays in the queue.
    pub(crate) fn accept(&self) -> io::Result<Option<Connection>> {
        if !self.origin.is_here() {
            return Ok(None);
        }
        // One that has been aborted has gone again; the next may be there.
        let aborted = |errno| errno == Errno::CONNABORTED;
        match again(aborted, || accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)) {
            Ok(fd) => Ok(Some(Connection::new(fd))),
            Err(Errno::AGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    fn bind_new(dir: BorrowedFd<'_>, new_name: &str) -> io::Result<Self> {
        let fd = new_socket(SocketType::SEQPACKET)?;
        // The file that bind makes takes its mode from the socket's inode, less the umask. Set there before, it is never wider
        // than this, not even for an instant.
        fchmod(&fd, OWNER_ONLY)?;
        bind(&fd, &address(dir, new_name)?)?;
        kill_point!("bind: bound");
        if let Err(errno) = open_up(&fd, dir, new_name) {
            let _ = unlinkat(dir, new_name, AtFlags::empty());
            return Err(errno.into());
        }
        Ok(Self { fd, origin: Origin::here() })
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes a socket that has just been bound accept.
fn open_up(socket: &OwnedFd, dir: BorrowedFd<'_>, new_name: &str) -> Result<(), Errno> {
    // Without the right to write nobody can connect: a umask may have taken it from the owner, and a group that was let in
    // has yet to get it.
    match Ownership::of(dir)?.settle(dir, new_name, FileType::Socket) {
        // Taken away by a cleaner; the rename is going to notice.
        Ok(()) | Err(Errno::NOENT) => listen(socket, BACKLOG),
        Err(errno) => Err(errno),
    }
}

/// Why a connection was not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectFailed {
    /// Its queue of connections is full: alive, try again later.
    #[error("too many connections are waiting to be accepted")]
    Busy,
    /// Nobody listens any more: its owner is dead, the name can be removed.
    #[error("nobody listens there any more")]
    Dead,
    /// There is no such name (any more).
    #[error("there is no such socket")]
    Gone,
    /// Something else, on our side.
    #[error(transparent)]
    Os(#[from] io::Error),
}

/// Connects to `name` in `dir`, without waiting: the connection is there on return, though perhaps not accepted yet.
pub(crate) fn connect(dir: BorrowedFd<'_>, name: &str) -> Result<Connection, ConnectFailed> {
    let fd = new_socket(SocketType::SEQPACKET)?;
    match try_connect(&fd, dir, name)? {
        Ok(()) => Ok(Connection::new(fd)),
        Err(Errno::AGAIN) => Err(ConnectFailed::Busy),
        Err(Errno::CONNREFUSED) => Err(ConnectFailed::Dead),
        Err(Errno::NOENT) => Err(ConnectFailed::Gone),
        Err(errno) => Err(ConnectFailed::Os(errno.into())),
    }
}

/// Two ends of one connection.
#[cfg(any(test, fuzzing, tokio_shm_shuttle))]
pub(crate) fn pair() -> io::Result<(Connection, Connection)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok((Connection::new(one), Connection::new(other)))
}

/// What has become of a socket's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Liveness {
    /// A process has the socket open.
    Alive,
    /// Nobody has, nor ever will again: the name can be removed.
    Dead,
    /// There is no such name. Not to be removed: it may have appeared since.
    Gone,
    /// It is another user's, and we may not connect to it (yet): one that is only being made is its maker's alone.
    Unknown,
}

/// Whether a process still has the socket open that `name` in `dir` was bound to. It notices nothing of being asked.
///
/// Asks by connecting a socket of the wrong type: a living one refuses that as such, a dead one refuses any. Also `Alive` between
/// bind and listen, so `.new-` names can be asked about; but see [`Listener::bind`] for the instant when one of those is wrongly
/// found dead.
pub(crate) fn liveness(dir: BorrowedFd<'_>, name: &str) -> io::Result<Liveness> {
    let probe = new_socket(SocketType::DGRAM)?;
    match try_connect(&probe, dir, name)? {
        Ok(()) | Err(Errno::PROTOTYPE) => Ok(Liveness::Alive),
        Err(Errno::CONNREFUSED) => Ok(Liveness::Dead),
        Err(Errno::NOENT) => Ok(Liveness::Gone),
        Err(Errno::ACCESS | Errno::PERM) => Ok(Liveness::Unknown),
        Err(errno) => Err(errno.into()),
    }
}

fn new_socket(kind: SocketType) -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?)
}

fn try_connect(socket: &OwnedFd, dir: BorrowedFd<'_>, name: &str) -> io::Result<Result<(), Errno>> {
    let address = address(dir, name)?;
    Ok(again_if_interrupted(|| connect_to(socket, &address)))
}

fn address(dir: BorrowedFd<'_>, name: &str) -> io::Result<SocketAddrUnix> {
    debug_assert!(!name.contains('/'));
    Ok(SocketAddrUnix::new(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))?)
}

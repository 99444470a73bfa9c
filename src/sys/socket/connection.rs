//! One connection: packets, with descriptors.
//!
//! Of what a peer sends, nothing is left open that the caller has not been given.
#![allow(unsafe_code)]

use super::peer::{self, PeerCredentials};
use crate::sys::fork::{Origin, inherited};
use crate::sys::{again, again_if_interrupted};
use rustix::cmsg_space;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::AsFd;
use rustix::io::{Errno, IoSlice, IoSliceMut};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// How many descriptors one packet may carry.
pub(crate) const MAX_FDS: usize = 4;

/// A connected socket. Dropping it is what the peer sees as the end.
#[derive(Debug)]
pub(crate) struct Connection {
    fd: OwnedFd,
    /// A child has it open as well, and neither takes packets from its parent nor speaks for it.
    origin: Origin,
}

/// What [`Connection::recv`] found.
#[derive(Debug)]
pub(crate) enum Received {
    /// Nothing, at present.
    WouldBlock,
    /// The peer has closed, or died; everything it sent has been received.
    ///
    /// Also an empty packet, which Linux does not tell from the end; nobody who follows the protocol sends one.
    Eof,
    /// One packet.
    Packet {
        /// How long it was; more than the buffer holds if it was truncated there.
        len: usize,
        /// What it carried; at most [`MAX_FDS`], the rest has been closed.
        fds: Vec<OwnedFd>,
        /// It was longer than the buffer, or carried more descriptors than it may: the peer misbehaves.
        truncated: bool,
    },
}

impl Connection {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { fd, origin: Origin::here() }
    }

    /// Sends one packet, whole or not at all. `false`: no room at present, nothing was sent.
    ///
    /// # Errors
    /// `InvalidInput` for an empty packet or more than [`MAX_FDS`] descriptors. `BrokenPipe` or `ConnectionReset` when the
    /// peer is gone. `ETOOMANYREFS` when this user has more descriptors under way in sockets than `RLIMIT_NOFILE`.
    pub(crate) fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<bool> {
        if bytes.is_empty() || fds.len() > MAX_FDS {
            return Err(Errno::INVAL.into());
        }
        if !self.origin.is_here() {
            return Err(inherited());
        }
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL.into());
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match again_if_interrupted(|| sendmsg(&self.fd, &[IoSlice::new(bytes)], &mut control, flags)) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Ends the connection for both sides, whoever else has the descriptor; what was sent can still be received.
    pub(crate) fn shutdown(&self) {
        if !self.origin.is_here() {
            return;
        }
        // It fails only where the peer has ended it already.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// How much of the room for packets that the peer has not received is taken, and how much there is, in the kernel's bytes, of which a
    /// packet takes several hundred at least. `None` where the kernel does not tell.
    pub(crate) fn unreceived(&self) -> Option<(usize, usize)> {
        let mut queued: libc::c_int = 0;
        // SAFETY: `fd` is open for as long as `self` is, and with `TIOCOUTQ` the kernel writes one `c_int`, which is what it is given.
        let asked = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
        let size = rustix::net::sockopt::socket_send_buffer_size(&self.fd).ok()?;
        (asked == 0).then(|| (usize::try_from(queued).unwrap_or(0), size))
    }

    /// Has the peer's next packet refused; what it has sent by now can still be received.
    pub(crate) fn shutdown_reading(&self) {
        if !self.origin.is_here() {
            return;
        }
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Read);
    }

    /// Ends the connection for the peer's receiving only: what was sent can still be received, and its end is still told.
    pub(crate) fn finish(&self) {
        if !self.origin.is_here() {
            return;
        }
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    /// Whether every process that had the peer's socket has closed it, of a connection that was [finished](Self::finish).
    pub(crate) fn is_closed_by_peer(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::empty())];
        // Hung up: both directions are shut down, ours by `finish`.
        matches!(poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(1..))
            && fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Takes the next packet.
    ///
    /// # Errors
    /// `EMFILE` when this process had no descriptors left for those in the packet, which is then lost.
    pub(crate) fn recv(&self, buf: &mut [u8]) -> io::Result<Received> {
        self.receive(buf, RecvFlags::empty())
    }

    /// Looks at the next packet, with descriptors of its own for those that it carries, and leaves it where it is: so that a
    /// receiver who has no room for it loses nothing. Nobody else may receive meanwhile.
    ///
    /// # Errors
    /// As [`recv`](Self::recv), except that nothing is lost.
    pub(crate) fn peek(&self, buf: &mut [u8]) -> io::Result<Received> {
        self.receive(buf, RecvFlags::PEEK)
    }

    /// Takes off the packet that was looked at; the descriptors in it are closed.
    pub(crate) fn discard(&self) {
        if !self.origin.is_here() {
            return;
        }
        let reset = |errno| errno == Errno::CONNRESET;
        // It was there at the look before, and nobody else receives.
        let _ = again(reset, || rustix::net::recv(&self.fd, &mut [0_u8], RecvFlags::DONTWAIT));
    }

    fn receive(&self, buf: &mut [u8], flags: RecvFlags) -> io::Result<Received> {
        if !self.origin.is_here() {
            return Err(inherited());
        }
        // A little more room than needed (for alignment): what arrives beyond the limit is closed below.
        let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(MAX_FDS))];
        // TRUNC has the kernel say how long the packet was, rather than how much of it there was room for.
        let flags = flags | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC | RecvFlags::TRUNC;
        // The peer closed before it had read everything. Said once, and then come the packets it sent before.
        let reset = |errno| errno == Errno::CONNRESET;
        let received = again(reset, || {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let message = recvmsg(&self.fd, &mut [IoSliceMut::new(buf)], &mut control, flags)?;
            let (fds, too_many) = take_fds(&mut control);
            Ok((message, fds, too_many))
        });
        let (message, fds, too_many) = match received {
            Ok(received) => received,
            Err(Errno::AGAIN) => return Ok(Received::WouldBlock),
            Err(errno) => return Err(errno.into()),
        };
        if message.bytes == 0 {
            return Ok(Received::Eof);
        }
        let control_truncated = message.flags.contains(ReturnFlags::CTRUNC);
        if control_truncated && fds.len() < MAX_FDS {
            // There was room in the buffer: it is our own table that was full.
            return Err(Errno::MFILE.into());
        }
        let truncated = control_truncated || too_many || message.flags.contains(ReturnFlags::TRUNC);
        Ok(Received::Packet { len: message.bytes, fds, truncated })
    }

    /// Who connected (seen from the side that accepted), or who listened (seen from the side that connected).
    ///
    /// # Errors
    /// Not on a connected socket.
    pub(crate) fn peer_credentials(&self) -> io::Result<PeerCredentials> {
        peer::credentials(self.fd.as_fd())
    }

    /// A descriptor of the peer's process, in whatever namespace that is.
    ///
    /// # Errors
    /// See [`peer::pidfd`].
    pub(crate) fn peer_pidfd(&self) -> io::Result<OwnedFd> {
        peer::pidfd(self.fd.as_fd())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Takes out at most [`MAX_FDS`]; says whether there were more. Those are closed.
fn take_fds(control: &mut RecvAncillaryBuffer<'_>) -> (Vec<OwnedFd>, bool) {
    let mut fds = Vec::new();
    let mut too_many = false;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            for fd in received {
                if fds.len() < MAX_FDS {
                    fds.push(fd);
                } else {
                    too_many = true;
                }
            }
        }
    }
    (fds, too_many)
}

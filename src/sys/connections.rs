//! This process's TCP connections, by their two addresses.
//!
//! For connections that a library made and does not hand out.
#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::io::fcntl_dupfd_cloexec;

/// Shuts the connection between these two ends down, both ways; `false` if this process has no such.
///
/// Who reads from it or writes to it finds that it has ended, as if the peer had ended it; so does the peer.
pub(crate) fn shut_down(local: SocketAddr, peer: SocketAddr) -> io::Result<bool> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        if !fs::read_link(entry.path()).is_ok_and(|is| is.to_string_lossy().starts_with("socket:")) {
            continue;
        }
        let Some(raw) = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        // Ours from here on: what is looked at below stays what it is, whatever its owner does meanwhile.
        let Ok(stream) = duplicate(raw).map(TcpStream::from) else { continue };
        let is_it = stream.local_addr().is_ok_and(|address| is_same(address, local))
            && stream.peer_addr().is_ok_and(|address| is_same(address, peer));
        if is_it {
            return stream.shutdown(Shutdown::Both).map(|()| true);
        }
    }
    Ok(false)
}

fn duplicate(raw: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: used for nothing but `fcntl`, while it is borrowed. Its owner is another part of the process and may have closed it
    // since it was listed: then the call fails, or duplicates whatever has the number now, which the caller looks at before it does
    // anything with it. Numbers from a directory's listing are never -1.
    let borrowed = unsafe { BorrowedFd::borrow_raw(raw) };
    Ok(fcntl_dupfd_cloexec(borrowed, 0)?)
}

/// Scopes and flow labels are not part of what a link is called.
fn is_same(one: SocketAddr, other: SocketAddr) -> bool {
    (one.ip(), one.port()) == (other.ip(), other.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::net::TcpListener;

    #[test]
    fn zenoh_connection_is_shut_down_by_its_addresses_and_no_other_is() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let mut ends = [(); 2].map(|()| {
            let near = TcpStream::connect(at).unwrap();
            (near, listener.accept().unwrap().0)
        });
        let local = ends[0].0.local_addr().unwrap();
        assert!(shut_down(local, at).unwrap());
        assert_eq!(ends[0].0.read(&mut [0]).unwrap(), 0);
        assert_eq!(ends[0].1.read(&mut [0]).unwrap(), 0);
        ends[1].0.set_nonblocking(true).unwrap();
        assert_eq!(ends[1].0.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // The listener is at that address, too, but has no peer.
        drop(ends);
        assert!(!shut_down(at, local).unwrap());
    }
}

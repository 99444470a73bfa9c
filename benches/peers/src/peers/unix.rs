//! Unix sockets through tokio: what one would use without shared memory. Each byte is copied in and out by the kernel.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{
    self, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};

use super::{Peer, Rx, Tx, until_some};
use crate::case::Case;
use crate::payload;

/// A stream socket, both ends of which know the size of a message.
pub(crate) struct Stream;

impl Peer for Stream {
    type Tx = StreamTx;
    type Rx = StreamRx;
}

pub(crate) struct StreamTx {
    listener: UnixListener,
    receivers: Vec<UnixStream>,
    buffer: Vec<u8>,
}

impl Tx for StreamTx {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let listener = UnixListener::bind(path(case, topic)).expect("bind");
        Self { listener, receivers: Vec::new(), buffer: vec![0; case.size] }
    }

    async fn connected(&mut self, receivers: usize) {
        while self.receivers.len() < receivers {
            self.receivers.push(self.listener.accept().await.expect("accept").0);
        }
    }

    async fn send(&mut self, size: usize, number: u64) {
        payload::write(&mut self.buffer[..size], number);
        for receiver in &mut self.receivers {
            receiver.write_all(&self.buffer[..size]).await.expect("write");
        }
    }
}

pub(crate) struct StreamRx {
    stream: UnixStream,
    buffer: Vec<u8>,
}

impl Rx for StreamRx {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let path = path(case, topic);
        let stream = until_some(|| std::os::unix::net::UnixStream::connect(&path).ok()).await;
        stream.set_nonblocking(true).expect("nonblocking");
        Self { stream: UnixStream::from_std(stream).expect("register"), buffer: vec![0; case.size] }
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        self.stream.read_exact(&mut self.buffer).await.expect("read");
        look(&self.buffer)
    }
}

/// A seqpacket socket, which tokio has only as a descriptor to watch.
pub(crate) struct Seqpacket;

impl Peer for Seqpacket {
    type Tx = SeqpacketTx;
    type Rx = SeqpacketRx;
}

pub(crate) struct SeqpacketTx {
    listener: Watched,
    receivers: Vec<Watched>,
    buffer: Vec<u8>,
}

impl Tx for SeqpacketTx {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let socket = socket();
        net::bind(&socket, &address(case, topic)).expect("bind");
        net::listen(&socket, 64).expect("listen");
        Self { listener: Watched::new(socket), receivers: Vec::new(), buffer: vec![0; case.size] }
    }

    async fn connected(&mut self, receivers: usize) {
        while self.receivers.len() < receivers {
            let accept = |socket: &OwnedFd| Ok(net::accept_with(socket, SocketFlags::NONBLOCK)?);
            let socket = self.listener.reading(accept).await;
            make_room(&socket, self.buffer.len());
            self.receivers.push(Watched::new(socket));
        }
    }

    async fn send(&mut self, size: usize, number: u64) {
        payload::write(&mut self.buffer[..size], number);
        for receiver in &self.receivers {
            let send = |socket: &OwnedFd| Ok(net::send(socket, &self.buffer[..size], SendFlags::NOSIGNAL)?);
            assert_eq!(receiver.writing(send).await, size);
        }
    }
}

pub(crate) struct SeqpacketRx {
    socket: Watched,
    buffer: Vec<u8>,
}

impl Rx for SeqpacketRx {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let address = address(case, topic);
        let socket = until_some(|| {
            let socket = socket();
            net::connect(&socket, &address).ok().map(|()| socket)
        })
        .await;
        Self { socket: Watched::new(socket), buffer: vec![0; case.size] }
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        let Self { socket, buffer } = self;
        let receive = |socket: &OwnedFd| Ok(net::recv(socket, &mut buffer[..], RecvFlags::empty())?.0);
        assert_eq!(socket.reading(receive).await, self.buffer.len());
        look(&self.buffer)
    }
}

/// A descriptor on tokio's reactor.
struct Watched(AsyncFd<OwnedFd>);

impl Watched {
    #[allow(unsafe_code)]
    fn new(socket: OwnedFd) -> Self {
        // SAFETY: an `OwnedFd` keeps its descriptor open and the same until it is dropped with the `AsyncFd`.
        let watched = unsafe { AsyncFd::register(socket) };
        Self(watched.map_err(|error| error.into_parts().1).expect("register"))
    }

    async fn reading<T>(&self, mut call: impl FnMut(&OwnedFd) -> io::Result<T>) -> T {
        self.0.async_io(tokio::io::Interest::READABLE, |socket| call(socket)).await.expect("read")
    }

    async fn writing<T>(&self, mut call: impl FnMut(&OwnedFd) -> io::Result<T>) -> T {
        self.0.async_io(tokio::io::Interest::WRITABLE, |socket| call(socket)).await.expect("write")
    }
}

fn socket() -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("socket")
}

/// A packet has to fit into the send buffer as a whole.
fn make_room(socket: impl AsFd, packet: usize) {
    if packet > 64 << 10 {
        let _ = sockopt::set_socket_send_buffer_size(socket, packet * 2);
    }
}

fn path(case: &Case, topic: &str) -> PathBuf {
    case.dir.join(format!("{topic}.sock"))
}

fn address(case: &Case, topic: &str) -> SocketAddrUnix {
    SocketAddrUnix::new(path(case, topic)).expect("a short path")
}

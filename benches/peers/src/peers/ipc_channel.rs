//! ipc-channel: small messages through its bytes channel, large ones as its `IpcSharedMemory`. It blocks.

use std::fs;
use std::path::PathBuf;

use ipc_channel::ipc::{
    IpcBytesReceiver, IpcBytesSender, IpcOneShotServer, IpcReceiver, IpcSender, IpcSharedMemory,
    bytes_channel, channel,
};

use super::{Peer, Rx, Tx, until_some};
use crate::case::Case;
use crate::payload;

pub(crate) struct IpcChannel;

impl Peer for IpcChannel {
    type Tx = Sending;
    type Rx = Receiving;
}

/// What a receiver gives to the sender that it has found.
type Offer = (IpcBytesSender, IpcSender<IpcSharedMemory>);

/// From this size on memory is shared.
const LARGE: usize = 64 << 10;

pub(crate) struct Sending {
    servers: Vec<IpcOneShotServer<Offer>>,
    receivers: Vec<Offer>,
    buffer: Vec<u8>,
}

impl Tx for Sending {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let mut servers = Vec::new();
        // A server takes one connection.
        for nth in 0..case.fars {
            let (server, name) = IpcOneShotServer::new().expect("server");
            servers.push(server);
            let unfinished = case.dir.join(format!("{topic}-{nth}.name"));
            fs::write(&unfinished, name).expect("write");
            fs::rename(&unfinished, offered(case, topic, nth)).expect("rename");
        }
        Self { servers, receivers: Vec::new(), buffer: vec![0; case.size] }
    }

    async fn connected(&mut self, receivers: usize) {
        for server in self.servers.drain(..receivers) {
            self.receivers.push(server.accept().expect("accept").1);
        }
    }

    async fn send(&mut self, size: usize, number: u64) {
        payload::write(&mut self.buffer[..size], number);
        for (small, large) in &self.receivers {
            if size < LARGE {
                small.send(&self.buffer[..size]).expect("send");
            } else {
                large.send(IpcSharedMemory::from_bytes(&self.buffer[..size])).expect("send");
            }
        }
    }
}

pub(crate) struct Receiving {
    small: IpcBytesReceiver,
    large: IpcReceiver<IpcSharedMemory>,
    is_large: bool,
}

impl Rx for Receiving {
    async fn open(case: &Case, topic: &'static str) -> Self {
        // Whoever takes the name away is the one to connect.
        let taken = case.dir.join(format!("{topic}-taken-by-{}", std::process::id()));
        let take = |nth| fs::rename(offered(case, topic, nth), &taken).ok();
        until_some(|| (0..case.fars).find_map(take)).await;
        let sender = IpcSender::connect(fs::read_to_string(&taken).expect("read")).expect("connect");
        let ((small_tx, small), (large_tx, large)) =
            (bytes_channel().expect("channel"), channel().expect("channel"));
        sender.send((small_tx, large_tx)).expect("offer");
        Self { small, large, is_large: case.size >= LARGE }
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        if self.is_large {
            look(&self.large.recv().expect("receive"))
        } else {
            look(&self.small.recv().expect("receive"))
        }
    }
}

fn offered(case: &Case, topic: &str, nth: usize) -> PathBuf {
    case.dir.join(format!("{topic}-{nth}"))
}

//! ringfire. Messages of 64 B go through its typed ring with lossless flow control, larger ones through its blob ring,
//! whose producer never waits: the suite waits in its place, for `headroom`, so that nothing is lost.

use std::path::PathBuf;

use ringfire::{
    BlobConsumer, BlobProducer, CleanupMode, FlowControl, FutexWait, RingConsumer, RingProducer,
    RingProducerBuilder,
};

use super::{Peer, Rx, Tx, until_some};
use crate::case::{Case, Mode};
use crate::payload;

pub(crate) struct Ringfire;

impl Peer for Ringfire {
    type Tx = Producer;
    type Rx = Consumer;
}

/// A message of the typed ring.
type Small = [u64; 8];
const SMALL: usize = size_of::<Small>();

pub(crate) enum Producer {
    Small(RingProducer<Small>),
    Blob(BlobProducer<()>),
}

impl Tx for Producer {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let capacity = case.depth.next_power_of_two();
        if case.size == SMALL {
            let builder = RingProducerBuilder::new(capacity as u64).max_readers(32);
            let builder = builder.flow_control(FlowControl::LosslessBackpressure);
            let builder = builder.cleanup_mode(CleanupMode::UnlinkOnDrop);
            return Self::Small(builder.build(path(case, topic)).expect("create"));
        }
        let arena = ((capacity + 1) * (case.size + 64)).next_power_of_two();
        Self::Blob(BlobProducer::create(path(case, topic), capacity as u64, arena).expect("create"))
    }

    /// Readers register by themselves; the board tells when.
    async fn connected(&mut self, _: usize) {}

    async fn send(&mut self, size: usize, number: u64) {
        match self {
            Self::Small(producer) => {
                let mut bytes = [0; SMALL];
                payload::write(&mut bytes, number);
                let words = bytes.as_chunks::<8>().0;
                producer.push(&std::array::from_fn(|nth| u64::from_le_bytes(words[nth])));
            }
            Self::Blob(producer) => {
                while producer.headroom() == 0 {
                    std::hint::spin_loop();
                }
                producer.push_with(&(), size, |bytes| payload::write(bytes, number)).expect("push");
            }
        }
    }

    async fn send_batch(&mut self, size: usize, number: u64, count: u64) {
        let Self::Small(producer) = self else {
            for _ in 0..count {
                self.send(size, number).await;
            }
            return;
        };
        let mut batch = [[0; 8]; 64];
        for message in &mut batch[..count as usize] {
            let mut bytes = [0; SMALL];
            payload::write(&mut bytes, number);
            let words = bytes.as_chunks::<8>().0;
            *message = std::array::from_fn(|nth| u64::from_le_bytes(words[nth]));
        }
        producer.push_batch(&batch[..count as usize]);
    }
}

pub(crate) enum Consumer {
    Small(RingConsumer<Small>, Mode),
    Blob(BlobConsumer<()>),
}

impl Rx for Consumer {
    async fn open(case: &Case, topic: &'static str) -> Self {
        let path = path(case, topic);
        if case.size == SMALL {
            return Self::Small(until_some(|| RingConsumer::attach(&path).ok()).await, case.mode);
        }
        Self::Blob(until_some(|| BlobConsumer::attach(&path).ok()).await)
    }

    async fn recv<T>(&mut self, look: impl FnOnce(&[u8]) -> T) -> T {
        match self {
            Self::Small(consumer, mode) => {
                let message = match mode {
                    Mode::Awake => consumer.recv_blocking(&mut ringfire::BusySpin::new()),
                    Mode::Parked => consumer.recv_blocking(&mut FutexWait::new(0, None)),
                    Mode::Default => consumer.recv_blocking(&mut FutexWait::default()),
                };
                assert_eq!(consumer.lapped_count(), 0, "nothing is lost");
                look(message.map(u64::to_le_bytes).as_flattened())
            }
            Self::Blob(consumer) => {
                let mut look = Some(look);
                loop {
                    let seen = consumer.view(|(), bytes| look.take().expect("not lapped")(bytes));
                    if let Some(seen) = seen.expect("view") {
                        return seen;
                    }
                    std::hint::spin_loop();
                }
            }
        }
    }
}

fn path(case: &Case, topic: &str) -> PathBuf {
    case.dir.join(format!("{topic}.ringfire"))
}

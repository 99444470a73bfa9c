//! What is said over a link's socket: one frame a packet, little-endian, each field at a fixed place.
//!
//! ```text
//! 0        4         6      7          8
//! | "tshm" | version | kind | reserved | the kind's fields …
//! ```
//!
//! A frame of another version is told apart before anything else of it is looked at, so that these first six bytes are
//! the only ones that can never change. Decoding is strict: what this build would not have encoded is an error.
//!
//! File descriptors travel beside the bytes; [`Frame::fds`] says how many, and counting them is up to the caller. So
//! is judging which frame may come when.

use super::layout::Geometry;

/// Changes with every change of the frames or of what they mean.
pub(crate) const VERSION: u16 = 2;

/// The longest packet that is accepted: the size of the receive buffer.
pub(crate) const FRAME_MAX: usize = 256;

const MAGIC: [u8; 4] = *b"tshm";

/// One packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Frame {
    /// Subscriber, first: asks for a link.
    Hello(Hello),
    /// Publisher, first: grants the link. With the link's page, the epoll instance that hears it ring for new messages,
    /// and the eventfd by which the subscriber rings for a publisher that is out of tickets or memory.
    Welcome(Welcome),
    /// Publisher, last: there will be no link, or none any more.
    Refused(RefusedReason),
    /// Publisher: descriptors may name this segment from here on. With the memory object.
    Segment(Segment),
    /// Publisher: no descriptor will name this segment, unless it is announced anew; unmap it when its last sample is
    /// gone.
    Retire {
        /// The segment's id, which no other segment ever has.
        id: u64,
    },
    /// Subscriber: its handle is gone, queue nothing more; but it still holds samples.
    Leave,
    /// Publisher, last: everything was delivered, nothing will follow.
    Bye,
}

/// The fields of [`Frame::Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    /// A random number that names this subscriber.
    pub(crate) subscriber: u128,
    /// When the kernel had taken the connection: nanoseconds of the monotonic clock.
    pub(crate) connected_at_ns: u64,
    /// For how long it had been trying to connect by then, because the publisher's line was full. A length of time is the same in every
    /// time namespace.
    pub(crate) waited_ns: u64,
    /// How many messages it wants queued or held at most.
    pub(crate) depth: u32,
    /// What is to happen when there are as many, if it is not left to the publisher.
    pub(crate) on_full: Option<OnFullWire>,
}

/// The fields of [`Frame::Welcome`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Welcome {
    /// A random number that names this publisher.
    pub(crate) publisher: u128,
    /// The first message that this subscriber must receive or count as lost. Not above `next_seq`.
    pub(crate) expect_seq: u64,
    /// The first message not yet sent when the link was made.
    pub(crate) next_seq: u64,
    /// The link's depth: not above what was asked for.
    pub(crate) depth: u32,
    /// What happens when the link is full.
    pub(crate) on_full: OnFullWire,
}

/// The fields of [`Frame::Segment`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Never used twice by a publisher.
    pub(crate) id: u64,
    /// Bytes; not 0.
    pub(crate) len: u64,
    /// What kind of object it is, and so which checks it has to pass.
    pub(crate) backing: BackingWire,
}

/// What happens to a message for a link without tickets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnFullWire {
    /// The publisher waits.
    Wait,
    /// The oldest message not yet received makes room.
    DropOldest,
    /// The message is dropped.
    DropNewest,
}

/// The two kinds of memory objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BackingWire {
    /// Sealed against writing and resizing.
    Memfd,
    /// Not sealed: POSIX shared memory has no seals.
    Posix,
}

/// Why a publisher grants no link, or ends one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RefusedReason {
    /// The page or the descriptors for another link cannot be had.
    #[error("it is out of memory or file descriptors")]
    OutOfResources,
    /// The subscriber runs as another user.
    #[error("this user may not subscribe")]
    NotPermitted,
    /// What it got was not what a subscriber says.
    #[error("it did not understand this subscriber")]
    NotUnderstood,
    /// The subscriber kept senders waiting for too long.
    #[error("this subscriber was stuck for too long")]
    Stuck,
    /// It has as many links as it may have.
    #[error("it has as many subscribers as it may; raise max_subscribers there, or close some")]
    Full,
    /// The subscriber still has much of what an earlier link of its gave it.
    #[error("this subscriber keeps too many samples from before it was disconnected; drop them")]
    Keeping,
}

/// What is wrong with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum WireError {
    /// It ends before its fields do.
    #[error("sent a frame of {len} bytes, which is too short for its kind")]
    Truncated {
        /// Bytes of the packet.
        len: usize,
    },
    /// It goes on after its fields, or is longer than any frame.
    #[error("sent a frame of {len} bytes, which is too long for its kind")]
    TooLong {
        /// Bytes of the packet.
        len: usize,
    },
    /// It does not begin as a frame does.
    #[error("sent something that is not a frame of this protocol")]
    NotAFrame,
    /// The peer was built with another protocol.
    #[error("speaks protocol version {actual}, this build speaks {expected}")]
    VersionMismatch {
        /// This build's.
        expected: u16,
        /// The peer's.
        actual: u16,
    },
    /// There is no such kind in this version.
    #[error("sent a frame of unknown kind {kind}")]
    UnknownKind {
        /// The byte that names the kind.
        kind: u8,
    },
    /// A field has a value that means nothing.
    #[error("sent a frame whose {field} cannot be {value}")]
    BadValue {
        /// Which field.
        field: &'static str,
        /// What it said.
        value: u64,
    },
}

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REFUSED: u8 = 3;
const SEGMENT: u8 = 4;
const RETIRE: u8 = 5;
const LEAVE: u8 = 6;
const BYE: u8 = 7;

impl Frame {
    /// What to call it in an error.
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Welcome(_) => "Welcome",
            Self::Refused(_) => "Refused",
            Self::Segment(_) => "Segment",
            Self::Retire { .. } => "Retire",
            Self::Leave => "Leave",
            Self::Bye => "Bye",
        }
    }

    /// How many file descriptors must come with the packet, no more and no less.
    pub(crate) const fn fds(&self) -> usize {
        match self {
            Self::Segment(_) => 1,
            Self::Welcome(_) => 3,
            Self::Hello(_) | Self::Refused(_) | Self::Retire { .. } | Self::Leave | Self::Bye => 0,
        }
    }

    /// Writes the packet into `buffer` and returns the part that is to be sent.
    pub(crate) fn encode<'b>(&self, buffer: &'b mut [u8; FRAME_MAX]) -> &'b [u8] {
        let mut to = Writer { buffer, len: 0 };
        to.put(MAGIC);
        to.put(VERSION.to_le_bytes());
        to.put([self.kind(), 0]);
        match self {
            Self::Hello(hello) => {
                to.put(hello.subscriber.to_le_bytes());
                to.put(hello.connected_at_ns.to_le_bytes());
                to.put(hello.waited_ns.to_le_bytes());
                to.put(hello.depth.to_le_bytes());
                to.put([hello.on_full.map_or(0, OnFullWire::code)]);
            }
            Self::Welcome(welcome) => {
                to.put(welcome.publisher.to_le_bytes());
                to.put(welcome.expect_seq.to_le_bytes());
                to.put(welcome.next_seq.to_le_bytes());
                to.put(welcome.depth.to_le_bytes());
                to.put([welcome.on_full.code()]);
            }
            Self::Refused(reason) => to.put([reason.code()]),
            Self::Segment(segment) => {
                to.put(segment.id.to_le_bytes());
                to.put(segment.len.to_le_bytes());
                to.put([segment.backing.code()]);
            }
            Self::Retire { id } => to.put(id.to_le_bytes()),
            Self::Leave | Self::Bye => {}
        }
        let Writer { buffer, len } = to;
        &buffer[..len]
    }

    /// Reads one packet, all of it.
    pub(crate) fn decode(packet: &[u8]) -> Result<Self, WireError> {
        let mut from = Reader { rest: packet, len: packet.len() };
        if from.take()? != MAGIC {
            return Err(WireError::NotAFrame);
        }
        let version = u16::from_le_bytes(from.take()?);
        if version != VERSION {
            return Err(WireError::VersionMismatch { expected: VERSION, actual: version });
        }
        let [kind, reserved] = from.take()?;
        if reserved != 0 {
            return Err(WireError::BadValue { field: "reserved byte", value: u64::from(reserved) });
        }
        let frame = match kind {
            HELLO => Self::Hello(Hello {
                subscriber: u128::from_le_bytes(from.take()?),
                connected_at_ns: from.u64()?,
                waited_ns: from.u64()?,
                depth: from.depth()?,
                on_full: match from.u8()? {
                    0 => None,
                    code => Some(OnFullWire::from_code(code)?),
                },
            }),
            WELCOME => {
                let publisher = u128::from_le_bytes(from.take()?);
                let (expect_seq, next_seq) = (from.u64()?, from.u64()?);
                if expect_seq > next_seq {
                    return Err(WireError::BadValue { field: "first expected message", value: expect_seq });
                }
                let depth = from.depth()?;
                let on_full = OnFullWire::from_code(from.u8()?)?;
                Self::Welcome(Welcome { publisher, expect_seq, next_seq, depth, on_full })
            }
            REFUSED => Self::Refused(RefusedReason::from_code(from.u8()?)?),
            SEGMENT => {
                let (id, len) = (from.u64()?, from.u64()?);
                if len == 0 {
                    return Err(WireError::BadValue { field: "segment length", value: len });
                }
                Self::Segment(Segment { id, len, backing: BackingWire::from_code(from.u8()?)? })
            }
            RETIRE => Self::Retire { id: from.u64()? },
            LEAVE => Self::Leave,
            BYE => Self::Bye,
            kind => return Err(WireError::UnknownKind { kind }),
        };
        from.end(frame)
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => HELLO,
            Self::Welcome(_) => WELCOME,
            Self::Refused(_) => REFUSED,
            Self::Segment(_) => SEGMENT,
            Self::Retire { .. } => RETIRE,
            Self::Leave => LEAVE,
            Self::Bye => BYE,
        }
    }
}

impl OnFullWire {
    const fn code(self) -> u8 {
        match self {
            Self::Wait => 1,
            Self::DropOldest => 2,
            Self::DropNewest => 3,
        }
    }

    fn from_code(code: u8) -> Result<Self, WireError> {
        match code {
            1 => Ok(Self::Wait),
            2 => Ok(Self::DropOldest),
            3 => Ok(Self::DropNewest),
            _ => Err(WireError::BadValue { field: "policy", value: u64::from(code) }),
        }
    }
}

impl BackingWire {
    const fn code(self) -> u8 {
        match self {
            Self::Memfd => 1,
            Self::Posix => 2,
        }
    }

    fn from_code(code: u8) -> Result<Self, WireError> {
        match code {
            1 => Ok(Self::Memfd),
            2 => Ok(Self::Posix),
            _ => Err(WireError::BadValue { field: "backing", value: u64::from(code) }),
        }
    }
}

impl RefusedReason {
    const fn code(self) -> u8 {
        match self {
            Self::OutOfResources => 1,
            Self::NotPermitted => 2,
            Self::NotUnderstood => 3,
            Self::Stuck => 4,
            Self::Full => 5,
            Self::Keeping => 6,
        }
    }

    fn from_code(code: u8) -> Result<Self, WireError> {
        match code {
            1 => Ok(Self::OutOfResources),
            2 => Ok(Self::NotPermitted),
            3 => Ok(Self::NotUnderstood),
            4 => Ok(Self::Stuck),
            5 => Ok(Self::Full),
            6 => Ok(Self::Keeping),
            _ => Err(WireError::BadValue { field: "reason", value: u64::from(code) }),
        }
    }
}

struct Writer<'b> {
    buffer: &'b mut [u8; FRAME_MAX],
    len: usize,
}

impl Writer<'_> {
    /// No frame comes near the buffer's length, whatever its values: a test encodes each kind.
    fn put<const N: usize>(&mut self, bytes: [u8; N]) {
        self.buffer[self.len..self.len + N].copy_from_slice(&bytes);
        self.len += N;
    }
}

struct Reader<'p> {
    rest: &'p [u8],
    len: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(WireError::Truncated { len: self.len })?;
        self.rest = rest;
        Ok(*bytes)
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.take().map(u8::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_le_bytes)
    }

    fn depth(&mut self) -> Result<u32, WireError> {
        let depth = u32::from_le_bytes(self.take()?);
        match Geometry::new(depth) {
            Some(_) => Ok(depth),
            None => Err(WireError::BadValue { field: "depth", value: u64::from(depth) }),
        }
    }

    fn end(self, frame: Frame) -> Result<Frame, WireError> {
        if self.rest.is_empty() { Ok(frame) } else { Err(WireError::TooLong { len: self.len }) }
    }
}

#[cfg(all(test, not(tokio_shm_loom)))]
mod tests {
    use super::*;
    use crate::proto::layout::DEPTH_MAX;
    use proptest::prelude::*;

    fn policy() -> impl Strategy<Value = OnFullWire> {
        prop_oneof![Just(OnFullWire::Wait), Just(OnFullWire::DropOldest), Just(OnFullWire::DropNewest)]
    }

    fn frame() -> impl Strategy<Value = Frame> {
        prop_oneof![
            (any::<u128>(), any::<u64>(), any::<u64>(), 1..=DEPTH_MAX, proptest::option::of(policy()))
                .prop_map(|(subscriber, connected_at_ns, waited_ns, depth, on_full)| {
                    Frame::Hello(Hello { subscriber, connected_at_ns, waited_ns, depth, on_full })
                }),
            (any::<u128>(), any::<u64>(), any::<u64>(), 1..=DEPTH_MAX, policy()).prop_map(
                |(publisher, a, b, depth, on_full)| {
                    let (expect_seq, next_seq) = (a.min(b), a.max(b));
                    Frame::Welcome(Welcome { publisher, expect_seq, next_seq, depth, on_full })
                }
            ),
            (1u8..=6).prop_map(|code| Frame::Refused(RefusedReason::from_code(code).unwrap())),
            (any::<u64>(), 1u64.., 1u8..=2).prop_map(|(id, len, code)| {
                Frame::Segment(Segment { id, len, backing: BackingWire::from_code(code).unwrap() })
            }),
            any::<u64>().prop_map(|id| Frame::Retire { id }),
            Just(Frame::Leave),
            Just(Frame::Bye),
        ]
    }

    fn encoded(frame: &Frame) -> Vec<u8> {
        frame.encode(&mut [0xff; FRAME_MAX]).to_vec()
    }

    proptest! {
        #[test]
        fn frame_survives_the_wire(frame in frame()) {
            prop_assert_eq!(Frame::decode(&encoded(&frame)), Ok(frame));
        }

        #[test]
        fn cut_or_extended_frame_is_refused(frame in frame(), at in any::<prop::sample::Index>(), more in 1usize..300) {
            let mut packet = encoded(&frame);
            let len = at.index(packet.len());
            prop_assert_eq!(Frame::decode(&packet[..len]), Err(WireError::Truncated { len }));
            packet.resize(packet.len() + more, 0);
            prop_assert_eq!(Frame::decode(&packet), Err(WireError::TooLong { len: packet.len() }));
        }

        #[test]
        fn arbitrary_bytes_are_refused_or_are_exactly_what_would_be_encoded(
            mut packet in prop::collection::vec(any::<u8>(), 0..80),
            kind in 0u8..10,
            code in 0u8..8,
            likely in 0usize..4,
        ) {
            // Without help, hardly any would get past the magic.
            for (at, byte) in packet.iter_mut().enumerate() {
                match at {
                    0..4 if likely > 0 => *byte = MAGIC[at],
                    4..6 if likely > 0 => *byte = VERSION.to_le_bytes()[at - 4],
                    6 if likely > 0 => *byte = kind,
                    7 if likely > 0 => *byte = 0,
                    8 if likely > 1 => *byte = code,
                    _ => {}
                }
            }
            if likely > 2 {
                let hello =
                    Hello { subscriber: 0, connected_at_ns: 0, waited_ns: 0, depth: 1, on_full: None };
                let len = encoded(&Frame::Hello(hello)).len();
                packet.resize(if kind == HELLO { len } else { packet.len() }, 0);
            }
            if let Ok(frame) = Frame::decode(&packet) {
                prop_assert_eq!(encoded(&frame), packet);
            }
        }

        #[test]
        fn frame_with_one_byte_changed_is_refused_or_means_something_else(
            frame in frame(),
            at in any::<prop::sample::Index>(),
            flip in 1u8..,
        ) {
            let mut packet = encoded(&frame);
            let at = at.index(packet.len());
            packet[at] ^= flip;
            match Frame::decode(&packet) {
                Ok(other) => {
                    prop_assert_ne!(other, frame);
                    prop_assert_eq!(encoded(&other), packet);
                }
                Err(WireError::NotAFrame) => prop_assert!(at < 4),
                Err(WireError::VersionMismatch { .. }) => prop_assert!((4..6).contains(&at)),
                Err(_) => prop_assert!(at >= 6),
            }
        }
    }

    #[test]
    fn frame_of_another_version_says_so_whatever_follows() {
        let expected = Err(WireError::VersionMismatch { expected: VERSION, actual: 0x0302 });
        assert_eq!(Frame::decode(b"tshm\x02\x03"), expected);
        assert_eq!(Frame::decode(b"tshm\x02\x03 and things that are not known yet"), expected);
    }

    #[test]
    fn hello_looks_as_it_always_did() {
        let hello = Frame::Hello(Hello {
            subscriber: 0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100,
            connected_at_ns: 0x2726_2524_2322_2120,
            waited_ns: 0x3736_3534_3332_3130,
            depth: 0x1_0000,
            on_full: Some(OnFullWire::DropNewest),
        });
        let mut expected = b"tshm\x02\x00\x01\x00".to_vec();
        expected.extend(0x00..=0x0f);
        expected.extend(0x20..=0x27);
        expected.extend(0x30..=0x37);
        expected.extend([0, 0, 1, 0, 3]);
        assert_eq!(encoded(&hello), expected);
    }

    #[test]
    fn field_that_cannot_be_is_named() {
        let welcome =
            Welcome { publisher: 0, expect_seq: 5, next_seq: 4, depth: 1, on_full: OnFullWire::Wait };
        let fault = |frame: Frame| match Frame::decode(&encoded(&frame)) {
            Err(WireError::BadValue { field, value }) => (field, value),
            other => panic!("{other:?}"),
        };
        assert_eq!(fault(Frame::Welcome(welcome)), ("first expected message", 5));
        let depth = DEPTH_MAX + 1;
        assert_eq!(fault(Frame::Welcome(Welcome { expect_seq: 4, depth, ..welcome })), ("depth", 65_537));
        let segment = Segment { id: 1, len: 0, backing: BackingWire::Memfd };
        assert_eq!(fault(Frame::Segment(segment)), ("segment length", 0));
    }
}

//! What a hostile peer can send, as functions of plain input: driven by the fuzz targets in `fuzz/` and, so that nobody
//! needs a nightly compiler for the basic check, by proptest here.
//!
//! Each panics where a promise is broken, and only there. Which error an input deserves is tested in `hostile`.
#![allow(unreachable_pub)] // It is public for the fuzz targets only.

mod handshake;
mod page;

pub use self::handshake::{Stage, Step, subscriber};
pub use self::page::{Op, page};

use crate::proto::wire::{FRAME_MAX, Frame};

/// Decodes a packet: an error, or a frame that is encoded to exactly these bytes.
pub fn wire(packet: &[u8]) {
    match Frame::decode(packet) {
        Ok(frame) => assert_eq!(frame.encode(&mut [0xff; FRAME_MAX]), packet, "{frame:?}"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arbitrary::{Arbitrary, Unstructured};
    use proptest::prelude::*;

    /// As the fuzzer makes them, of random bytes. One by one: of a list's own bytes, half would end it.
    fn made<T: for<'a> Arbitrary<'a> + std::fmt::Debug>(most: usize) -> impl Strategy<Value = Vec<T>> {
        let one = prop::collection::vec(any::<u8>(), 32)
            .prop_map(|bytes| T::arbitrary(&mut Unstructured::new(&bytes)).expect("from what is missing"));
        prop::collection::vec(one, 0..most)
    }

    proptest! {
        #[test]
        fn hostile_packet_is_an_error_or_the_frame_that_it_is(
            head in prop_oneof![Just(&b"tshm\x01\x00"[..]), Just(&b"tshm"[..]), Just(&b""[..])],
            tail in prop::collection::vec(any::<u8>(), 0..60),
            kind in 0..9u8,
        ) {
            wire(&tail);
            wire(&[head, &tail].concat());
            wire(&[head, &[kind, 0], &tail].concat());
        }

        #[test]
        fn hostile_page_makes_neither_side_panic_loop_or_hand_out_what_it_does_not_have(
            depth in any::<u8>(),
            ops in made::<Op>(400),
        ) {
            page(depth, &ops);
        }

        #[test]
        fn hostile_publisher_cannot_lead_a_subscriber_out_of_bounds(steps in made::<Step>(100)) {
            subscriber(&steps);
        }
    }

    fn private_dir() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        dir
    }

    /// What fuzzing has found to go different ways. A package from the registry comes without it.
    fn corpus(target: &str) -> impl Iterator<Item = Vec<u8>> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
        let files = std::fs::read_dir(path).into_iter().flatten();
        files.map(|file| std::fs::read(file.unwrap().path()).unwrap())
    }

    fn input<T: for<'a> Arbitrary<'a>>(bytes: &[u8]) -> T {
        T::arbitrary_take_rest(Unstructured::new(bytes)).unwrap()
    }

    #[test]
    fn hostile_corpora_break_no_promise() {
        corpus("wire").for_each(|packet| wire(&packet));
        for bytes in corpus("page") {
            let (depth, ops) = input::<(u8, Vec<Op>)>(&bytes);
            page(depth, &ops);
        }
        let dir = private_dir();
        let stage = Stage::new(dir.path());
        for bytes in corpus("handshake") {
            match input::<(bool, Vec<Step>)>(&bytes) {
                (true, steps) => subscriber(&steps),
                (false, steps) => stage.publisher(&steps),
            }
        }
    }

    #[test]
    fn hostile_subscriber_cannot_keep_what_a_publisher_has() {
        let dir = private_dir();
        let stage = Stage::new(dir.path());
        proptest!(|(steps in made::<Step>(100))| stage.publisher(&steps));
    }
}

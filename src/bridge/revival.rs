//! Connections that zenoh keeps up and no longer sends on, ended so that they are made anew.
//!
//! zenoh 1.10 knows its transports by the id of their peer. Where a connection is found dead, and another one that was about to take
//! its place as well, the old transport is deleted twice, and the second time is up to half a lease later. If the peer has connected
//! again in between, it is the new transport that is taken out of the list: its tasks go on, it receives and says that it is alive,
//! so that the peer has nothing to mend, but nobody finds it to send on it. It stays so for as long as the connection does.
//!
//! It can be told for certain: zenoh says of each link when it is up and when it is gone, and lists the transports that it knows. A
//! transport is listed before its first link is said to be up and until after its last one is closed, so a link to a peer that is
//! not listed is such a one. To end it zenoh offers nothing (closing the session leaves it as it is, and the peer sending to it), but
//! its TCP connection can be shut down: then both ends find it dead, and connect again by what they are configured to do.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ::zenoh::Session;
use ::zenoh::sample::SampleKind;
use ::zenoh::session::{Link, ZenohId};
use parking_lot::Mutex;

use super::Stop;
use super::stats::{Counters, count};
use crate::sys::connections::shut_down;
use crate::text::chain;

/// How long between two looks. A link has to be lost at both: what is said and what is listed are not of one moment.
const LOOK: Duration = Duration::from_secs(2);

/// A link's own address and its peer's.
type Ends = (SocketAddr, SocketAddr);

/// The links that are said to be up, each with its peer. (Not of all that have gone zenoh says so: see `look`.)
type Up = Arc<Mutex<HashMap<Ends, ZenohId>>>;

/// The links of one session.
pub(super) struct Revival {
    up: Up,
    /// Lost when it was last looked.
    suspects: HashSet<Ends>,
}

impl Revival {
    pub(super) async fn new(session: &Session) -> ::zenoh::Result<Self> {
        let up = Up::default();
        let links = Arc::clone(&up);
        session
            .info()
            .link_events_listener()
            .history(true)
            .callback(move |event| {
                let Some(ends) = ends(event.link()) else { return };
                match event.kind() {
                    SampleKind::Put => links.lock().insert(ends, *event.link().zid()),
                    SampleKind::Delete => links.lock().remove(&ends),
                };
            })
            .background()
            .await?;
        Ok(Self { up, suspects: HashSet::new() })
    }

    /// Looks from time to time, until the bridge stops.
    pub(super) async fn run(mut self, session: Session, counters: Arc<Counters>, mut stop: Stop) {
        loop {
            tokio::select! {
                biased;
                () = stop.stopped() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
            let peers = session.info().transports().await.map(|transport| *transport.zid());
            let ended = self.look(&peers.collect());
            count(&counters.revived, ended);
        }
    }

    /// Ends the links that were lost the last time as well; says how many.
    fn look(&mut self, listed: &HashSet<ZenohId>) -> u64 {
        let lost = |(ends, peer): (&Ends, &ZenohId)| (!listed.contains(peer)).then_some(*ends);
        let lost: HashSet<Ends> = self.up.lock().iter().filter_map(lost).collect();
        let mut ended = 0;
        for ends in lost.intersection(&self.suspects) {
            let (local, peer) = *ends;
            match shut_down(local, peer) {
                Ok(true) => {
                    tracing::warn!(%local, %peer, "zenoh no longer sent on a connection: ended");
                    ended += 1;
                }
                // Gone long ago, with its transport and without a word.
                Ok(false) => drop(self.up.lock().remove(ends)),
                Err(error) => {
                    tracing::warn!(%local, %peer, error = %chain(&error), "zenoh no longer sends on a connection")
                }
            }
        }
        self.suspects = lost;
        ended
    }
}

/// `None` for links that are no TCP connections: those of one host have no cable to be cut.
fn ends(link: &Link) -> Option<Ends> {
    Some((link.src().address().as_str().parse().ok()?, link.dst().address().as_str().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{ErrorKind, Read as _};
    use std::net::{TcpListener, TcpStream};

    fn of(near: &TcpStream) -> Ends {
        (near.local_addr().unwrap(), near.peer_addr().unwrap())
    }

    /// Two connections, each of a peer of its own; their ends there, and what knows of them.
    fn two() -> ([ZenohId; 2], [(TcpStream, TcpStream); 2], Revival) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let links = [(); 2].map(|()| {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let far = listener.accept().unwrap().0;
            far.set_nonblocking(true).unwrap();
            (near, far)
        });
        let peers = [1, 2].map(|id: u8| ZenohId::try_from(&[id][..]).unwrap());
        let up = links.iter().map(|(near, _)| of(near)).zip(peers).collect();
        (peers, links, Revival { up: Arc::new(Mutex::new(up)), suspects: HashSet::new() })
    }

    fn is_open(mut far: &TcpStream) -> bool {
        match far.read(&mut [0]) {
            Ok(read) => read > 0,
            Err(error) => error.kind() == ErrorKind::WouldBlock,
        }
    }

    #[test]
    fn zenoh_link_to_a_peer_that_is_not_listed_is_ended_at_the_second_look() {
        let (peers, links, mut revival) = two();
        let listed = HashSet::from([peers[1]]);
        assert_eq!(revival.look(&listed), 0);
        assert!(is_open(&links[0].1));
        assert_eq!(revival.look(&listed), 1);
        assert!(!is_open(&links[0].1));
        assert!(is_open(&links[1].1));
        // One that has gone without a word is forgotten.
        drop(links);
        assert_eq!(revival.look(&listed), 0);
        assert!(revival.up.lock().values().eq([&peers[1]]));
    }

    #[test]
    fn zenoh_link_to_a_peer_that_was_not_listed_once_is_left_alone() {
        let (peers, links, mut revival) = two();
        for listed in [&[][..], &peers, &[]] {
            assert_eq!(revival.look(&listed.iter().copied().collect()), 0);
        }
        assert!(links.iter().all(|(_, far)| is_open(far)));
    }
}

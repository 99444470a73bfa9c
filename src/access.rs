//! Who may take part besides the processes of our own user: nobody, unless a builder says so.
//!
//! It decides by what the kernel says of a socket's peer and of the runtime directory; it asks the kernel nothing itself. Who has no
//! number in our user namespace is never let in, not even by the number that the kernel shows in its place: it stands for anyone.

use rustix::process::geteuid;

use crate::sys::socket::PeerCredentials;

/// Users and groups that are let in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Access {
    uids: Vec<u32>,
    gids: Vec<u32>,
}

impl Access {
    pub(crate) fn allow_uid(&mut self, uid: u32) {
        self.uids.push(uid);
    }

    pub(crate) fn allow_gid(&mut self, gid: u32) {
        self.gids.push(gid);
    }

    /// Whether a peer may publish to us, or subscribe to us.
    pub(crate) fn admits(&self, peer: PeerCredentials) -> bool {
        peer.uid.is_some_and(|uid| self.admits_user(uid))
            || peer.gid.is_some_and(|gid| self.admits_group(gid))
    }

    /// Whether a directory of this user's may be trusted.
    pub(crate) fn admits_user(&self, uid: u32) -> bool {
        uid == geteuid().as_raw() || self.uids.contains(&uid)
    }

    /// Whether a directory that members of this group can enter may be used.
    pub(crate) fn admits_group(&self, gid: u32) -> bool {
        self.gids.contains(&gid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_is_for_our_own_user_unless_others_are_let_in() {
        let us = geteuid().as_raw();
        let peer = |uid, gid| PeerCredentials { pid: None, uid: Some(uid), gid: Some(gid) };
        let mut access = Access::default();
        assert!(access.admits(peer(us, 77)));
        assert!(!access.admits(peer(us + 1, 77)));
        access.allow_uid(us + 1);
        assert!(access.admits(peer(us + 1, 77)) && access.admits_user(us + 1));
        assert!(!access.admits(peer(us + 2, 77)));
        access.allow_gid(77);
        assert!(access.admits(peer(us + 2, 77)) && access.admits_group(77));
        assert!(!access.admits_user(us + 2) && !access.admits_group(us + 1));
        let unmapped = PeerCredentials { pid: None, uid: None, gid: None };
        access.allow_uid(65_534);
        access.allow_gid(65_534);
        assert!(!access.admits(unmapped));
        assert!(access.admits(PeerCredentials { gid: Some(77), ..unmapped }));
    }
}

//! Who may take part besides the processes of our own user: nobody, unless a builder says so.
//!
//! It decides by what the kernel says of a socket's peer and of the runtime directory; it asks the kernel nothing itself.

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
        self.admits_user(peer.uid) || self.gids.contains(&peer.gid)
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
        let peer = |uid, gid| PeerCredentials { pid: None, uid, gid };
        let mut access = Access::default();
        assert!(access.admits(peer(us, 77)));
        assert!(!access.admits(peer(us + 1, 77)));
        access.allow_uid(us + 1);
        assert!(access.admits(peer(us + 1, 77)) && access.admits_user(us + 1));
        assert!(!access.admits(peer(us + 2, 77)));
        access.allow_gid(77);
        assert!(access.admits(peer(us + 2, 77)) && access.admits_group(77));
        assert!(!access.admits_user(us + 2) && !access.admits_group(us + 1));
    }
}

//! Whose a file is that we make, and who may use it: never more than the directory that it is made in allows.
//!
//! It does not judge whether that directory can be trusted.

use crate::sys::ids::{is_ours, known_uid};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid, chmod, chownat, fstat, openat};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::os::fd::{AsFd, AsRawFd};

/// Owner and access of what is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ownership {
    /// The user that it is given to in place of us; only root can.
    owner: Option<u32>,
    /// The group that may use it as its owner does.
    group: Option<u32>,
}

impl Ownership {
    /// Ours, and nobody else's.
    pub(crate) const OURS: Self = Self { owner: None, group: None };

    /// That of a directory, for what is made in it.
    pub(crate) fn of(dir: impl AsFd) -> Result<Self, Errno> {
        let stat = fstat(dir)?;
        let us = geteuid();
        Ok(Self {
            owner: (us.is_root() && stat.st_uid != us.as_raw()).then_some(stat.st_uid).and_then(known_uid),
            group: (stat.st_mode & 0o070 == 0o070).then_some(stat.st_gid),
        })
    }

    /// Sets owner, group and mode of what has just been made as `name` in `dir`, for its owner alone so far.
    ///
    /// What it finds under that name may have been exchanged for something else by whoever may write in `dir`: so it is
    /// opened first, as what was made and ours, and then changed through that descriptor.
    pub(crate) fn settle(
        self,
        dir: impl AsFd,
        name: impl rustix::path::Arg,
        kind: FileType,
    ) -> Result<(), Errno> {
        // As a path only, which needs no right to what is being repaired: a umask such as 0177 takes from the owner, too.
        let made = openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        let stat = fstat(&made)?;
        if FileType::from_raw_mode(stat.st_mode) != kind || !is_ours(stat.st_uid) {
            return Err(Errno::NOENT);
        }
        let owner = self.owner.filter(|owner| *owner != stat.st_uid);
        let group = self.group.filter(|group| *group != stat.st_gid);
        if owner.is_some() || group.is_some() {
            chownat(&made, "", owner.map(Uid::from_raw), group.map(Gid::from_raw), AtFlags::EMPTY_PATH)?;
        }
        let mode = Mode::from_raw_mode(match (kind, self.group) {
            (FileType::Directory, None) => 0o700,
            (FileType::Directory, Some(_)) => 0o770,
            (_, None) => 0o600,
            (_, Some(_)) => 0o660,
        });
        if stat.st_mode & 0o7777 != mode.as_raw_mode() {
            chmod(format!("/proc/self/fd/{}", made.as_raw_fd()), mode)?;
        }
        Ok(())
    }
}

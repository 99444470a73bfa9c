//! The directory that all topics of a user live in: which it is, and whether it can be trusted.
//!
//! Its mode is the first gate: whoever cannot enter it can neither connect to a publisher nor pretend to be one. So it must belong
//! to us and be closed to everybody else, before anything in it is looked at.

use crate::access::Access;
use crate::sys::ids::{is_ours, known_gid, known_uid};
use crate::sys::ownership::Ownership;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, mkdirat, open, statat};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A directory that was found good once, and is checked again each time that it is opened.
///
/// Holds no descriptor, for those are few: it is opened for the short time that it is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RuntimeDir {
    path: Arc<Path>,
    access: Arc<Access>,
}

impl RuntimeDir {
    /// The directory given; else `$TOKIO_SHM_DIR`; else `$XDG_RUNTIME_DIR/tokio-shm`; else `tokio-shm-<uid>` in the directory for
    /// temporary files. Made if it does not exist (its parent must).
    pub(crate) fn resolve(explicit: Option<&Path>, access: Access) -> Result<Self, RuntimeDirError> {
        let env = |name: &str| std::env::var_os(name);
        let temp = std::env::temp_dir();
        // An empty TMPDIR, too.
        let temp = if temp.is_absolute() { temp } else { PathBuf::from("/tmp") };
        let (chosen, by) = choose(explicit, env, &temp);
        // Absolute, as the process may change its directory.
        let path =
            std::path::absolute(&chosen).map_err(|source| RuntimeDirError::Open { path: chosen, source })?;
        let runtime = Self { path: path.into(), access: Arc::new(access) };
        if by == XDG {
            runtime.check_parent()?;
        }
        let dir = runtime.open()?;
        check_proc(&dir)?;
        runtime.tell(&dir, by, &temp);
        Ok(runtime)
    }

    /// What `$XDG_RUNTIME_DIR` names is one user's. Were another to make a directory there, as root under `sudo` can, it would lock
    /// that user out from then on.
    fn check_parent(&self) -> Result<(), RuntimeDirError> {
        let Some(Ok(parent)) = self.path.parent().map(|parent| statat(CWD, parent, AtFlags::empty())) else {
            return Ok(());
        };
        let is_missing = matches!(statat(CWD, &*self.path, AtFlags::SYMLINK_NOFOLLOW), Err(Errno::NOENT));
        if !is_missing || is_ours(parent.st_uid) {
            return Ok(());
        }
        let (path, us) = (self.path.to_path_buf(), geteuid().as_raw());
        Err(RuntimeDirError::Owner { path, owner: parent.st_uid, us })
    }

    /// Says which directory it is, and of others that this user's programs may be using instead.
    fn tell(&self, dir: &OwnedFd, by: &'static str, temp: &Path) {
        if !tracing::enabled!(tracing::Level::DEBUG) {
            return;
        }
        let owner = fstat(dir).map_or(u32::MAX, |stat| stat.st_uid);
        tracing::debug!(path = %self.path.display(), owner, chosen_by = by, "the runtime directory");
        let uid = geteuid().as_raw();
        let usual = Path::new("/run/user").join(uid.to_string()).join("tokio-shm");
        for other in [usual, temp.join(format!("tokio-shm-{uid}"))] {
            if *other != *self.path && other.symlink_metadata().is_ok() {
                tracing::debug!(
                    path = %self.path.display(),
                    other = %other.display(),
                    "there is another runtime directory of this user: programs with another XDG_RUNTIME_DIR or TMPDIR \
                     may be using it, and are not seen here; set TOKIO_SHM_DIR alike for all"
                );
            }
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Who may take part.
    pub(crate) fn access(&self) -> &Arc<Access> {
        &self.access
    }

    /// Opens it, making it if need be, and checks that nobody else can enter it.
    pub(crate) fn open(&self) -> Result<OwnedFd, RuntimeDirError> {
        loop {
            if let Some(fd) = self.open_existing()? {
                return Ok(fd);
            }
            match make_private_dir(CWD, &*self.path, Ownership::OURS) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(source) => {
                    return Err(RuntimeDirError::Create {
                        path: self.path.to_path_buf(),
                        source: source.into(),
                    });
                }
            }
        }
    }

    /// As [`open`](Self::open), but `None` if it does not exist: whoever leaves must not bring it back.
    pub(crate) fn open_existing(&self) -> Result<Option<OwnedFd>, RuntimeDirError> {
        let failed =
            |errno: Errno| RuntimeDirError::Open { path: self.path.to_path_buf(), source: errno.into() };
        let fd = match open(&*self.path, DIRECTORY, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            // The last part is a symbolic link, or a file.
            Err(Errno::LOOP | Errno::NOTDIR) if self.is_not_a_directory() => {
                return Err(RuntimeDirError::NotADirectory { path: self.path.to_path_buf() });
            }
            Err(Errno::ACCESS) => return Err(self.closed(Errno::ACCESS)),
            Err(errno) => return Err(failed(errno)),
        };
        self.check(&fstat(&fd).map_err(failed)?)?;
        Ok(Some(fd))
    }

    /// Why it may not be opened: mostly because it is another user's.
    fn closed(&self, errno: Errno) -> RuntimeDirError {
        let (path, us) = (self.path.to_path_buf(), geteuid().as_raw());
        match statat(CWD, &*self.path, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.st_uid != us => RuntimeDirError::Owner { path, owner: stat.st_uid, us },
            _ => RuntimeDirError::Open { path, source: errno.into() },
        }
    }

    fn is_not_a_directory(&self) -> bool {
        let stat = statat(CWD, &*self.path, AtFlags::SYMLINK_NOFOLLOW);
        stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) != FileType::Directory)
    }

    /// Only users that are let in can enter it, or change who can.
    fn check(&self, stat: &Stat) -> Result<(), RuntimeDirError> {
        let mode = stat.st_mode & 0o7777;
        let for_group = mode & 0o070 != 0;
        if known_uid(stat.st_uid).is_none() {
            let path = self.path.to_path_buf();
            return Err(RuntimeDirError::Unmapped { path, shown: stat.st_uid, us: geteuid().as_raw() });
        }
        let group_admitted = known_gid(stat.st_gid).is_some_and(|gid| self.access.admits_group(gid));
        // Root could come in anyway, and is who prepares a directory for a group.
        let prepared = for_group && group_admitted && stat.st_uid == 0;
        if !self.access.admits_user(stat.st_uid) && !prepared {
            let (owner, us) = (stat.st_uid, geteuid().as_raw());
            return Err(RuntimeDirError::Owner { path: self.path.to_path_buf(), owner, us });
        }
        let too_much = mode & 0o007 != 0 || (for_group && !group_admitted);
        // Whoever uses a topic may have to make its directory.
        let too_little = for_group && mode & 0o070 != 0o070;
        if too_much || too_little {
            return Err(RuntimeDirError::Mode { path: self.path.to_path_buf(), mode });
        }
        Ok(())
    }
}

/// How directories are opened: to be read, and never through a symbolic link in the last place.
pub(super) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Makes a directory that is its owner's alone from the first instant, fully usable to the owner whatever the umask, and then
/// to whom `ownership` lets in.
pub(super) fn make_private_dir(
    parent: impl AsFd,
    path: impl rustix::path::Arg,
    ownership: Ownership,
) -> Result<(), Errno> {
    path.into_with_c_str(|path| {
        mkdirat(&parent, path, Mode::RWXU)?;
        kill_point!("bind: directory begun");
        match ownership.settle(&parent, path, FileType::Directory) {
            // Removed again by somebody who was leaving.
            Err(Errno::NOENT) => Ok(()),
            settled => settled,
        }
    })
}

/// Sockets are named, directories watched and descriptors judged through `/proc/self/fd`: whether it leads where it should.
fn check_proc(dir: &OwnedFd) -> Result<(), RuntimeDirError> {
    let failed = |errno: Errno| RuntimeDirError::NoProc { source: errno.into() };
    let ours = fstat(dir).map_err(failed)?;
    let named =
        statat(CWD, format!("/proc/self/fd/{}", dir.as_raw_fd()), AtFlags::empty()).map_err(failed)?;
    match (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino) {
        true => Ok(()),
        false => Err(failed(Errno::NOENT)),
    }
}

/// The variable that names the directory which another user must not make anything in.
const XDG: &str = "XDG_RUNTIME_DIR";

/// The directory, and what chose it.
fn choose(
    explicit: Option<&Path>,
    env: impl Fn(&str) -> Option<OsString>,
    temp: &Path,
) -> (PathBuf, &'static str) {
    // Empty counts as not set, as for a shell.
    let env = |name| env(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = explicit {
        (path.to_owned(), "runtime_dir")
    } else if let Some(path) = env("TOKIO_SHM_DIR") {
        (path, "TOKIO_SHM_DIR")
    } else if let Some(path) = env(XDG).filter(|path| path.is_absolute()) {
        // Its specification has a relative path ignored: programs in other working directories would not be met.
        (path.join("tokio-shm"), XDG)
    } else {
        (temp.join(format!("tokio-shm-{}", geteuid().as_raw())), "the temporary directory")
    }
}

/// The directory that all topics live in cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RuntimeDirError {
    /// It does not exist and cannot be made.
    #[error(
        "cannot make the runtime directory {path:?}; its parent must exist and be writable, or name another directory in \
         TOKIO_SHM_DIR"
    )]
    Create {
        /// Its path.
        path: PathBuf,
        /// The error of the OS.
        source: io::Error,
    },
    /// It exists and cannot be opened.
    #[error(
        "cannot open the runtime directory {path:?}; repair it, or name another directory in TOKIO_SHM_DIR"
    )]
    Open {
        /// Its path.
        path: PathBuf,
        /// The error of the OS.
        source: io::Error,
    },
    /// It is a file, or a symbolic link.
    #[error(
        "the runtime directory {path:?} is not a directory (a symbolic link will not do); remove it, or name another in \
         TOKIO_SHM_DIR"
    )]
    NotADirectory {
        /// Its path.
        path: PathBuf,
    },
    /// It belongs to another user, who could listen in.
    #[error(
        "the runtime directory {path:?} belongs to user {owner}, but this process runs as user {us}; programs that are to \
         meet must run as the same user, and name a directory of that user's in TOKIO_SHM_DIR, or let each other's users in \
         (`allow_uid`, `allow_gid`); if one run under `sudo` has left it, remove it as user {owner}"
    )]
    Owner {
        /// Its path.
        path: PathBuf,
        /// The user it belongs to.
        owner: u32,
        /// The user of this process.
        us: u32,
    },
    /// Its owner has no number in this process's user namespace, in which all such users look alike.
    #[error(
        "the runtime directory {path:?} shows as user {shown}'s, which in this user namespace is anyone without a number in it \
         (this process runs as user {us}); give the user that owns it a number (`unshare --map-current-user`, podman's \
         `--userns=keep-id`), run as another user than {shown}, or name a directory of this user's in TOKIO_SHM_DIR"
    )]
    Unmapped {
        /// Its path.
        path: PathBuf,
        /// The number that the kernel shows in place of its owner's.
        shown: u32,
        /// The user of this process.
        us: u32,
    },
    /// `/proc` is not mounted, or is that of a pid namespace in which this process has no number.
    #[error(
        "/proc/self/fd is not to be had, which sockets are named by; mount it (`mount -t proc proc /proc`)"
    )]
    NoProc {
        /// The error of the OS.
        source: io::Error,
    },
    /// Others may enter it.
    #[error(
        "the runtime directory {path:?} has mode {mode:04o}, which lets other users in; run `chmod 700` on it (or `chgrp` \
         and `chmod 770`, for a group that was let in by `allow_gid`)"
    )]
    Mode {
        /// Its path.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    #[test]
    fn directory_is_chosen_in_order_and_empty_counts_as_unset() {
        let all = |name: &str| Some(OsString::from(format!("/{name}")));
        let temp = Path::new("/t");
        let choose = |explicit, env: &dyn Fn(&str) -> Option<OsString>, temp| choose(explicit, env, temp).0;
        assert_eq!(choose(Some(Path::new("/e")), &all, temp), Path::new("/e"));
        assert_eq!(choose(None, &all, temp), Path::new("/TOKIO_SHM_DIR"));
        let empty_first =
            |name: &str| (name != "TOKIO_SHM_DIR").then(|| "/run/user/7".into()).or(Some("".into()));
        assert_eq!(choose(None, &empty_first, temp), Path::new("/run/user/7/tokio-shm"));
        let last = PathBuf::from(format!("/t/tokio-shm-{}", geteuid().as_raw()));
        assert_eq!(choose(None, &|_| Some("".into()), temp), last);
        assert_eq!(choose(None, &|_| None, temp), last);
        let relative = |name: &str| (name == XDG).then(|| "run".into());
        assert_eq!(choose(None, &relative, temp), last);
    }

    #[test]
    fn directory_missing_is_made_for_the_owner_alone() {
        let base = tempfile::tempdir().unwrap();
        let path = base.path().join("r");
        let runtime = RuntimeDir::resolve(Some(&path), Access::default()).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o700);
        // Removed behind our back, it is made anew.
        std::fs::remove_dir(&path).unwrap();
        runtime.open().unwrap();
        assert!(matches!(
            RuntimeDir::resolve(Some(&base.path().join("no/such")), Access::default()),
            Err(RuntimeDirError::Create { .. })
        ));
    }

    #[test]
    fn directory_that_others_can_enter_is_refused() {
        let base = tempfile::tempdir().unwrap();
        for mode in [0o701, 0o710, 0o777, 0o1770] {
            std::fs::set_permissions(base.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let error = RuntimeDir::resolve(Some(base.path()), Access::default()).unwrap_err();
            assert!(matches!(error, RuntimeDirError::Mode { mode: found, .. } if found == mode));
            assert!(
                error.to_string().contains(&format!("{mode:04o}")) && error.to_string().contains("chmod 700")
            );
        }
    }

    #[test]
    fn directory_of_another_user_is_refused() {
        let us = geteuid().as_raw();
        let error = judge(Access::default(), us + 7, 0o700).unwrap_err().to_string();
        let said = [r#""/r""#.to_owned(), format!("user {}", us + 7), format!("user {us}")];
        assert!(said.iter().all(|said| error.contains(said)), "{error}");
    }

    /// What is thought of "/r", of group 77.
    fn judge(access: Access, owner: u32, mode: u32) -> Result<(), RuntimeDirError> {
        let mut stat = statat(CWD, "/", AtFlags::empty()).unwrap();
        (stat.st_uid, stat.st_gid, stat.st_mode) = (owner, 77, FileType::Directory.as_raw_mode() | mode);
        RuntimeDir { path: Path::new("/r").into(), access: Arc::new(access) }.check(&stat)
    }

    #[test]
    fn directory_of_users_and_groups_that_are_let_in_is_accepted_but_never_one_for_all() {
        let us = geteuid().as_raw();
        let (mut users, mut group) = (Access::default(), Access::default());
        users.allow_uid(us + 7);
        assert!(judge(users.clone(), us + 7, 0o700).is_ok());
        assert!(judge(users.clone(), us + 8, 0o700).is_err());
        assert!(judge(users, us + 7, 0o770).is_err(), "its group was not let in");
        group.allow_gid(77);
        for mode in [0o700, 0o770, 0o2770, 0o3770] {
            assert!(judge(group.clone(), us, mode).is_ok());
        }
        assert!(judge(group.clone(), 0, 0o770).is_ok(), "prepared by root");
        assert!(judge(group.clone(), us + 7, 0o770).is_err());
        for mode in [0o701, 0o704, 0o777, 0o772, 0o750] {
            assert!(judge(group.clone(), us, mode).is_err());
        }
    }

    #[test]
    fn directory_behind_a_link_and_a_file_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let link = base.path().join("link");
        symlink(base.path(), &link).unwrap();
        assert!(matches!(
            RuntimeDir::resolve(Some(&link), Access::default()),
            Err(RuntimeDirError::NotADirectory { .. })
        ));
        let file = base.path().join("file");
        std::fs::write(&file, b"").unwrap();
        assert!(matches!(
            RuntimeDir::resolve(Some(&file), Access::default()),
            Err(RuntimeDirError::NotADirectory { .. })
        ));
        let dangling = base.path().join("dangling");
        symlink("/no/such", &dangling).unwrap();
        assert!(matches!(
            RuntimeDir::resolve(Some(&dangling), Access::default()),
            Err(RuntimeDirError::NotADirectory { .. })
        ));
    }

    /// The umask belongs to the process.
    #[test]
    fn directory_made_under_any_umask_is_the_owners_alone() {
        crate::sys::testing::run_alone("topic::runtime_dir::tests::child_umask");
    }

    #[test]
    #[ignore = "the child half of directory_made_under_any_umask_is_the_owners_alone"]
    fn child_umask() {
        if !crate::sys::testing::is_alone() {
            return;
        }
        let base = tempfile::tempdir().unwrap();
        // What root may do regardless would hide a mode that is too narrow. Our own files stay ours.
        crate::sys::testing::drop_capabilities();
        for mask in [0o000, 0o022, 0o177, 0o777] {
            rustix::process::umask(Mode::from_raw_mode(mask));
            let path = base.path().join(format!("{mask:o}"));
            RuntimeDir::resolve(Some(&path), Access::default()).unwrap();
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o700);
        }
    }
}

use super::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use std::path::Path;

const NOTHING: Changes = Changes { changed: false, gone: false };
const CHANGED: Changes = Changes { changed: true, gone: false };
const GONE_TOO: Changes = Changes { changed: true, gone: true };

fn open_dir(path: &Path) -> OwnedFd {
    open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn watch_on(dirs: &[&Path]) -> DirectoryWatch {
    let fds: Vec<_> = dirs.iter().map(|path| open_dir(path)).collect();
    let watch = DirectoryWatch::new().unwrap();
    watch.watch(&fds.iter().map(|fd| Target::Directory(fd.as_fd())).collect::<Vec<_>>()).unwrap();
    watch
}

fn is_readable(watch: &DirectoryWatch) -> bool {
    poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

/// Takes until there is nothing more to hear: tests beside this one ring the bell too.
fn settle(watch: &DirectoryWatch) -> Changes {
    let mut all = watch.take().unwrap();
    while is_readable(watch) {
        let more = watch.take().unwrap();
        all = Changes { changed: all.changed | more.changed, gone: all.gone | more.gone };
    }
    all
}

fn move_in(dir: &Path, name: &str) {
    let new = dir.join(format!(".new-{name}"));
    std::fs::write(&new, b"").unwrap();
    std::fs::rename(&new, dir.join(name)).unwrap();
}

#[test]
fn watch_sees_what_is_moved_in_and_what_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let watch = watch_on(&[dir.path()]);
    assert_eq!(settle(&watch), NOTHING);
    move_in(dir.path(), "a");
    assert!(is_readable(&watch));
    assert_eq!(settle(&watch), CHANGED);
    assert_eq!(settle(&watch), NOTHING);
    std::fs::remove_file(dir.path().join("a")).unwrap();
    assert_eq!(settle(&watch), CHANGED);
    std::fs::write(dir.path().join("created, not moved"), b"").unwrap();
    assert_eq!(settle(&watch), NOTHING);
}

#[test]
fn watches_on_one_directory_each_see_a_change_whoever_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (watch_on(&[dir.path()]), watch_on(&[dir.path()]));
    for name in ["a", "b", "c"] {
        move_in(dir.path(), name);
        assert_eq!(settle(&first), CHANGED);
        // The event has been read, but not this one's wake-up.
        assert!(is_readable(&second));
        assert_eq!(settle(&second), CHANGED);
    }
    drop(first);
    move_in(dir.path(), "d");
    assert_eq!(settle(&second), CHANGED, "the other's leaving must not end the watch");
}

#[test]
fn watches_on_two_directories_see_each_its_own() {
    let (left, right) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, second) = (watch_on(&[left.path()]), watch_on(&[right.path()]));
    move_in(right.path(), "a");
    assert_eq!(settle(&first), NOTHING);
    assert!(is_readable(&second));
    assert_eq!(settle(&second), CHANGED);
}

#[test]
fn watch_on_several_directories_sees_all_and_after_an_exchange_only_the_new() {
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [a, b, c] = [0, 1, 2].map(|i| dirs[i].path());
    let watch = watch_on(&[a, b]);
    move_in(b, "x");
    assert_eq!(settle(&watch), CHANGED);
    let (fd_b, fd_c) = (open_dir(b), open_dir(c));
    watch.watch(&[Target::Directory(fd_b.as_fd()), Target::Directory(fd_c.as_fd())]).unwrap();
    move_in(a, "x");
    assert_eq!(settle(&watch), NOTHING);
    move_in(c, "x");
    assert_eq!(settle(&watch), CHANGED);
    move_in(b, "y");
    assert_eq!(settle(&watch), CHANGED);
}

#[test]
fn exchange_that_fails_leaves_the_watch_as_it_was() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let watch = watch_on(&[dir.path()]);
    let (good, file) = (open_dir(other.path()), std::fs::File::open("/dev/null").unwrap());
    assert!(matches!(
        watch.watch(&[Target::Directory(good.as_fd()), Target::Directory(file.as_fd())]),
        Err(WatchError::Os { .. })
    ));
    move_in(other.path(), "a");
    assert_eq!(settle(&watch), NOTHING);
    move_in(dir.path(), "a");
    assert_eq!(settle(&watch), CHANGED);
}

#[test]
fn directory_removed_or_moved_is_gone() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("d");
    for _ in 0..3 {
        std::fs::create_dir(&path).unwrap();
        let (first, second) = (watch_on(&[&path]), watch_on(&[&path]));
        std::fs::remove_dir(&path).unwrap();
        assert_eq!((settle(&first), settle(&second)), (GONE_TOO, GONE_TOO));
    }
    std::fs::create_dir(&path).unwrap();
    let watch = watch_on(&[&path]);
    std::fs::rename(&path, base.path().join("e")).unwrap();
    assert_eq!(settle(&watch), GONE_TOO);
}

#[test]
fn directory_removed_while_somebody_has_it_open_is_seen_by_its_parents_watch() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("d");
    std::fs::create_dir(&path).unwrap();
    let watch = watch_on(&[&path, base.path()]);
    let _open = open_dir(&path);
    std::fs::remove_dir(&path).unwrap();
    assert!(settle(&watch).changed);
}

#[test]
fn directory_awaited_is_heard_of_when_it_is_made_or_moved_in_and_files_are_not() {
    let base = tempfile::tempdir().unwrap();
    let (watch, fd) = (DirectoryWatch::new().unwrap(), open_dir(base.path()));
    watch.watch(&[Target::Awaited(fd.as_fd())]).unwrap();
    std::fs::write(base.path().join("file"), b"").unwrap();
    std::fs::create_dir(base.path().join(".new-d")).unwrap();
    assert_eq!(settle(&watch), NOTHING);
    std::fs::rename(base.path().join(".new-d"), base.path().join("d")).unwrap();
    assert_eq!(settle(&watch), CHANGED);
    std::fs::create_dir(base.path().join("e")).unwrap();
    assert_eq!(settle(&watch), CHANGED);
}

#[test]
fn file_that_is_open_and_removed_or_moved_is_heard_of_and_its_neighbours_are_not() {
    let base = tempfile::tempdir().unwrap();
    let (watch, fd) = (DirectoryWatch::new().unwrap(), open_dir(base.path()));
    let path = base.path().join("f");
    let open = std::fs::File::create(&path).unwrap();
    watch.watch(&[Target::File(fd.as_fd(), "f"), Target::Place(fd.as_fd())]).unwrap();
    move_in(base.path(), "g");
    std::fs::remove_file(base.path().join("g")).unwrap();
    assert_eq!(settle(&watch), NOTHING);
    std::fs::remove_file(&path).unwrap();
    assert!(settle(&watch).changed);
    drop(open);
    assert_eq!(settle(&watch), GONE_TOO);
    std::fs::write(&path, b"").unwrap();
    watch.watch(&[Target::File(fd.as_fd(), "f")]).unwrap();
    std::fs::rename(&path, base.path().join("g")).unwrap();
    assert_eq!(settle(&watch), GONE_TOO);
    assert!(watch.watch(&[Target::File(fd.as_fd(), "f")]).is_err(), "there is none");
}

#[test]
fn queue_overflow_tells_everybody_everything_may_have_changed() {
    let mut watches = Watches::default();
    let (first, second) = (watches.join(), watches.join());
    assert!(watches.note(-1, ReadFlags::QUEUE_OVERFLOW, first));
    assert_eq!(watches.users[&first], GONE_TOO);
    assert_eq!(watches.users[&second], GONE_TOO);
}

#[test]
fn events_of_a_watch_given_up_concern_nobody() {
    let mut watches = Watches::default();
    let user = watches.join();
    watches.add(7, user);
    assert!(watches.remove(7, user));
    assert!(!watches.note(7, ReadFlags::MOVED_TO, 0));
    assert!(!watches.note(7, ReadFlags::IGNORED, 0));
    assert_eq!(watches.users[&user], NOTHING);
    // The number given out anew before IGNORED of the old one was read: told to watch again.
    watches.add(7, user);
    assert!(watches.note(7, ReadFlags::IGNORED, 0));
    assert_eq!(watches.users[&user], GONE_TOO);
    assert!(watches.by_descriptor.is_empty());
}

/// Every change must reach every watch, though the readers take events from each other. Each thread waits by `poll` alone.
#[test]
fn watches_of_many_threads_never_miss_a_wake_up() {
    let dir = tempfile::tempdir().unwrap();
    let rounds = 300;
    let threads = 4;
    let round_done = std::sync::Barrier::new(threads + 1);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let watch = watch_on(&[dir.path()]);
            let (round_done, dir) = (&round_done, dir.path());
            scope.spawn(move || {
                for round in 0..rounds {
                    while !dir.join(format!("f{round}")).exists() {
                        let limit = Timespec { tv_sec: 20, tv_nsec: 0 };
                        let woken = poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&limit)).unwrap();
                        // To stop waiting before everybody is through would hang the others.
                        if woken == 0 {
                            crate::sys::testing::abort(&format!("no wake-up in round {round}"));
                        }
                        watch.take().unwrap();
                    }
                    round_done.wait();
                }
            });
        }
        for round in 0..rounds {
            move_in(dir.path(), &format!("f{round}"));
            round_done.wait();
        }
    });
}

#[test]
fn event_is_not_lost_while_another_begins_to_watch_the_same_directory() {
    crate::sys::testing::run_alone("sys::inotify::tests::child_watches_again_and_again");
}

/// Alone, because whoever looks while it reads others' events may find nothing for an instant.
#[test]
#[ignore = "the child half of event_is_not_lost_while_another_begins_to_watch_the_same_directory"]
fn child_watches_again_and_again() {
    if !crate::sys::testing::is_alone() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (watch, other, fd) = (watch_on(&[dir.path()]), DirectoryWatch::new().unwrap(), open_dir(dir.path()));
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                other.watch(&[Target::Directory(fd.as_fd())]).unwrap();
            }
        });
        let inner = dir.path().join("t");
        let missed = (0..10_000).find(|_| {
            std::fs::create_dir(&inner).unwrap();
            std::fs::remove_dir(&inner).unwrap();
            // It is in the queue, or has been read by the other: no need to wait.
            !watch.take().unwrap().changed
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert_eq!(missed, None, "the news of so many removals came");
    });
}

/// Descriptors and limits belong to the process.
#[test]
fn limit_inotify_instance_is_one_and_is_kept() {
    crate::sys::testing::run_alone("sys::inotify::tests::child_one_instance");
}

#[test]
#[ignore = "the child half of limit_inotify_instance_is_one_and_is_kept"]
fn child_one_instance() {
    if !crate::sys::testing::is_alone() {
        return;
    }
    use crate::sys::testing::{open_descriptors, set_limit};
    let instances = || {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let targets = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        targets.filter(|target| target.as_os_str() == "anon_inode:inotify").count()
    };
    let dir = tempfile::tempdir().unwrap();
    let before = open_descriptors();
    // Neither the bell's descriptor nor the instance's can be had.
    for room in 0..2 {
        let lowest = open_dir(dir.path());
        let limit = lowest.as_raw_fd() as u64 + room;
        drop(lowest);
        set_limit(rustix::process::Resource::Nofile, limit);
        let failed = DirectoryWatch::new().map(drop);
        set_limit(rustix::process::Resource::Nofile, 1024);
        assert!(matches!(failed, Err(WatchError::Descriptors { .. })), "{failed:?}");
        assert_eq!(open_descriptors(), before);
    }
    // All instances of the user taken: bounded by the limit, and only tried where that is small.
    let mut taken = Vec::new();
    while taken.len() < 900 {
        match inotify::init(CreateFlags::CLOEXEC) {
            Ok(fd) => taken.push(fd),
            Err(_) => {
                // Others of this user may give one back just then.
                if let Err(failed) = DirectoryWatch::new() {
                    assert!(
                        matches!(failed, WatchError::Instances { limit, .. } if limit.get().is_some()),
                        "{failed:?}"
                    );
                    assert!(failed.to_string().contains("fs.inotify.max_user_instances"));
                }
                break;
            }
        }
    }
    drop(taken);
    for _ in 0..3 {
        let watches: Vec<_> = (0..10).map(|_| watch_on(&[dir.path()])).collect();
        assert_eq!((instances(), open_descriptors()), (1, before + 2 + watches.len()));
        drop(watches);
        assert_eq!((instances(), open_descriptors()), (1, before + 2));
    }
}

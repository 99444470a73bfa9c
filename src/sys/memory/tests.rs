use super::*;
use rustix::mm::mprotect;
use std::io;

const PAGE: usize = 4096;

const PLAIN: CreateOptions =
    CreateOptions { backing: Backing::Memfd, populate: true, lock: false, huge_pages: false };

fn write(mapping: &Mapping, offset: usize, value: u8) {
    assert!(offset < mapping.len());
    // SAFETY: below the mapping's length, which its maker mapped for writing.
    let at = unsafe { mapping.as_ptr().add(offset) };
    // SAFETY: as above; no other thread of this test writes there.
    unsafe { at.write_volatile(value) };
}

fn read(mapping: &Mapping, offset: usize) -> u8 {
    assert!(offset < mapping.len());
    // SAFETY: below the mapping's length.
    let at = unsafe { mapping.as_ptr().add(offset) };
    // SAFETY: as above.
    unsafe { at.read_volatile() }
}

fn os_error(result: Result<Mapping, Errno>) -> Errno {
    result.expect_err("mapping must be refused")
}

#[test]
fn segment_written_by_its_maker_is_read_by_the_other_side() {
    for backing in [Backing::Memfd, Backing::PosixShm] {
        for populate in [true, false] {
            for huge_pages in [true, false] {
                let options = CreateOptions { backing, populate, huge_pages, lock: false };
                let (fd, ours) = create(3 * PAGE + 5, &options).unwrap();
                let theirs = map_read_only(fd.as_fd(), 3 * PAGE + 5, backing).unwrap().mapping;
                drop(fd);
                assert_eq!(read(&theirs, 3 * PAGE + 4), 0);
                write(&ours, 3 * PAGE + 4, 7);
                assert_eq!(read(&theirs, 3 * PAGE + 4), 7);
                drop(ours);
                assert_eq!(read(&theirs, 3 * PAGE + 4), 7);
            }
        }
    }
}

#[test]
fn segment_sealed_cannot_be_changed_by_whoever_has_its_descriptor() {
    let (fd, ours) = create(4 * PAGE, &PLAIN).unwrap();
    write(&ours, PAGE, 1);
    let writable = ProtFlags::READ | ProtFlags::WRITE;
    assert_eq!(os_error(Mapping::new(fd.as_fd(), PAGE, writable, MapFlags::empty())), Errno::PERM);
    assert_eq!(rustix::io::write(&fd, b"x"), Err(Errno::PERM));
    assert_eq!(ftruncate(&fd, 0), Err(Errno::PERM));
    assert_eq!(ftruncate(&fd, 1 << 20), Err(Errno::PERM));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    assert_eq!(fallocate(&fd, punch, 0, PAGE as u64), Err(Errno::PERM));
    assert_eq!(fcntl_add_seals(&fd, SealFlags::WRITE), Err(Errno::PERM));

    let theirs = map_read_only(fd.as_fd(), 4 * PAGE, Backing::Memfd).unwrap().mapping;
    let at = theirs.as_ptr().as_ptr().cast::<c_void>();
    // SAFETY: the range is the mapping's; the call is expected to be refused.
    let made_writable = unsafe { mprotect(at, PAGE, rustix::mm::MprotectFlags::WRITE) };
    assert_eq!(made_writable, Err(Errno::ACCESS));
    assert_eq!(theirs.advise(Advice::LinuxDontNeed), Ok(()));
    assert_eq!(read(&theirs, PAGE), 1);

    // A descriptor opened anew is no way around it.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let anew = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    assert_eq!(os_error(Mapping::new(anew.as_fd(), PAGE, writable, MapFlags::empty())), Errno::PERM);
    // And the maker writes on.
    write(&ours, PAGE, 2);
    assert_eq!(read(&theirs, PAGE), 2);
}

#[test]
fn segment_of_posix_memory_is_given_away_for_reading_only() {
    let options = CreateOptions { backing: Backing::PosixShm, ..PLAIN };
    let (fd, _ours) = create(PAGE, &options).unwrap();
    let writable = ProtFlags::READ | ProtFlags::WRITE;
    assert_eq!(os_error(Mapping::new(fd.as_fd(), PAGE, writable, MapFlags::empty())), Errno::ACCESS);
    assert!(ftruncate(&fd, 0).is_err());
    assert_eq!(fstat(&fd).unwrap().st_nlink, 0);
}

#[test]
fn memfd_without_every_seal_is_refused_with_the_names_of_those_missing() {
    let fd = new_memfd(c"test").unwrap();
    ftruncate(&fd, PAGE as u64).unwrap();
    let refusal = |fd: &OwnedFd| match map_read_only(fd.as_fd(), PAGE, Backing::Memfd).unwrap_err() {
        MemoryError::MissingSeals { missing } => missing,
        other => panic!("{other:?}"),
    };
    assert_eq!(refusal(&fd), "SEAL, SHRINK, GROW, FUTURE_WRITE");
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
    assert_eq!(refusal(&fd), "SEAL, FUTURE_WRITE");
    map_link_page(fd.as_fd(), PAGE).unwrap();
    fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE).unwrap();
    assert_eq!(refusal(&fd), "SEAL");
    fcntl_add_seals(&fd, SealFlags::SEAL).unwrap();
    map_read_only(fd.as_fd(), PAGE, Backing::Memfd).unwrap();
}

#[test]
fn memfd_of_another_size_is_refused() {
    let (fd, _mapping) = create(2 * PAGE, &PLAIN).unwrap();
    for announced in [2 * PAGE + 1, 3 * PAGE, PAGE, 2 * PAGE - 1] {
        let error = map_read_only(fd.as_fd(), announced, Backing::Memfd).unwrap_err();
        assert!(
            matches!(error, MemoryError::WrongSize { expected, found: 8192 } if expected == announced as u64),
            "{error:?}"
        );
    }
    let (page, _mapping) = create_link_page(PAGE).unwrap();
    assert!(matches!(map_link_page(page.as_fd(), 2 * PAGE), Err(MemoryError::WrongSize { .. })));
    let (posix, _mapping) = create(PAGE, &CreateOptions { backing: Backing::PosixShm, ..PLAIN }).unwrap();
    assert!(matches!(
        map_read_only(posix.as_fd(), PAGE + 1, Backing::PosixShm),
        Err(MemoryError::WrongSize { expected: 4097, found: 4096 })
    ));
}

#[test]
fn descriptor_of_something_else_is_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let path_only = rustix::fs::open(
        "/",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    );
    for fd in [null.into(), event, path_only.unwrap()] {
        let memfd = map_read_only(fd.as_fd(), PAGE, Backing::Memfd);
        assert!(matches!(memfd, Err(MemoryError::NotSharedMemory)), "{memfd:?}");
        let posix = map_read_only(fd.as_fd(), PAGE, Backing::PosixShm);
        assert!(matches!(posix, Err(MemoryError::NotSharedMemory)), "{posix:?}");
        assert!(matches!(map_link_page(fd.as_fd(), PAGE), Err(MemoryError::NotSharedMemory)));
    }
}

#[test]
fn link_page_is_written_by_both_sides_and_resized_by_neither() {
    let (fd, ours) = create_link_page(2 * PAGE).unwrap();
    let theirs = map_link_page(fd.as_fd(), 2 * PAGE).unwrap();
    write(&ours, 0, 1);
    write(&theirs, PAGE, 2);
    assert_eq!((read(&theirs, 0), read(&ours, PAGE)), (1, 2));
    assert_eq!(ftruncate(&fd, 0), Err(Errno::PERM));
    assert_eq!(ftruncate(&fd, 1 << 20), Err(Errno::PERM));
    assert_eq!(fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE), Err(Errno::PERM));
}

#[test]
fn length_that_cannot_be_is_refused() {
    let (fd, _mapping) = create(PAGE, &PLAIN).unwrap();
    for len in [0, usize::MAX, isize::MAX as usize + 1] {
        assert!(matches!(create(len, &PLAIN), Err(MemoryError::InvalidLength { .. })));
        assert!(matches!(create_link_page(len), Err(MemoryError::InvalidLength { .. })));
        assert!(matches!(
            map_read_only(fd.as_fd(), len, Backing::Memfd),
            Err(MemoryError::InvalidLength { .. })
        ));
    }
    // More than there is: an error, not a SIGBUS, and not a filled machine either.
    let options = CreateOptions { populate: false, ..PLAIN };
    let error = create(isize::MAX as usize, &options).unwrap_err();
    assert!(!matches!(error, MemoryError::Os { .. } | MemoryError::Descriptors { .. }), "{error:?}");
}

#[test]
fn error_messages_say_what_to_do() {
    let text = |error: MemoryError| {
        use std::error::Error;
        assert!(error.source().is_some());
        error.to_string()
    };
    let lock = text(describe_lock_failure(1 << 30, Errno::NOMEM));
    for part in ["1073741824", "RLIMIT_MEMLOCK", "ulimit -l", "LimitMEMLOCK=", "lock_memory"] {
        assert!(lock.contains(part), "{lock}");
    }
    let full = text(describe_shortage(Backing::PosixShm, 77, Errno::NOSPC));
    for part in ["77 bytes", "/dev/shm", "memfd"] {
        assert!(full.contains(part), "{full}");
    }
    let files = text(open_failure_for_test());
    assert!(files.contains("RLIMIT_NOFILE") && files.contains("ulimit -n"), "{files}");
    let host = error::open_failure("x", Errno::NFILE);
    assert!(host.is_shortage());
    let host = text(host);
    assert!(host.contains("on this host") && host.contains("fs.file-max"), "{host}");
    let none = text(describe_shortage(Backing::Memfd, 5, Errno::NOSPC));
    assert!(none.contains("5 bytes") && none.contains("max_bytes"), "{none}");
    let addresses = text(MemoryError::mapping(6)(Errno::NOMEM));
    for part in ["6 bytes", "RLIMIT_AS", "ulimit -v", "LimitAS=", "vm.max_map_count"] {
        assert!(addresses.contains(part), "{addresses}");
    }
}

fn open_failure_for_test() -> MemoryError {
    error::open_failure("x", Errno::MFILE)
}

#[test]
fn allocation_that_is_interrupted_goes_on_in_smaller_pieces_and_ends_with_an_error_at_last() {
    let len = 300 << 20;
    // Signals so frequent that no more than a MiB is done between two.
    let (mut done, mut calls) = (0, 0);
    let outcome = in_pieces(len, |at, bytes| {
        assert_eq!(at, done, "what was done is not done again");
        calls += 1;
        if bytes > 1 << 20 {
            return Err(Errno::INTR);
        }
        done += bytes;
        Ok(())
    });
    assert_eq!((outcome, done), (Ok(()), len as u64));
    assert!(calls < 2_000, "{calls}");
    // And so frequent that nothing is.
    let mut calls = 0;
    let outcome = in_pieces(len, |at, _| {
        calls += 1;
        assert_eq!(at, 0);
        Err(Errno::INTR)
    });
    assert_eq!((outcome, calls), (Err(Errno::INTR), INTERRUPTIONS_MAX + 1));
    let mut calls = 0;
    let outcome = in_pieces(len, |_, _| {
        calls += 1;
        Err(Errno::NOSPC)
    });
    assert_eq!((outcome, calls), (Err(Errno::NOSPC), 1));
}

#[test]
fn segment_locked_within_the_limit_is_made() {
    match create(PAGE, &CreateOptions { lock: true, ..PLAIN }) {
        Ok(_) | Err(MemoryError::Lock { .. }) => {}
        Err(other) => panic!("{other:?}"),
    }
}

/// Everything that fails must leave nothing behind. Descriptors and limits belong to the process, so this needs one of its
/// own: the child half below, run alone.
#[test]
fn limit_failures_leave_no_descriptor_no_mapping_and_no_name() {
    crate::sys::testing::run_alone("sys::memory::tests::child_failures_leave_nothing_behind");
}

#[test]
#[ignore = "the child half of limit_failures_leave_no_descriptor_no_mapping_and_no_name"]
fn child_failures_leave_nothing_behind() {
    if !crate::sys::testing::is_alone() {
        return;
    }
    use crate::sys::testing::{open_descriptors, set_limit};
    use rustix::process::Resource;
    use std::collections::HashSet;

    let mapped = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .filter(|line| line.contains("/memfd:tokio-shm") || line.contains("/dev/shm/tokio-shm"))
            .count()
    };
    // Other tests make and unlink names all the time; what has been forgotten is what stays.
    let forgotten_names = || {
        let names = || {
            let entries = std::fs::read_dir("/dev/shm").unwrap().map(|entry| entry.unwrap().file_name());
            entries.filter(|name| name.to_string_lossy().starts_with("tokio-shm-")).collect::<HashSet<_>>()
        };
        (0..1_000).fold(names(), |staying, _| staying.intersection(&names()).cloned().collect()).len()
    };
    crate::sys::testing::drop_capabilities();
    set_limit(Resource::Memlock, 2 * PAGE as u64);
    let (descriptors, names) = (open_descriptors(), forgotten_names());
    for backing in [Backing::Memfd, Backing::PosixShm] {
        for huge_pages in [true, false] {
            let options = CreateOptions { backing, lock: true, huge_pages, populate: true };
            match create(16 * PAGE, &options).unwrap_err() {
                MemoryError::Lock { len, limit, source } => {
                    assert_eq!((len, limit.get()), (16 * PAGE, Some(2 * PAGE as u64)));
                    assert_eq!(source.kind(), io::ErrorKind::OutOfMemory);
                }
                other => panic!("{other:?}"),
            }
            drop(create(PAGE, &options).unwrap());
        }
        let failed = create(1 << 50, &CreateOptions { backing, ..PLAIN }).unwrap_err();
        assert!(!matches!(failed, MemoryError::Os { .. }), "{failed:?}");
    }
    assert_eq!((open_descriptors(), mapped(), forgotten_names()), (descriptors, 0, names));

    // Limits count the highest number, so the next lowest free one is the one to forbid.
    for spare in [0, 1] {
        let lowest = std::fs::File::open("/dev/null").unwrap();
        let limit = std::os::fd::AsRawFd::as_raw_fd(&lowest) as u64 + spare;
        drop(lowest);
        set_limit(Resource::Nofile, limit);
        let memfd = create(PAGE, &PLAIN).map(drop);
        let posix = create(PAGE, &CreateOptions { backing: Backing::PosixShm, ..PLAIN }).map(drop);
        set_limit(Resource::Nofile, 1024);
        assert!(spare == 1 || matches!(memfd, Err(MemoryError::Descriptors { .. })), "{memfd:?}");
        match posix {
            Err(MemoryError::Descriptors { limit: named, .. }) => {
                assert!(spare <= 1 && named.get().is_some())
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((open_descriptors(), mapped(), forgotten_names()), (descriptors, 0, names));
}

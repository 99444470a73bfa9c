//! What control groups leave this process of memory: every limit from its own group up to the root, of v2 and of v1.
//!
//! Reads files only, none of which need be there: a group that cannot be read limits nothing.

use std::borrow::Cow;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

/// The limit that leaves least.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tightest {
    /// What may still be allocated, in bytes.
    pub(crate) free: u64,
    /// The limit, in bytes.
    pub(crate) limit: u64,
    /// The file that sets it.
    pub(crate) file: PathBuf,
}

/// At most so much of a limit is left to the rest of the process: its heap, its page tables, what others allocate meanwhile.
const RESERVE_MAX: u64 = 64 << 20;

/// From here on a limit of v1 is none: it has no word for that.
const UNLIMITED: u64 = 1 << 62;

/// How the files of one version are called.
struct Names {
    /// Limits that memory is reclaimed for, or processes are killed for.
    limits: &'static [&'static str],
    usage: &'static str,
    /// Of `memory.stat`: file pages that can be had back, and those of them that have to be written first.
    clean: [&'static str; 2],
    dirty: [&'static str; 2],
}

const V2: Names = Names {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    clean: ["inactive_file", "active_file"],
    dirty: ["file_dirty", "file_writeback"],
};

const V1: Names = Names {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    clean: ["total_inactive_file", "total_active_file"],
    dirty: ["total_dirty", "total_writeback"],
};

/// The tightest limit on this process, if there is any; `swap_free` is what the host has of swap.
pub(crate) fn tightest(swap_free: u64) -> Option<Tightest> {
    tightest_of(Path::new("/proc/self"), swap_free)
}

/// The same for the process whose `cgroup` and `mountinfo` lie in `process`.
fn tightest_of(process: &Path, swap_free: u64) -> Option<Tightest> {
    let groups = std::fs::read_to_string(process.join("cgroup")).ok()?;
    let mounts = std::fs::read(process.join("mountinfo")).ok()?;
    let mut tightest = None;
    for mount in mounts.split(|byte| *byte == b'\n').filter_map(Mount::parse) {
        let Some(group) = mount.group(&groups) else { continue };
        for (level, dir) in mount.levels(group).enumerate() {
            // Before Linux 5.11 a group of v1 could leave its children's memory uncounted.
            if level > 0 && !mount.unified && number(&dir, "memory.use_hierarchy") == Some(0) {
                break;
            }
            let found = if mount.unified { look_v2(&dir, swap_free) } else { look_v1(&dir, swap_free) };
            tightest = tightest.into_iter().chain(found).min_by_key(|limit| limit.free);
        }
    }
    tightest
}

/// A hierarchy of groups that counts memory, or may.
struct Mount {
    /// The group that is seen at `point`.
    root: PathBuf,
    point: PathBuf,
    unified: bool,
}

impl Mount {
    /// A line of `mountinfo`: `36 35 98:0 /root /point rw,noatime master:1 - cgroup source rw,memory`.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let (root, point) = (fields.nth(3)?, fields.next()?);
        let mut file_system = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, options) = (file_system.next()?, file_system.nth(1)?);
        let unified = match kind {
            b"cgroup2" => true,
            b"cgroup" if options.split(|byte| *byte == b',').any(|option| option == b"memory") => false,
            _ => return None,
        };
        Some(Self { root: path(root), point: path(point), unified })
    }

    /// The process's group in this hierarchy, from the lines of `/proc/self/cgroup`: `4:cpu,memory:/group`, or `0::/group`.
    fn group<'a>(&self, groups: &'a str) -> Option<&'a Path> {
        let mut lines = groups.lines().filter_map(|line| {
            let (_, rest) = line.split_once(':')?;
            rest.split_once(':')
        });
        let ours = |controllers: &str| match self.unified {
            true => controllers.is_empty(),
            false => controllers.split(',').any(|controller| controller == "memory"),
        };
        lines.find(|(controllers, _)| ours(controllers)).map(|(_, group)| Path::new(group))
    }

    /// The directories of `group` and of those above it, as far as they can be seen.
    fn levels(&self, group: &Path) -> impl Iterator<Item = PathBuf> {
        // In a container the path may be the host's, or lead out of what is mounted: then what is mounted is the nearest.
        let below = group.strip_prefix(&self.root).unwrap_or(Path::new(""));
        let outside = below.components().any(|component| component == Component::ParentDir);
        let below = if outside { Path::new("") } else { below };
        let levels: Vec<_> = below.ancestors().map(|level| self.point.join(level)).collect();
        levels.into_iter()
    }
}

fn look_v2(dir: &Path, swap_free: u64) -> Option<Tightest> {
    // Where swap is not limited the files are there and say `max`, or are not there.
    let swap = match (number(dir, "memory.swap.max"), number(dir, "memory.swap.current")) {
        (Some(most), Some(used)) => swap_free.min(most.saturating_sub(used)),
        _ => swap_free,
    };
    look(dir, &V2, swap)
}

fn look_v1(dir: &Path, swap_free: u64) -> Option<Tightest> {
    let memory = look(dir, &V1, swap_free);
    // Memory and swap together.
    let names =
        Names { limits: &["memory.memsw.limit_in_bytes"], usage: "memory.memsw.usage_in_bytes", ..V1 };
    memory.into_iter().chain(look(dir, &names, 0)).min_by_key(|limit| limit.free)
}

fn look(dir: &Path, names: &Names, swap: u64) -> Option<Tightest> {
    let limits = names.limits.iter().filter_map(|name| Some((number(dir, name)?, *name)));
    let (limit, name) = limits.filter(|(limit, _)| *limit < UNLIMITED).min()?;
    let used = number(dir, names.usage)?;
    let stat = std::fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let sum = |names: [&str; 2]| {
        names.into_iter().filter_map(|name| field(&stat, name)).fold(0, u64::saturating_add)
    };
    let reclaimable = sum(names.clean).saturating_sub(sum(names.dirty));
    let free = limit
        .saturating_sub(used.saturating_sub(reclaimable))
        .saturating_add(swap)
        .saturating_sub((limit / 16).min(RESERVE_MAX));
    Some(Tightest { free, limit, file: dir.join(name) })
}

/// The number in a file. `None` for `max` as well.
fn number(dir: &Path, name: &str) -> Option<u64> {
    std::fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok()
}

/// A number of `memory.stat`.
fn field(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

/// A path of `mountinfo`, which has white space and backslashes in octal.
fn path(escaped: &[u8]) -> PathBuf {
    let mut bytes = Cow::Borrowed(escaped);
    while let Some(at) = bytes.windows(4).position(|code| octal(code).is_some()) {
        let byte = octal(&bytes[at..at + 4]).unwrap_or(b'\\');
        // A backslash decoded stays one, and what follows it cannot be taken for a code.
        if byte == b'\\' {
            let (head, tail) = (bytes[..=at].to_vec(), path(&bytes[at + 4..]));
            return PathBuf::from(OsString::from_vec([head, tail.into_os_string().into_vec()].concat()));
        }
        bytes.to_mut().splice(at..at + 4, [byte]);
    }
    PathBuf::from(OsString::from_vec(bytes.into_owned()))
}

/// The byte of `\040`, `\011`, `\012` or `\134`.
fn octal(code: &[u8]) -> Option<u8> {
    match code {
        b"\\040" => Some(b' '),
        b"\\011" => Some(b'\t'),
        b"\\012" => Some(b'\n'),
        b"\\134" => Some(b'\\'),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A `/proc/self` and the mounts that it tells of, made up.
    struct Made(tempfile::TempDir);

    impl Made {
        /// `mounts`: the root, the mount point below the temporary directory, the kind and the options of each.
        fn new(groups: &str, mounts: &[[&str; 4]]) -> Self {
            let made = Self(tempfile::tempdir().unwrap());
            std::fs::write(made.0.path().join("cgroup"), groups).unwrap();
            let lines = mounts.iter().map(|[root, point, kind, options]| {
                let point = made.0.path().join(point);
                std::fs::create_dir_all(path(point.as_os_str().as_encoded_bytes())).unwrap();
                format!(
                    "35 31 0:32 {root} {} rw,relatime master:1 shared:2 - {kind} none rw,{options}\n",
                    point.display()
                )
            });
            std::fs::write(made.0.path().join("mountinfo"), lines.collect::<String>()).unwrap();
            made
        }

        fn group(&self, dir: &str, files: &[(&str, &str)]) -> PathBuf {
            let dir = self.0.path().join(dir);
            std::fs::create_dir_all(&dir).unwrap();
            for (name, content) in files {
                std::fs::write(dir.join(name), content).unwrap();
            }
            dir
        }

        fn look(&self, swap_free: u64) -> Option<Tightest> {
            tightest_of(self.0.path(), swap_free)
        }
    }

    #[test]
    fn cgroup_without_files_or_limits_limits_nothing() {
        let made = Made::new("0::/a\n", &[["/", "sys", "cgroup2", "nsdelegate"]]);
        assert_eq!(made.look(0), None);
        made.group("sys/a", &[("memory.max", "max\n"), ("memory.high", "max\n"), ("memory.current", "5\n")]);
        assert_eq!(made.look(0), None);
        std::fs::remove_file(made.0.path().join("mountinfo")).unwrap();
        assert_eq!(made.look(0), None);
        let v1 = Made::new("4:memory:/a\n", &[["/", "sys", "cgroup", "memory"]]);
        v1.group(
            "sys/a",
            &[("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.usage_in_bytes", "5\n")],
        );
        assert_eq!(v1.look(0), None);
        // Whatever this machine has can be read.
        let _ = tightest(0);
    }

    #[test]
    fn cgroup_of_v2_is_looked_at_all_the_way_up() {
        let made =
            Made::new("1:cpu:/x\n0::/outer/inner\n", &[["/", "sys", "cgroup2", "memory_recursiveprot"]]);
        let limit = |bytes: u64| bytes.to_string();
        let outer = made.group(
            "sys/outer",
            &[
                ("memory.max", &limit(160 * MIB)),
                ("memory.high", "max"),
                ("memory.current", &limit(100 * MIB)),
                (
                    "memory.stat",
                    &format!(
                        "anon 7\ninactive_file {0}\nactive_file {0}\nfile_dirty {1}\n",
                        10 * MIB,
                        5 * MIB
                    ),
                ),
            ],
        );
        let found = made.look(0).unwrap();
        assert_eq!(found, Tightest { free: 65 * MIB, limit: 160 * MIB, file: outer.join("memory.max") });
        // The lower of the two, of the group that leaves least.
        let inner = made.group(
            "sys/outer/inner",
            &[
                ("memory.max", &limit(1600 * MIB)),
                ("memory.high", &limit(32 * MIB)),
                ("memory.current", &limit(10 * MIB)),
            ],
        );
        let found = made.look(0).unwrap();
        assert_eq!(found, Tightest { free: 20 * MIB, limit: 32 * MIB, file: inner.join("memory.high") });
        // Swap that the host has counts as far as the group may use it.
        assert_eq!(made.look(7 * MIB).unwrap().free, 27 * MIB);
        made.group(
            "sys/outer/inner",
            &[("memory.swap.max", &limit(4 * MIB)), ("memory.swap.current", &limit(MIB))],
        );
        assert_eq!(made.look(7 * MIB).unwrap().free, 23 * MIB);
        // Beyond its limit there is nothing, rather than much.
        made.group("sys/outer/inner", &[("memory.current", &limit(99 * MIB))]);
        assert_eq!(made.look(0).unwrap().free, 0);
    }

    #[test]
    fn cgroup_of_v1_is_looked_at_with_its_swap_and_up_to_where_memory_is_counted() {
        let made = Made::new(
            "9:name=systemd:/\n4:cpu,memory:/outer/inner\n0::/\n",
            &[
                ["/", "sys/unified", "cgroup2", "x"],
                ["/", "sys/cpu", "cgroup", "cpu"],
                ["/", "sys/memory\\040v1", "cgroup", "cpu,memory"],
            ],
        );
        let limit = |bytes: u64| bytes.to_string();
        let inner = made.group(
            "sys/memory v1/outer/inner",
            &[
                ("memory.limit_in_bytes", &limit(96 * MIB)),
                ("memory.usage_in_bytes", &limit(40 * MIB)),
                (
                    "memory.stat",
                    &format!("inactive_file 1\ntotal_inactive_file {MIB}\ntotal_active_file {MIB}\n"),
                ),
            ],
        );
        let found = made.look(0).unwrap();
        let file = inner.join("memory.limit_in_bytes");
        assert_eq!(found, Tightest { free: 52 * MIB, limit: 96 * MIB, file });
        // Memory and swap have one limit together.
        made.group(
            "sys/memory v1/outer/inner",
            &[
                ("memory.memsw.limit_in_bytes", &limit(96 * MIB)),
                ("memory.memsw.usage_in_bytes", &limit(40 * MIB)),
            ],
        );
        assert_eq!(made.look(50 * MIB).unwrap().free, 52 * MIB);
        let outer =
            [("memory.limit_in_bytes", &*limit(16 * MIB)), ("memory.usage_in_bytes", &*limit(8 * MIB))];
        made.group("sys/memory v1/outer", &outer);
        made.group("sys/memory v1/outer", &[("memory.use_hierarchy", "0\n")]);
        assert_eq!(made.look(0).unwrap().limit, 96 * MIB);
        made.group("sys/memory v1/outer", &[("memory.use_hierarchy", "1\n")]);
        assert_eq!((made.look(0).unwrap().limit, made.look(0).unwrap().free), (16 * MIB, 7 * MIB));
    }

    #[test]
    fn cgroup_of_a_container_is_found_where_it_is_mounted() {
        let files = [("memory.max", "1600"), ("memory.current", "100")];
        // The host's path, and the group itself mounted; a path that leads out; one of another mount.
        for (groups, root) in [
            ("0::/docker/abc/job", "/docker/abc"),
            ("0::/../other", "/"),
            ("0::/system.slice/x", "/docker/abc"),
        ] {
            let made = Made::new(groups, &[[root, "sys", "cgroup2", "x"]]);
            let dir = made.group("sys", &files);
            let found = made.look(0).unwrap();
            assert_eq!(found, Tightest { free: 1400, limit: 1600, file: dir.join("memory.max") }, "{groups}");
        }
    }

    #[test]
    fn path_of_mountinfo_is_read_as_it_was() {
        for (escaped, plain) in [
            ("/a", "/a"),
            ("/a\\040b\\011", "/a b\t"),
            ("/a\\134040", "/a\\040"),
            ("/\\134\\134x", "/\\\\x"),
            ("/\\1", "/\\1"),
        ] {
            assert_eq!(path(escaped.as_bytes()), Path::new(plain));
        }
    }
}

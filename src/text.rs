//! How what the log and errors speak of is written: an error with its causes, an id, a process.

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::Read;

use rustix::process::{Pid, getpid};

/// An error and all that is behind it, each once: `cannot receive any more: Broken pipe (os error 32)`.
pub(crate) fn chain<'a>(error: &'a (dyn Error + 'static)) -> Chain<'a> {
    Chain(error)
}

/// See [`chain`].
pub(crate) struct Chain<'a>(&'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut said = self.0.to_string();
        f.write_str(&said)?;
        let mut next = self.0.source();
        while let Some(cause) = next {
            let words = cause.to_string();
            // Many an error says what its cause says.
            if !said.contains(&words) {
                write!(f, ": {words}")?;
                said = words;
            }
            next = cause.source();
        }
        Ok(())
    }
}

/// A publisher's or subscriber's id, as names of files have it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hex(pub(crate) u128);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A process, by its number and, while it is there and `/proc` shows it, its name: `4711 (camera)`.
#[derive(Debug, Clone)]
pub(crate) struct Called {
    pid: Option<Pid>,
    name: Option<String>,
}

impl Called {
    /// A peer's process; `None` for one that has no number here.
    pub(crate) fn of(pid: Option<Pid>) -> Self {
        Self { pid, name: pid.and_then(name_of) }
    }
}

/// At most 15 bytes by the kernel's rule; whatever `/proc` may be, no more than these are read.
fn name_of(pid: Pid) -> Option<String> {
    // In a pid namespace that sees the `/proc` of another one, the number there is another process's.
    if std::fs::read_link("/proc/self").ok()?.to_str()? != getpid().as_raw_nonzero().to_string() {
        return None;
    }
    let mut bytes = [0; 64];
    let len = File::open(format!("/proc/{}/comm", pid.as_raw_nonzero())).ok()?.read(&mut bytes).ok()?;
    let name = String::from_utf8_lossy(&bytes[..len]);
    Some(name.trim_end().escape_debug().to_string()).filter(|name| !name.is_empty())
}

impl fmt::Display for Called {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.pid, &self.name) {
            (Some(pid), Some(name)) => write!(f, "{} ({name})", pid.as_raw_nonzero()),
            (Some(pid), None) => write!(f, "{}", pid.as_raw_nonzero()),
            (None, _) => f.write_str("of another pid namespace"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{words}")]
    struct Told {
        words: &'static str,
        source: Option<Box<dyn Error + Send + Sync>>,
    }

    #[test]
    fn error_is_written_with_each_cause_once() {
        let cause = |words, source: Option<Told>| Told { words, source: source.map(Into::into) };
        let error = cause("cannot open: no", Some(cause("no", Some(cause("a limit", None)))));
        assert_eq!(chain(&error).to_string(), "cannot open: no: a limit");
        assert_eq!(chain(&cause("alone", None)).to_string(), "alone");
    }

    #[test]
    fn process_is_called_by_its_number_and_its_name_if_it_has_one() {
        let us = rustix::process::getpid();
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap();
        // The test's thread may be called otherwise than the process: both are names, and end without a line's end.
        let called = Called::of(Some(us)).to_string();
        assert!(
            called.starts_with(&format!("{} (", us.as_raw_nonzero())) && called.ends_with(')'),
            "{called}"
        );
        assert!(!comm.is_empty() && !called.contains('\n'));
        // Beyond the kernel's largest.
        let nobody = Pid::from_raw(i32::MAX).unwrap();
        assert_eq!(Called::of(Some(nobody)).to_string(), i32::MAX.to_string());
        assert_eq!(Called::of(None).to_string(), "of another pid namespace");
    }

    #[test]
    fn id_is_written_as_in_the_names_of_files() {
        assert_eq!(format!("{0} {0:?}", Hex(0xab)), format!("{0} {0}", "0".repeat(30) + "ab"));
    }
}

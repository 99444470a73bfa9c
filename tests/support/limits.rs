//! Limits of this process, and what errors say of them.

use std::error::Error;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The whole text of an error, as a program shows it that prints the causes too.
pub(crate) fn text(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[track_caller]
pub(crate) fn assert_says(error: &(dyn Error + 'static), parts: &[&str]) {
    let text = text(error);
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

/// Runs `body` with no more of `resource` than `current`.
pub(crate) fn limited<T>(resource: Resource, current: u64, body: impl FnOnce() -> T) -> T {
    let before = getrlimit(resource);
    setrlimit(resource, Rlimit { current: Some(current), maximum: before.maximum }).unwrap();
    let result = body();
    setrlimit(resource, before).unwrap();
    result
}

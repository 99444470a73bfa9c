//! Topics whose names look like one that nobody publishes to: for who has mistyped it.
//!
//! A guess for the log, from one directory and a handful of names. It is no search of all topics.

use super::directory::{first_parts, names_in, relative_path};
use super::name::TopicName;
use super::runtime_dir::RuntimeDir;
use rustix::fs::{AtFlags, statat};
use std::os::fd::BorrowedFd;

/// Names compared at most.
const NAMES_MAX: usize = 1_000;
/// Names told at most.
const TOLD_MAX: usize = 5;

/// Topics like `name`, of which the first `parts` parts exist, in `dir`, and the next one does not.
pub(super) fn find(dir: BorrowedFd<'_>, parts: usize, runtime: &RuntimeDir, name: &TopicName) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(missing) = name.components().nth(parts) {
        let names = names_in(dir).unwrap_or_default();
        let like = names.iter().take(NAMES_MAX).filter(|other| is_like(&missing, other));
        let before = first_parts(name, parts);
        found.extend(
            like.map(|other| if before.is_empty() { other.clone() } else { format!("{before}/{other}") }),
        );
    }
    if let Ok(Some(root)) = runtime.open_existing() {
        let other = variants(name.as_str()).into_iter().filter(|other| {
            TopicName::new(other)
                .is_ok_and(|other| statat(&root, relative_path(&other), AtFlags::SYMLINK_NOFOLLOW).is_ok())
        });
        found.extend(other);
    }
    found.truncate(TOLD_MAX);
    found
}

/// Whether two parts on disk differ by case only, or by one or two letters.
fn is_like(ours: &str, other: &str) -> bool {
    let (ours, other) = (ours.to_lowercase(), other.to_lowercase());
    let most = if ours.chars().count() < 5 { 1 } else { 2 };
    !other.starts_with('.') && distance(&ours, &other) <= most
}

/// How many letters have to be added, taken away or exchanged to make the one of the other.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<_> = other.chars().collect();
    let mut row: Vec<_> = (0..=other.len()).collect();
    for (at, letter) in one.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], at + 1);
        for (column, &theirs) in other.iter().enumerate() {
            let exchanged = diagonal + usize::from(letter != theirs);
            diagonal = row[column + 1];
            row[column + 1] = exchanged.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

/// The same name with slashes more or fewer.
fn variants(name: &str) -> Vec<String> {
    let bare = name.split('/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
    let mut variants = vec![bare.clone(), format!("/{bare}"), format!("{bare}/"), format!("/{bare}/")];
    variants.retain(|variant| variant != name);
    variants
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_differ_by_case_or_a_letter_or_two_are_alike_and_others_are_not() {
        for (ours, other) in
            [("Camera", "camera"), ("pose", "poses"), ("camera", "camrea"), ("a", "b"), ("t", "T")]
        {
            assert!(is_like(ours, other), "{ours} {other}");
        }
        for (ours, other) in [("pose", "scan"), ("left", "right"), ("a", "abc"), ("a", ".new-a"), ("", ".")] {
            assert!(!is_like(ours, other), "{ours} {other}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
        assert_eq!(distance("", "ab"), 2);
    }

    #[test]
    fn name_with_other_slashes_is_a_variant_and_the_name_itself_is_not() {
        assert_eq!(variants("/a//b"), ["a/b", "/a/b", "a/b/", "/a/b/"]);
        assert_eq!(variants("a"), ["/a", "a/", "/a/"]);
    }
}

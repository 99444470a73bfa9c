//! Names of topics, and the directories that stand for them.
//!
//! Any text without `*` may be a name (that is kept for patterns); `/` in it makes a hierarchy. On disk each part between slashes is a directory under its own name,
//! with a `+` in front where that is needed:
//!
//! * an empty part and one that begins with `.` get one, so that no part is empty, `.`, `..`, or one of our own files, which
//!   all begin with `.`;
//! * one that begins with `+` gets one, so that no two parts become the same.
//!
//! This is one to one: a name on disk that begins with `+` stands for what follows the `+`, any other for itself; and as no part
//! contains `/`, the parts give back the name. So `a`, `/a`, `a/`, `a//b`, `.` and `..` are as many different topics, and `a/b`
//! lives in the directory of `a` without the two knowing of each other.

use std::fmt;

/// The name of a topic: 1 to 200 bytes of UTF-8, any but NUL and `*`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct TopicName {
    name: Box<str>,
}

impl TopicName {
    /// The longest name, in bytes. With the `+` a single part still is a file name that every file system takes (255).
    pub(crate) const MAX_LEN: usize = 200;

    /// Checks a name.
    pub(crate) fn new(name: &str) -> Result<Self, TopicError> {
        if name.is_empty() {
            return Err(TopicError::Empty);
        }
        if name.len() > Self::MAX_LEN {
            return Err(TopicError::TooLong { len: name.len(), max: Self::MAX_LEN });
        }
        if let Some(at) = name.bytes().position(|byte| byte == 0) {
            return Err(TopicError::Nul { at });
        }
        if let Some(at) = name.bytes().position(|byte| byte == b'*') {
            return Err(TopicError::Pattern { at });
        }
        Ok(Self { name: name.into() })
    }

    /// The name as it was given.
    pub(crate) fn as_str(&self) -> &str {
        &self.name
    }

    /// The directories that stand for it, outermost first. At least one.
    pub(crate) fn components(&self) -> impl Iterator<Item = String> {
        self.name.split('/').map(on_disk)
    }
}

impl fmt::Display for TopicName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn on_disk(part: &str) -> String {
    if part.is_empty() || part.starts_with(['.', '+']) { format!("+{part}") } else { part.to_owned() }
}

/// The topic that lives in the directory of these components; `None` for a directory that is none of ours.
#[cfg(feature = "zenoh")]
pub(crate) fn topic_of_components(components: &[String]) -> Option<String> {
    let parts: Vec<_> = components.iter().map(|part| part.strip_prefix('+').unwrap_or(part)).collect();
    let name = TopicName::new(&parts.join("/")).ok()?;
    name.components().eq(components.iter().cloned()).then(|| name.as_str().to_owned())
}

/// A topic cannot have this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopicError {
    /// There is no name.
    #[error("a topic's name must not be empty")]
    Empty,
    /// The name is too long.
    #[error("the topic's name has {len} bytes, at most {max} are allowed")]
    TooLong {
        /// Its length, in bytes.
        len: usize,
        /// The most it may have.
        max: usize,
    },
    /// The name contains a NUL.
    #[error("the topic's name has a NUL byte at position {at}, which no file name can contain")]
    Nul {
        /// Where, counted in bytes from zero.
        at: usize,
    },
    /// The name contains a `*`.
    #[error(
        "the topic's name has a `*` at position {at}, which is kept for patterns; there are none yet: name one topic, without `*`"
    )]
    Pattern {
        /// Where, counted in bytes from zero.
        at: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn path(name: &str) -> Vec<String> {
        TopicName::new(name).unwrap().components().collect()
    }

    /// The inverse, as the header describes it.
    fn name_of(path: &[String]) -> String {
        let parts: Vec<_> = path.iter().map(|part| part.strip_prefix('+').unwrap_or(part)).collect();
        parts.join("/")
    }

    #[test]
    fn name_out_of_bounds_is_refused_with_the_limit() {
        assert_eq!(TopicName::new(""), Err(TopicError::Empty));
        assert_eq!(TopicName::new("a\0"), Err(TopicError::Nul { at: 1 }));
        for (name, at) in [("*", 0), ("md/*", 3), ("md/**", 3), ("a*b/c", 1)] {
            assert_eq!(TopicName::new(name), Err(TopicError::Pattern { at }));
        }
        let long = "ä".repeat(100);
        assert!(TopicName::new(&long).is_ok());
        let error = TopicName::new(&(long + "x")).unwrap_err();
        assert_eq!(error.to_string(), "the topic's name has 201 bytes, at most 200 are allowed");
    }

    #[test]
    fn names_that_look_alike_live_apart() {
        let names = [
            "a", "/a", "a/", "a/b", "a//b", "/", "//", ".", "..", "+", "+.", "+a", "++a", "./a", "+/a",
            ".pub-x",
        ];
        let paths: HashSet<_> = names.iter().map(|name| path(name)).collect();
        assert_eq!(paths.len(), names.len());
        assert_eq!(path("camera/front"), ["camera", "front"]);
        assert_eq!(path("/..//+x"), ["+", "+..", "+", "++x"]);
    }

    proptest! {
        #[test]
        fn name_on_disk_is_safe_and_gives_back_the_name(name in "[ab/.+%~ \u{e4}\u{1f980}]{1,50}") {
            let path = path(&name);
            for part in &path {
                prop_assert!(!part.is_empty() && !part.starts_with('.') && !part.contains('/') && part.len() <= 255);
            }
            prop_assert_eq!(name_of(&path), name);
        }

        #[test]
        fn names_that_differ_live_apart(a in "[a/.+]{1,6}", b in "[a/.+]{1,6}") {
            prop_assert_eq!(path(&a) == path(&b), a == b);
        }
    }
}

//! [`Route`]: which topics go under which zenoh keys, and back.
//!
//! Pure text: it knows neither a session nor a directory.

use std::fmt;

use ::zenoh::key_expr::KeyExpr;

/// Topics on one side and zenoh key expressions on the other, with as many wildcards on both.
///
/// A `*` stands for one part between slashes, `**` at the end for one or more; the first of one side is the first of the other.
/// What a wildcard stands for is carried over as it is.
///
/// # Examples
///
/// ```
/// use tokio_shm::bridge::{Direction, Route};
///
/// # fn main() -> Result<(), tokio_shm::bridge::RouteError> {
/// let route = Route::new("camera/*", "robot1/*/image")?.direction(Direction::ToZenoh);
/// assert_eq!(route.key_of("camera/front").as_deref(), Some("robot1/front/image"));
/// assert_eq!(route.topic_of("robot1/front/image").as_deref(), Some("camera/front"));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a route does nothing until a bridge has it"]
pub struct Route {
    topics: Pattern,
    keys: Pattern,
    pub(super) direction: Direction,
    pub(super) congestion: Congestion,
}

/// Which way messages go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Direction {
    /// Both ways. What came from the other side is not sent back.
    #[default]
    Both,
    /// From local topics to zenoh.
    ToZenoh,
    /// From zenoh to local topics.
    FromZenoh,
}

/// What happens where one side takes messages more slowly than the other gives them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Congestion {
    /// The sender is made to wait: a local publisher by its full subscriber, a zenoh publisher by a full connection
    /// (if it uses `CongestionControl::Block`). One slow subscriber slows all of the route.
    #[default]
    Wait,
    /// The oldest messages are dropped, and counted where they are missed: at a local subscriber as
    /// [`Lagged`](crate::RecvError::Lagged), at the other bridge as [`missed`](super::BridgeStats::missed).
    Drop,
}

/// Why two patterns do not make a [`Route`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// A pattern that is empty, or has a wildcard where none can be.
    #[error(
        "{pattern:?} is no pattern: use * for a whole part between slashes, and ** only as the last part"
    )]
    Pattern {
        /// The pattern.
        pattern: String,
    },
    /// zenoh would not have the key expression.
    #[error("{key:?} is no zenoh key expression: {reason}")]
    Key {
        /// The key expression.
        key: String,
        /// What zenoh says.
        reason: String,
    },
    /// The wildcards of the two are not the same.
    #[error("{topics:?} and {keys:?} must have the same wildcards in the same order")]
    Wildcards {
        /// The pattern of topics.
        topics: String,
        /// The key expression.
        keys: String,
    },
}

impl Route {
    /// A route both ways that makes senders wait.
    ///
    /// # Errors
    ///
    /// [`RouteError`]: one of the two cannot be used, or they do not fit together.
    pub fn new(topics: &str, keys: &str) -> Result<Self, RouteError> {
        let route = Self {
            topics: Pattern::new(topics)?,
            keys: Pattern::new(keys)?,
            direction: Direction::default(),
            congestion: Congestion::default(),
        };
        KeyExpr::new(keys)
            .map_err(|error| RouteError::Key { key: keys.to_owned(), reason: error.to_string() })?;
        if !route.topics.wildcards().eq(route.keys.wildcards()) {
            return Err(RouteError::Wildcards { topics: topics.to_owned(), keys: keys.to_owned() });
        }
        Ok(route)
    }

    /// Which way messages go. Default both.
    pub fn direction(mut self, direction: Direction) -> Self {
        self.direction = direction;
        self
    }

    /// What happens where one side is slower. Default [`Congestion::Wait`].
    pub fn congestion(mut self, congestion: Congestion) -> Self {
        self.congestion = congestion;
        self
    }

    /// The zenoh key for a topic, if the route is for it.
    ///
    /// `None` as well where zenoh cannot have such a key: topics may be any text.
    pub fn key_of(&self, topic: &str) -> Option<String> {
        let key = self.keys.fill(&self.topics.captures(topic)?);
        KeyExpr::new(key.as_str()).is_ok_and(|key| !key.is_wild()).then_some(key)
    }

    /// The topic for a zenoh key, if the route is for it.
    pub fn topic_of(&self, key: &str) -> Option<String> {
        Some(self.topics.fill(&self.keys.captures(key)?))
    }

    /// The only topic and key, where there is no wildcard.
    pub(super) fn exact(&self) -> Option<(String, String)> {
        let none = self.topics.wildcards().next().is_none();
        none.then(|| (self.topics.to_string(), self.keys.to_string()))
    }

    pub(super) fn keys(&self) -> String {
        self.keys.to_string()
    }

    pub(super) fn is_to_zenoh(&self) -> bool {
        matches!(self.direction, Direction::Both | Direction::ToZenoh)
    }

    pub(super) fn is_from_zenoh(&self) -> bool {
        matches!(self.direction, Direction::Both | Direction::FromZenoh)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arrow = match self.direction {
            Direction::Both => "<->",
            Direction::ToZenoh => "->",
            Direction::FromZenoh => "<-",
        };
        write!(f, "{} {arrow} {}", self.topics, self.keys)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pattern(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Literal(String),
    One,
    /// Only the last.
    Rest,
}

impl Pattern {
    fn new(pattern: &str) -> Result<Self, RouteError> {
        let wrong = || RouteError::Pattern { pattern: pattern.to_owned() };
        let last = pattern.split('/').count() - 1;
        let part = |(index, part): (usize, &str)| match part {
            "*" => Ok(Part::One),
            "**" if index == last => Ok(Part::Rest),
            part if part.is_empty() || part.contains('*') => Err(wrong()),
            part => Ok(Part::Literal(part.to_owned())),
        };
        pattern.split('/').enumerate().map(part).collect::<Result<_, _>>().map(Self)
    }

    fn wildcards(&self) -> impl Iterator<Item = &Part> {
        self.0.iter().filter(|part| !matches!(part, Part::Literal(_)))
    }

    /// What the wildcards stand for in `name`; `None` if it does not match.
    fn captures<'a>(&self, name: &'a str) -> Option<Vec<&'a str>> {
        let mut captures = Vec::new();
        let mut rest = Some(name);
        for part in &self.0 {
            let name = rest?;
            if matches!(part, Part::Rest) {
                captures.push(name);
                return Some(captures);
            }
            let (head, tail) = match name.split_once('/') {
                Some((head, tail)) => (head, Some(tail)),
                None => (name, None),
            };
            match part {
                Part::Literal(literal) if literal == head => {}
                Part::Literal(_) => return None,
                _ => captures.push(head),
            }
            rest = tail;
        }
        rest.is_none().then_some(captures)
    }

    fn fill(&self, captures: &[&str]) -> String {
        let mut captures = captures.iter();
        let parts = self.0.iter().map(|part| match part {
            Part::Literal(literal) => literal,
            _ => captures.next().copied().unwrap_or_default(),
        });
        parts.collect::<Vec<_>>().join("/")
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.0.iter().enumerate() {
            let slash = if index == 0 { "" } else { "/" };
            let part = match part {
                Part::Literal(literal) => literal,
                Part::One => "*",
                Part::Rest => "**",
            };
            write!(f, "{slash}{part}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn zenoh_route_maps_wildcards_in_their_order() {
        let route = Route::new("a/*/b/**", "x/*/**").unwrap();
        assert_eq!(route.key_of("a/1/b/2/3").as_deref(), Some("x/1/2/3"));
        assert_eq!(route.topic_of("x/1/2").as_deref(), Some("a/1/b/2"));
        for other in ["a", "a/1/b", "a/1/c/2", "b/1/b/2", "a//b/2"] {
            assert_eq!(route.key_of(other), None, "{other}");
        }
        assert_eq!(route.topic_of("x/1"), None);
        assert_eq!(Route::new("a", "b/c").unwrap().exact(), Some(("a".to_owned(), "b/c".to_owned())));
    }

    #[test]
    fn zenoh_route_refuses_what_does_not_fit_together() {
        for (topics, keys) in [("a*", "b*"), ("", ""), ("a/**/b", "b/**/b"), ("a//b", "b")] {
            assert!(matches!(Route::new(topics, keys), Err(RouteError::Pattern { .. })), "{topics}");
        }
        for (topics, keys) in [("*", "a"), ("a", "*"), ("*", "**"), ("*/*", "*")] {
            assert!(matches!(Route::new(topics, keys), Err(RouteError::Wildcards { .. })), "{topics}");
        }
        assert!(matches!(Route::new("a", "b#"), Err(RouteError::Key { .. })));
        // A topic that zenoh has no key for.
        assert_eq!(Route::new("*", "k/*").unwrap().key_of("what?"), None);
    }

    proptest! {
        #[test]
        fn zenoh_route_there_and_back_gives_the_same_topic(parts in prop::collection::vec("[a-z0-9_.-]{1,5}", 1..5)) {
            let route = Route::new("t/*/**", "z/*/k/**").unwrap();
            let topic = format!("t/{}/{}", parts[0], parts.join("/"));
            let key = route.key_of(&topic).unwrap();
            prop_assert_eq!(route.topic_of(&key), Some(topic));
        }
    }
}

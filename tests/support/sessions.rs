//! zenoh sessions that talk to each other and to nobody else.

use std::time::{Duration, Instant};

use zenoh::{Config, Session};

use super::LIMIT;

/// What all sessions of these tests have: no search for others, and a place of their own to listen at.
pub(crate) fn config(mode: &str, listen: &[&str], connect: &[&str]) -> Config {
    let mut config = Config::default();
    let endpoints = |list: &[&str]| serde_json::to_string(list).expect("strings");
    for (key, value) in [
        ("mode", format!("{mode:?}")),
        ("scouting/multicast/enabled", "false".to_owned()),
        ("listen/endpoints", endpoints(listen)),
        ("connect/endpoints", endpoints(connect)),
        // A test's router comes back at once, and the connection with it.
        (
            "connect/retry",
            r#"{ period_init_ms: 50, period_max_ms: 200, period_increase_factor: 2 }"#.to_owned(),
        ),
        ("connect/exit_on_failure", "false".to_owned()),
        ("connect/timeout_ms", "-1".to_owned()),
        ("listen/exit_on_failure", "true".to_owned()),
    ] {
        config.insert_json5(key, &value).expect("a setting of zenoh's");
    }
    config
}

/// A session that others connect to, and where.
pub(crate) async fn listening(mode: &str) -> (Session, String) {
    let session = zenoh::open(config(mode, &["tcp/127.0.0.1:0"], &[])).await.expect("open a session");
    let at = session.info().locators().await.into_iter().map(|at| at.to_string());
    let at = at.into_iter().find(|at| at.starts_with("tcp/")).expect("a locator");
    (session, at)
}

/// Waits until somebody subscribes to what `publisher` publishes.
pub(crate) async fn until_matched(publisher: &zenoh::pubsub::Publisher<'_>) {
    let deadline = Instant::now() + LIMIT;
    while !publisher.matching_status().await.expect("matching status").matching() {
        assert!(Instant::now() < deadline, "no subscriber came within {LIMIT:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

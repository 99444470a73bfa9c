//! Peers that come and go leave nothing: this binary has one test, because it counts what its process has open.

mod support;

use support::{Dir, within};

/// What of this process could grow: open descriptors, mappings, and resident memory in KiB.
fn footprint() -> (usize, usize, usize) {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mappings = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    (descriptors, mappings, resident.trim().trim_end_matches(" kB").trim().parse().unwrap())
}

#[test]
fn ten_thousand_subscribers_and_a_thousand_publishers_leave_nothing() {
    let dir = Dir::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let publisher = dir.publisher("t").bind().unwrap();
        let round = async |number: u32| {
            let mut subscriber = dir.subscriber("t").connect().unwrap();
            if number.is_multiple_of(20) {
                // Gone before it was welcomed, or right after.
                return;
            }
            within("send", publisher.send(number.to_le_bytes())).await.unwrap();
            assert_eq!(&*within("recv", subscriber.recv()).await.unwrap(), number.to_le_bytes());
        };
        let publish = async |number: u32| {
            let publisher = dir.publisher("come/and/go").bind().unwrap();
            publisher.send(number.to_le_bytes()).await.unwrap();
            within("close", publisher.close()).await.unwrap();
        };
        let settled = || {
            let publisher = &publisher;
            support::until("subscribers are gone", move || publisher.subscriber_count() == 0)
        };
        for number in 0..500 {
            round(number).await;
            publish(number).await;
        }
        settled().await;
        let before = footprint();
        for number in 0..10_000 {
            round(number).await;
            if number.is_multiple_of(10) {
                publish(number).await;
            }
        }
        settled().await;
        support::until("descriptors and mappings are what they were", || {
            let now = footprint();
            now.0 <= before.0 && now.1 <= before.1 + 2
        })
        .await;
        let after = footprint();
        assert!(after.2 <= before.2 + 4 * 1024, "resident memory grew: {before:?} to {after:?} KiB");
        assert_eq!(publisher.pool().stats().in_use(), 0);
        within("close", publisher.close()).await.unwrap();
    });
    dir.assert_empties();
}

//! The check behind every `blocking_` call.

/// Panics where blocking would stall a runtime's tasks.
///
/// tokio keeps the knowledge of where that is to itself, but its own blocking calls check it: this borrows one.
#[track_caller]
pub(crate) fn assert_may_block() {
    // Locking an unlocked mutex that nobody else can see never waits; it only checks.
    drop(tokio::sync::Mutex::const_new(()).blocking_lock());
}

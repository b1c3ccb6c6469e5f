//! The keystore learns where objects are that a start has opened elsewhere: after the start, when nobody waits.

use super::{Daemon, lock, paths};
use crate::model::problem::chain;
use crate::vm::start::Moved;

/// Kept until somebody has time.
pub(super) fn note(daemon: &Daemon, moved: Vec<Moved>) {
    if moved.is_empty() {
        return;
    }
    let mut noted = lock(&daemon.moved);
    noted.retain(|old| moved.iter().all(|new| new.envelope != old.envelope));
    noted.extend(moved);
    drop(noted);
    daemon.copies_bell.ring();
}

/// Looks at the old places, and writes down what is sure.
pub(super) fn settle(daemon: &Daemon) {
    let noted = std::mem::take(&mut *lock(&daemon.moved));
    if noted.is_empty() {
        return;
    }
    let rule = paths::rule(daemon);
    for moved in noted {
        let (from, to) = (&moved.from, moved.to.display());
        match moved.settle(daemon.keystore.as_ref(), &rule) {
            Ok(true) => tracing::info!(envelope = %moved.envelope, "has moved from {from:?} to {to}"),
            Ok(false) => {}
            Err(error) => tracing::warn!(envelope = %moved.envelope, "is in {to} now: {}", chain(&error)),
        }
    }
}

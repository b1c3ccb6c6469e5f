//! The keystore learns where objects are that a start has opened elsewhere: after the start, when nobody waits.

use std::thread::{Builder, Scope};

use super::{Daemon, lock};
use crate::model::problem::chain;
use crate::vm::host::Host;
use crate::vm::moved::Moved;

/// For later.
pub(super) fn note(daemon: &Daemon, moved: Vec<Moved>) {
    if moved.is_empty() {
        return;
    }
    lock(&daemon.moved).note(moved);
    daemon.notes_bell.ring();
}

/// Has the old places looked at, and written down what is sure.
pub(super) fn settle<'scope>(daemon: &'scope Daemon, scope: &'scope Scope<'scope, '_>) {
    let begun = lock(&daemon.moved).begin();
    for moved in begun {
        let envelope = moved.envelope;
        let end = move || lock(&daemon.moved).end(envelope);
        let look = move || {
            settle_one(daemon, &moved);
            if end() {
                daemon.notes_bell.ring();
            }
        };
        if let Err(error) = Builder::new().name("moved".to_owned()).spawn_scoped(scope, look) {
            // The next start notes it again.
            tracing::error!(%envelope, %error, "no thread to see whether it has moved");
            end();
        }
    }
}

fn settle_one(daemon: &Daemon, moved: &Moved) {
    let host = Host {
        paths: daemon.path_rule(),
        ..daemon.host()
    };
    let (from, to) = (&moved.from, moved.to.display());
    match moved.settle(&host) {
        Ok(true) => tracing::info!(envelope = %moved.envelope, "has moved from {from:?} to {to}"),
        Ok(false) => {}
        Err(error) => tracing::warn!(envelope = %moved.envelope, "is in {to} now: {}", chain(&error)),
    }
}

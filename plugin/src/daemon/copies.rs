//! The thread that brings the copies of envelopes up to date, and what else is noted behind the hooks' backs.
//!
//! Woken by a job, by the end of a VM, and by the clock.

use std::time::Duration;

use super::{Daemon, first_runs, lock, moved, saved};
use crate::job::copies::{self, Guards};

/// Between two looks at the copies: a job that is under way rings after each of its batches.
const PAUSE: Duration = Duration::from_millis(500);
/// After this time a copy that could not follow is tried again, whatever has happened.
const AGAIN: Duration = Duration::from_secs(60);

/// Brings copies up to date for ever. For a thread of its own.
pub fn run(daemon: &Daemon) {
    let guards = Guards {
        headers: &daemon.headers,
        is_armed: &|envelope| lock(&daemon.armed).needs(envelope),
    };
    loop {
        saved::note_all(daemon);
        first_runs::write(daemon);
        moved::settle(daemon);
        let copying = lock(&daemon.copying);
        if let Err(problem) = copies::update(&daemon.host(), guards, || daemon.host_of_vms()) {
            tracing::warn!("copies of envelopes: {problem}");
        }
        drop(copying);
        std::thread::sleep(PAUSE);
        daemon.copies_bell.wait(AGAIN);
    }
}

//! The thread that brings the copies of envelopes up to date.
//!
//! Woken by a job, by the end of a VM, and by the clock.

use std::sync::Arc;
use std::thread::Scope;
use std::time::Instant;

use super::Daemon;
use super::locks::Doing;
use crate::job::copies::{self, Errand, Guards, News};
use crate::model::deadlines::image::ANSWERS;
use crate::model::deadlines::job::{COPIES, COPIES_AGAIN, COPIES_CLAIM};
use crate::model::problem::chain;
use crate::store::CopyPlace;

/// Brings copies up to date for ever. For a thread of its own.
pub(crate) fn run(daemon: &Daemon) {
    std::thread::scope(|scope| {
        loop {
            update(daemon, scope);
            std::thread::sleep(COPIES);
            daemon.copies_bell.wait(COPIES_AGAIN);
        }
    });
}

fn update<'scope>(daemon: &'scope Daemon, scope: &'scope Scope<'scope, '_>) {
    let deadline = Instant::now() + COPIES_CLAIM;
    let guards = Guards {
        headers: &daemon.headers,
        is_armed: Arc::new(|envelope| daemon.armed.needs(envelope)),
        claimed: Arc::new(move |vm, work| {
            let claim = daemon.claims.vm_until(vm, Doing::Copies, deadline);
            claim.map(|_claim| work()).map_err(|busy| busy.message)
        }),
    };
    let run = |errand: Errand<'scope>| {
        let Errand {
            about,
            paths,
            place,
            work,
        } = errand;
        let late = move |news| note_late(daemon, place, &news);
        daemon.late.in_time(scope, (about, &paths), ANSWERS, work, late)
    };
    if let Err(problem) = copies::update(daemon.host(), &guards, || daemon.host_of_vms(), &run) {
        tracing::warn!("copies of envelopes: {problem}");
    }
}

/// It answers again, and so may what else is there.
fn note_late(daemon: &Daemon, place: CopyPlace, news: &News) {
    if let Err(error) = daemon.host_store.note_copies(place, news) {
        tracing::warn!("copies of envelopes: {}", chain(&error));
    }
    daemon.copies_bell.ring();
}

//! The thread that notes what hooks have told, when nobody waits for it. It waits for neither storage nor libvirt itself.

use std::sync::atomic::Ordering;
use std::thread::{Builder, Scope};

use super::{Daemon, first_runs, moved, saved};
use crate::model::deadlines::job::{COPIES, COPIES_AGAIN};

/// Notes things for ever. For a thread of its own.
pub(crate) fn run(daemon: &Daemon) {
    std::thread::scope(|scope| {
        loop {
            first_runs::write(daemon);
            moved::settle(daemon, scope);
            look_for_saved(daemon, scope);
            std::thread::sleep(COPIES);
            daemon.notes_bell.wait(COPIES_AGAIN);
        }
    });
}

/// In a thread, for which libvirt may have no answer. What comes meanwhile is looked at after it.
fn look_for_saved<'scope>(daemon: &'scope Daemon, scope: &'scope Scope<'scope, '_>) {
    let asks = &daemon.asks_of_saved;
    if daemon.changed_vms.lock().is_empty() || asks.swap(true, Ordering::SeqCst) {
        return;
    }
    let look = move || {
        saved::note_all(daemon);
        asks.store(false, Ordering::SeqCst);
        if !daemon.changed_vms.lock().is_empty() {
            daemon.notes_bell.ring();
        }
    };
    if let Err(error) = Builder::new().name("saved".to_owned()).spawn_scoped(scope, look) {
        tracing::error!(%error, "no thread to see which VMs were saved to a file");
        asks.store(false, Ordering::SeqCst);
    }
}

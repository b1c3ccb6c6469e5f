//! Starts of which nothing is heard after `prepare`: a `started` can be lost, and a hook can be gone before anybody has looked.
//!
//! Their keys must not stay in libvirt. One thread waits until the next start is overdue; libvirt is asked on the background
//! connection, because the domain API waits for the very VM whose start is slow. Each question has a thread of its own, so that
//! one that hangs keeps no other's keys armed.

use std::sync::Arc;

use super::{Daemon, first_runs, lock};
use crate::host::libvirt::{LibvirtError, Power};
use crate::model::deadlines::IDLE;
use crate::model::deadlines::start::OVERDUE_AGAIN;
use crate::model::problem::chain;
use crate::vm::start::Overdue;

/// How many questions may hang at once: libvirt takes five of a client, and others use this connection too.
const MAX_LOOKS: usize = 2;

/// Disarms starts whose end is not told, for ever.
pub(crate) fn watch(daemon: &Arc<Daemon>) {
    loop {
        let (overdue, next) = daemon.armed.overdue(daemon.config().hook_deadline);
        let wait = if overdue.is_empty() { IDLE } else { OVERDUE_AGAIN };
        for start in overdue {
            look(daemon, start);
        }
        daemon.arms_bell.wait(next.map_or(wait, |next| next.min(wait)));
    }
}

fn look(daemon: &Arc<Daemon>, start: Overdue) {
    let mut looks = lock(&daemon.looks);
    if looks.len() >= MAX_LOOKS || !looks.insert(start.vm) {
        return;
    }
    let looking = Arc::clone(daemon);
    let asked = std::thread::Builder::new()
        .name("overdue".to_owned())
        .spawn(move || {
            disarm_unless_starting(&looking, start);
            lock(&looking.looks).remove(&start.vm);
        });
    if asked.is_err() {
        looks.remove(&start.vm);
    }
}

fn disarm_unless_starting(daemon: &Daemon, start: Overdue) {
    let vm = start.vm;
    let power = daemon.background.power(vm);
    if matches!(power, Ok(Power::On))
        && let Ok(Some(known)) = daemon.keystore.vm(vm)
    {
        // As its `started` would have done.
        first_runs::note_running(daemon, vm, &known.name);
    }
    match power {
        Ok(Power::Starting) => {}
        Ok(power) => match disarm(daemon, start) {
            Ok(0) => {}
            Ok(secrets) => tracing::warn!(
                %vm, secrets, op = "disarm",
                "libvirt never said what became of its start, and says now that it is {power}"
            ),
            Err(error) => tracing::error!(%vm, op = "disarm", "{}", chain(&error)),
        },
        // It is asked again.
        Err(error) => tracing::warn!(%vm, op = "disarm", "{}", chain(&error)),
    }
}

/// Returns how many secrets there were.
fn disarm(daemon: &Daemon, start: Overdue) -> Result<usize, LibvirtError> {
    let unused = daemon.armed.disarm_overdue(start);
    let undefined = daemon.libvirt.disarm(&unused);
    undefined.inspect_err(|_| unused.stay_armed(start.vm))?;
    Ok(unused.len())
}

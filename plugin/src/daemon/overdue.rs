//! Starts of which nothing is heard after `prepare`: a `started` can be lost, and a hook can be gone before anybody has looked.
//!
//! Their keys must not stay in libvirt. One thread waits until the next start is overdue; libvirt is asked on the background
//! connection, because the domain API waits for the very VM whose start is slow. Each question has a thread of its own, so that
//! one that hangs keeps no other's keys armed.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Daemon, lock};
use crate::host::libvirt::Power;
use crate::model::envelope::VmId;
use crate::model::problem::chain;
use crate::vm::start::Overdue;

/// How many questions may hang at once: libvirt takes five of a client, and others use this connection too.
const MAX_LOOKS: usize = 2;
/// When to ask again about a start that goes on.
const AGAIN: Duration = Duration::from_secs(2);
/// Without any start; a new one rings.
const IDLE: Duration = Duration::from_secs(3600);

/// The VMs that libvirt is being asked about.
pub(super) type Looks = Mutex<BTreeSet<VmId>>;

impl Daemon {
    /// Disarms starts whose end is not told, for ever.
    pub fn watch_arms(self: &Arc<Self>) {
        loop {
            let (overdue, next) = lock(&self.armed).overdue(self.config().hook_deadline);
            let wait = if overdue.is_empty() { IDLE } else { AGAIN };
            for start in overdue {
                self.look(start);
            }
            self.arms_bell.wait(next.map_or(wait, |next| next.min(wait)));
        }
    }

    fn look(self: &Arc<Self>, start: Overdue) {
        let mut looks = lock(&self.looks);
        if looks.len() >= MAX_LOOKS || !looks.insert(start.vm) {
            return;
        }
        let daemon = Arc::clone(self);
        let asked = std::thread::Builder::new()
            .name("overdue".to_owned())
            .spawn(move || {
                daemon.disarm_unless_starting(start);
                lock(&daemon.looks).remove(&start.vm);
            });
        if asked.is_err() {
            looks.remove(&start.vm);
        }
    }

    fn disarm_unless_starting(&self, start: Overdue) {
        let vm = start.vm;
        let power = self.background.power(vm);
        if matches!(power, Ok(Power::On))
            && let Ok(Some(known)) = self.keystore.vm(vm)
        {
            // As its `started` would have done.
            self.note_running(vm, &known.name);
        }
        match power {
            Ok(Power::Starting) => {}
            Ok(power) => match self.disarm_overdue(start) {
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
    fn disarm_overdue(&self, start: Overdue) -> Result<usize, crate::host::libvirt::LibvirtError> {
        let _shared = lock(&self.shared);
        // Held until they are gone: a start that needs one of them again defines it after that.
        let mut arms = lock(&self.armed);
        let unused = arms.disarm_overdue(start);
        self.libvirt.disarm(&unused).inspect_err(|_| {
            arms.arm(start.vm, unused.iter().copied());
        })?;
        Ok(unused.len())
    }
}

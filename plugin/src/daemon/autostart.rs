//! Starts sealed VMs with the host: [`crate::vm::autostart`] says which and when.
//!
//! libvirt starts each as it does for `virsh start`, and its hook asks this very daemon: so that is asked for on a connection of
//! its own, by a thread that holds nothing. Nobody waits for it but the VMs that come after it, for a while.

use std::sync::mpsc::sync_channel;
use std::thread::{Builder, Scope};
use std::time::{Duration, Instant};

use super::{Daemon, lock, records};
use crate::audit::Actor;
use crate::domain::{self, Domain, Object};
use crate::host::boot::BootId;
use crate::host::libvirt::{Background, DefinedDomain};
use crate::model::deadlines::autostart::{LOOK, START};
use crate::model::deadlines::daemon::FIRST_UNLOCKS;
use crate::model::deadlines::libvirt::CHECK;
use crate::model::envelope::{Envelope, ProviderId, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::store::{Autostart, Change};
use crate::vm::autostart::{self, Decision, Facts, Keys, Opener, Presence, Starts, ThisBoot};
use crate::vm::names;

/// Which providers open something now.
type Openers = Vec<(ProviderId, Keys)>;

/// Until nothing more is to be started in this boot. For a thread of its own.
pub(crate) fn run(daemon: &Daemon) {
    let Some(boot) = daemon.boot else { return };
    daemon.first_unlocks.wait(FIRST_UNLOCKS);
    let libvirt = Background::new(&daemon.config().libvirt_uri);
    let mut starter = Starter {
        daemon,
        libvirt: &libvirt,
        boot,
        seen: None,
    };
    std::thread::scope(|scope| {
        while let Some(pause) = starter.round(scope) {
            std::thread::sleep(pause);
        }
    });
}

struct Starter<'a> {
    daemon: &'a Daemon,
    libvirt: &'a Background,
    boot: BootId,
    /// Who opened what in the last round: until that changes, a VM that waits for a provider waits on.
    seen: Option<Openers>,
}

impl<'a> Starter<'a> {
    /// Looks at all that are to start. Says when to do so again; never, if there is none.
    fn round<'scope>(&mut self, scope: &'scope Scope<'scope, '_>) -> Option<Duration>
    where
        'a: 'scope,
    {
        let kept = match self.daemon.host_store.autostarts() {
            Ok(rows) => rows.sound,
            Err(error) => {
                tracing::error!("which VMs start with this host can't be read: {}", chain(&error));
                return Some(CHECK);
            }
        };
        let is_open = |kept: &Autostart| {
            ThisBoot::of(Some(kept), self.boot) == ThisBoot::Open
                && !lock(&self.daemon.autostarts).is_settled(kept.vm)
        };
        let open: Vec<_> = kept.into_iter().filter(is_open).collect();
        if open.is_empty() {
            return None;
        }
        // One that autostarts what is not sealed answers nobody yet.
        if self.daemon.libvirt.reach(CHECK).is_err() || self.libvirt.connect().is_err() {
            return Some(CHECK);
        }
        let openers = self.openers();
        let has_changed = self.seen.as_ref() != Some(&openers);
        self.seen = Some(openers);
        for kept in open {
            let may_go_on = has_changed || lock(&self.daemon.autostarts).is_due(kept.vm, Instant::now());
            if may_go_on && let Err(problem) = self.look_at(scope, kept.vm) {
                tracing::warn!(vm = %kept.vm, "whether it is to start with this host can't be seen: {problem}");
                self.seen = None;
            }
        }
        Some(LOOK)
    }

    fn openers(&self) -> Openers {
        let providers = self.daemon.recipients.providers().into_iter();
        let opener = |provider| Some((provider, self.opener(provider)?.keys()));
        providers
            .filter_map(|known| opener(known.provider().id()))
            .collect()
    }

    fn opener(&self, provider: ProviderId) -> Option<Opener> {
        let known = self.daemon.recipients.by_id(provider)?;
        Some(Opener {
            name: known.provider().name().to_owned(),
            status: known.provider().status(),
            has_cache: known.cache().is_some(),
            kind: known.row(),
        })
    }

    fn look_at<'scope>(&self, scope: &'scope Scope<'scope, '_>, vm: VmId) -> Result<(), Problem>
    where
        'a: 'scope,
    {
        let daemon = self.daemon;
        let defined = self.libvirt.domain(&vm.to_string());
        // One whose name is this UUID is another VM.
        let defined = defined
            .map_err(|error| names::unreachable(&error))?
            .filter(|defined| defined.vm == vm);
        let (presence, keys) = match &defined {
            None => (Presence::Undefined, Keys::Missing),
            Some(defined) if defined.active => (Presence::Active, Keys::Ready),
            Some(defined) => (Presence::Off, self.keys_of(defined)),
        };
        // Not before that: one that was started and stopped while another was starting is seen here.
        let kept = daemon.host_store.autostart(vm)?;
        let facts = Facts {
            this_boot: ThisBoot::of(kept.as_ref(), self.boot),
            presence,
            keys,
            tries: lock(&daemon.autostarts).tries(vm, Instant::now()),
        };
        match (autostart::decide(&facts), defined, kept) {
            (Decision::Start, Some(defined), Some(kept)) => self.start(scope, &defined, &kept),
            (Decision::Settle, ..) => settle(daemon, vm, self.boot, None),
            (Decision::Start | Decision::Wait | Decision::LeaveAlone, ..) => {}
        }
        Ok(())
    }

    fn keys_of(&self, defined: &DefinedDomain) -> Keys {
        // What can't be read, or is not known here, is for the start to tell.
        let known = Domain::parse(&defined.xml).map_or_else(|_| Vec::new(), |domain| self.envelopes(&domain));
        let (keys, waits_for) = autostart::keys(&defined.name, &known, |provider| self.opener(provider));
        lock(&self.daemon.autostarts).note_keys(defined.vm, keys, waits_for);
        keys
    }

    fn envelopes(&self, domain: &Domain) -> Vec<Envelope> {
        let objects = domain::objects(domain);
        let sealed = objects.iter().filter_map(Object::envelope);
        sealed
            .filter_map(|id| self.daemon.keystore.readable_envelope(id).ok().flatten())
            .map(|record| record.envelope)
            .collect()
    }

    fn start<'scope>(&self, scope: &'scope Scope<'scope, '_>, defined: &DefinedDomain, before: &Autostart)
    where
        'a: 'scope,
    {
        let (daemon, libvirt, vm, name) = (self.daemon, self.libvirt, defined.vm, &defined.name);
        let (failures, starts) = {
            let mut attempts = lock(&daemon.autostarts);
            (attempts.begin(vm), attempts.starts(vm))
        };
        tracing::info!(domain = name, op = "autostart", "starting with this host");
        let (sender, receiver) = sync_channel(1);
        let thread = Builder::new().name("autostart".to_owned());
        let started = thread.spawn_scoped(scope, move || {
            // Nobody may wait any more.
            let _ = sender.send(libvirt.start(vm).map_err(|error| chain(&error)));
        });
        let outcome = match started {
            Ok(_) => receiver.recv_timeout(START).ok(),
            Err(error) => Some(Err(error.to_string())),
        };
        let refusal = lock(&daemon.autostarts).end(vm);
        let Some(outcome) = outcome else {
            let what = format!("{name} has been starting for more than {} s", START.as_secs());
            tracing::warn!(domain = name, op = "autostart", "{what}");
            let found = Finding::warning(FindingCode::AutostartSlow, Subject::Vm(name.clone()), what);
            return settle(daemon, vm, self.boot, Some(found));
        };
        let result = outcome.clone().map_err(Problem::failed);
        records::note_vm(daemon, Actor::Virtseald, "autostart", vm, name, &result);
        daemon.glances.expire();
        let Err(why) = outcome else {
            tracing::info!(domain = name, op = "autostart", "started");
            return settle(daemon, vm, self.boot, None);
        };
        let found = autostart::failed(name, refusal, &why);
        tracing::warn!(domain = name, op = "autostart", "{found}");
        // One that somebody has ended in the middle is off for another reason.
        if matches!(libvirt.has_failed_to_start(vm), Ok(true)) {
            let before = *before;
            take_back(daemon, &Settled { before, starts });
        }
        match daemon.host_store.autostart(vm) {
            Ok(None) => lock(&daemon.autostarts).forget(vm),
            Ok(Some(kept)) if kept.settled != self.boot => {
                lock(&daemon.autostarts).note_failure(vm, failures, found, Instant::now());
            }
            // Somebody else was faster, or has ended it.
            Ok(Some(_)) | Err(_) => {
                let runs = matches!(libvirt.domain(&vm.to_string()), Ok(Some(now)) if now.active);
                settle(daemon, vm, self.boot, (!runs).then_some(found));
            }
        }
    }
}

/// What a start has changed before the keys of its VM were armed.
pub(super) struct Settled {
    before: Autostart,
    starts: Starts,
}

/// Before the keys of a VM are armed for a start, whoever has asked for that: it is left alone from now on until the next boot. Gives what
/// [`take_back`] needs.
pub(super) fn note_start(daemon: &Daemon, vm: VmId) -> Option<Settled> {
    let boot = daemon.boot?;
    let before = daemon.host_store.autostart(vm);
    if matches!(before, Ok(None)) {
        return None;
    }
    let starts = lock(&daemon.autostarts).note_start(vm);
    match daemon.host_store.settle_autostart(vm, boot) {
        Ok(Change::Unchanged) => None,
        Ok(Change::Changed) => {
            lock(&daemon.autostarts).forget(vm);
            before.ok().flatten().map(|before| Settled { before, starts })
        }
        Err(error) => {
            tracing::error!(%vm, "can't record that it was started in this boot: {}", chain(&error));
            lock(&daemon.autostarts).settle(vm, None);
            None
        }
    }
}

/// It has not run after all: unless it was started once more meanwhile, for then it may have, and somebody has stopped it. A start that
/// begins just now waits for this, and settles it anew.
pub(super) fn take_back(daemon: &Daemon, Settled { before, starts }: &Settled) {
    let mut attempts = lock(&daemon.autostarts);
    if !attempts.forget_start(before.vm, *starts) {
        return;
    }
    if let Err(error) = daemon.host_store.settle_autostart(before.vm, before.settled) {
        tracing::error!(vm = %before.vm, "can't record that it was not started in this boot: {}", chain(&error));
    }
}

fn settle(daemon: &Daemon, vm: VmId, boot: BootId, found: Option<Finding>) {
    if let Err(error) = daemon.host_store.settle_autostart(vm, boot) {
        tracing::error!(%vm, "can't record that it is settled for this boot: {}", chain(&error));
    }
    lock(&daemon.autostarts).settle(vm, found);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn start(daemon: &Daemon, vm: VmId) -> Option<Settled> {
        let before = uuid::Uuid::nil().to_string().parse().unwrap();
        daemon.host_store.enable_autostart(vm, before).unwrap();
        note_start(daemon, vm)
    }

    /// Whether it is left alone in this boot after a start that did not come to run, and what happened `meanwhile`.
    fn is_settled(meanwhile: impl FnOnce(&Daemon, VmId)) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            state_dir: dir.path().to_owned(),
            ..Config::default()
        };
        let daemon = Daemon::open(config).unwrap();
        let vm = VmId::random();
        let settled = start(&daemon, vm).unwrap();
        meanwhile(&daemon, vm);
        take_back(&daemon, &settled);
        ThisBoot::of(
            daemon.host_store.autostart(vm).unwrap().as_ref(),
            daemon.boot.unwrap(),
        ) == ThisBoot::Settled
    }

    #[test]
    fn a_vm_that_was_started_meanwhile_may_have_been_stopped_and_is_left_alone() {
        assert!(!is_settled(|_, _| {}));
        assert!(!is_settled(|daemon, _| assert!(
            start(daemon, VmId::random()).is_some()
        )));
        assert!(is_settled(|daemon, vm| assert!(start(daemon, vm).is_none())));
        assert!(is_settled(|daemon, vm| lock(&daemon.autostarts).note_running(vm)));
    }
}

//! What a hook waits for: a VM is about to start, has started, or is gone.
//!
//! The answer is ready before the hook's deadline or not at all: a start that nobody waits for any more arms nothing.

use std::time::{Duration, Instant};

use super::state::Daemon;
use super::{autostart, first_runs, lock, moved, paths, records, saved};
use crate::audit::Actor;
use crate::domain::{self, Domain, Object};
use crate::host::libvirt::{Arming, LibvirtError};
use crate::model::advice::Advice;
use crate::model::envelope::EnvelopeId;
use crate::model::problem::{Code, Problem, chain};
use crate::store::EnvelopeRecord;
use crate::vm::first_runs::vtpm_of;
use crate::vm::names;
use crate::vm::start::{self, Deadline, Opened, Prepared, StartContext, StateSource};

/// The part of a hook's deadline after which a libvirt that says nothing is taken to be autostarting.
const LIBVIRT_SHARE: f64 = 0.3;

/// The part of it that a start waits for what unlocks providers as virtseald starts.
const UNLOCKS_SHARE: f64 = 0.4;

/// What hook.conf wants of every VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HookPolicy {
    /// Nothing: plain VMs start.
    Any,
    /// `require_sealed`. The mark of a sealed VM is not enough: something of it must be.
    RequireSealed,
}

impl Daemon {
    /// How long a hook's call may take: a little less than the hook waits, so that the reason reaches the user.
    pub(crate) fn hook_deadline(&self) -> Duration {
        self.config().hook_deadline.mul_f64(0.9)
    }

    /// What a hook is told when time is up.
    pub(crate) fn deadline_passed(&self, waited: Duration) -> Problem {
        let libvirt = if self.libvirt.is_connected() {
            ""
        } else {
            ": libvirt does not answer"
        };
        Problem::unreachable(format!(
            "no decision within {:.1} s{libvirt}",
            waited.as_secs_f64()
        ))
        .next(Advice::ShowStatus)
    }

    /// `prepare begin`: arms all keys of the VM, or none.
    pub(crate) fn prepare(
        &self,
        by: Actor,
        xml: &str,
        policy: HookPolicy,
        master_key_on_disk: Option<&str>,
        deadline: &Deadline,
    ) -> Result<(), Problem> {
        let domain = Domain::parse(xml).map_err(|error| Problem::failed(chain(&error)))?;
        lock(&self.prepared).insert(domain.uuid);
        // What was said of that counts for one start, whatever it takes to decide.
        let source = self
            .first_runs
            .lock()
            .state_source(domain.uuid, vtpm_of(&domain), Instant::now());
        let decide = || self.decide(&domain, xml, policy, source, deadline);
        let unlocks_go_on = self.first_unlocks.go_on();
        let mut decided = decide();
        let waits_for_keys =
            matches!(&decided, Err(refused) if matches!(refused.code, Code::Locked | Code::Unreachable));
        let patience = self.config().hook_deadline.mul_f64(UNLOCKS_SHARE);
        if unlocks_go_on && waits_for_keys && self.first_unlocks.wait(patience) {
            decided = decide();
        }
        records::note_start(self, by, &domain, &decided);
        match &decided {
            Ok(objects) => tracing::info!(domain = domain.name, objects, op = "prepare", "armed"),
            Err(failure) => {
                tracing::warn!(domain = domain.name, op = "prepare", "refused: {failure}");
                lock(&self.autostarts).note_refusal(domain.uuid, failure);
            }
        }
        if decided.is_ok() {
            self.note_master_key(&domain, master_key_on_disk);
        }
        decided.map(drop)
    }

    /// For the status. A start does not fail for it: the hook's policy lets it pass, and the journal has it too.
    fn note_master_key(&self, domain: &Domain, on_disk: Option<&str>) {
        let noted = match on_disk {
            Some(why) => self.host_store.note_master_key_on_disk(domain.uuid, why),
            None => self.host_store.forget_master_key_on_disk(domain.uuid),
        };
        if let Err(error) = noted {
            tracing::error!(
                domain = domain.name,
                "can't record where its master key is: {}",
                chain(&error)
            );
        }
    }

    /// A sealed VM may name its own secrets, in the places where they are looked for, and those of disks that are shared with
    /// it; libvirt finds any other one in more places than [`crate::vm::start::prepare`] reads.
    fn refuse_secrets_of_others(&self, domain: &Domain, xml: &str, opened: &[Opened]) -> Result<(), Problem> {
        let named = domain::named_secrets(xml).map_err(|error| Problem::failed(chain(&error)))?;
        let others = named
            .into_iter()
            .filter(|id| opened.iter().all(|object| object.envelope != *id));
        for id in others {
            let known = self.keystore.envelope(id)?;
            if let Some(owner) = known
                .map(|known| known.envelope.vm)
                .filter(|vm| *vm != domain.uuid)
            {
                let why = format!("it names secret {id}, which is that of VM {owner}");
                return Err(Problem::denied(why)
                    .of(format!("{} stays off", domain.name))
                    .next(Advice::EditXml(domain.name.clone()).within("a VM has secrets of its own")));
            }
        }
        Ok(())
    }

    fn decide(
        &self,
        domain: &Domain,
        xml: &str,
        policy: HookPolicy,
        state_source: StateSource,
        deadline: &Deadline,
    ) -> Result<usize, Problem> {
        let patience = self.config().hook_deadline.mul_f64(LIBVIRT_SHARE);
        let own = self.keystore.envelopes_of(domain.uuid)?.sound;
        let context = StartContext {
            keystore: self.keystore.as_ref(),
            host_store: &self.host_store,
            recipients: &self.recipients,
            opened_headers: &self.opened_headers,
            swtpm_dir: self.config().swtpm_dir,
            paths: paths::rule_of_start(self, domain, &own, patience)?,
            policy: self.config().policy.of(domain),
            run: first_runs::known_run(self, domain.uuid),
            state_source,
        };
        // Until the VM is armed: from then on that keeps its headers as they are.
        let known = |id| match own.iter().find(|record| record.envelope.id == id) {
            Some(record) => Some(record.clone()),
            None => self.keystore.readable_envelope(id).ok().flatten(),
        };
        let _held = self.headers.hold(held_by(domain, known), deadline);
        let Prepared {
            opened,
            first_run,
            moved,
        } = start::prepare(&context, domain)?;
        if opened.is_empty() && policy == HookPolicy::RequireSealed {
            return Err(nothing_sealed(domain));
        }
        self.refuse_secrets_of_others(domain, xml, &opened)?;
        // Who else may have what is armed is seen by this alone.
        self.host_store
            .ensure_hook_index()
            .map_err(|error| Problem::from(error).of(format!("{} stays off", domain.name)))?;
        self.libvirt
            .reach(patience)
            .map_err(|error| unreachable_libvirt(domain, &error))?;
        let count = opened.len();
        let settled = autostart::note_start(self, domain.uuid);
        self.first_runs.lock().expect(domain.uuid, first_run);
        self.arm(domain, opened, deadline).inspect_err(|_| {
            self.first_runs.lock().expect(domain.uuid, None);
            if let Some(settled) = &settled {
                autostart::take_back(self, settled);
            }
        })?;
        moved::note(self, moved);
        Ok(count)
    }

    /// Arms unless nobody waits any more: the hook has given up then, and its `release end` may have passed.
    fn arm(&self, domain: &Domain, opened: Vec<Opened>, deadline: &Deadline) -> Result<(), Problem> {
        let too_late = || {
            Problem::unreachable(format!(
                "{} stays off: nobody waits for its start any more",
                domain.name
            ))
            .next(Advice::ShowStatus)
        };
        if deadline.has_passed() {
            return Err(too_late());
        }
        let envelopes: Vec<_> = opened.iter().map(|object| object.envelope).collect();
        if !self.armed.arm(domain.uuid, &envelopes, deadline) {
            return Err(too_late());
        }
        self.arms_bell.ring();
        let secrets: Vec<_> = opened.into_iter().map(|object| arming(domain, object)).collect();
        let armed = self
            .libvirt
            .arm(&secrets)
            .map_err(|error| unreachable_libvirt(domain, &error));
        let failed = match armed {
            Ok(()) if !deadline.has_passed() => return Ok(()),
            Ok(()) => too_late(),
            Err(failure) => failure,
        };
        self.take_back(domain, envelopes);
        Err(failed)
    }

    /// Undefines what no other VM needs, also where `release end` came meanwhile: it may have found less than what
    /// there is now.
    fn take_back(&self, domain: &Domain, envelopes: Vec<EnvelopeId>) {
        if let Err(error) = self
            .libvirt
            .disarm(&self.armed.disarm_with(domain.uuid, envelopes))
        {
            tracing::error!(domain = domain.name, "{}", chain(&error));
        }
    }

    /// `started begin`: QEMU and swtpm have the keys, libvirt needs them no more.
    pub(crate) fn started(&self, vm: &str, name: &str) -> Result<(), Problem> {
        saved::look_later(self, vm);
        let disarmed = self.disarm(vm, name);
        if let Ok(vm) = names::uuid_of_hook(vm) {
            lock(&self.autostarts).note_running(vm);
            first_runs::note_running(self, vm, name);
        }
        disarmed
    }

    /// `release end`: whatever happened, nothing stays armed.
    pub(crate) fn released(&self, vm: &str, name: &str) -> Result<(), Problem> {
        let disarmed = self.disarm(vm, name);
        saved::look_later(self, vm);
        if let Ok(vm) = names::uuid_of_hook(vm) {
            lock(&self.prepared).remove(&vm);
            first_runs::note_ended(self, vm, name);
            if let Err(error) = self.host_store.forget_master_key_on_disk(vm) {
                tracing::error!(
                    domain = name,
                    "can't record that its master key is gone: {}",
                    chain(&error)
                );
            }
        }
        // Its images can follow what was rewrapped while it ran.
        self.copies_bell.ring();
        disarmed
    }

    fn disarm(&self, vm: &str, name: &str) -> Result<(), Problem> {
        let vm = names::uuid_of_hook(vm)?;
        let unused = self.armed.disarm(vm);
        self.libvirt.disarm(&unused).map_err(|error| {
            unused.stay_armed(vm);
            tracing::error!(domain = name, op = "disarm", "{}", chain(&error));
            Problem::unreachable(chain(&error))
        })
    }

    /// Undefines the secrets that a daemon before this one left in libvirt. Connects when it has to.
    ///
    /// Only what this keystore knows: another virtseald may be starting a VM of its own on the same libvirt.
    pub(crate) fn sweep(&self) -> Result<usize, LibvirtError> {
        let armed = self.libvirt.armed()?;
        let known = armed
            .into_iter()
            .filter(|envelope| match self.keystore.envelope(*envelope) {
                Ok(known) => known.is_some(),
                Err(error) => error.is_of_row(),
            })
            .collect();
        let left = self.armed.unneeded(known);
        self.libvirt.disarm(&left)?;
        Ok(left.len())
    }
}

/// The envelopes that nothing may change while the VM starts: not those that the keystore knows not to be for it. Whoever defines
/// domains can name any in them, and would keep their headers, and who shreds their VM, waiting with starts that are refused.
fn held_by(domain: &Domain, known: impl Fn(EnvelopeId) -> Option<EnvelopeRecord>) -> Vec<EnvelopeId> {
    let objects = domain::objects(domain);
    let sealed = objects.iter().filter_map(Object::envelope);
    sealed
        .filter(|id| known(*id).is_none_or(|record| record.envelope.serves(domain.uuid)))
        .collect()
}

fn arming(domain: &Domain, object: Opened) -> Arming {
    Arming {
        envelope: object.envelope,
        kind: object.kind,
        description: format!("virtseal: {} of {}", object.label, domain.name),
        passphrase: object.passphrase,
    }
}

fn nothing_sealed(domain: &Domain) -> Problem {
    let name = &domain.name;
    let why = "it is marked as sealed, nothing of it is, and hook.conf has require_sealed = true";
    Problem::denied(why).of(format!("{name} stays off")).next(
        Advice::ShowVm(name.clone())
            .then("give it a disk or a TPM")
            .then(Advice::SealVm(name.clone())),
    )
}

fn unreachable_libvirt(domain: &Domain, error: &LibvirtError) -> Problem {
    let name = &domain.name;
    let failure = Problem::unreachable(format!("{name} stays off: {}", chain(error)));
    match error {
        LibvirtError::Silent { .. } => {
            let autostart = Advice::Autostart(name.clone()).note("if libvirt autostarts it");
            failure.next(autostart.then(Advice::StartVm(name.clone())))
        }
        LibvirtError::Usurped { .. } => failure.next(
            "keep others from defining secrets: SECURITY.md, \"Write access to secrets\"; then copy the data to a new disk in the guest",
        ),
        _ => failure.next(Advice::ShowStatus),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{VmId, fixture};
    use crate::store::EnvelopeState;

    #[test]
    fn a_start_keeps_nobody_from_what_is_not_for_its_vm() {
        let [own, another, sharer] = [0; 3].map(|_| VmId::random());
        let record = |vm, shared_with: &[VmId]| {
            let mut envelope = fixture::envelope(vm).into_envelope();
            envelope.shared_with = shared_with.to_vec();
            EnvelopeRecord {
                envelope,
                state: EnvelopeState::Active,
                location: String::new(),
                created: 0,
                updated: 0,
            }
        };
        let records = [record(own, &[]), record(another, &[sharer])];
        let unknown = EnvelopeId::random();
        let ids: Vec<_> = records.iter().map(|record| record.envelope.id).collect();
        let disks: String = ids
            .iter()
            .chain([&unknown])
            .zip(["vda", "vdb", "vdc"])
            .map(|(id, target)| {
                format!(
                    "<disk type='file'><source file='/images/{target}'><encryption format='luks'><secret type='passphrase' \
                     uuid='{id}'/></encryption></source><target dev='{target}'/></disk>"
                )
            })
            .collect();
        let held = |vm: VmId| {
            let xml = format!(
                "<domain type='kvm'><name>a</name><uuid>{vm}</uuid><devices>{disks}</devices></domain>"
            );
            held_by(&Domain::parse(&xml).unwrap(), |id| {
                records.iter().find(|record| record.envelope.id == id).cloned()
            })
        };
        assert_eq!(held(own), [ids[0], unknown]);
        assert_eq!(held(another), [ids[1], unknown]);
        assert_eq!(held(sharer), [ids[1], unknown]);
        assert_eq!(held(VmId::random()), [unknown]);
    }
}

//! What a hook waits for: a VM is about to start, has started, or is gone.
//!
//! The answer is ready before the hook's deadline or not at all: a start that nobody waits for any more arms nothing.

use std::time::{Duration, Instant};

use super::state::Daemon;
use super::{first_runs, lock, moved, paths, records, saved};
use crate::audit::Actor;
use crate::domain::{self, Domain, ObjectState};
use crate::host::libvirt::{Arming, LibvirtError};
use crate::model::advice::Advice;
use crate::model::envelope::EnvelopeId;
use crate::model::problem::{Code, Problem, chain};
use crate::vm::first_runs::vtpm_of;
use crate::vm::names;
use crate::vm::start::{self, Deadline, Opened, Prepared, StartContext};

/// The part of a hook's deadline after which a libvirt that says nothing is taken to be autostarting.
const LIBVIRT_SHARE: f64 = 0.3;

/// What hook.conf wants of every VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPolicy {
    /// Nothing: plain VMs start.
    Any,
    /// `require_sealed`. The mark of a sealed VM is not enough: something of it must be.
    RequireSealed,
}

impl Daemon {
    /// How long a hook's call may take: a little less than the hook waits, so that the reason reaches the user.
    #[must_use]
    pub fn hook_deadline(&self) -> Duration {
        self.config().hook_deadline.mul_f64(0.9)
    }

    /// What a hook is told when time is up.
    #[must_use]
    pub fn deadline_passed(&self, waited: Duration) -> Problem {
        let libvirt = if self.libvirt.is_connected() {
            ""
        } else {
            ": libvirt does not answer"
        };
        Problem::new(
            Code::Unreachable,
            format!("no decision within {:.1} s{libvirt}", waited.as_secs_f64()),
        )
        .next(Advice::ShowStatus)
    }

    /// `prepare begin`: arms all keys of the VM, or none.
    pub fn prepare(
        &self,
        by: Actor,
        xml: &str,
        policy: HookPolicy,
        deadline: &Deadline,
    ) -> Result<(), Problem> {
        let domain = Domain::parse(xml).map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
        let decided = self.decide(&domain, xml, policy, deadline);
        records::note_start(self, by, &domain, &decided);
        match &decided {
            Ok(objects) => tracing::info!(domain = domain.name, objects, op = "prepare", "armed"),
            Err(failure) => tracing::warn!(domain = domain.name, op = "prepare", "refused: {failure}"),
        }
        decided.map(drop)
    }

    /// A sealed VM may name its own secrets, in the places where they are looked for, and those of disks that are shared with
    /// it; libvirt finds any other one in more places than [`crate::vm::start::prepare`] reads.
    fn refuse_secrets_of_others(&self, domain: &Domain, xml: &str, opened: &[Opened]) -> Result<(), Problem> {
        let named = domain::named_secrets(xml).map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
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
                return Err(Problem::new(Code::Denied, why)
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
        deadline: &Deadline,
    ) -> Result<usize, Problem> {
        let patience = self.config().hook_deadline.mul_f64(LIBVIRT_SHARE);
        let context = StartContext {
            keystore: self.keystore.as_ref(),
            host_store: &self.host_store,
            recipients: &self.recipients,
            opened_headers: &self.opened_headers,
            swtpm_dir: self.config().swtpm_dir,
            paths: paths::rule_of_start(self, domain, patience)?,
            policy: self.config().policy.of(domain),
            run: first_runs::known_run(self, domain.uuid),
            state_source: lock(&self.first_runs).state_source(domain.uuid, vtpm_of(domain), Instant::now()),
        };
        // Until the VM is armed: from then on that keeps its headers as they are.
        let _held = self.headers.hold(envelopes_of(domain), deadline);
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
        lock(&self.first_runs).expect(domain.uuid, first_run);
        self.arm(domain, opened, deadline)
            .inspect_err(|_| lock(&self.first_runs).expect(domain.uuid, None))?;
        moved::note(self, moved);
        Ok(count)
    }

    /// Arms unless nobody waits any more: the hook has given up then, and its `release end` may have passed.
    fn arm(&self, domain: &Domain, opened: Vec<Opened>, deadline: &Deadline) -> Result<(), Problem> {
        let too_late = || {
            Problem::new(
                Code::Unreachable,
                format!("{} stays off: nobody waits for its start any more", domain.name),
            )
            .next(Advice::ShowStatus)
        };
        if deadline.has_passed() {
            return Err(too_late());
        }
        let shareable = opened.iter().any(|object| object.shareable);
        let _shared = shareable.then(|| lock(&self.shared));
        let envelopes: Vec<_> = opened.iter().map(|object| object.envelope).collect();
        lock(&self.armed).arm(domain.uuid, envelopes.iter().copied());
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
    fn take_back(&self, domain: &Domain, mut envelopes: Vec<EnvelopeId>) {
        let mut arms = lock(&self.armed);
        let _ = arms.disarm(domain.uuid);
        envelopes.retain(|envelope| !arms.needs(*envelope));
        drop(arms);
        if let Err(error) = self.libvirt.disarm(&envelopes) {
            tracing::error!(domain = domain.name, "{}", chain(&error));
        }
    }

    /// `started begin`: QEMU and swtpm have the keys, libvirt needs them no more.
    pub fn started(&self, vm: &str, name: &str) -> Result<(), Problem> {
        saved::look_later(self, vm);
        let disarmed = self.disarm(vm, name);
        if let Ok(vm) = names::uuid_of_hook(vm) {
            first_runs::note_running(self, vm, name);
        }
        disarmed
    }

    /// `release end`: whatever happened, nothing stays armed.
    pub fn released(&self, vm: &str, name: &str) -> Result<(), Problem> {
        let disarmed = self.disarm(vm, name);
        saved::look_later(self, vm);
        if let Ok(vm) = names::uuid_of_hook(vm) {
            first_runs::note_ended(self, vm, name);
        }
        // Its images can follow what was rewrapped while it ran.
        self.copies_bell.ring();
        disarmed
    }

    fn disarm(&self, vm: &str, name: &str) -> Result<(), Problem> {
        let vm = names::uuid_of_hook(vm)?;
        let _shared = lock(&self.shared);
        let unused = lock(&self.armed).disarm(vm);
        self.libvirt.disarm(&unused).map_err(|error| {
            // Remembered, so that `release end` or the next start tries again.
            lock(&self.armed).arm(vm, unused.iter().copied());
            tracing::error!(domain = name, op = "disarm", "{}", chain(&error));
            Problem::new(Code::Unreachable, chain(&error))
        })
    }

    /// Undefines the secrets that a daemon before this one left in libvirt. Connects when it has to.
    ///
    /// Only what this keystore knows: another virtseald may be starting a VM of its own on the same libvirt.
    pub fn sweep(&self) -> Result<usize, LibvirtError> {
        let armed = self.libvirt.armed()?;
        let _shared = lock(&self.shared);
        // Held until they are gone: a start that needs one of them again defines it after that.
        let arms = lock(&self.armed);
        let left: Vec<EnvelopeId> = armed
            .into_iter()
            .filter(|envelope| match self.keystore.envelope(*envelope) {
                Ok(known) => known.is_some(),
                Err(error) => error.is_of_row(),
            })
            .filter(|envelope| !arms.needs(*envelope))
            .collect();
        self.libvirt.disarm(&left)?;
        Ok(left.len())
    }
}

fn envelopes_of(domain: &Domain) -> Vec<EnvelopeId> {
    let sealed = domain::objects(domain)
        .into_iter()
        .filter_map(|object| match object.state {
            ObjectState::Sealed(envelope) => Some(envelope),
            ObjectState::Plain | ObjectState::Unsupported(_) => None,
        });
    sealed.collect()
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
    Problem::new(Code::Denied, why)
        .of(format!("{name} stays off"))
        .next(
            Advice::ShowVm(name.clone())
                .then("give it a disk or a TPM")
                .then(Advice::SealVm(name.clone())),
        )
}

fn unreachable_libvirt(domain: &Domain, error: &LibvirtError) -> Problem {
    let name = &domain.name;
    let failure = Problem::new(Code::Unreachable, format!("{name} stays off: {}", chain(error)));
    match error {
        LibvirtError::Silent { .. } => failure.next(Advice::NoAutostart(name.clone()).then(Advice::StartVm(name.clone()))),
        LibvirtError::Usurped { .. } => failure.next(
            "keep others from defining secrets: SECURITY.md, \"Write access to secrets\"; then copy the data to a new disk in the guest",
        ),
        _ => failure.next(Advice::ShowStatus),
    }
}

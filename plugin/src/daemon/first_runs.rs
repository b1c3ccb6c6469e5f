//! Notes that a VM has run, so that a vTPM whose state is missing afterwards is taken for lost, here and wherever the envelope
//! travels. The order, and what each death on the way leaves, is in docs/adr/0012.
//!
//! Nobody waits here for a provider or for libvirt, and nothing fails a guest: what can't be written down is kept in memory, and
//! tried again.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use swtpm_state::{State, libvirt_state_dir};

use super::{Daemon, lock, vm_id};
use crate::domain::{self, Domain, ObjectState};
use crate::model::envelope::{EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::store::{CopyPlace, KeystoreError};
use crate::vm::start::{FirstRun, KnownRun, StateSource};

/// How long after `migrate` or `restore` its `prepare` may come: libvirt waits 30 s for another job on the VM between the two.
const ARRIVAL: Duration = Duration::from_secs(35);

/// What is to be noted of VMs, and what comes with them.
#[derive(Debug, Default)]
pub(super) struct FirstRuns {
    runs: Mutex<BTreeMap<VmId, Run>>,
    /// What libvirt said will start with a state from elsewhere.
    arriving: Mutex<BTreeMap<VmId, Arrival>>,
}

/// A vTPM whose state comes with its VM.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    vtpm: EnvelopeId,
    heard: Instant,
}

/// A first run.
#[derive(Clone, Debug)]
enum Run {
    /// It may come.
    Expected(FirstRun),
    /// It came, and that is not written down yet.
    Heard { name: String, first: Option<FirstRun> },
}

impl FirstRuns {
    /// What a `prepare` found to be noted, in place of what an earlier one did. What was heard stays.
    pub(super) fn expect(&self, vm: VmId, first: Option<FirstRun>) {
        let mut runs = lock(&self.runs);
        if matches!(runs.get(&vm), Some(Run::Heard { .. })) {
            return;
        }
        match first {
            Some(first) => runs.insert(vm, Run::Expected(first)),
            None => runs.remove(&vm),
        };
    }

    /// Where the state of the vTPM of a VM that starts now comes from. What was said counts for one start, and for the vTPM
    /// that it was said of.
    pub(super) fn state_source(&self, vm: VmId, vtpm: Option<EnvelopeId>) -> StateSource {
        let mut arriving = lock(&self.arriving);
        arriving.retain(|_, arrival| arrival.heard.elapsed() < ARRIVAL);
        match arriving.remove(&vm) {
            Some(arrival) if Some(arrival.vtpm) == vtpm => StateSource::Stream,
            Some(_) | None => StateSource::Disk,
        }
    }

    /// It has come, or it will not: the next start of this VM is another one.
    fn has_arrived(&self, vm: VmId) {
        lock(&self.arriving).remove(&vm);
    }

    fn hear(&self, vm: VmId, name: &str, first: Option<FirstRun>) {
        let name = name.to_owned();
        lock(&self.runs).insert(vm, Run::Heard { name, first });
    }

    fn heard(&self) -> Vec<(VmId, String, Option<FirstRun>)> {
        let runs = lock(&self.runs);
        let heard = runs.iter().filter_map(|(vm, run)| match run {
            Run::Heard { name, first } => Some((*vm, name.clone(), first.clone())),
            Run::Expected(_) => None,
        });
        heard.collect()
    }
}

impl Daemon {
    /// `migrate begin` or `restore begin`: the state of the vTPM comes in the stream, so none has to be here.
    pub fn arriving(&self, vm: &str, xml: &str) -> Result<(), Problem> {
        let vm = vm_id(vm)?;
        let domain = Domain::parse(xml).map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
        if let Some(vtpm) = vtpm_of(&domain).filter(|_| domain.uuid == vm) {
            let heard = Instant::now();
            lock(&self.first_runs.arriving).insert(vm, Arrival { vtpm, heard });
        }
        Ok(())
    }

    /// Before a `prepare`: what was heard and could not be written counts all the same.
    pub(super) fn known_run(&self, vm: VmId) -> KnownRun {
        self.write_runs();
        match lock(&self.first_runs.runs).get(&vm) {
            Some(Run::Heard { .. }) => KnownRun::Yes,
            Some(Run::Expected(_)) | None => KnownRun::AsKept,
        }
    }

    /// The VM runs: swtpm has made its state, unless that is still to come from another host.
    pub(super) fn note_running(&self, vm: VmId, name: &str) {
        self.first_runs.has_arrived(vm);
        let expected = {
            let mut runs = lock(&self.first_runs.runs);
            match runs.remove(&vm) {
                Some(Run::Expected(first)) => Some(first),
                Some(heard @ Run::Heard { .. }) => {
                    runs.insert(vm, heard);
                    None
                }
                None => None,
            }
        };
        if let Some(first) = expected
            && self.has_state(vm)
        {
            self.first_runs.hear(vm, name, Some(first));
        }
        self.write_runs();
        self.copies_bell.ring();
    }

    /// The VM has ended. A first start that came no further than `prepare` does not count: libvirt may be about to delete what
    /// swtpm made. Of a start that this daemon knows nothing of, a state that is there tells that there was one.
    pub(super) fn note_ended(&self, vm: VmId, name: &str) {
        self.first_runs.has_arrived(vm);
        let expected = {
            let mut runs = lock(&self.first_runs.runs);
            let is_expected = matches!(runs.get(&vm), Some(Run::Expected(_)));
            is_expected.then(|| runs.remove(&vm))
        };
        if expected.is_none() && self.is_unnoted(vm) && self.has_state(vm) {
            self.first_runs.hear(vm, name, None);
        }
        self.write_runs();
    }

    /// Writes down what was heard. What can't be written stays.
    pub(super) fn write_runs(&self) {
        for (vm, name, first) in self.first_runs.heard() {
            match self.write_run(vm, &name, first.as_ref()) {
                Ok(()) => {
                    lock(&self.first_runs.runs).remove(&vm);
                }
                Err(error) => tracing::error!(
                    domain = name,
                    "that it has run can't be noted, and is tried again: {}",
                    chain(&error)
                ),
            }
        }
    }

    fn write_run(&self, vm: VmId, name: &str, first: Option<&FirstRun>) -> Result<(), KeystoreError> {
        let known = self.keystore.envelopes_of(vm)?;
        // A damaged row is one, and is mended below.
        let is_noted = !matches!(self.keystore.vm(vm), Ok(None));
        if !is_noted && known.is_empty() {
            // Shredded meanwhile.
            return Ok(());
        }
        self.keystore.remember_vm(vm, name)?;
        self.keystore.set_vtpm_seen(vm)?;
        let Some(FirstRun { before, after }) = first else {
            return Ok(());
        };
        // One that a job has changed meanwhile learns of it at the next start, from the note.
        let record = self.keystore.readable_envelope(after.id)?;
        if record.is_some_and(|record| record.envelope == *before) {
            self.keystore.put(after, "")?;
            self.keystore.copy_is_behind(before, CopyPlace::Xml)?;
        }
        Ok(())
    }

    fn is_unnoted(&self, vm: VmId) -> bool {
        let record = self.keystore.vm(vm);
        record.is_ok_and(|record| record.is_some_and(|record| !record.vtpm_seen))
    }

    fn has_state(&self, vm: VmId) -> bool {
        let dir = libvirt_state_dir(&self.config().swtpm_dir, &vm);
        matches!(State::read(&dir), Ok(State::Encrypted(_)))
    }
}

/// The envelope of the domain's vTPM.
pub(super) fn vtpm_of(domain: &Domain) -> Option<EnvelopeId> {
    let mut objects = domain::objects(domain).into_iter();
    let vtpm = objects.find(|object| object.kind == ObjectKind::Vtpm)?;
    match vtpm.state {
        ObjectState::Sealed(envelope) => Some(envelope),
        ObjectState::Plain | ObjectState::Unsupported(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(runs: &FirstRuns, vm: VmId, vtpm: EnvelopeId, ago: Duration) {
        let heard = Instant::now().checked_sub(ago).unwrap();
        lock(&runs.arriving).insert(vm, Arrival { vtpm, heard });
    }

    #[test]
    fn that_a_vm_comes_with_its_state_counts_for_one_start_of_that_vtpm() {
        let (runs, vm, vtpm) = (FirstRuns::default(), VmId::random(), EnvelopeId::random());
        heard(&runs, vm, vtpm, Duration::ZERO);
        assert_eq!(runs.state_source(VmId::random(), Some(vtpm)), StateSource::Disk);
        assert_eq!(runs.state_source(vm, Some(vtpm)), StateSource::Stream);
        assert_eq!(
            runs.state_source(vm, Some(vtpm)),
            StateSource::Disk,
            "it was said once"
        );
        for other in [Some(EnvelopeId::random()), None] {
            heard(&runs, vm, vtpm, Duration::ZERO);
            assert_eq!(runs.state_source(vm, other), StateSource::Disk);
            assert_eq!(runs.state_source(vm, Some(vtpm)), StateSource::Disk);
        }
        heard(&runs, vm, vtpm, ARRIVAL);
        assert_eq!(
            runs.state_source(vm, Some(vtpm)),
            StateSource::Disk,
            "it is too late"
        );
        heard(&runs, vm, vtpm, Duration::ZERO);
        runs.has_arrived(vm);
        assert_eq!(
            runs.state_source(vm, Some(vtpm)),
            StateSource::Disk,
            "it did not come"
        );
    }
}

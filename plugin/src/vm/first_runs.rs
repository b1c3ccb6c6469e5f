//! Which starts are to be noted, so that a vTPM whose state is missing afterwards is taken for lost, here and wherever the envelope
//! travels. The order, and what each death on the way leaves, is in docs/adr/0012.
//!
//! In memory alone: what can't be written down is kept here, and tried again.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::domain::{self, Domain};
use crate::model::deadlines::start::ARRIVAL;
use crate::model::envelope::{EnvelopeId, VmId};
use crate::vm::start::{FirstRun, KnownRun, StateSource};

/// What is to be noted of VMs, and what comes with them.
#[derive(Debug, Default)]
pub(crate) struct FirstRuns {
    runs: BTreeMap<VmId, Run>,
    /// What libvirt said will start with a state from elsewhere.
    arriving: BTreeMap<VmId, Arrival>,
}

/// A vTPM whose state comes with its VM.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    vtpm: EnvelopeId,
    heard: Instant,
}

#[derive(Clone, Debug)]
enum Run {
    /// It may come.
    Expected(FirstRun),
    /// It came, and that is not written down yet.
    Heard(HeardRun),
}

/// A run that is to be written down.
#[derive(Clone, Debug)]
pub(crate) struct HeardRun {
    pub name: String,
    /// What its envelope becomes by that, if a `prepare` of this daemon expected it.
    pub first: Option<FirstRun>,
}

impl FirstRuns {
    /// What a `prepare` found to be noted, in place of what an earlier one did. What was heard stays.
    pub(crate) fn expect(&mut self, vm: VmId, first: Option<FirstRun>) {
        match (self.runs.get(&vm), first) {
            (Some(Run::Heard(_)), _) => {}
            (_, Some(first)) => drop(self.runs.insert(vm, Run::Expected(first))),
            (_, None) => drop(self.runs.remove(&vm)),
        }
    }

    /// The state of this vTPM comes in a stream, so none has to be here.
    pub(crate) fn arrives(&mut self, vm: VmId, vtpm: EnvelopeId, now: Instant) {
        self.arriving.insert(vm, Arrival { vtpm, heard: now });
    }

    /// Where the state of the vTPM of a VM that starts now comes from. What was said counts for one start, and for the vTPM
    /// that it was said of.
    pub(crate) fn state_source(&mut self, vm: VmId, vtpm: Option<EnvelopeId>, now: Instant) -> StateSource {
        self.arriving
            .retain(|_, arrival| now.saturating_duration_since(arrival.heard) < ARRIVAL);
        match self.arriving.remove(&vm) {
            Some(arrival) if Some(arrival.vtpm) == vtpm => StateSource::Stream,
            Some(_) | None => StateSource::Disk,
        }
    }

    /// What was heard and could not be written counts all the same.
    pub(crate) fn known_run(&self, vm: VmId) -> KnownRun {
        match self.runs.get(&vm) {
            Some(Run::Heard(_)) => KnownRun::Yes,
            Some(Run::Expected(_)) | None => KnownRun::AsKept,
        }
    }

    /// The VM has started or ended, with what was to be noted of that. Its state has come, or it will not: the next start of this VM
    /// is another one.
    pub(crate) fn take_expected(&mut self, vm: VmId) -> Option<FirstRun> {
        self.arriving.remove(&vm);
        match self.runs.remove(&vm)? {
            Run::Expected(first) => Some(first),
            heard @ Run::Heard(_) => {
                self.runs.insert(vm, heard);
                None
            }
        }
    }

    /// It ran, and that is to be written down; what was heard before says more than nothing.
    pub(crate) fn hear(&mut self, vm: VmId, name: &str, first: Option<FirstRun>) {
        if first.is_none() && matches!(self.runs.get(&vm), Some(Run::Heard(_))) {
            return;
        }
        let name = name.to_owned();
        self.runs.insert(vm, Run::Heard(HeardRun { name, first }));
    }

    /// What is to be written down.
    pub(crate) fn heard(&self) -> Vec<(VmId, HeardRun)> {
        let runs = self.runs.iter();
        let heard = runs.filter_map(|(vm, run)| match run {
            Run::Heard(heard) => Some((*vm, heard.clone())),
            Run::Expected(_) => None,
        });
        heard.collect()
    }

    /// That was written down.
    pub(crate) fn forget(&mut self, vm: VmId) {
        self.runs.remove(&vm);
    }
}

/// The envelope of the domain's vTPM.
pub(crate) fn vtpm_of(domain: &Domain) -> Option<EnvelopeId> {
    let mut objects = domain::objects(domain).into_iter();
    let vtpm = objects.find(|object| object.kind.is_made_at_first_start())?;
    vtpm.envelope()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn that_a_vm_comes_with_its_state_counts_for_one_start_of_that_vtpm() {
        let (mut runs, vm, vtpm) = (FirstRuns::default(), VmId::random(), EnvelopeId::random());
        let (now, disk) = (Instant::now(), StateSource::Disk);
        runs.arrives(vm, vtpm, now);
        assert_eq!(runs.state_source(VmId::random(), Some(vtpm), now), disk);
        assert_eq!(runs.state_source(vm, Some(vtpm), now), StateSource::Stream);
        assert_eq!(runs.state_source(vm, Some(vtpm), now), disk, "it was said once");
        for other in [Some(EnvelopeId::random()), None] {
            runs.arrives(vm, vtpm, now);
            assert_eq!(runs.state_source(vm, other, now), disk);
            assert_eq!(runs.state_source(vm, Some(vtpm), now), disk);
        }
        runs.arrives(vm, vtpm, now);
        assert_eq!(
            runs.state_source(vm, Some(vtpm), now + ARRIVAL),
            disk,
            "it is too late"
        );
        runs.arrives(vm, vtpm, now);
        let _ = runs.take_expected(vm);
        assert_eq!(runs.state_source(vm, Some(vtpm), now), disk, "it did not come");
    }

    #[test]
    fn what_was_heard_stays_until_it_is_written() {
        let (mut runs, vm) = (FirstRuns::default(), VmId::random());
        assert_eq!(runs.known_run(vm), KnownRun::AsKept);
        runs.hear(vm, "a", None);
        runs.expect(vm, None);
        assert!(runs.take_expected(vm).is_none());
        assert_eq!(runs.known_run(vm), KnownRun::Yes);
        assert!(matches!(&runs.heard()[..], [(of, run)] if *of == vm && run.name == "a"));
        runs.forget(vm);
        assert_eq!(runs.known_run(vm), KnownRun::AsKept);
        assert!(runs.heard().is_empty());
    }
}

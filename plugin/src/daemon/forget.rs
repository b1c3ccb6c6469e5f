//! What `vm forget` and `vm adopt --from` ask for: this host's records of a VM go, into a file that brings them back.
//!
//! No key is destroyed, and no server is asked: the VM may run on another host. What must not happen is that the last envelope
//! of an object goes whose file is here. That a path has nothing now is no proof that there is nothing: its storage may not be
//! mounted. So what is dropped is kept first, see [`crate::vm::forgotten`].

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::paths;
use super::{Daemon, lock, records};
use crate::api::Outcome;
use crate::audit::Actor;
use crate::host::permitted::PathError;
use crate::model::advice::Advice;
use crate::model::envelope::{Precedence, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::{Located, Present};
use crate::store::{Change, EnvelopeRecord, Mark, Put, StoreError, VmRecord};
use crate::vm::forgotten::{self, Forgotten};
use crate::vm::names::{self, unreachable};

/// What is where an object was.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whereabouts {
    /// Nothing, as far as this host sees now.
    Absent,
    /// Something else.
    Another,
    /// An image that carries its envelope.
    Carries(Copy),
    /// Something encrypted that says nothing of its envelope, and may be the object.
    Unmarked,
    /// It can't be looked at.
    Unreadable(String),
}

/// How what an image carries compares with what the keystore has. Anybody who writes the image has written it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copy {
    /// It is the same.
    Same,
    /// It is another version, which opens.
    Opens(Precedence),
    /// It is another version, and was not opened.
    Closed,
}

/// Whether the record of an object may go.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// The image has a copy.
    HasCopy,
    /// Only the file of what was forgotten brings it back, should the object turn up.
    OnlyTheFile,
    /// It would be lost for an object that is here.
    Stays(String),
}

/// Nothing is believed for want of a sight: what can't be looked at counts as the object.
fn decide(seen: &Whereabouts) -> Verdict {
    match seen {
        Whereabouts::Carries(Copy::Same | Copy::Opens(Precedence::Newer | Precedence::Same)) => {
            Verdict::HasCopy
        }
        Whereabouts::Carries(Copy::Opens(Precedence::Conflict)) => Verdict::Stays(
            "its image carries another version of its envelope, and which of the two counts is not decided"
                .to_owned(),
        ),
        Whereabouts::Carries(Copy::Opens(Precedence::Older)) => {
            Verdict::Stays("its image carries an older version of its envelope".to_owned())
        }
        Whereabouts::Carries(Copy::Closed) => Verdict::Stays(
            "its image carries another version of its envelope, which does not open here".to_owned(),
        ),
        Whereabouts::Unmarked => Verdict::Stays("this host has the only copy of its envelope".to_owned()),
        Whereabouts::Unreadable(why) => Verdict::Stays(format!("nobody can tell whether it is there: {why}")),
        Whereabouts::Absent | Whereabouts::Another => Verdict::OnlyTheFile,
    }
}

impl Daemon {
    /// Drops what this host knows of a VM that is not defined here, after it was kept in a file.
    pub fn forget_vm(&self, by: Actor, vm: &str) -> Result<Outcome, Problem> {
        let _sealing = lock(&self.sealing);
        let _copying = lock(&self.copying);
        let (id, name) = self.undefined_vm(vm)?;
        let forgotten = self.forget(id, &name);
        records::note_vm(self, by, "forget", id, &name, &forgotten);
        forgotten
    }

    fn undefined_vm(&self, vm: &str) -> Result<(VmId, String), Problem> {
        match names::find_domain(&self.background, vm) {
            Ok(defined) => Err(Problem::new(
                Code::WouldLoseKey,
                format!(
                    "{} is not forgotten: it is defined here, and needs its keys to start",
                    defined.name
                ),
            )
            .next(Advice::UndefineVm(defined.name.clone()).note("if it is on another host now"))),
            Err(absent) if absent.code == Code::NotFound => self
                .known_as(vm, Advice::ForgetVm)?
                .filter(|(id, _)| {
                    let known = self.keystore.envelopes_of(*id);
                    known.is_ok_and(|known| !known.is_empty()) || !matches!(self.keystore.vm(*id), Ok(None))
                })
                .ok_or_else(|| {
                    Problem::new(Code::NotFound, format!("virtseal knows no VM '{vm}'"))
                        .next(Advice::ListOrphans)
                }),
            Err(failure) => Err(failure),
        }
    }

    fn forget(&self, vm: VmId, name: &str) -> Result<Outcome, Problem> {
        self.refuse_while_a_job_concerns(vm)?;
        let records = self.keystore.envelopes_of(vm)?.whole()?;
        let kept = self.background.every_xml().map_err(|error| unreachable(&error))?;
        super::shred::refuse_if_used(&kept, vm, name, &records)?;
        let mut alone = Vec::new();
        let mut stays = Vec::new();
        for record in &records {
            match decide(&self.whereabouts(record)) {
                Verdict::HasCopy => {}
                Verdict::OnlyTheFile => alone.push(self.object_name(record)),
                Verdict::Stays(why) => stays.push(format!("{}: {why}", self.object_name(record))),
            }
        }
        if !stays.is_empty() {
            return Err(Problem::new(
                Code::WouldLoseKey,
                format!("{name} is not forgotten: {}", stays.join("; ")),
            )
            .next(
                Advice::from(format!("move that to where {name} is now, or to its backup"))
                    .then(Advice::ForgetVm(name.to_owned()))
                    .or_else(Advice::DefineXml.note(format!("its dumpxml, to keep {name} here"))),
            ));
        }
        let path = self.keep_aside(vm, name, &records)?;
        if self.keystore.forget_vm(vm, &records)? == Change::Unchanged {
            return Err(Problem::new(
                Code::Busy,
                format!("the keys of {name} have changed just now: none was forgotten"),
            )
            .next(Advice::ForgetVm(name.to_owned())));
        }
        Ok(forgotten_outcome(name, records.len(), &path, &alone))
    }

    /// On stable storage, and read back, when this returns.
    pub(super) fn keep_aside(
        &self,
        vm: VmId,
        name: &str,
        records: &[EnvelopeRecord],
    ) -> Result<PathBuf, Problem> {
        let mut retired = self.keystore.retired_keks()?.whole()?;
        retired.retain(|kek| kek.vm == vm);
        let known = self.keystore.vm(vm)?.unwrap_or_else(|| VmRecord {
            vm,
            name: name.to_owned(),
            sealed_at: records.iter().map(|record| record.created).min().unwrap_or(0),
            vtpm_seen: false,
        });
        let mut saved = self.host_store.saved_states()?.whole()?;
        saved.retain(|saved| saved.vm == vm);
        let forgotten = Forgotten {
            vm: known,
            mark: self.keystore.mark(vm)?.unwrap_or(Mark::Sealed),
            saved: saved.pop(),
            objects: records.to_vec(),
            retired,
        };
        forgotten::keep(self.host_store.dir(), &forgotten).map_err(|error| {
            Problem::from_error(Code::Failed, format!("{name} is not forgotten"), &error)
                .next(Advice::from("mend that").then(Advice::ForgetVm(name.to_owned())))
        })
    }

    pub(super) fn refuse_while_a_job_concerns(&self, vm: VmId) -> Result<(), Problem> {
        let running = self.keystore.running_jobs()?;
        match running.iter().find(|job| job.subject.concerns(vm)) {
            None => Ok(()),
            Some(job) => Err(Problem::new(Code::Busy, format!("job {} runs", job.id.0))
                .next(Advice::WatchJob(job.id.0).or(Advice::AbortJob(job.id.0)))),
        }
    }

    fn located(&self, record: &EnvelopeRecord) -> Result<Option<Located>, PathError> {
        let (kind, vm) = (record.envelope.kind, record.envelope.vm);
        let path = (!record.location.is_empty()).then(|| Path::new(&record.location));
        let permit = |path: &Path| paths::known_place(self, path);
        Located::of(kind, vm, path, &self.config().swtpm_dir, permit)
    }

    fn object_name(&self, record: &EnvelopeRecord) -> String {
        let kind = record.envelope.kind;
        match self.located(record) {
            Ok(Some(object)) => format!("{kind} {object}"),
            Ok(None) | Err(_) => format!("{kind} {}", record.location),
        }
    }

    fn whereabouts(&self, record: &EnvelopeRecord) -> Whereabouts {
        let object = match self.located(record) {
            Ok(Some(object)) => object,
            Ok(None) => return Whereabouts::Absent,
            Err(error) if error.is_missing() => return Whereabouts::Absent,
            Err(error) => return Whereabouts::Unreadable(chain(&error)),
        };
        let copy = match object.inspect() {
            Ok(Present::Absent) => return Whereabouts::Absent,
            Ok(Present::Plain) => return Whereabouts::Another,
            Ok(Present::Encrypted(copy)) => copy,
            Err(error) => return Whereabouts::Unreadable(chain(&error)),
        };
        match copy.envelope() {
            Some(found) if found == record.envelope => Whereabouts::Carries(Copy::Same),
            Some(found) if found.id == record.envelope.id => {
                let dek = self.recipients.open_envelope(&found).ok();
                Whereabouts::Carries(match dek.and_then(|dek| found.verify(&dek).ok()) {
                    Some(_) => Copy::Opens(found.supersedes(&record.envelope)),
                    None => Copy::Closed,
                })
            }
            Some(_) => Whereabouts::Another,
            None => Whereabouts::Unmarked,
        }
    }

    /// Takes back what `vm forget` has kept in the file in `fds`, after each envelope was opened.
    pub fn adopt_forgotten(&self, by: Actor, fds: Vec<OwnedFd>) -> Result<Outcome, Problem> {
        let _sealing = lock(&self.sealing);
        let forgotten = read_forgotten(fds)?;
        let (vm, name) = (forgotten.vm.vm, forgotten.vm.name.clone());
        let adopted = self.adopt(&forgotten);
        records::note_vm(self, by, "adopt", vm, &name, &adopted);
        adopted
    }

    fn adopt(&self, forgotten: &Forgotten) -> Result<Outcome, Problem> {
        let name = &forgotten.vm.name;
        for record in &forgotten.objects {
            // Who wrote the file is not known: what its provider has wrapped for this very object is.
            let not_adopted = |failure: Problem| failure.of(format!("{name} is not adopted"));
            let dek = self
                .recipients
                .open_envelope(&record.envelope)
                .map_err(|error| not_adopted(error.into()))?;
            record.verify(&dek).map_err(|error| {
                let what = format!("envelope {}", record.envelope.id);
                not_adopted(Problem::from_error(Code::Failed, what, &error))
                    .next("give the file as it was written when the VM was forgotten")
            })?;
        }
        let mut outcome = Outcome {
            steps: Vec::new(),
            warnings: Vec::new(),
            changed: false,
        };
        for record in &forgotten.objects {
            let what = format!("envelope {} ({})", record.envelope.id, self.object_name(record));
            match self.keystore.bring_back(record) {
                Ok(Put::Adopted | Put::Updated) => outcome.steps.push(format!("take back {what}")),
                Ok(Put::Unchanged) => {}
                Ok(Put::Stale) => outcome
                    .warnings
                    .push(format!("{what}: the keystore has a later one, which stays")),
                Err(error @ (StoreError::Conflict { .. } | StoreError::OtherObject { .. })) => {
                    outcome
                        .warnings
                        .push(format!("{what} is left out: {}", chain(&error)));
                }
                Err(error) => return Err(error.into()),
            }
        }
        // Of this host first: alone it keeps KEKs that nothing needs, and loses nothing.
        if let Some(saved) = &forgotten.saved {
            self.host_store.bring_back_saved(saved)?;
        }
        self.keystore
            .bring_back_vm(&forgotten.vm, forgotten.mark, &forgotten.retired)?;
        self.copies_bell.ring();
        outcome.changed = !outcome.steps.is_empty();
        Ok(outcome)
    }
}

fn forgotten_outcome(name: &str, envelopes: usize, path: &Path, alone: &[String]) -> Outcome {
    let mut warnings = Vec::new();
    if !alone.is_empty() {
        warnings.push(format!(
            "nothing is there of {}. If it only is not mounted now, {} brings its keys back",
            alone.join(", "),
            Advice::AdoptFrom(path.to_owned())
        ));
    }
    Outcome {
        steps: vec![format!(
            "drop what this host knew of {name} ({envelopes} envelopes), kept in {}; no key was destroyed",
            path.display()
        )],
        warnings,
        changed: true,
    }
}

fn read_forgotten(fds: Vec<OwnedFd>) -> Result<Forgotten, Problem> {
    let [fd]: [OwnedFd; 1] = fds.try_into().map_err(|fds: Vec<_>| {
        Problem::new(Code::Usage, format!("one file was expected, {} came", fds.len()))
    })?;
    let unusable = |error: &dyn std::error::Error| {
        Problem::from_error(Code::Failed, "the file can't be adopted", error).next(format!(
            "give a file that was written when a VM was forgotten, in {} of the state directory",
            forgotten::DIRECTORY
        ))
    };
    let mut text = Vec::new();
    File::from(fd)
        .take(forgotten::MAX_BYTES)
        .read_to_end(&mut text)
        .map_err(|error| unusable(&error))?;
    Forgotten::from_json(&text).map_err(|error| unusable(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_the_object_keeps_its_envelope() {
        for seen in [
            Whereabouts::Unmarked,
            Whereabouts::Unreadable("Permission denied".to_owned()),
            Whereabouts::Carries(Copy::Opens(Precedence::Older)),
            Whereabouts::Carries(Copy::Opens(Precedence::Conflict)),
            Whereabouts::Carries(Copy::Closed),
        ] {
            assert!(matches!(decide(&seen), Verdict::Stays(_)), "{seen:?}");
        }
        for copy in [Copy::Same, Copy::Opens(Precedence::Newer)] {
            assert_eq!(decide(&Whereabouts::Carries(copy)), Verdict::HasCopy);
        }
        for seen in [Whereabouts::Absent, Whereabouts::Another] {
            assert_eq!(decide(&seen), Verdict::OnlyTheFile);
        }
    }
}

//! What `vm forget` and `vm adopt --from` ask for: this host's records of a VM go, into a file that brings them back.
//!
//! No key is destroyed, and no server is asked: the VM may run on another host. What must not happen is that the last envelope
//! of an object goes whose file is here. That a path has nothing now is no proof that there is nothing: its storage may not be
//! mounted. So what is dropped is kept first, see [`crate::vm::forgotten`].

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::forgotten::{self, Forgotten, Said};
use super::host::Host;
use crate::api::{Outcome, StepView};
use crate::host::libvirt::KeptXml;
use crate::model::act::{StepCode, Tense};
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeId, Precedence, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::ImageCopy;
use crate::object::{self, Located, Present};
use crate::store::{
    Change, DamagedRow, EnvelopeRecord, EnvelopeState, EnvelopeStore, Held, HostStore, Mark, Put, StoreError,
    VmRecord,
};
use crate::terminal::word;

/// What is where an object was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Whereabouts {
    /// Nothing, as far as this host sees now.
    Absent,
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
pub(super) enum Copy {
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

/// Drops what this host knows of a VM that is not defined here, after it was kept in a file. No job may run on it.
pub(crate) fn forget(host: &Host<'_>, vm: VmId, name: &str) -> Result<Outcome, Problem> {
    let rows = host.keystore.envelopes_of(vm)?;
    let ids = rows.sound.iter().map(|record| record.envelope.id);
    let damaged = rows.damaged.iter().filter_map(|row| row.envelope);
    refuse_if_used(&host.kept, vm, name, ids.chain(damaged))?;
    let mut alone = Vec::new();
    let mut stays = Vec::new();
    for record in &rows.sound {
        match decide(&whereabouts(host, record)) {
            Verdict::HasCopy => {}
            Verdict::OnlyTheFile => alone.push(object_name(host, record)),
            Verdict::Stays(why) => stays.push(format!("{}: {why}", object_name(host, record))),
        }
    }
    if !stays.is_empty() {
        return Err(
            Problem::would_lose_key(format!("{name} is not forgotten: {}", stays.join("; "))).next(
                Advice::from(format!(
                    "move that to where {} is now or to its backup",
                    word(name)
                ))
                .then(Advice::ForgetVm(name.to_owned()))
                .or_else(Advice::DefineXml.note(format!("its dumpxml, to keep {} here", word(name)))),
            ),
        );
    }
    let mut records = rows.sound.clone();
    let mut lost = Vec::new();
    for row in &rows.damaged {
        match what_opens(host, row) {
            Some(record) => records.push(record),
            None => lost.push(row),
        }
    }
    let raw = lost.iter().map(|row| row.raw.clone()).collect();
    let dropped = Dropped {
        said: Said::Elsewhere,
        records: &records,
        damaged: raw,
    };
    let path = keep_aside(host.keystore, host.host_store, vm, name, dropped)?;
    if host.keystore.forget_vm(vm, &rows)? == Change::Unchanged {
        return Err(Problem::busy(format!(
            "the keys of {name} have changed just now: none was forgotten"
        ))
        .next(Advice::ForgetVm(name.to_owned())));
    }
    let mut outcome = forgotten_outcome(name, records.len(), &path, &alone);
    outcome.warnings.extend(lost.into_iter().map(|row| {
        let path = path.display();
        let what = format!("{row}. As it was it is in {path}; what nothing else opens is lost");
        Finding::warning(FindingCode::RecordDamaged, Subject::Vm(name.to_owned()), what).into()
    }));
    Ok(outcome)
}

/// What a damaged row still has, if that is shown to be true.
fn what_opens(host: &Host<'_>, row: &DamagedRow) -> Option<EnvelopeRecord> {
    let Held { envelope, location } = row.holds.as_deref()?.clone();
    let dek = host.recipients.open_envelope(&envelope).ok()?;
    envelope.verify(&dek).ok()?;
    Some(EnvelopeRecord {
        envelope,
        state: EnvelopeState::Active,
        location,
        created: 0,
        updated: 0,
    })
}

/// An image of the VM that another one uses, by what libvirt has.
pub(crate) fn refuse_if_used(
    kept: &[KeptXml],
    vm: VmId,
    name: &str,
    envelopes: impl Iterator<Item = EnvelopeId>,
) -> Result<(), Problem> {
    let ids: Vec<String> = envelopes.map(|id| id.to_string()).collect();
    // As text: an XML that can't be read may need its disk all the same.
    let user = kept
        .iter()
        .filter(|other| other.vm != vm)
        .find(|other| ids.iter().any(|id| other.xml.contains(id)));
    match user {
        None => Ok(()),
        Some(other) => Err(Problem::would_lose_key(format!(
            "{name} stays: {} uses one of its disks",
            other.name
        ))
        .next(Advice::EditXml(other.name.clone()).within("remove that disk"))),
    }
}

/// What is about to be dropped of a VM.
pub(crate) struct Dropped<'a> {
    pub said: Said,
    pub records: &'a [EnvelopeRecord],
    /// For whoever mends them by hand.
    pub damaged: Vec<serde_json::Value>,
}

/// On stable storage, and read back, when this returns.
///
/// # Errors
/// When it is not: then nothing may be dropped.
pub(crate) fn keep_aside(
    keystore: &dyn EnvelopeStore,
    host_store: &HostStore,
    vm: VmId,
    name: &str,
    dropped: Dropped<'_>,
) -> Result<PathBuf, Problem> {
    let Dropped {
        said,
        records,
        mut damaged,
    } = dropped;
    let (vms, retired, saved) = (
        keystore.vms()?,
        keystore.retired_keks()?,
        host_store.saved_states()?,
    );
    let rows = [vms.damaged, retired.damaged, saved.damaged]
        .into_iter()
        .flatten();
    damaged.extend(rows.filter(|row| row.vm == Some(vm)).map(|row| row.raw));
    let mut retired = retired.sound;
    retired.retain(|kek| kek.vm == vm);
    let known = vms.sound.into_iter().find(|known| known.vm == vm);
    let known = known.unwrap_or_else(|| VmRecord {
        vm,
        name: name.to_owned(),
        sealed_at: records.iter().map(|record| record.created).min().unwrap_or(0),
        vtpm_seen: false,
    });
    let mut saved = saved.sound;
    saved.retain(|saved| saved.vm == vm);
    let forgotten = Forgotten {
        vm: known,
        said,
        mark: keystore.mark(vm)?.unwrap_or(Mark::Sealed),
        saved: saved.pop(),
        objects: records.to_vec(),
        retired,
        damaged,
    };
    forgotten::keep(host_store.dir(), &forgotten).map_err(|error| {
        Problem::from_error(Code::Failed, format!("{name} is not forgotten"), &error)
            .next(Advice::from("mend that").then(Advice::ForgetVm(name.to_owned())))
    })
}

pub(super) fn object_name(host: &Host<'_>, record: &EnvelopeRecord) -> String {
    let path = object::path_of(record, &host.swtpm_dir);
    format!("{} {}", record.envelope.kind, path.display())
}

pub(super) fn whereabouts(host: &Host<'_>, record: &EnvelopeRecord) -> Whereabouts {
    let known = &record.envelope;
    let place = Located::of(
        known.kind,
        known.vm,
        Some(Path::new(&record.location)).filter(|path| !path.as_os_str().is_empty()),
        &host.swtpm_dir,
        |path| host.known_place(path),
    );
    let found = match place {
        Ok(None) => return Whereabouts::Absent,
        Ok(Some(object)) => object.inspect().map_err(|error| chain(&error)),
        Err(error) if error.is_missing() => return Whereabouts::Absent,
        Err(error) => Err(chain(&error)),
    };
    match found {
        Err(why) => Whereabouts::Unreadable(why),
        Ok(Present::Absent) => Whereabouts::Absent,
        Ok(Present::Plain) => Whereabouts::Another,
        Ok(Present::Encrypted(ImageCopy::Envelope(found))) if *found == *known => {
            Whereabouts::Carries(Copy::Same)
        }
        Ok(Present::Encrypted(ImageCopy::Envelope(found))) if found.id == known.id => {
            let dek = host.recipients.open_envelope(&found).ok();
            Whereabouts::Carries(match dek.and_then(|dek| found.verify(&dek).ok()) {
                Some(_) => Copy::Opens(found.supersedes(known)),
                None => Copy::Closed,
            })
        }
        Ok(Present::Encrypted(ImageCopy::Envelope(_))) => Whereabouts::Another,
        Ok(Present::Encrypted(ImageCopy::None | ImageCopy::Unreadable(_))) => Whereabouts::Unmarked,
    }
}

/// Takes back what [`forget`] has kept, after each envelope was opened.
pub(crate) fn adopt(host: &Host<'_>, forgotten: &Forgotten) -> Result<Outcome, Problem> {
    let name = &forgotten.vm.name;
    for record in &forgotten.objects {
        // Who wrote the file is not known: what its provider has wrapped for this very object is.
        let not_adopted = |failure: Problem| failure.of(format!("{name} is not adopted"));
        let dek = host
            .recipients
            .open_envelope(&record.envelope)
            .map_err(|error| not_adopted(error.into()))?;
        record.verify(&dek).map_err(|error| {
            let what = format!("envelope {}", record.envelope.id);
            not_adopted(Problem::from_error(Code::Failed, what, &error))
                .next("give the file as it was written when the VM was forgotten")
        })?;
    }
    let (mut outcome, mut acts) = (Outcome::default(), Vec::new());
    for record in &forgotten.objects {
        let what = format!("envelope {} ({})", record.envelope.id, object_name(host, record));
        let left_out = |code, what: String| Finding::warning(code, Subject::Vm(name.clone()), what).into();
        match host.keystore.bring_back(record) {
            Ok(Put::Adopted | Put::Updated) => {
                let act = StepCode::Adopt.told(format!("took back {what}"));
                acts.push(act.with(record.envelope.id));
            }
            Ok(Put::Unchanged) => {}
            Ok(Put::Stale) => {
                let what = format!("{what}: the keystore has a later one, which stays");
                outcome.warnings.push(left_out(FindingCode::CopyOlder, what));
            }
            Err(error) => {
                let code = match error {
                    StoreError::Conflict { .. } => FindingCode::CopyConflict,
                    StoreError::OtherObject { .. } => FindingCode::CopyOfAnother,
                    error => return Err(error.into()),
                };
                let what = format!("{what} is left out: {}", chain(&error));
                outcome.warnings.push(left_out(code, what));
            }
        }
    }
    // Of this host first: alone it keeps KEKs that nothing needs, and loses nothing.
    if let Some(saved) = &forgotten.saved {
        host.host_store.bring_back_saved(saved)?;
    }
    host.keystore
        .bring_back_vm(&forgotten.vm, forgotten.mark, &forgotten.retired)?;
    outcome.changed = !acts.is_empty();
    outcome.steps = StepView::all(&acts, Tense::Done, &Subject::Vm(name.clone()));
    Ok(outcome)
}

fn forgotten_outcome(name: &str, envelopes: usize, path: &Path, alone: &[String]) -> Outcome {
    let (vm, mut warnings) = (Subject::Vm(name.to_owned()), Vec::new());
    if !alone.is_empty() {
        let what = format!(
            "nothing is there of {}. If it only is not mounted now, have its keys back: {}",
            alone.join(", "),
            Advice::AdoptFrom(path.to_owned())
        );
        warnings.push(Finding::warning(FindingCode::KeptAside, vm.clone(), what).into());
    }
    let text = format!(
        "dropped what this host knew of {name} ({envelopes} envelopes), kept in {}; no key was destroyed",
        path.display()
    );
    let act = StepCode::Forget.told(text).at(path);
    Outcome {
        steps: StepView::all(&[act], Tense::Done, &vm),
        warnings,
        changed: true,
        ..Outcome::default()
    }
}

/// What [`forget`] has kept in the file in `fds`.
pub(crate) fn read(fds: Vec<OwnedFd>) -> Result<Forgotten, Problem> {
    let [fd]: [OwnedFd; 1] = fds
        .try_into()
        .map_err(|fds: Vec<_>| Problem::usage(format!("one file was expected, {} came", fds.len())))?;
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

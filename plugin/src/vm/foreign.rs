//! What to believe of copies that travelled: the keystore learns of those that are true, and notes those that are behind.
//!
//! Anybody who writes XML or images can write any number of copies. One whose MAC does not verify replaces nothing and stops
//! nothing; which of two that verify and differ in one generation counts is root's to decide, so it is named.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::host::Host;
use super::names::VmNames;
use super::seal;
use super::start::adoption::{Doubt, Weighed, believe, weigh};
use super::visible::{Place, Visible, VisibleCopy, held_copies};
use crate::domain::{Domain, encrypted_layers};
use crate::host::libvirt::DefinedDomain;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, Precedence, VmId};
use crate::model::finding::{Finding, Subject};
use crate::model::problem::{Problem, chain};
use crate::object::Opening;
use crate::object::disk::{self, ImageCopy};
use crate::secret::Dek;
use crate::store::{CopyPlace, EnvelopeRecord, LeftBehind, StoreError};

/// What came to this host with VMs and images, and is not taken in.
#[derive(Debug)]
pub(crate) struct Travelling {
    /// What could not be read, and where; what somebody else has in hand; what was given up here.
    pub left_out: Vec<Problem>,
    /// What a job leaves as it is, and why.
    pub rivals: Vec<LeftBehind>,
}

/// Whether somebody who had the key wrote a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Its MAC verifies.
    Authentic,
    Forged,
    /// The key is out of reach now, or it has no MAC.
    Unknown,
}

/// The keystore learns of envelopes that travelled here, as it would at the start of their VM: those that it does not
/// know, or in an earlier generation, that verify and open. A job that did not know them would leave them behind. What
/// can't be believed is passed over; what can't be read is named. Each VM is taken by `claim` for as long as its own are looked at:
/// one that is being shredded must not get back what goes.
pub(crate) fn adopt_foreign_envelopes<C>(
    host: &Host<'_>,
    claim: impl Fn(VmId) -> Result<C, Problem>,
) -> Result<Travelling, Problem> {
    let mut visible = Visible::of_host(host)?;
    note_bad_images(host, &visible.bad_images)?;
    let rivals = rivals(host, &visible.copies)?;
    visible.copies.extend(held_copies(host.keystore, None)?);
    let mut vms: BTreeMap<VmId, Vec<VisibleCopy>> = BTreeMap::new();
    for copy in visible.copies {
        let record = host.keystore.readable_envelope(copy.envelope.id)?;
        if to_take_in(&copy, record.as_ref()).is_some() {
            vms.entry(copy.envelope.vm).or_default().push(copy);
        }
    }
    let mut left_out = visible.unreadable;
    for (vm, copies) in vms {
        match claim(vm) {
            Ok(_claim) => left_out.extend(take_in_all(host, copies)?),
            Err(busy) => left_out.push(Problem::busy(busy.message)),
        }
    }
    Ok(Travelling { left_out, rivals })
}

/// The same for what came with this VM, as far as it can be believed now.
pub(crate) fn take_in_copies_of(host: &Host<'_>, defined: &DefinedDomain) {
    let visible = Visible::of_domain(host, defined).map_err(Problem::from);
    if let Err(problem) = visible.and_then(|visible| take_in_all(host, visible.copies)) {
        tracing::warn!(domain = defined.name, "{problem}");
    }
}

/// Envelopes of which somebody who had the key made another version of the same generation: which of them counts is root's to
/// decide, and a job would hide the other. One that was forged follows the keystore.
fn rivals(host: &Host<'_>, copies: &[VisibleCopy]) -> Result<Vec<LeftBehind>, StoreError> {
    let mut claims: BTreeMap<EnvelopeId, Vec<&VisibleCopy>> = BTreeMap::new();
    for copy in copies.iter().filter(|copy| copy.place.kept().is_some()) {
        claims.entry(copy.envelope.id).or_default().push(copy);
    }
    // Anybody can write any number of copies: each envelope is opened once.
    let mut rivals = Vec::new();
    for (id, mut copies) in claims {
        let Some(record) = host.keystore.readable_envelope(id)? else {
            continue;
        };
        copies.retain(|copy| copy.envelope.supersedes(&record.envelope) == Precedence::Conflict);
        if !copies.is_empty() {
            rivals.extend(rivals_of(host, &record, copies));
        }
    }
    Ok(rivals)
}

fn rivals_of(host: &Host<'_>, record: &EnvelopeRecord, mut copies: Vec<&VisibleCopy>) -> Vec<LeftBehind> {
    let left = |copy: &VisibleCopy, why: &str| LeftBehind {
        envelope: record.envelope.id,
        reason: format!(
            "{} has another version of generation {}; {why}: {}",
            copy.place,
            copy.envelope.generation,
            Advice::ShowVm(record.envelope.vm.to_string())
        ),
        again: false,
    };
    let dek = match host.recipients.open_envelope(&record.envelope) {
        Ok(dek) => dek,
        // The job would write over it without having seen whether it is true.
        Err(error) => {
            let why = format!("whether it is true can't be told now ({})", error.reasons());
            return copies.into_iter().map(|copy| left(copy, &why)).collect();
        }
    };
    // What does not verify itself is changed by no job.
    let Ok(own) = record.verify(&dek) else {
        return Vec::new();
    };
    copies.retain(|copy| match weigh(&own, &copy.envelope, &dek) {
        Weighed::Doubtful(Doubt::Conflict) => true,
        Weighed::Doubtful(Doubt::Unverified(_)) => {
            // Where that fails it is tried at the next job.
            let _ = note_behind(host, copy, record, Proof::Forged);
            false
        }
        _ => false,
    });
    let is_open = |copy: &VisibleCopy| left(copy, "which one counts must be decided");
    copies.into_iter().map(is_open).collect()
}

/// The keystore's copy is written over one that can't be read or is of another object, once that has opened the image.
fn note_bad_images(host: &Host<'_>, images: &[PathBuf]) -> Result<(), Problem> {
    if images.is_empty() {
        return Ok(());
    }
    let is_bad = |record: &EnvelopeRecord| images.iter().any(|image| *image == Path::new(&record.location));
    for record in host
        .keystore
        .envelopes()?
        .sound
        .iter()
        .filter(|record| is_bad(record))
    {
        host.host_store
            .copy_is_behind(&record.envelope, CopyPlace::Image)?;
    }
    Ok(())
}

/// The same for the images of one VM, by what its XML names now.
pub(crate) fn note_bad_images_of(host: &Host<'_>, xml: &str) -> Result<(), Problem> {
    let Ok(domain) = Domain::parse(xml) else {
        return Ok(());
    };
    for (id, path) in encrypted_layers(&domain) {
        let place = host.place_of(domain.uuid, &path)?;
        let copy = place.map(|place| disk::identify(&place).map(|(_, copy)| copy));
        let is_bad = match copy {
            Ok(Ok(ImageCopy::Unreadable(_))) => true,
            Ok(Ok(ImageCopy::Envelope(found))) => found.id != id,
            _ => false,
        };
        if let (true, Some(record)) = (is_bad, host.keystore.readable_envelope(id)?) {
            host.host_store
                .copy_is_behind(&record.envelope, CopyPlace::Image)?;
        }
    }
    Ok(())
}

/// Notes that a copy which differs from what the keystore has is behind. Says whether it can follow. The KEKs that it names are
/// kept for it if it was verified.
pub(crate) fn note_behind(
    host: &Host<'_>,
    copy: &VisibleCopy,
    kept: &EnvelopeRecord,
    proof: Proof,
) -> Result<bool, Problem> {
    let Some(place) = copy.place.kept() else {
        return Ok(false);
    };
    let needs = match proof {
        Proof::Authentic => &copy.envelope,
        Proof::Forged | Proof::Unknown => &kept.envelope,
    };
    host.host_store.copy_is_behind(needs, place)?;
    Ok(true)
}

/// Says which of them were given up here.
fn take_in_all(
    host: &Host<'_>,
    copies: impl IntoIterator<Item = VisibleCopy>,
) -> Result<Vec<Problem>, Problem> {
    let mut candidates = Vec::new();
    for copy in copies {
        let record = host.keystore.readable_envelope(copy.envelope.id)?;
        if let Some(location) = to_take_in(&copy, record.as_ref()) {
            candidates.push((copy, record, location));
        }
    }
    let first: Vec<_> = candidates
        .iter()
        .map(|(copy, record, _)| record.as_ref().map_or(&copy.envelope, |record| &record.envelope))
        .collect();
    let opened = host.recipients.open_each(&first);
    let mut out = Vec::new();
    for ((copy, record, location), dek) in candidates.iter().zip(opened) {
        let Ok(dek) = dek else { continue };
        match take_in(host, copy, record.as_ref(), location, &dek) {
            Ok(Taken::Weighed(_)) => {}
            Ok(Taken::GivenUp(problem)) => out.push(problem),
            Err(problem) => {
                tracing::warn!(envelope = %copy.envelope.id, place = %copy.place, "not adopted: {problem}");
            }
        }
    }
    Ok(out)
}

/// What became of a copy.
#[derive(Debug)]
pub(crate) enum Taken {
    /// The keystore has what counts; what there is to say of a copy that does not.
    Weighed(Option<Finding>),
    /// It is of a vTPM that was given up here, and stays out.
    GivenUp(Problem),
}

/// Takes in a copy that counts, by the key that the keystore's version, or it where there is none, opens to.
pub(crate) fn take_in(
    host: &Host<'_>,
    copy: &VisibleCopy,
    record: Option<&EnvelopeRecord>,
    location: &str,
    dek: &Dek,
) -> Result<Taken, Problem> {
    let refused = |error| Problem::failed(chain(&error));
    let believed = believe(host.recipients, record, Some(&copy.envelope), dek).map_err(refused)?;
    let doubt = believed.doubt.as_ref();
    let doubt = doubt.map(|doubt| {
        let what = doubt.words(&copy.envelope, &copy.place.to_string());
        Finding::warning(doubt.code(), Subject::Vm(copy.envelope.vm.to_string()), what)
    });
    if let Some(doubt) = &doubt {
        tracing::warn!("{doubt}");
    }
    if record.is_none() {
        let opening = host.open_object(&believed.envelope, Path::new(location), dek);
        // Only its own state, put back, makes it count again.
        if !matches!(opening, Ok(Opening::Opened))
            && let Some(file) = given_up(host, &believed.envelope)?
        {
            return Ok(Taken::GivenUp(stays_out(host, copy, &file)?));
        }
        opening?;
    }
    if believed.is_news {
        host.keystore.put(&believed.envelope, location)?;
        tracing::info!(envelope = %copy.envelope.id, place = %copy.place, "taken in");
    }
    Ok(Taken::Weighed(doubt))
}

/// The file with the envelope of a vTPM that was given up here for another.
pub(crate) fn given_up(host: &Host<'_>, envelope: &Envelope) -> Result<Option<PathBuf>, Problem> {
    match envelope.kind.is_made_at_first_start() {
        true => seal::given_up(host, envelope.vm, envelope.id),
        false => Ok(None),
    }
}

fn stays_out(host: &Host<'_>, copy: &VisibleCopy, file: &Path) -> Result<Problem, Problem> {
    let name = VmNames::of_keystore(host.keystore)?.of(copy.envelope.vm);
    let what = format!(
        "envelope {} in {} is of a vTPM that was given up here (it is kept in {}), and the VM has a new one",
        copy.envelope.id,
        copy.place,
        file.display()
    );
    let seal = Advice::SealVm(name.clone()).note("which names the new one in the XML");
    Ok(Problem::failed(what).about(Subject::Vm(name)).next(seal))
}

/// The location to keep it with, if the keystore should learn of it. A snapshot is the past, and who wrote a format 1 can't
/// be told.
fn to_take_in(copy: &VisibleCopy, known: Option<&EnvelopeRecord>) -> Option<String> {
    if matches!(copy.place, Place::Snapshot(..)) || copy.envelope.format() != Envelope::FORMAT {
        return None;
    }
    match known {
        Some(known) => {
            let is_newer = copy.envelope.supersedes(&known.envelope) == Precedence::Newer;
            is_newer.then(|| known.location.clone())
        }
        None if !copy.envelope.kind.is_kept_by_path() => Some(String::new()),
        None => Some(copy.location.as_ref()?.display().to_string()),
    }
}

/// Whether a copy may say the truth, as far as this host can tell: what its keystore knows shows whether it was forged.
pub(crate) fn may_be_true(host: &Host<'_>, copy: &VisibleCopy) -> bool {
    let Ok(Some(record)) = host.keystore.readable_envelope(copy.envelope.id) else {
        return true;
    };
    match host.recipients.open_envelope(&record.envelope) {
        Ok(dek) => copy.envelope.verify(&dek).is_ok(),
        Err(_) => true,
    }
}

/// What the key of `known`, the keystore's version, says of a copy.
pub(crate) fn proof_of(host: &Host<'_>, copy: &Envelope, known: &Envelope) -> Proof {
    if copy.format() != Envelope::FORMAT {
        return Proof::Unknown;
    }
    match host.recipients.open_envelope(known) {
        Ok(dek) if copy.verify(&dek).is_ok() => Proof::Authentic,
        Ok(_) => Proof::Forged,
        Err(_) => Proof::Unknown,
    }
}

#[cfg(test)]
mod tests;

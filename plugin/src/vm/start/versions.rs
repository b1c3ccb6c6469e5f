//! The versions that there are of an envelope, and which of them a start opens: the keystore's, the copy in the XML, and what is left in
//! a damaged row.

use super::adoption::{Believed, believe, believe_without_row};
use super::{Moved, StartContext};
use crate::domain::{Domain, ObjectRef};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeError, Precedence};
use crate::model::problem::{Code, Problem, chain};
use crate::recipients::{OpenError, Recipients};
use crate::secret::Dek;
use crate::store::EnvelopeRecord;

/// What there is of an object's envelope: one of the three at least.
pub(super) struct Versions {
    pub(super) record: Option<EnvelopeRecord>,
    /// What a damaged row has in the place of a record.
    held: Option<Envelope>,
    pub(super) copy: Option<Envelope>,
    /// What is wrong with a copy that can't be read.
    pub(super) unreadable: Option<String>,
    pub(super) location: String,
}

impl Versions {
    /// The one to open: the keystore's, where it has one.
    fn first(&self) -> Option<&Envelope> {
        self.record
            .as_ref()
            .map(|record| &record.envelope)
            .or(self.copy.as_ref())
            .or(self.held.as_ref())
    }

    /// The one to open where the first does not: a newer copy, or what is in a damaged row. What it claims is verified then, and
    /// that its key is the keystore's, by the MAC of that one.
    fn second(&self) -> Option<&Envelope> {
        let Some(record) = &self.record else {
            return self.held.as_ref().filter(|_| self.copy.is_some());
        };
        let copy = self.copy.as_ref()?;
        let have_macs = record.envelope.format() == Envelope::FORMAT && copy.format() == Envelope::FORMAT;
        let is_newer = copy.supersedes(&record.envelope) == Precedence::Newer;
        (have_macs && is_newer).then_some(copy)
    }

    /// An image of this VM that was opened elsewhere than the keystore has it: another VM's, which is shared, is where its own says.
    pub(super) fn moved(&self, domain: &Domain, object: &ObjectRef) -> Option<Moved> {
        let (record, to) = (self.record.as_ref()?, object.path.clone()?);
        let is_elsewhere = record.envelope.vm == domain.uuid && record.location != self.location;
        is_elsewhere.then(|| Moved {
            envelope: record.envelope.id,
            from: record.location.clone(),
            to,
        })
    }

    /// The one that counts, once one of them has opened to `dek`.
    pub(super) fn believe(&self, recipients: &Recipients, dek: &Dek) -> Result<Believed, EnvelopeError> {
        match (&self.held, &self.copy) {
            (Some(held), Some(copy)) => believe_without_row(recipients, held, copy, dek),
            (held, copy) => believe(
                recipients,
                self.record.as_ref(),
                copy.as_ref().or(held.as_ref()),
                dek,
            ),
        }
    }
}

/// The keystore's version, and the copy that travels in the XML.
pub(super) fn find_versions(
    context: &StartContext<'_>,
    domain: &Domain,
    object: &ObjectRef,
) -> Result<Versions, Problem> {
    let location = object
        .path
        .as_ref()
        .map(|path| path.display().to_string())
        .unwrap_or_default();
    let metadata = domain.metadata.as_ref();
    let (record, damaged) = match context.keystore.envelope(object.secret) {
        Err(error) if error.is_of_row() => (None, Some(chain(&error))),
        found => (found?, None),
    };
    let held = match damaged {
        Some(_) => context.keystore.held_envelope(object.secret)?,
        None => None,
    };
    let versions = Versions {
        record,
        held,
        copy: metadata
            .and_then(|metadata| metadata.envelope(object.secret))
            .cloned(),
        unreadable: metadata.and_then(|metadata| metadata.unreadable(object.secret)),
        location,
    };
    if versions.first().is_none() {
        return Err(match damaged {
            Some(damaged) => lost(domain, object, &damaged),
            None => missing(object, versions.unreadable.as_deref()),
        });
    }
    // What a copy claims is verified once it is open.
    let claims: Vec<_> = versions.first().into_iter().chain(versions.second()).collect();
    check_place(domain, object, &claims)?;
    Ok(versions)
}

/// The DEK of each object, or the reason of the first that has none.
pub(super) fn open_versions(
    context: &StartContext<'_>,
    versions: &[Versions],
) -> Result<Vec<Dek>, OpenError> {
    let first: Vec<_> = versions.iter().filter_map(Versions::first).collect();
    if versions.iter().all(|versions| versions.second().is_none()) {
        return context.recipients.open_all(&first);
    }
    let opened = context.recipients.open_each(&first);
    let mut deks = Vec::with_capacity(versions.len());
    for (versions, opened) in versions.iter().zip(opened) {
        deks.push(match (opened, versions.second()) {
            (Err(error), Some(copy)) => context.recipients.open_envelope(copy).map_err(|_| error)?,
            (opened, _) => opened?,
        });
    }
    Ok(deks)
}

/// The XML has no copy that can be read; the image, or a backup, may have one.
fn lost(domain: &Domain, object: &ObjectRef, damaged: &str) -> Problem {
    let id = object.secret;
    Problem::new(
        Code::Failed,
        format!("{damaged}; the domain XML has no copy of envelope {id} either"),
    )
    .next(
        Advice::AdoptVm(domain.name.clone())
            .note("which looks at the image too")
            .or_else(Advice::DefineSealedXml(None))
            .or(Advice::RestoreState),
    )
}

fn missing(object: &ObjectRef, unreadable: Option<&str>) -> Problem {
    let id = object.secret;
    let reason = match unreadable {
        Some(reason) => format!("its envelope {id} is not in the keystore; in the domain XML, {reason}"),
        None => format!("its envelope {id} is neither in the keystore nor in the domain XML"),
    };
    Problem::new(Code::NotFound, reason).next(Advice::DefineSealedXml(None))
}

/// An envelope serves the object that it was made for, in its own VM and in those that root has shared the object with. One of
/// `versions`, of which there is one at least, must say so.
pub(super) fn check_place(
    domain: &Domain,
    object: &ObjectRef,
    versions: &[&Envelope],
) -> Result<(), Problem> {
    let envelope = versions[0];
    if envelope.kind != object.kind {
        let found = envelope.kind;
        return Err(Problem::new(
            Code::Failed,
            format!(
                "envelope {} is that of a {found}: envelopes were swapped",
                envelope.id
            ),
        )
        .next(Advice::EditXml(domain.name.clone()).within("give each object its own secret UUID")));
    }
    if !versions.iter().any(|envelope| envelope.serves(domain.uuid)) {
        return Err(Problem::new(
            Code::Failed,
            format!(
                "envelope {} belongs to VM {}, which does not share it: the XML was copied or swapped",
                envelope.id, envelope.vm
            ),
        )
        .next(
            Advice::EditXml(domain.name.clone())
                .or(Advice::DefineXml.note("its own dumpxml"))
                .within("it needs its own disks and <virtseal:vm> metadata")
                .also(
                    Advice::CreateVolume {
                        path: "FILE".into(),
                        vm: domain.name.clone(),
                    }
                    .note("which makes new ones"),
                ),
        ));
    }
    Ok(())
}

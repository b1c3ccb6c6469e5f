//! The versions that there are of an envelope, and which of them a start opens: the keystore's, the copy in the XML, and what is left in
//! a damaged row.

use super::StartContext;
use super::adoption::{Believed, believe, believe_without_row};
use crate::domain::{Domain, ObjectRef};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeError, EnvelopeId, Precedence};
use crate::model::problem::{Problem, chain};
use crate::recipients::{OpenError, Recipients};
use crate::secret::Dek;
use crate::store::{EnvelopeRecord, EnvelopeStore, StoreError};
use crate::vm::whose::Whose;

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

/// What this host keeps of an envelope.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kept {
    pub record: Option<EnvelopeRecord>,
    /// What is wrong with its row.
    pub damaged: Option<String>,
    /// What a damaged row has in the place of a record.
    pub held: Option<Envelope>,
}

impl Kept {
    pub(super) fn in_keystore(keystore: &dyn EnvelopeStore, id: EnvelopeId) -> Result<Self, StoreError> {
        match keystore.envelope(id) {
            Err(error) if error.is_of_row() => Ok(Self {
                record: None,
                damaged: Some(chain(&error)),
                held: keystore.held_envelope(id)?,
            }),
            record => Ok(Self {
                record: record?,
                ..Self::default()
            }),
        }
    }
}

impl Versions {
    /// What is kept, and the copy that travels in the XML.
    pub(super) fn of(
        domain: &Domain,
        object: &ObjectRef,
        kept: Kept,
        whose: impl Fn(&Envelope) -> Whose,
    ) -> Result<Self, Problem> {
        let location = object
            .path
            .as_ref()
            .map(|path| path.display().to_string())
            .unwrap_or_default();
        let metadata = domain.metadata.as_ref();
        let copy = metadata.and_then(|metadata| metadata.envelope(object.secret));
        let versions = Self {
            record: kept.record,
            held: kept.held,
            copy: copy.cloned(),
            unreadable: metadata.and_then(|metadata| metadata.unreadable(object.secret)),
            location,
        };
        if versions.first().is_none() {
            return Err(match kept.damaged {
                Some(damaged) => lost(domain, object, &damaged),
                None => missing(object, versions.unreadable.as_deref()),
            });
        }
        // What a copy claims is verified once it is open.
        let claims: Vec<_> = versions.first().into_iter().chain(versions.second()).collect();
        check_place(domain, object, &claims, whose)?;
        Ok(versions)
    }

    /// Whether one of them opens, by what `opens` says of each.
    pub(super) fn open_by(
        &self,
        opens: impl Fn(&Envelope) -> Result<(), OpenError>,
    ) -> Result<(), OpenError> {
        let first = self.first().map_or(Ok(()), &opens);
        first.or_else(|error| match self.second() {
            Some(second) => opens(second).map_err(|_| error),
            None => Err(error),
        })
    }

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
    Problem::failed(format!(
        "{damaged}; the domain XML has no copy of envelope {id} either"
    ))
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
    Problem::not_found(reason).next(Advice::DefineSealedXml(None))
}

/// An envelope serves the object that it was made for, in its own VM and in those that root has shared the object with. One of
/// `versions`, of which there is one at least, must say so.
pub(super) fn check_place(
    domain: &Domain,
    object: &ObjectRef,
    versions: &[&Envelope],
    whose: impl Fn(&Envelope) -> Whose,
) -> Result<(), Problem> {
    let envelope = versions[0];
    if envelope.kind != object.kind {
        let found = envelope.kind;
        return Err(Problem::failed(format!(
            "envelope {} is that of a {found}: envelopes were swapped",
            envelope.id
        ))
        .next(Advice::EditXml(domain.name.clone()).within("give each object its own secret UUID")));
    }
    if !versions.iter().any(|envelope| envelope.serves(domain.uuid)) {
        let (vm, path) = (&domain.name, object.path.as_deref());
        return Err(whose(envelope).refuse(envelope, vm, path));
    }
    Ok(())
}

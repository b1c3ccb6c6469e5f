//! What `vm adopt` asks for: the keystore learns of envelopes that came with a VM, from its XML and its images.
//!
//! A format 2 shows by its MAC that whoever wrote it had the key. A format 1 shows nothing: it is adopted only where root says
//! so, after its object has opened, and never where a format 2 of the same envelope is known.

use std::path::Path;

use super::foreign::{Proof, note_behind, open_its_object, take_in};
use super::host::Host;
use super::names::ProviderNames;
use super::start::adoption::not_believed;
use super::visible::{Place, VisibleCopy, held_copies};
use crate::api::Outcome;
use crate::domain::{self, Domain, ObjectRef, ObjectState, encrypted_layers};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeError, Format1, ObjectKind, Verified};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk;
use crate::secret::Dek;

/// Which copies root answers for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Formats {
    /// Those that show who wrote them.
    WithMac,
    /// Those of format 1 too.
    Format1Too,
}

/// Takes over the envelopes of a VM that came from another host, as its first start would.
///
/// # Errors
/// With the first object whose envelope is not taken over; the others are.
pub fn adopt(host: &Host<'_>, domain: &Domain, formats: Formats) -> Result<Outcome, Problem> {
    let of_vm = |failure: Problem| failure.of(&domain.name);
    let carried = |path: &Path| carried_by(host, domain, path);
    let objects = objects_of(domain, carried);
    if objects.is_empty() {
        return Err(Problem::new(
            Code::NotFound,
            format!(
                "{} has no sealed objects, neither by its XML nor by its images",
                domain.name
            ),
        ));
    }
    let (mut steps, mut warnings, mut failed) = (Vec::new(), unreadable_in(domain), None);
    for object in &objects {
        match adopt_object(host, domain, object, formats, &mut warnings) {
            Ok(step) => steps.extend(step),
            // The others may well be adopted.
            Err(failure) => drop(failed.get_or_insert(of_vm(failure.of(&object.label)))),
        }
    }
    let is_damaged = host.keystore.vm(domain.uuid).is_err();
    if is_damaged {
        steps.push(format!("mend what is noted of {}", domain.name));
    }
    if !steps.is_empty() {
        host.keystore.remember_vm(domain.uuid, &domain.name)?;
    }
    match failed {
        Some(failure) => Err(failure),
        None => Ok(Outcome {
            changed: !steps.is_empty(),
            steps,
            warnings,
        }),
    }
}

/// By an image that the XML names; of one where root does not look, opening it says so.
fn carried_by(host: &Host<'_>, domain: &Domain, path: &Path) -> Option<Envelope> {
    let place = host.permit_known(domain.uuid, path).ok()?;
    disk::inspect(&place).ok()?.envelope
}

fn unreadable_in(domain: &Domain) -> Vec<String> {
    let unreadable = domain.metadata.iter().flat_map(|metadata| &metadata.unreadable);
    unreadable
        .map(|copy| format!("not adopted from the XML of {}: {}", domain.name, copy.reason))
        .collect()
}

/// What was done for one object, if there was anything to do.
fn adopt_object(
    host: &Host<'_>,
    domain: &Domain,
    object: &ObjectRef,
    formats: Formats,
    warnings: &mut Vec<String>,
) -> Result<Option<String>, Problem> {
    let record = host.keystore.readable_envelope(object.secret)?;
    let mut copies = copies_of(domain, object, |path| carried_by(host, domain, path));
    if record.is_none() {
        let held = held_copies(host.keystore, Some(domain.uuid)).into_iter();
        copies.extend(held.filter(|copy| copy.envelope.id == object.secret));
    }
    let location = object
        .path
        .as_ref()
        .map_or_else(String::new, |path| path.display().to_string());
    let (with_mac, without): (Vec<_>, Vec<_>) = copies
        .iter()
        .filter(|copy| copy.envelope.kind == object.kind)
        .partition(|copy| copy.envelope.format() == Envelope::FORMAT);
    let before = record.as_ref().map(|record| &record.envelope);
    let mut refused = None;
    for copy in with_mac {
        match adopt_with_mac(host, copy, &location) {
            Ok(doubt) => warnings.extend(doubt),
            Err(problem) => drop(refused.get_or_insert(problem)),
        }
    }
    if let Some(record) = host.keystore.readable_envelope(object.secret)? {
        let is_news = before != Some(&record.envelope);
        return Ok(is_news.then(|| adopted(host, object, &record.envelope)));
    }
    if formats == Formats::WithMac && !without.is_empty() {
        return Err(not_believed(&domain.name, &EnvelopeError::Format1));
    }
    // Nobody's word makes an object of another VM this one's.
    for copy in without.into_iter().filter(|copy| copy.envelope.vm == domain.uuid) {
        match adopt_format_1(host, copy, &copies, &location) {
            Ok(made) => {
                let step = adopted(host, object, &made);
                return Ok(Some(format!("{step}, format 1 from {}", copy.place)));
            }
            Err(failure) => drop(refused.get_or_insert(failure)),
        }
    }
    Err(refused.unwrap_or_else(|| {
        Problem::new(
            Code::NotFound,
            format!(
                "its envelope {} is neither here, nor in the XML, nor in the image",
                object.secret
            ),
        )
        .next(Advice::DefineSealedXml(Some(domain.name.clone())))
    }))
}

fn adopt_with_mac(host: &Host<'_>, copy: &VisibleCopy, location: &str) -> Result<Option<String>, Problem> {
    let record = host.keystore.readable_envelope(copy.envelope.id)?;
    let first = record.as_ref().map_or(&copy.envelope, |record| &record.envelope);
    let dek = host.recipients.open_envelope(first)?;
    let kept_at = record
        .as_ref()
        .map_or(location, |record| record.location.as_str());
    take_in(host, copy, record.as_ref(), kept_at, &dek)
}

/// One that the keystore does not know.
fn adopt_format_1(
    host: &Host<'_>,
    copy: &VisibleCopy,
    copies: &[VisibleCopy],
    location: &str,
) -> Result<Verified, Problem> {
    let dek = host.recipients.open_envelope(&copy.envelope)?;
    refuse_where_format_2_is_known(copies, &dek)?;
    open_its_object(host, &copy.envelope, location, &dek)?;
    let made = copy
        .envelope
        .upgrade(&dek, Format1::AdoptedByRoot)
        .map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
    host.keystore.put(&made, location)?;
    if let Some(record) = host.keystore.readable_envelope(made.id)? {
        for copy in copies {
            note_behind(host, copy, &record, Proof::Unknown)?;
        }
    }
    Ok(made)
}

fn adopted(host: &Host<'_>, object: &ObjectRef, envelope: &Envelope) -> String {
    format!(
        "adopt envelope {} of {} (opened by {})",
        envelope.id,
        object.label,
        ProviderNames::of_host(host.recipients, host.keystore)
            .of(envelope)
            .join(", ")
    )
}

/// What the XML names an envelope of, and the disks whose image carries one for this VM: `vm seal` writes that into the XML.
fn objects_of(domain: &Domain, carried_by: impl Fn(&Path) -> Option<Envelope>) -> Vec<ObjectRef> {
    let mut found: Vec<ObjectRef> = Vec::new();
    for object in domain::objects(domain) {
        let carried = || {
            let path = object
                .path
                .as_deref()
                .filter(|_| object.kind == ObjectKind::Disk)?;
            let envelope = carried_by(path)?;
            (envelope.vm == domain.uuid).then_some(envelope.id)
        };
        let secret = match object.state {
            ObjectState::Sealed(id) => Some(id),
            ObjectState::Plain | ObjectState::Unsupported(_) => carried(),
        };
        found.extend(secret.map(|secret| ObjectRef {
            kind: object.kind,
            label: object.label.clone(),
            secret,
            path: object.path.clone(),
        }));
    }
    for (secret, path) in encrypted_layers(domain) {
        if found.iter().all(|object| object.secret != secret) {
            found.push(ObjectRef {
                kind: ObjectKind::Disk,
                label: path.display().to_string(),
                secret,
                path: Some(path),
            });
        }
    }
    found
}

/// By the key that opens the format 1, whatever opens the other.
fn refuse_where_format_2_is_known(copies: &[VisibleCopy], dek: &Dek) -> Result<(), Problem> {
    let Some(known) = copies.iter().find(|copy| copy.envelope.verify(dek).is_ok()) else {
        return Ok(());
    };
    let reason = format!(
        "its envelope is in {} in format 2, and format 1 is older or not by virtseal",
        known.place
    );
    let providers: Vec<_> = known
        .envelope
        .stanzas
        .iter()
        .map(|stanza| stanza.provider_name.as_str())
        .collect();
    Err(Problem::new(Code::WouldLoseKey, reason)
        .next(Advice::ListProviders.within(format!("that version is opened by {}", providers.join(", ")))))
}

/// Those in the XML and in the image, of this object's envelope.
fn copies_of(
    domain: &Domain,
    object: &ObjectRef,
    carried_by: impl Fn(&Path) -> Option<Envelope>,
) -> Vec<VisibleCopy> {
    let metadata = domain.metadata.as_ref();
    let in_xml = metadata.and_then(|metadata| metadata.envelope(object.secret));
    let in_xml = in_xml.map(|envelope| VisibleCopy {
        envelope: envelope.clone(),
        location: object.path.clone(),
        place: Place::Xml(domain.name.clone()),
    });
    let in_image = object.path.as_deref().and_then(|path: &Path| {
        Some(VisibleCopy {
            envelope: carried_by(path)?,
            location: Some(path.to_owned()),
            place: Place::Image(path.to_owned()),
        })
    });
    in_xml
        .into_iter()
        .chain(in_image.filter(|copy| copy.envelope.id == object.secret))
        .collect()
}

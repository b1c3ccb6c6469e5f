//! What `vm adopt` asks for: the keystore learns of envelopes that came with a VM, from its XML and its images.
//!
//! A format 2 shows by its MAC that whoever wrote it had the key. A format 1 shows nothing: it is adopted only where root says
//! so, after its object has opened, and never where a format 2 of the same envelope is known.

use std::path::Path;

use super::foreign::{Proof, Taken, note_behind, take_in};
use super::host::Host;
use super::moved::Moved;
use super::names::ProviderNames;
use super::start::adoption::not_believed;
use super::visible::{Place, VisibleCopy, held_copies};
use crate::api::{FindingView, Outcome, StepView};
use crate::domain::{self, Domain, ObjectRef, encrypted_layers};
use crate::model::act::{Act, StepCode, Tense, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeError, Format1, ObjectKind, Verified};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::object::disk;
use crate::secret::Dek;
use crate::terminal::quoted;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Formats {
    /// Those that show who wrote them.
    WithMac,
    /// Those of format 1 too.
    Format1Too,
}

/// Takes over the envelopes of a VM that came from another host, as its first start would, and follows images that have moved.
///
/// # Errors
/// With the first object whose envelope is not taken over; the others are.
pub(crate) fn adopt(host: &Host<'_>, domain: &Domain, formats: Formats) -> Result<Outcome, Problem> {
    let name = &domain.name;
    let carried = |path: &Path| carried_by(host, domain, path);
    let objects = objects_of(domain, carried);
    if objects.is_empty() {
        return Err(nothing_sealed(host, domain));
    }
    let (mut acts, mut warnings, mut failed) = (Vec::new(), unreadable_in(domain), None);
    for object in &objects {
        match adopt_object(host, domain, object, formats, &mut warnings) {
            Ok(act) => acts.extend(act),
            // The others may well be adopted.
            Err(failure) => {
                let failure = failure.about(Subject::object(name, &object.label));
                failed.get_or_insert(failure.of(&object.label).of(name));
            }
        }
    }
    if host.keystore.vm(domain.uuid).is_err() {
        acts.push(StepCode::RepairRecords.told(format!("repaired the records of {name}")));
    }
    if !acts.is_empty() {
        host.keystore.remember_vm(domain.uuid, name)?;
    }
    for moved in Moved::among(domain, &host.keystore.envelopes_of(domain.uuid)?.sound) {
        match moved.open_and_settle(host) {
            Ok(true) => acts.push(moved.act()),
            Ok(false) => {}
            Err(failure) => warnings.push(Finding::beside(
                FindingCode::PathNotNoted,
                Subject::Vm(name.clone()),
                failure.of(format!("can't {}", moved.act())),
            )),
        }
    }
    match failed {
        Some(failure) => Err(failure),
        None => Ok(Outcome {
            changed: !acts.is_empty(),
            steps: StepView::all(&acts, Tense::Done, &Subject::Vm(name.clone())),
            warnings: FindingView::all(&warnings),
            ..Outcome::default()
        }),
    }
}

/// Unless an image was not looked at: what it carries is not known then.
fn nothing_sealed(host: &Host<'_>, domain: &Domain) -> Problem {
    let name = &domain.name;
    let objects = domain::objects(domain).into_iter();
    let disks = objects.filter(|object| object.kind == ObjectKind::Disk);
    let mut unseen = disks.filter_map(|disk| {
        let refused = host.permit_known(domain.uuid, disk.path.as_deref()?).err()?;
        Some(refused.of(&disk.label).of(name))
    });
    unseen.next().unwrap_or_else(|| {
        Problem::not_found(format!(
            "{name} has no sealed objects, neither by its XML nor by its images"
        ))
    })
}

/// By an image that the XML names; of one where root does not look, opening it says so.
fn carried_by(host: &Host<'_>, domain: &Domain, path: &Path) -> Option<Envelope> {
    let place = host.permit_known(domain.uuid, path).ok()?;
    disk::inspect(&place).ok()?.envelope
}

fn unreadable_in(domain: &Domain) -> Vec<Finding> {
    let unreadable = domain.metadata.iter().flat_map(|metadata| &metadata.unreadable);
    unreadable
        .map(|copy| {
            let what = format!("not adopted from the XML of {}: {}", domain.name, copy.reason);
            Finding::warning(
                FindingCode::CopyUnreadable,
                Subject::Vm(domain.name.clone()),
                what,
            )
        })
        .collect()
}

/// What was done for one object, if there was anything to do.
fn adopt_object(
    host: &Host<'_>,
    domain: &Domain,
    object: &ObjectRef,
    formats: Formats,
    warnings: &mut Vec<Finding>,
) -> Result<Option<Act>, Problem> {
    let before = host.keystore.readable_envelope(object.secret)?;
    let mut copies = copies_of(domain, object, |path| carried_by(host, domain, path));
    if before.is_none() {
        let held = held_copies(host.keystore, Some(domain.uuid))?.into_iter();
        copies.extend(held.filter(|copy| copy.envelope.id == object.secret));
    }
    let Attempts { with_mac, format_1 } = attempts(domain, object, &copies, formats);
    let location = object.path.as_deref().unwrap_or(Path::new(""));
    let mut refused = None;
    for copy in with_mac {
        match adopt_with_mac(host, copy, location) {
            Ok(Taken::Weighed(doubt)) => warnings.extend(doubt.map(|doubt| Finding {
                subject: Subject::object(&domain.name, &object.label),
                ..doubt
            })),
            Ok(Taken::GivenUp(problem)) | Err(problem) => drop(refused.get_or_insert(problem)),
        }
    }
    if let Some(record) = host.keystore.readable_envelope(object.secret)? {
        let is_news = before.is_none_or(|before| before.envelope != record.envelope);
        return Ok(is_news.then(|| adopted(host, object, &record.envelope, "")));
    }
    for copy in format_1? {
        match adopt_format_1(host, copy, &copies, location) {
            Ok(made) => {
                let from = format!(", format 1 from {}", copy.place);
                return Ok(Some(adopted(host, object, &made, &from)));
            }
            Err(failure) => drop(refused.get_or_insert(failure)),
        }
    }
    Err(refused.unwrap_or_else(|| {
        Problem::not_found(format!(
            "its envelope {} is neither here, nor in the XML, nor in the image",
            object.secret
        ))
        .next(Advice::DefineSealedXml(Some(domain.name.clone())))
    }))
}

/// Which copies of an object's envelope are tried, each until one counts.
struct Attempts<'a> {
    with_mac: Vec<&'a VisibleCopy>,
    /// Where none of these counts; or why they are not tried.
    format_1: Result<Vec<&'a VisibleCopy>, Problem>,
}

fn attempts<'a>(
    domain: &Domain,
    object: &ObjectRef,
    copies: &'a [VisibleCopy],
    formats: Formats,
) -> Attempts<'a> {
    let of_kind = copies.iter().filter(|copy| copy.envelope.kind == object.kind);
    let (with_mac, mut without): (Vec<_>, Vec<_>) =
        of_kind.partition(|copy| copy.envelope.format() == Envelope::FORMAT);
    let format_1 = match formats {
        Formats::WithMac if !without.is_empty() => Err(not_believed(&domain.name, &EnvelopeError::Format1)),
        Formats::WithMac | Formats::Format1Too => {
            // Nobody's word makes an object of another VM this one's.
            without.retain(|copy| copy.envelope.vm == domain.uuid);
            Ok(without)
        }
    };
    Attempts { with_mac, format_1 }
}

fn adopt_with_mac(host: &Host<'_>, copy: &VisibleCopy, location: &Path) -> Result<Taken, Problem> {
    let record = host.keystore.readable_envelope(copy.envelope.id)?;
    let first = record.as_ref().map_or(&copy.envelope, |record| &record.envelope);
    let dek = host.recipients.open_envelope(first)?;
    let location = location.display().to_string();
    let kept_at = record.as_ref().map_or(&location, |record| &record.location);
    take_in(host, copy, record.as_ref(), kept_at, &dek)
}

/// One that the keystore does not know.
fn adopt_format_1(
    host: &Host<'_>,
    copy: &VisibleCopy,
    copies: &[VisibleCopy],
    location: &Path,
) -> Result<Verified, Problem> {
    let dek = host.recipients.open_envelope(&copy.envelope)?;
    refuse_where_format_2_is_known(copies, &dek)?;
    host.open_object(&copy.envelope, location, &dek)?;
    let made = copy
        .envelope
        .upgrade(&dek, Format1::AdoptedByRoot)
        .map_err(|error| Problem::failed(chain(&error)))?;
    host.keystore.put(&made, &location.display().to_string())?;
    if let Some(record) = host.keystore.readable_envelope(made.id)? {
        for copy in copies {
            note_behind(host, copy, &record, Proof::Unknown)?;
        }
    }
    Ok(made)
}

fn adopted(host: &Host<'_>, object: &ObjectRef, envelope: &Envelope, from: &str) -> Act {
    let names = ProviderNames::of_host(host.recipients, host.keystore).of(envelope);
    let (id, label) = (envelope.id, &object.label);
    let what = format!("envelope {id} of {label} (opened by {}){from}", names.join(", "));
    let act = Verb::Adopt.act(StepCode::Adopt, what).on(label).with(id);
    object.path.iter().fold(act, Act::at)
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
        let secret = object.envelope().or_else(carried);
        found.extend(secret.map(|secret| object.with(secret)));
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
        .map(|stanza| quoted(&stanza.provider_name))
        .collect();
    Err(Problem::would_lose_key(reason)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{VmId, fixture};

    fn copy(envelope: Envelope, place: &str) -> VisibleCopy {
        VisibleCopy {
            envelope,
            location: None,
            place: Place::Image(place.into()),
        }
    }

    fn format_1(of: &Verified) -> Envelope {
        let mut json: serde_json::Value = serde_json::from_str(&of.to_json()).unwrap();
        let fields = json.as_object_mut().unwrap();
        fields.retain(|name, _| ["id", "vm", "kind", "generation", "stanzas"].contains(&name.as_str()));
        fields.insert("version".to_owned(), 1.into());
        Envelope::from_json(&json.to_string()).unwrap()
    }

    #[test]
    fn copies_with_a_mac_come_first_and_format_1_by_roots_word_alone() {
        let vm = VmId::random();
        let xml = format!("<domain type='kvm'><name>a</name><uuid>{vm}</uuid></domain>");
        let domain = Domain::parse(&xml).unwrap();
        let (own, of_another) = (fixture::envelope(vm), fixture::envelope(VmId::random()));
        let copies = [
            copy(format_1(&of_another), "another VM's"),
            copy(format_1(&own), "format 1"),
            copy(own.clone().into_envelope(), "format 2"),
        ];
        let object = |kind| ObjectRef {
            kind,
            label: "disk vda".to_owned(),
            secret: own.id,
            path: None,
        };
        let places = |copies: &[&VisibleCopy]| -> Vec<_> {
            copies.iter().map(|copy| copy.place.to_string()).collect()
        };
        let disk = object(ObjectKind::Disk);
        let by_root = attempts(&domain, &disk, &copies, Formats::Format1Too);
        assert_eq!(places(&by_root.with_mac), ["format 2"]);
        assert_eq!(places(&by_root.format_1.unwrap()), ["format 1"]);

        let usual = attempts(&domain, &disk, &copies, Formats::WithMac);
        assert_eq!(places(&usual.with_mac), ["format 2"]);
        let advice = usual.format_1.unwrap_err().advice.unwrap().to_string();
        assert!(advice.contains("--format-1"), "{advice}");
        let without = attempts(&domain, &disk, &copies[2..], Formats::WithMac);
        assert_eq!(places(&without.format_1.unwrap()), [""; 0]);

        // Those of another kind count for nothing.
        let vtpm = attempts(&domain, &object(ObjectKind::Vtpm), &copies, Formats::WithMac);
        assert!(vtpm.with_mac.is_empty() && vtpm.format_1.unwrap().is_empty());
    }
}

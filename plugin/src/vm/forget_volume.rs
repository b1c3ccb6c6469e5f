//! What `volume forget` asks for: the record of one object goes, as of a disk whose image was deleted, and a file brings it back.
//!
//! No key is destroyed. What is gone at its path may be elsewhere, so all places are looked at where this host knows it to be, and
//! what is seen at one of them, or in the XML of a VM, goes by a typed name alone. Copies in the metadata of XML that has the
//! disk no more go with the record: else they would count as an envelope that nobody here knows.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::forget::{Dropped, Whereabouts, keep_aside, object_name, whereabouts};
use super::forgotten::Said;
use super::host::Host;
use super::names::VmNames;
use super::visible::{Place, Visible};
use crate::api::{Outcome, StepView};
use crate::domain::{self, Domain, Metadata, SecretRef, edit, named_secrets, names_path};
use crate::host::libvirt::KeptXml;
use crate::model::act::{StepCode, Tense};
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeId, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem};
use crate::store::{Change, EnvelopeRecord};
use crate::terminal::word;

/// Where something of the object was seen, or may be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sighting {
    /// A VM has it in its XML, as the disk with this target where that shows.
    InXml { vm: String, disk: Option<String> },
    /// The XML of a snapshot or a managed save needs it.
    InSnapshot { vm: String, kept_in: String },
    /// It is there, or something that may be it.
    At(PathBuf),
    /// Nobody can tell whether it is there, and why.
    OutOfSight(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Nothing of it is to be seen.
    Goes,
    /// The name of its VM was typed.
    GoesAsTyped,
    Stays,
    OtherTyped,
}

fn decide(vm: &str, seen: &BTreeSet<Sighting>, typed: Option<&str>) -> Verdict {
    match typed {
        Some(typed) if typed != vm => Verdict::OtherTyped,
        _ if seen.is_empty() => Verdict::Goes,
        Some(_) => Verdict::GoesAsTyped,
        None => Verdict::Stays,
    }
}

/// The record that is meant by `asked`, a path or the UUID of an envelope.
pub(crate) fn find(host: &Host<'_>, asked: &str) -> Result<EnvelopeRecord, Problem> {
    let none = || Problem::not_found(format!("this host knows no volume {asked}")).next(Advice::ListOrphans);
    if let Ok(id) = asked.parse() {
        return host.keystore.envelope(id)?.ok_or_else(none);
    }
    let mut records = host.keystore.envelopes()?.sound;
    records.retain(|record| record.location == asked);
    let ids: Vec<_> = records
        .iter()
        .map(|record| record.envelope.id.to_string())
        .collect();
    match (records.pop(), records.is_empty()) {
        (None, _) => Err(none()),
        (Some(record), true) => Ok(record),
        (Some(_), false) => Err(Problem::usage(format!("{} volumes were at {asked}", ids.len()))
            .next(Advice::ForgetVolume("UUID".into()).note(format!("one of {}", ids.join(", "))))),
    }
}

/// Whether this XML needs the object: by its secret, wherever that is named, or by its path.
pub(crate) fn is_needed_by(xml: &str, record: &EnvelopeRecord) -> bool {
    let id = record.envelope.id;
    // As text where it can't be read: it may need its disk all the same.
    let by_secret =
        named_secrets(xml).map_or_else(|_| xml.contains(&id.to_string()), |ids| ids.contains(&id));
    let place = Path::new(&record.location);
    let as_object = |domain: &Domain| {
        let mut objects = domain::objects(domain).into_iter();
        objects.any(|object| object.path.as_deref() == Some(place))
    };
    let as_text = || !record.location.is_empty() && names_path(xml, Path::new(&record.location));
    let as_source = |sources: Vec<PathBuf>| sources.iter().any(|path| path == place);
    by_secret
        || Metadata::sources_in(xml).is_ok_and(as_source)
        || Domain::parse(xml).map_or_else(|_| as_text(), |domain| as_object(&domain))
}

/// Drops the record, after it was kept in a file; where the object, or somebody who needs it, is to be seen, only if the name of its
/// VM was `typed`. Nothing else may be done to the VM meanwhile, and no start may have the envelope.
///
/// # Errors
/// With where it was seen.
pub(crate) fn forget(
    host: &Host<'_>,
    record: &EnvelopeRecord,
    typed: Option<&str>,
) -> Result<Outcome, Problem> {
    let (id, owner) = (record.envelope.id, record.envelope.vm);
    let (what, vm) = (
        object_name(host, record),
        VmNames::of_keystore(host.keystore)?.of(owner),
    );
    let seen = sightings(host, record)?;
    let verdict = decide(&vm, &seen, typed);
    match verdict {
        Verdict::Goes | Verdict::GoesAsTyped => {}
        Verdict::Stays => return Err(stays(&what, &named(record), &seen)),
        Verdict::OtherTyped => {
            return Err(Problem::would_lose_key(format!(
                "{what} is not forgotten: '{}' was typed",
                typed.unwrap_or_default()
            ))
            .next(
                Advice::ForceForgetVolume(named(record))
                    .note(format!("and type the name of its VM, {}", word(vm))),
            ));
        }
    }
    let said = match verdict {
        Verdict::GoesAsTyped => Said::Elsewhere,
        _ => Said::Deleted,
    };
    let copies = copies_in_metadata(host, record);
    let kept = keep_aside(
        host.keystore,
        host.host_store,
        owner,
        &vm,
        Dropped {
            said,
            records: std::slice::from_ref(record),
            damaged: copies.others,
        },
    )?;
    for holder in copies.holders {
        remove_copy(host, holder, id)?;
    }
    if host.keystore.forget_envelope(record)? == Change::Unchanged {
        return Err(
            Problem::busy(format!("the envelope of {what} has changed just now, and stays"))
                .next(Advice::ForgetVolume(named(record))),
        );
    }
    let back = match record.envelope.kind.is_kept_by_path() {
        true => Advice::AdoptVolume((&record.location).into()),
        false => Advice::AdoptFrom(kept.clone()),
    };
    let text = format!(
        "dropped the envelope of {what} of {vm}, kept in {}; no key was destroyed",
        kept.display()
    );
    let act = StepCode::Forget.told(text).with(id).at(&kept);
    let object = match record.envelope.kind.is_kept_by_path() {
        true => Subject::Image(record.location.clone()),
        false => Subject::object(&vm, &record.envelope.kind.to_string()),
    };
    let kept_aside = Finding::warning(
        FindingCode::KeptAside,
        object.clone(),
        format!("should it turn up: {back}"),
    );
    Ok(Outcome {
        steps: StepView::all(&[act], Tense::Done, &object),
        warnings: vec![kept_aside.into()],
        changed: true,
        ..Outcome::default()
    })
}

fn sightings(host: &Host<'_>, record: &EnvelopeRecord) -> Result<BTreeSet<Sighting>, Problem> {
    let id = record.envelope.id;
    let text = id.to_string();
    let in_xml = host.kept.iter().filter_map(|kept| match &kept.snapshot {
        // Nobody can take the copy out of its metadata.
        Some(kept_in) => kept.xml.contains(&text).then(|| Sighting::InSnapshot {
            vm: kept.name.clone(),
            kept_in: kept_in.clone(),
        }),
        None => is_needed_by(&kept.xml, record).then(|| Sighting::InXml {
            vm: kept.name.clone(),
            disk: target_in(&kept.xml, record),
        }),
    });
    let mut seen: BTreeSet<_> = in_xml.collect();
    let copies = Visible::of_host(host)?.copies.into_iter();
    seen.extend(
        copies
            .filter(|copy| copy.envelope.id == id)
            .filter_map(|copy| match copy.place {
                Place::Image(path) => Some(Sighting::At(path)),
                Place::Xml(_) | Place::Snapshot(..) | Place::Keystore => None,
            }),
    );
    seen.extend(match whereabouts(host, record) {
        Whereabouts::Absent | Whereabouts::Another => None,
        Whereabouts::Carries(_) | Whereabouts::Unmarked => {
            Some(Sighting::At(crate::object::path_of(record, &host.swtpm_dir)))
        }
        Whereabouts::Unreadable(why) => Some(Sighting::OutOfSight(why)),
    });
    Ok(seen)
}

fn target_in(xml: &str, record: &EnvelopeRecord) -> Option<String> {
    let domain = Domain::parse(xml).ok()?;
    let secret = SecretRef::Uuid(record.envelope.id);
    let is_it = |disk: &&crate::domain::Disk| {
        disk.source.path() == Some(Path::new(&record.location))
            || disk
                .encryption
                .as_ref()
                .is_some_and(|encryption| encryption.secret == secret)
    };
    domain.disks.iter().find(is_it).map(|disk| disk.target.clone())
}

/// As `volume forget` takes it.
fn named(record: &EnvelopeRecord) -> String {
    match record.location.as_str() {
        "" => record.envelope.id.to_string(),
        path => path.to_owned(),
    }
}

fn stays(what: &str, named: &str, seen: &BTreeSet<Sighting>) -> Problem {
    let again = || Advice::ForgetVolume(named.to_owned());
    let reasons: Vec<_> = seen.iter().map(ToString::to_string).collect();
    let way = match seen.first() {
        Some(Sighting::InXml { vm, disk: Some(disk) }) => Advice::DetachDisk {
            vm: vm.clone(),
            disk: disk.clone(),
        }
        .then(again()),
        Some(Sighting::InXml { vm, disk: None }) => Advice::EditXml(vm.clone())
            .within("remove it there")
            .then(again()),
        Some(Sighting::InSnapshot { vm, .. }) => Advice::ListSnapshots(vm.clone())
            .within("delete those that are from before it was removed")
            .then(again()),
        Some(Sighting::OutOfSight(_)) => Advice::from("mend that").then(again()),
        Some(Sighting::At(_)) | None => Advice::from("delete it, if nobody needs its data").then(again()),
    };
    let force = Advice::ForceForgetVolume(named.to_owned()).note("which asks for the name of its VM");
    Problem::would_lose_key(format!("{what} is not forgotten: {}", reasons.join("; ")))
        .next(way.or_else(force))
}

/// The copies that go with the record.
struct Copies {
    /// The VMs whose metadata has one, and whose XML needs the object no more.
    holders: BTreeSet<VmId>,
    /// Those that are not what the record says, as JSON.
    others: Vec<serde_json::Value>,
}

fn copies_in_metadata(host: &Host<'_>, record: &EnvelopeRecord) -> Copies {
    let id = record.envelope.id;
    let has_one = |kept: &&KeptXml| kept.snapshot.is_none() && Metadata::ids_in(&kept.xml).contains(&id);
    let mut copies = Copies {
        holders: BTreeSet::new(),
        others: Vec::new(),
    };
    for kept in host
        .kept
        .iter()
        .filter(has_one)
        .filter(|kept| !is_needed_by(&kept.xml, record))
    {
        copies.holders.insert(kept.vm);
        let found = Metadata::envelopes_in(&kept.xml)
            .map(|(envelopes, _)| envelopes)
            .unwrap_or_default();
        let others = found
            .into_iter()
            .filter(|found| found.id == id && *found != record.envelope);
        copies
            .others
            .extend(others.filter_map(|other| serde_json::to_value(other).ok()));
    }
    copies
}

fn remove_copy(host: &Host<'_>, vm: VmId, id: EnvelopeId) -> Result<(), Problem> {
    let failed = |why: &dyn std::error::Error| {
        Problem::from_error(
            Code::Failed,
            format!("the copy of envelope {id} in the XML of VM {vm} stays"),
            why,
        )
        .next(Advice::EditXml(vm.to_string()).within("remove that <virtseal:envelope>"))
    };
    let unreadable = RefCell::new(None);
    let namespace = (Metadata::PREFIX, Metadata::NAMESPACE);
    let edited = host.libvirt.edit_metadata(vm, namespace, |element| {
        edit::element_without(element, id).unwrap_or_else(|error| {
            *unreadable.borrow_mut() = Some(error);
            None
        })
    });
    match (edited, unreadable.into_inner()) {
        (Err(error), _) => Err(failed(&error)),
        (Ok(_), Some(error)) => Err(failed(&error)),
        (Ok(_), None) => Ok(()),
    }
}

impl std::fmt::Display for Sighting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::InXml { vm, disk: Some(disk) } => write!(f, "{vm} has it in its XML, as {disk}"),
            Self::InXml { vm, disk: None } => write!(f, "{vm} has it in its XML"),
            Self::InSnapshot { vm, kept_in } => write!(f, "{kept_in} of {vm} has its envelope"),
            Self::At(path) => write!(f, "{} is there", path.display()),
            Self::OutOfSight(why) => write!(f, "nobody can tell whether it is there: {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::fixture;
    use crate::store::EnvelopeState;

    fn record() -> EnvelopeRecord {
        EnvelopeRecord {
            envelope: fixture::envelope(VmId::random()).into_envelope(),
            state: EnvelopeState::Active,
            location: "/images/data.qcow2".to_owned(),
            created: 0,
            updated: 0,
        }
    }

    fn all() -> Vec<Sighting> {
        let vm = || "web01".to_owned();
        vec![
            Sighting::InXml {
                vm: vm(),
                disk: Some("vdb".to_owned()),
            },
            Sighting::InXml { vm: vm(), disk: None },
            Sighting::InSnapshot {
                vm: vm(),
                kept_in: "snapshot s1".to_owned(),
            },
            Sighting::At("/images/data.qcow2".into()),
            Sighting::OutOfSight("Permission denied".to_owned()),
        ]
    }

    #[test]
    fn what_is_seen_anywhere_goes_by_the_name_of_its_vm_alone() {
        let nothing = BTreeSet::new();
        assert_eq!(decide("web01", &nothing, None), Verdict::Goes);
        assert_eq!(decide("web01", &nothing, Some("web01")), Verdict::Goes);
        assert_eq!(decide("web01", &nothing, Some("")), Verdict::OtherTyped);
        for sighting in all() {
            let seen = BTreeSet::from([sighting]);
            assert_eq!(decide("web01", &seen, None), Verdict::Stays, "{seen:?}");
            assert_eq!(decide("web01", &seen, Some("web02")), Verdict::OtherTyped);
            assert_eq!(decide("web01", &seen, Some("web01")), Verdict::GoesAsTyped);
            let problem = stays("disk /images/data.qcow2", "/images/data.qcow2", &seen);
            assert!(
                problem.to_string().contains("volume forget /images/data.qcow2"),
                "{problem}"
            );
        }
    }

    #[test]
    fn xml_needs_a_volume_by_its_secret_or_its_path_and_not_by_a_copy_of_its_envelope() {
        let record = record();
        let domain = |metadata: &str, disk: &str| {
            format!(
                "<domain type='kvm'><name>a</name><uuid>{}</uuid><metadata><virtseal:vm xmlns:virtseal='{}'>{metadata}</virtseal:vm>\
                 </metadata><devices>{disk}</devices></domain>",
                record.envelope.vm,
                Metadata::NAMESPACE
            )
        };
        let copy = format!(
            "<virtseal:envelope id='{}'>{}</virtseal:envelope>",
            record.envelope.id,
            record.envelope.to_json()
        );
        assert!(!is_needed_by(&domain(&copy, ""), &record));
        let disk =
            |source: &str| format!("<disk type='file'><source {source}</source><target dev='vdb'/></disk>");
        let secret = format!(
            "file='/moved'><encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption>",
            record.envelope.id
        );
        for source in [&secret, "file='/images/data.qcow2'>"] {
            let xml = domain(&copy, &disk(source));
            assert!(is_needed_by(&xml, &record), "{source}");
            assert_eq!(target_in(&xml, &record).as_deref(), Some("vdb"));
        }
        assert!(!is_needed_by(&domain(&copy, &disk("file='/other'>")), &record));
        let store = format!("<os><nvram>{}</nvram></os>", record.location);
        let with_store = domain(&copy, "").replace("<devices>", &format!("{store}<devices>"));
        assert!(is_needed_by(&with_store, &record));
        // What can't be read counts by its text.
        assert!(is_needed_by(&record.envelope.id.to_string(), &record));
        assert!(is_needed_by(&record.location, &record) && !is_needed_by("/images", &record));
    }
}

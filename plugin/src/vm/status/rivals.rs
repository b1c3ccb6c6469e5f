//! Copies in a domain's XML and its images that are not what the keystore has: what `vm status` says of them.
//!
//! Status has no key, so it tells only what they claim. One that is behind follows by itself, and is not worth a word.

use std::path::Path;

use crate::domain::Domain;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, Precedence};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::object::disk::ImageCopy;

/// Of the copies in the XML, given what the keystore has.
pub(super) fn of<'k>(domain: &Domain, kept: impl Fn(EnvelopeId) -> Option<&'k Envelope>) -> Vec<Finding> {
    let Some(metadata) = &domain.metadata else {
        return Vec::new();
    };
    let name = &domain.name;
    let copies = metadata.envelopes.iter();
    let of_copies = copies.filter_map(|copy| match kept(copy.id) {
        Some(kept) => rival(
            name,
            Subject::Vm(name.clone()),
            &format!("the XML of {name}"),
            copy,
            kept,
        ),
        None => unknown(name, copy),
    });
    let unreadable = metadata.unreadable.iter().map(|copy| {
        let reason = &copy.reason;
        let (what, advice) = match copy.id.and_then(&kept) {
            Some(_) => (
                format!("{name}: {reason}; the keystore's is used"),
                Advice::SealVm(name.clone()).note("which has it written over that"),
            ),
            None => (
                format!("{name}: {reason}"),
                Advice::DefineSealedXml(Some(name.clone())),
            ),
        };
        Finding::warning(FindingCode::CopyUnreadable, Subject::Vm(name.clone()), what).next(advice)
    });
    of_copies.chain(unreadable).collect()
}

/// Of the copy in the image at `path`, whose envelope the keystore has as `kept`.
pub(in crate::vm) fn in_image(
    name: &str,
    object: &str,
    path: &Path,
    copy: &ImageCopy,
    kept: Option<&Envelope>,
) -> Option<Finding> {
    let shown = path.display();
    let subject = Subject::Object {
        vm: name.to_owned(),
        object: object.to_owned(),
    };
    let seal = || Advice::SealVm(name.to_owned());
    let (code, what, advice) = match (copy, kept) {
        (ImageCopy::Envelope(copy), Some(kept)) if copy.id == kept.id => {
            return rival(name, subject, &shown.to_string(), copy, kept);
        }
        (ImageCopy::Envelope(copy), Some(kept)) => (
            FindingCode::CopyOfAnother,
            format!(
                "{name}: {shown} carries envelope {}, which is not the one of this disk ({}); the keystore's is used",
                copy.id, kept.id
            ),
            seal().note("which has it written over that if it opens the image"),
        ),
        (ImageCopy::Unreadable(why), Some(kept)) => (
            FindingCode::CopyUnreadable,
            format!(
                "{name}: the copy of envelope {} in {shown} can't be read: {why}; the keystore's is used",
                kept.id
            ),
            seal().note("which has it written over that once the image has opened"),
        ),
        (ImageCopy::Unreadable(why), None) => (
            FindingCode::CopyUnreadable,
            format!("{name}: the copy of an envelope in {shown} can't be read: {why}"),
            Advice::DefineSealedXml(Some(name.to_owned())),
        ),
        (ImageCopy::None, _) | (ImageCopy::Envelope(_), None) => return None,
    };
    Some(Finding::warning(code, subject, what).next(advice))
}

fn rival(name: &str, subject: Subject, place: &str, copy: &Envelope, kept: &Envelope) -> Option<Finding> {
    let id = kept.id;
    match copy.supersedes(kept) {
        Precedence::Same | Precedence::Older => None,
        Precedence::Conflict => {
            let what = format!(
                "the keystore and {place} have different versions of generation {} of envelope {id}. The keystore's, opened by \
                 {}, is used; that of {place} names {}",
                kept.generation,
                providers(kept),
                providers(copy),
            );
            let rekey = Advice::RekeyVm(name.to_owned())
                .note("which makes a later generation of the keystore's for both")
                .also("for the other one, do that on the host where it was made, and bring its dumpxml here");
            Some(Finding::critical(FindingCode::CopyConflict, subject, what).next(rekey))
        }
        Precedence::Newer => {
            let what = format!(
                "{place} claims generation {} of envelope {id}, and the keystore has {}",
                copy.generation, kept.generation
            );
            let adopt = Advice::AdoptVm(name.to_owned()).note("which takes it over if it verifies");
            Some(Finding::warning(FindingCode::CopyNewer, subject, what).next(adopt))
        }
    }
}

fn unknown(name: &str, copy: &Envelope) -> Option<Finding> {
    let is_old = copy.format() != Envelope::FORMAT;
    is_old.then(|| {
        let what = format!(
            "the XML of {name} has envelope {} in format 1, which this host does not know",
            copy.id
        );
        let adopt = Advice::AdoptFormat1(name.to_owned()).note("if you know where that XML comes from");
        Finding::warning(FindingCode::CopyUnknown, Subject::Vm(name.to_owned()), what).next(adopt)
    })
}

fn providers(envelope: &Envelope) -> String {
    let names: Vec<_> = envelope
        .stanzas
        .iter()
        .map(|stanza| format!("'{}'", stanza.provider_name))
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{Binding, KekId, ObjectKind, ProviderId, Stanza, Verified, VmId};
    use crate::secret::Dek;

    #[test]
    fn each_is_named_with_what_is_used() {
        let (dek, vm) = (Dek::random().unwrap(), VmId::random());
        let stanza = |name: &str| Stanza {
            provider: ProviderId::random(),
            provider_name: name.to_owned(),
            kek: KekId("v1:provider".to_owned()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        };
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm,
            kind: ObjectKind::Disk,
        };
        let made = Verified::new(&binding, vec![stanza("main")], &dek).unwrap();
        let ours = made.with_stanzas(vec![stanza("ours")], &dek).unwrap();
        let theirs = made.with_stanzas(vec![stanza("theirs")], &dek).unwrap();
        let newer = theirs.mark_seen(&dek).unwrap();
        assert_eq!(
            rival("web01", Subject::Vm("web01".into()), "/images/a", &made, &ours),
            None
        );
        assert_eq!(
            rival("web01", Subject::Vm("web01".into()), "/images/a", &ours, &ours),
            None
        );
        let found = rival("web01", Subject::Vm("web01".into()), "/images/a", &theirs, &ours).unwrap();
        let conflict = found.to_string();
        for part in [
            "/images/a",
            "virtseal vm rekey web01",
            "generation 2",
            "'ours'",
            "'theirs'",
            &made.id.to_string(),
        ] {
            assert!(conflict.contains(part), "{conflict}");
        }
        let claim = rival("web01", Subject::Vm("web01".into()), "/images/a", &newer, &ours)
            .unwrap()
            .to_string();
        assert!(
            claim.contains("claims generation 3") && claim.contains("vm adopt web01"),
            "{claim}"
        );
        assert_eq!(unknown("web01", &made), None);
        // The same of images.
        let path = Path::new("/images/a");
        let copy = |envelope: &Verified| ImageCopy::Envelope(Box::new(envelope.clone().into_envelope()));
        assert_eq!(
            in_image("web01", "disk vda", path, &copy(&theirs), Some(&ours)).map(|found| found.to_string()),
            Some(conflict)
        );
        assert_eq!(
            in_image("web01", "disk vda", path, &copy(&ours), Some(&ours)),
            None
        );
        assert_eq!(
            in_image("web01", "disk vda", path, &ImageCopy::None, Some(&ours)),
            None
        );
        let other = Binding {
            envelope: EnvelopeId::random(),
            ..binding
        };
        let other = Verified::new(&other, vec![stanza("main")], &dek).unwrap();
        let foreign = in_image("web01", "disk vda", path, &copy(&other), Some(&ours))
            .unwrap()
            .to_string();
        assert!(
            foreign.contains("/images/a") && foreign.contains(&other.id.to_string()),
            "{foreign}"
        );
        let bad = ImageCopy::Unreadable("it is not text".to_owned());
        let bad = in_image("web01", "disk vda", path, &bad, Some(&ours))
            .unwrap()
            .to_string();
        assert!(bad.contains("/images/a") && bad.contains("not text"), "{bad}");
    }
}

//! What a status tells of side doors: those that are allowed, what is attached or copied while a VM runs, and plain layers below its
//! disks. Each finding says what leads out.

use std::collections::BTreeMap;
use std::path::Path;

use super::{allow, free_of_overlays, judge, not_sealed, refuse};
use crate::domain::jobs::JobTarget;
use crate::domain::{
    self, Domain, Object, ObjectState, Permission, Policy, PolicyKey, Refusal, Rule, objects,
    sealed_objects_under,
};
use crate::host::permitted::{PathError, PermittedPath};
use crate::host::storage;
use crate::model::advice::Advice;
use crate::model::deadlines::status::STORAGE;
use crate::model::envelope::ObjectKind;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::object::disk::{self, VolumeError};
use crate::terminal::visible;

/// `what` is shown as it is.
fn warning(domain: &Domain, what: &str) -> Finding {
    let what = format!("{}: {what}", visible(&domain.name));
    Finding::warning(FindingCode::Plaintext, Subject::Vm(domain.name.clone()), what)
}

/// What is allowed and still lands in plaintext somewhere.
pub(crate) fn warnings(domain: &Domain, policy: Policy) -> Vec<Finding> {
    let judged = judge(domain, policy).into_iter();
    judged
        .filter(|(_, _, rule)| *rule == Rule::Warned)
        .map(|(words, door, _)| warning(domain, &words).next(door.way_out(&domain.name)))
        .collect()
}

/// [`warnings`], and why the next start of a sealed VM is refused.
pub(crate) fn findings(domain: &Domain, policy: Policy) -> Vec<Finding> {
    let refused = refuse(domain, policy).err().map(|problem| {
        let problem = problem.of(format!("{} stays off at its next start", domain.name));
        Finding::of(
            FindingCode::StartRefused,
            Subject::Vm(domain.name.clone()),
            problem,
        )
    });
    let overlaid = match sealed_objects_under(domain, policy) {
        Err(refusal @ Refusal::Overlaid { .. }) => Some(Finding::of(
            FindingCode::Overlaid,
            Subject::Vm(domain.name.clone()),
            not_sealed(&refusal).of(format!("{} stays off at its next start", domain.name)),
        )),
        Ok(_) | Err(_) => None,
    };
    let found = refused.into_iter().chain(overlaid);
    found.chain(warnings(domain, policy)).collect()
}

/// What a running sealed VM has that a start would have refused, or its next start would not have: copies and a backup in the
/// making, and what was attached. No hook runs for these.
pub(crate) fn while_it_runs(
    live: &Domain,
    next: Option<&Domain>,
    backup: &[JobTarget],
    policy: Policy,
) -> Vec<Finding> {
    let known = next.map(|next| warnings(next, policy)).unwrap_or_default();
    let mut found = warnings(live, policy);
    found.retain(|warning| !known.contains(warning));
    let backup = backup.iter().filter(|target| !target.sealed);
    found.extend(
        backup.map(|target| warning(live, &visible(&target.to_string())).next(target.way_out(&live.name))),
    );
    let is_allowed = |disk: &Object| {
        policy.mixed_disks == Permission::Yes && next.is_some_and(|next| objects(next).contains(disk))
    };
    let plain = plain_disks(live).into_iter().filter(|disk| !is_allowed(disk));
    found.extend(plain.map(|disk| {
        let path = disk.path.unwrap_or_default();
        let what = format!(
            "{} is in use in plaintext, whatever its image is: {}",
            disk.label,
            path.display()
        );
        warning(live, &visible(&what)).next(match domain::is_overlay(live, &path) {
            true => free_of_overlays(&live.name),
            false => Advice::from("detach it").or_else(allow(PolicyKey::MixedDisks.as_str())),
        })
    }));
    found
}

/// The disks that the guest may write to, and that libvirt opens without a key.
pub(crate) fn plain_disks(domain: &Domain) -> Vec<Object> {
    let mut disks = objects(domain);
    disks.retain(|object| object.kind == ObjectKind::Disk && object.state == ObjectState::Plain);
    disks
}

/// That a disk is a sealed image, opened as if it were raw.
pub(crate) fn sealed_as_raw(live: &Domain, disk: &str, path: &Path, owner: &str) -> Finding {
    let what = format!(
        "{disk} is the sealed image {} of {owner}, opened as raw: the guest sees ciphertext, and what it writes there destroys \
         the image",
        path.display()
    );
    Finding {
        code: FindingCode::SealedAsRaw,
        ..warning(live, &visible(&what))
    }
    .next(Advice::from("detach it").then(Advice::ShowVolume(path.to_owned())))
}

/// Which plain images the VM's disks are based on, but for what is on storage that does not answer.
pub(crate) fn plain_layers(
    domain: &Domain,
    policy: Policy,
    permit: impl Fn(&Path) -> Result<PermittedPath, PathError> + Send + Sync + 'static,
) -> Vec<Finding> {
    let mut found = Vec::new();
    if policy.plain_backing == Permission::Yes {
        return found;
    }
    let written = || domain.disks.iter().filter(|disk| !disk.readonly);
    let paths = written().filter_map(|disk| disk.source.path().map(Path::to_owned));
    // Headers alone are read.
    let look = move |path: &Path| {
        let top = permit(path).ok()?;
        Some(disk::known_layers(&top, |path| Ok(permit(path)?)))
    };
    let seen = storage::in_time(paths.collect(), STORAGE, look).into_iter();
    let mut seen: BTreeMap<_, _> = seen.filter_map(|(path, seen)| Some((path, seen??))).collect();
    for disk in written() {
        let seen = disk.source.path().and_then(|path| seen.remove(path));
        let Some((layers, end)) = seen else { continue };
        let is_based = format!("disk {} is based on", disk.target);
        if let Some(VolumeError::Place(error)) = end {
            let problem = Problem::from(error);
            let what = format!(
                "{is_based} an image that virtseal does not look at: {}",
                problem.message
            );
            found.push(Finding {
                advice: problem.advice,
                ..warning(domain, &visible(&what))
            });
        }
        let plain = layers.into_iter().skip(1).filter(|layer| !layer.encrypted);
        found.extend(plain.map(|layer| {
            let path = layer.path.display();
            let what = format!("{is_based} the plain image {path}: whatever is in that is plaintext");
            warning(domain, &visible(&what)).next(allow("plain_backing"))
        }));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::tests::domain;
    use super::*;
    use crate::domain::jobs::Role;
    use crate::model::finding::Severity;

    #[test]
    fn what_was_attached_or_is_copied_while_it_runs_is_told() {
        let disk = |inside: &str| {
            format!(
                "<devices><disk type='file'><source file='/d'/><target dev='vdb'/>{inside}</disk></devices>"
            )
        };
        let seen = |live: &Domain, next: Option<&Domain>, policy| while_it_runs(live, next, &[], policy);
        let (next, attached) = (domain(""), domain(&disk("")));
        // Into its definition too, or of a VM that has none: a start would have refused it.
        for next in [Some(&next), Some(&attached), None] {
            let told = seen(&attached, next, Policy::default());
            assert!(
                matches!(&told[..], [one] if one.what.contains("disk vdb") && one.what.contains("/d")),
                "{told:?}"
            );
        }
        let mixed = Policy {
            mixed_disks: Permission::Yes,
            ..Policy::default()
        };
        assert!(seen(&attached, Some(&attached), mixed).is_empty());
        assert_eq!(seen(&attached, Some(&next), mixed).len(), 1);
        let copied = domain(&disk(
            "<mirror type='file' job='copy'><source file='/copy'/></mirror>",
        ));
        let told = seen(&copied, Some(&attached), mixed);
        assert!(
            matches!(&told[..], [one] if one.what.contains("/copy")),
            "{told:?}"
        );
        assert!(seen(&next, Some(&next), Policy::default()).is_empty());
    }

    #[test]
    fn an_overlay_on_a_sealed_disk_is_told_with_what_frees_of_it() {
        let sealed = format!(
            "<encryption format='luks' engine='qemu'><secret type='passphrase' uuid='{}'/></encryption>",
            uuid::Uuid::new_v4()
        );
        let vm = domain(&format!(
            "<metadata><v:vm xmlns:v='urn:virtseal:vm:1'/></metadata><devices><disk type='file'><source file='/o'/><backingStore \
             type='file'><source file='/b'>{sealed}</source></backingStore><target dev='vda'/></disk></devices>"
        ));
        let commit = "virtseal vm snapshot commit 'my vm'";
        let told = findings(&vm, Policy::default());
        let is_told = |found: &Finding| {
            found.to_string().contains("plain overlay, /o") && found.to_string().contains(commit)
        };
        assert_eq!(told.iter().filter(|found| is_told(found)).count(), 1, "{told:?}");
        let told = while_it_runs(&vm, Some(&vm), &[], Policy::default());
        assert!(
            matches!(&told[..], [one] if one.to_string().contains(commit)),
            "{told:?}"
        );
    }

    #[test]
    fn a_backup_is_told_where_it_is_plain() {
        let vm = domain("");
        let target = |sealed| JobTarget {
            disk: "vda".into(),
            role: Role::Scratch,
            to: "/x\u{1b}[2J".into(),
            sealed,
        };
        let told = while_it_runs(&vm, Some(&vm), &[target(false), target(true)], Policy::default());
        assert_eq!(told.len(), 1, "{told:?}");
        let told = told[0].to_string();
        assert!(
            told.contains("/x") && told.contains("<scratch>") && !told.contains('\u{1b}'),
            "{told}"
        );
    }

    #[test]
    fn each_of_them_says_what_leads_out() {
        let plain = domain(
            "<devices><disk type='file'><source file='/d'/><target dev='vdb'/></disk>\
             <filesystem><source dir='/srv'/></filesystem></devices>",
        );
        let mut told = while_it_runs(&plain, None, &[], Policy::default());
        told.push(sealed_as_raw(&plain, "disk vda", Path::new("/a"), "b"));
        assert_eq!(told.len(), 3, "{told:?}");
        for finding in told {
            assert!(finding.advice.is_some(), "{finding}");
            assert_eq!(finding.severity, Severity::Warning);
        }
    }
}

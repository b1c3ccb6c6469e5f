//! Which VMs the hook takes for sealed: it lets none of them start by an XML that does not say so.
//!
//! A VM is marked before the first of its objects is replaced, because from then on its old XML would show the guest ciphertext,
//! and write on it. The mark goes when nothing of the VM is encrypted.

use crate::api::{Outcome, StepView};
use crate::domain::{self, Domain};
use crate::host::libvirt::DefinedDomain;
use crate::model::act::{StepCode, Tense, Verb};
use crate::model::envelope::ObjectKind;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::object::disk::{self, VolumeError};
use crate::vm::host::Host;

/// Runs `seal` with the VM marked; a VM of which nothing was sealed starts as before.
pub(crate) fn while_marked<T>(
    host: &Host<'_>,
    vm: &DefinedDomain,
    seal: impl FnOnce() -> Result<T, Problem>,
) -> Result<T, Problem> {
    let was_sealed = host.keystore.is_sealed(vm.vm)?;
    host.keystore.remember_vm(vm.vm, &vm.name)?;
    seal().inspect_err(|_| {
        if !was_sealed && nothing_is_encrypted(host, vm).unwrap_or(false) {
            // Else the next `vm seal` or `vm unseal` of it does.
            let _ = host.keystore.note_plain(vm.vm);
        }
    })
}

/// Whether a plain VM is marked and has no more of a sealed one: a seal was interrupted before it did anything, or the VM was
/// brought back from a plain backup.
///
/// # Errors
/// Of a file where root does not look, with what permits it.
pub(crate) fn is_marked_in_vain(host: &Host<'_>, vm: &DefinedDomain) -> Result<bool, Problem> {
    let is_plain = Domain::parse(&vm.xml).is_ok_and(|domain| domain.metadata.is_none());
    Ok(is_plain && host.keystore.is_sealed(vm.vm)? && nothing_is_encrypted(host, vm)?)
}

/// What taking the mark away comes to.
pub(crate) fn unmarked(name: &str, tense: Tense) -> Outcome {
    let step = Verb::Let.act(StepCode::Unmark, "it start as it is: nothing of it is encrypted");
    let vm = Subject::Vm(name.to_owned());
    Outcome {
        steps: StepView::all(&[step], tense, &vm),
        warnings: vec![keys_stay(vm).into()],
        changed: tense == Tense::Done,
        ..Outcome::default()
    }
}

pub(super) fn keys_stay(vm: Subject) -> Finding {
    Finding::warning(FindingCode::KeysStay, vm, "the keys stay in the keystore")
}

/// What is at the place of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Plain,
    Nothing,
    /// Or nobody can tell.
    Encrypted,
}

/// Looks at every file that the XML names.
fn nothing_is_encrypted(host: &Host<'_>, vm: &DefinedDomain) -> Result<bool, Problem> {
    let Ok(domain) = Domain::parse(&vm.xml) else {
        return Ok(false);
    };
    let mut contents = Vec::new();
    for object in domain::objects(&domain) {
        let Some(path) = object.path.filter(|_| is_plain(&domain, &contents)) else {
            continue;
        };
        let found = match host.place_of(vm.vm, &path)? {
            Ok(place) => disk::inspect(&place),
            Err(error) if error.is_missing() => Err(VolumeError::NotFound(path)),
            Err(error) => return Err(error.into()),
        };
        let content = match found {
            Ok(info) if info.format.is_encrypted() => Content::Encrypted,
            Ok(_) => Content::Plain,
            Err(VolumeError::NotFound(_)) => Content::Nothing,
            Err(_) => Content::Encrypted,
        };
        contents.push((object.kind, content));
    }
    Ok(is_plain(&domain, &contents))
}

/// Whether every file is there, and plain; libvirt makes a variable store that is missing. In doubt it is not.
fn is_plain(domain: &Domain, contents: &[(ObjectKind, Content)]) -> bool {
    let is_plain = |(kind, content): &(ObjectKind, Content)| match content {
        Content::Plain => true,
        Content::Nothing => *kind == ObjectKind::Nvram,
        Content::Encrypted => false,
    };
    domain::encrypted_layers(domain).is_empty() && contents.iter().all(is_plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_plain_only_if_all_of_it_is_there_and_plain() {
        let domain = |inside: &str| {
            let uuid = uuid::Uuid::new_v4();
            Domain::parse(&format!(
                "<domain type='kvm'><name>a</name><uuid>{uuid}</uuid><devices>{inside}</devices></domain>"
            ))
            .unwrap()
        };
        let plain = domain("");
        let all = |contents: &[(ObjectKind, Content)]| is_plain(&plain, contents);
        use ObjectKind::{Disk, Nvram};
        assert!(all(&[]) && all(&[(Disk, Content::Plain), (Nvram, Content::Plain)]));
        assert!(all(&[(Nvram, Content::Nothing)]), "libvirt makes a new one");
        assert!(!all(&[(Disk, Content::Nothing)]));
        for kind in [Disk, Nvram] {
            assert!(!all(&[(Disk, Content::Plain), (kind, Content::Encrypted)]));
        }
        let luks = "<encryption format='luks'><secret type='passphrase' uuid='00000000-0000-0000-0000-000000000001'/></encryption>";
        let named = domain(&format!(
            "<disk type='file'><source file='/d'>{luks}</source><target dev='vda'/></disk>"
        ));
        assert!(
            !is_plain(&named, &[(Disk, Content::Plain)]),
            "its XML says otherwise"
        );
    }
}

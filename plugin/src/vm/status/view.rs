//! What `virtseal status` shows of a VM, of what was gathered.

use std::path::Path;

use super::known::{self, Known};
use super::look::SeenObject;
use super::standing::{Facts, Found, Owner, Standing, is_sealed};
use super::{rivals, starts};
use crate::api::{FindingView, ObjectStanding, ObjectView, StartView, VmPower, VmState, VmView};
use crate::domain::{self, Domain, DomainError, ObjectState, TpmBackend};
use crate::host::libvirt::DomainEntry;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ObjectKind, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::store::{EnvelopeRecord, EnvelopeState};
use crate::vm::start::outlook::Obstacle;

/// Whether a VM is one of those that a status lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Concern {
    /// Something of it is sealed, damaged or wrong.
    Ours,
    /// It has nothing to do with virtseal.
    NotOurs,
}

/// The view of one that is listed.
pub(crate) fn listed((view, concern): (VmView, Concern)) -> Option<VmView> {
    (concern == Concern::Ours).then_some(view)
}

/// A VM that libvirt has, with what was found on it elsewhere: its side doors, and what was done to it while it ran.
pub(crate) fn defined(
    defined: &DomainEntry,
    domain: &Domain,
    seen: &[SeenObject],
    found: Vec<Finding>,
    known: &Known,
) -> (VmView, Concern) {
    let objects: Vec<_> = seen.iter().map(|seen| object(domain, seen, known)).collect();
    let state = vm_state(domain, &objects);
    let damaged = known.damaged_of(defined.vm);
    let of_another = |object: &OneObject| object.standing == ObjectStanding::OfAnotherVm;
    let is_ours =
        state != VmState::Plain || !damaged.is_empty() || !found.is_empty() || objects.iter().any(of_another);
    let mut findings = of_xml(domain, state);
    findings.extend(damaged);
    findings.extend(rivals::of(domain, |id| known.envelope(id)));
    findings.extend(objects.iter().filter_map(|object| object.rival.clone()));
    findings.extend(known.saved(defined).filter(|_| state != VmState::Plain));
    findings.extend(found);
    let standings: Vec<_> = objects.iter().map(|object| object.standing).collect();
    let mut views: Vec<_> = objects.into_iter().map(|object| object.view).collect();
    views.extend(detached(domain, seen, known));
    let view = VmView {
        name: defined.name.clone(),
        uuid: defined.vm.to_string(),
        depends_on: depends_on(&views),
        power: power(defined).into(),
        autostart: known.autostart(defined.vm, Some(defined)).into(),
        starts: starts::of(domain, seen, &standings, known),
        state: state.into(),
        objects: views,
        warnings: FindingView::all(&findings),
    };
    (view, if is_ours { Concern::Ours } else { Concern::NotOurs })
}

/// A VM whose XML can't be read.
pub(crate) fn unreadable(
    defined: &DomainEntry,
    error: &DomainError,
    found: Vec<Finding>,
    known: &Known,
) -> VmView {
    let problem = xml_unreadable(defined, error);
    let starts = starts::refused(&Obstacle::of_vm(problem.clone()));
    let mut findings = vec![Finding::of(
        FindingCode::XmlUnreadable,
        Subject::Vm(defined.name.clone()),
        problem,
    )];
    findings.extend(known.damaged_of(defined.vm));
    findings.extend(found);
    VmView {
        power: power(defined).into(),
        autostart: known.autostart(defined.vm, Some(defined)).into(),
        starts,
        state: VmState::Unreadable.into(),
        ..of_keystore(defined.vm, &defined.name, &findings, known)
    }
}

/// A VM that only the keystore knows, or of which nothing is left but what was found.
pub(crate) fn undefined(vm: VmId, name: &str, found: Vec<Finding>, known: &Known) -> VmView {
    let findings = [known.damaged_of(vm), found].concat();
    of_keystore(vm, name, &findings, known)
}

/// A VM of the keystore, while libvirt can't be asked for its VMs.
pub(crate) fn not_asked(view: &VmView) -> VmView {
    VmView {
        power: VmPower::Unknown.into(),
        starts: StartView::unknown("libvirt does not answer"),
        state: VmState::Unknown.into(),
        ..view.clone()
    }
}

fn of_keystore(vm: VmId, name: &str, findings: &[Finding], known: &Known) -> VmView {
    let kept = |record: &EnvelopeRecord| {
        let state = match record.state {
            EnvelopeState::Pending => ObjectStanding::Pending,
            EnvelopeState::Active => ObjectStanding::Active,
        };
        kept_object(record, state, known)
    };
    let objects: Vec<_> = known.records_of(vm).map(kept).collect();
    VmView {
        name: name.to_owned(),
        uuid: vm.to_string(),
        depends_on: depends_on(&objects),
        power: VmPower::Undefined.into(),
        autostart: known.autostart(vm, None).into(),
        starts: StartView::no("it is not defined here", None),
        state: VmState::Undefined.into(),
        objects,
        warnings: FindingView::all(findings),
    }
}

/// That its XML can't be read, with what helps.
pub(crate) fn xml_unreadable(defined: &DomainEntry, error: &DomainError) -> Problem {
    let name = &defined.name;
    let what = format!("{name}: its XML can't be read: {}", chain(error));
    let earlier = Advice::DefineXml.note("with an earlier dumpxml of it");
    let mended = match error {
        // Nor is it told to an editor.
        DomainError::Untold(_) => earlier,
        _ => Advice::EditXml(name.clone()).or(earlier),
    };
    Problem::failed(what).next(mended.then(Advice::SealVm(name.clone())))
}

struct OneObject {
    view: ObjectView,
    standing: ObjectStanding,
    /// Whether the XML says that it is sealed.
    says_so: bool,
    rival: Option<Finding>,
}

fn object(domain: &Domain, seen: &SeenObject, known: &Known) -> OneObject {
    let (vm, object, path) = (domain.uuid, &seen.object, seen.path.as_deref());
    let kept = known.of(vm, object, &seen.found, path);
    let metadata = domain.metadata.as_ref();
    let in_xml = object.envelope().and_then(|id| metadata?.envelope(id));
    let envelope = kept.or(in_xml);
    let (standing, detail) = standing(domain, seen, kept, in_xml, known);
    let gone = envelope
        .filter(|_| is_sealed(standing))
        .and_then(|envelope| known.providers.gone(envelope));
    let (state, detail) = match gone {
        Some(gone) => (ObjectStanding::Locked, Some(gone)),
        None => (standing, detail),
    };
    let view = ObjectView {
        object: object.label.clone(),
        state: state.into(),
        detail,
        path: path.map(|path| path.display().to_string()),
        envelope: object
            .envelope()
            .or(envelope.map(|envelope| envelope.id))
            .map(|id| id.to_string()),
        generation: envelope.and_then(|envelope| envelope.generation.stored()),
        generation_verified: kept.is_some(),
        providers: envelope
            .map(|envelope| known.providers.of(envelope))
            .unwrap_or_default(),
        shared_with: kept
            .map(|kept| known.names(&kept.shared_with))
            .unwrap_or_default(),
    };
    let rival = path.and_then(|path| rivals::in_image(&domain.name, &object.label, path, &seen.copy, kept));
    OneObject {
        view,
        standing,
        says_so: object.envelope().is_some(),
        rival,
    }
}

fn standing(
    domain: &Domain,
    seen: &SeenObject,
    kept: Option<&Envelope>,
    in_xml: Option<&Envelope>,
    known: &Known,
) -> Standing {
    let carried = match seen.found {
        Found::Encrypted(carried) => carried.map(|(_, vm)| vm),
        _ => None,
    };
    let by_image = || {
        let vm = carried.filter(|_| seen.object.state == ObjectState::Plain)?;
        Some(match vm {
            vm if vm == domain.uuid => Owner::This,
            vm => Owner::Other(vm),
        })
    };
    let facts = Facts {
        kind: seen.object.kind,
        xml: &seen.object.state,
        found: seen.found.clone(),
        owner: known::owner(kept, in_xml, domain.uuid).or_else(by_image),
        has_run: known.has_run(domain.uuid),
    };
    match facts.standing() {
        (ObjectStanding::EnvelopeMissing, _) if domain.metadata.is_none() => (ObjectStanding::NotOurs, None),
        standing => standing,
    }
}

/// What the keystore has for a VM and its XML does not name in any way: a disk that was detached, a TPM that was taken out.
fn detached(domain: &Domain, seen: &[SeenObject], known: &Known) -> Vec<ObjectView> {
    let layers = domain::encrypted_layers(domain);
    let is_named = |record: &EnvelopeRecord| {
        let envelope = &record.envelope;
        layers.iter().any(|(id, _)| *id == envelope.id)
            || seen.iter().any(|SeenObject { object, .. }| match envelope.kind {
                ObjectKind::Disk => {
                    object.state == ObjectState::Sealed(envelope.id)
                        || object.path.as_deref() == Some(Path::new(&record.location))
                }
                kind => object.kind == kind,
            })
    };
    let records = known.records_of(domain.uuid);
    let detached = records.filter(|record| record.state == EnvelopeState::Active && !is_named(record));
    detached
        .map(|record| kept_object(record, ObjectStanding::Detached, known))
        .collect()
}

fn kept_object(record: &EnvelopeRecord, state: ObjectStanding, known: &Known) -> ObjectView {
    let envelope = &record.envelope;
    let gone = known.providers.gone(envelope);
    ObjectView {
        object: envelope.kind.to_string(),
        state: gone.as_ref().map_or(state, |_| ObjectStanding::Locked).into(),
        detail: gone,
        path: (!record.location.is_empty()).then(|| record.location.clone()),
        envelope: Some(envelope.id.to_string()),
        generation: envelope.generation.stored(),
        generation_verified: true,
        providers: known.providers.of(envelope),
        shared_with: known.names(&envelope.shared_with),
    }
}

/// The provider that is the only one to open one of the objects.
fn depends_on(objects: &[ObjectView]) -> Option<String> {
    let alone = objects.iter().find_map(|object| match &object.providers[..] {
        [only] => Some(only),
        [first, rest @ ..] if rest.iter().all(|other| other == first) => Some(first),
        _ => None,
    });
    alone.cloned()
}

fn power(defined: &DomainEntry) -> VmPower {
    match (defined.active, defined.managed_save) {
        (true, _) => VmPower::Running,
        (false, true) => VmPower::Saved,
        (false, false) => VmPower::Off,
    }
}

fn vm_state(domain: &Domain, objects: &[OneObject]) -> VmState {
    let is_taken_out = |object: &OneObject| object.standing == ObjectStanding::NotInXml;
    let says_so = domain.metadata.is_some() && !objects.iter().any(is_taken_out);
    if !says_so && objects.iter().any(|object| is_sealed(object.standing)) {
        VmState::NotInXml
    } else if domain.metadata.is_none() {
        VmState::Plain
    } else if objects.iter().all(|object| object.says_so) {
        VmState::Sealed
    } else {
        VmState::Mixed
    }
}

/// What the XML alone tells.
fn of_xml(domain: &Domain, state: VmState) -> Vec<Finding> {
    let (name, mut findings) = (&domain.name, Vec::new());
    let subject = || Subject::Vm(name.clone());
    if state == VmState::NotInXml {
        let what = match domain.metadata {
            Some(_) => format!("{name} is sealed, and its XML does not say so of all its objects"),
            None => format!("{name} was sealed, and its XML does not say so"),
        };
        findings.push(
            Finding::critical(FindingCode::NotInXml, subject(), what).next(Advice::SealVm(name.clone())),
        );
    }
    let backend = domain.tpm.as_ref().map(|tpm| &tpm.backend);
    if let Some(TpmBackend::Emulator {
        secret: Some(_),
        persistent_state: false,
        ..
    }) = backend
        && domain.metadata.is_some()
    {
        let what = format!(
            "libvirt may delete the vTPM's state of {name}, when it ends as a transient domain or is undefined"
        );
        let persist = Advice::SealVm(name.clone()).note("which sets persistent_state='yes'");
        findings.push(
            Finding::warning(FindingCode::VtpmNotPersistent, subject(), what)
                .next(Advice::ShutDownVm(name.clone()).then(persist)),
        );
    }
    findings
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::api::OrNewer;
    use crate::model::envelope::{Binding, EnvelopeId, KekId, ProviderId, Stanza, Verified};
    use crate::object::disk::ImageCopy;
    use crate::secret::Dek;
    use crate::store::{Rows, VmRecord};
    use crate::vm::names::ProviderNames;

    /// A VM with one disk, by its XML, by what is there, and by what the keystore has.
    struct Case {
        vm: VmId,
        envelope: Verified,
        names_it: bool,
        found: Found,
    }

    impl Case {
        fn new(names_it: bool, found: impl Fn(EnvelopeId, VmId) -> Found) -> Self {
            let (vm, id) = (VmId::random(), EnvelopeId::random());
            let binding = Binding {
                envelope: id,
                vm,
                kind: ObjectKind::Disk,
            };
            let stanza = Stanza {
                provider: ProviderId::random(),
                provider_name: "main".to_owned(),
                kek: KekId("v1:provider".to_owned()),
                mechanism: "A256GCM".to_owned(),
                body: vec![7; 92],
            };
            let envelope = Verified::new(&binding, vec![stanza], &Dek::random().unwrap()).unwrap();
            Self {
                vm,
                envelope,
                names_it,
                found: found(id, vm),
            }
        }

        fn known(&self) -> Known {
            let vm = VmRecord {
                vm: self.vm,
                name: "a".into(),
                sealed_at: 0,
                vtpm_seen: false,
            };
            let record = EnvelopeRecord {
                envelope: self.envelope.clone().into_envelope(),
                state: EnvelopeState::Active,
                location: "/d".into(),
                created: 0,
                updated: 0,
            };
            let [damaged, of_envelopes] = [Vec::new(), Vec::new()];
            let (vms, envelopes) = (vec![vm], vec![record]);
            Known::new(
                Rows { sound: vms, damaged },
                Rows {
                    sound: envelopes,
                    damaged: of_envelopes,
                },
            )
        }

        fn view(&self, known: &Known) -> (VmView, Concern) {
            let luks = format!(
                "<encryption format='luks' engine='qemu'><secret type='passphrase' uuid='{}'/></encryption>",
                self.envelope.id
            );
            let luks = if self.names_it { &luks } else { "" };
            let xml = format!(
                "<domain type='kvm'><name>a</name><uuid>{}</uuid><devices><disk type='file'><source file='/d'>{luks}</source>\
                 <target dev='vda'/></disk></devices></domain>",
                self.vm
            );
            let domain = Domain::parse(&xml).unwrap();
            let seen: Vec<_> = domain::objects(&domain)
                .into_iter()
                .map(|object| SeenObject {
                    path: Some(PathBuf::from("/d")),
                    found: self.found.clone(),
                    obstacle: None,
                    copy: ImageCopy::None,
                    object,
                })
                .collect();
            let vm = DomainEntry {
                vm: self.vm,
                name: "a".into(),
                active: false,
                autostart: false,
                managed_save: false,
            };
            defined(&vm, &domain, &seen, Vec::new(), known)
        }
    }

    #[test]
    fn a_sealed_disk_that_the_xml_does_not_name_is_told_with_what_takes_it_back() {
        let case = Case::new(false, |id, vm| Found::Encrypted(Some((id, vm))));
        let mut known = case.known();
        known.providers = ProviderNames::default();
        let (view, concern) = case.view(&known);
        assert_eq!(
            (view.state.known(), concern),
            (Some(VmState::NotInXml), Concern::Ours)
        );
        assert_eq!(view.objects.len(), 1);
        // Its provider is not on this host.
        assert_eq!(view.objects[0].state.known(), Some(ObjectStanding::Locked));
        assert_eq!(
            view.objects[0].words(),
            "locked: provider 'main' is not on this host"
        );
        let warned = view.warnings[0].to_string();
        assert!(
            warned.starts_with("critical: ") && warned.contains("virtseal vm seal a"),
            "{warned}"
        );
    }

    #[test]
    fn an_xml_that_says_it_of_some_objects_is_not_said_to_say_nothing() {
        let told = |metadata: &str| {
            let xml = format!(
                "<domain type='kvm'><name>a</name><uuid>{}</uuid><metadata>{metadata}</metadata></domain>",
                VmId::random()
            );
            of_xml(&Domain::parse(&xml).unwrap(), VmState::NotInXml)[0]
                .what
                .clone()
        };
        assert!(told("").starts_with("a was sealed"));
        let some = told("<virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'/>");
        assert!(some.ends_with("of all its objects"), "{some}");
    }

    #[test]
    fn a_plain_disk_at_the_place_of_a_sealed_one_is_plain_whatever_xml_and_keystore_say() {
        for names_it in [true, false] {
            let case = Case::new(names_it, |_, _| Found::Plain);
            let (view, _) = case.view(&case.known());
            let plain = [ObjectStanding::Plain, ObjectStanding::PlainInside].map(OrNewer::from);
            assert!(plain.contains(&view.objects[0].state), "{:?}", view.objects);
            assert_ne!(view.state, VmState::Sealed.into());
        }
    }

    #[test]
    fn a_vm_of_others_is_not_listed() {
        let case = Case::new(false, |_, _| Found::OutOfSight);
        let nothing = Known::default();
        let (view, concern) = case.view(&nothing);
        assert_eq!(
            (view.state.known(), concern),
            (Some(VmState::Plain), Concern::NotOurs)
        );
        let gone = undefined(case.vm, "a", Vec::new(), &case.known());
        assert_eq!(
            (gone.power, gone.state),
            (VmPower::Undefined.into(), VmState::Undefined.into())
        );
        assert_eq!(gone.objects[0].generation, Some(1));
    }
}

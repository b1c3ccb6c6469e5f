//! What `virtseal status` and `virtseal vm status` show.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use swtpm_state::State;

use super::glance::Age;
use super::paths;
use super::service::provider_view;
use super::{Daemon, lock};
use crate::api::pages;
use crate::api::{HostStatus, ObjectView, VmView, Vms};
use crate::domain::{self, Domain, DomainError, Metadata, Object, ObjectState, TpmBackend};
use crate::host::libvirt::DefinedDomain;
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{self, ImageCopy, VolumeError};
use crate::object::vtpm::StateDir;
use crate::store::{EnvelopeRecord, EnvelopeState, VmRecord};
use crate::terminal::word;
use crate::vm::names;
use crate::vm::names::{KnownVm, VmNames};
use crate::vm::side_doors;
use crate::vm::status::standing::{Facts, Found, Owner, Standing, Used};
use crate::vm::status::{damaged, rivals};

impl Daemon {
    /// Everything at a glance; never waits for a provider.
    pub fn status(&self, age: Age, after: Option<&str>) -> Result<HostStatus, Problem> {
        let glance = self.glances.take(age)?;
        let providers = provider_view::list(self)?.providers;
        let damaged = pages::cut(glance.damaged.to_vec(), pages::PAGE / 8);
        let others = pages::size_of(&providers) + pages::size_of(&damaged);
        let (vms, next_vms) = pages::of_vms(&glance.vms, after, others);
        Ok(HostStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            libvirt: glance.libvirt.err().unwrap_or_else(|| "connected".to_owned()),
            libvirt_uri: self.config().libvirt_uri,
            providers,
            vms,
            next_vms,
            armed: lock(&self.armed).len() as i64,
            audit: self.audit.problem(),
            damaged,
        })
    }

    /// One VM, sealed or not; or all sealed ones.
    pub fn vm_status(&self, vm: Option<&str>, age: Age, after: Option<&str>) -> Result<Vms, Problem> {
        let Some(vm) = vm else {
            let glance = self.glances.take(age)?;
            if let Err(why) = glance.libvirt {
                return Err(Problem::new(Code::Unreachable, why).next("virtseal status"));
            }
            let (vms, next) = pages::of_vms(&glance.vms, after, 0);
            return Ok(Vms { vms, next });
        };
        let found = names::find_vm(&self.background, self.keystore.as_ref(), vm)?;
        let known = self.known(paths::rule(self))?;
        let view = match found {
            KnownVm::Defined(defined) => {
                let domain = Domain::parse(&defined.xml).map_err(|error| unreadable(&defined, &error))?;
                let looked = defined.active.then(|| self.look_now(defined.vm)).transpose();
                let mut view = self.defined(&defined, &domain, Look::Closely, &known).0;
                let policy = self.config().policy.of(&domain);
                let permit = |path: &Path| known.permit(domain.uuid, path);
                view.warnings
                    .extend(side_doors::plain_layers(&domain, policy, permit));
                view.warnings
                    .extend(looked.err().map(|failure| failure.of(&defined.name).to_string()));
                view
            }
            KnownVm::Undefined(record) => self.undefined(&record, &known),
        };
        Ok(Vms {
            vms: vec![view],
            next: None,
        })
    }

    pub(super) fn sealed_vms(&self, domains: Vec<DefinedDomain>) -> Result<Vec<VmView>, Problem> {
        let rule = if domains.is_empty() {
            paths::rule_of_settings(self)
        } else {
            paths::rule(self)
        };
        let known = self.known(rule)?;
        let mut vms: Vec<_> = domains
            .iter()
            .filter_map(|defined| self.listed(defined, &known))
            .collect();
        let defined: BTreeSet<VmId> = domains.iter().map(|defined| defined.vm).collect();
        let undefined = known.vms.values().filter(|record| !defined.contains(&record.vm));
        vms.extend(undefined.map(|record| self.undefined(record, &known)));
        let found = self.running.with_findings().into_iter();
        let gone = found.filter(|(vm, _)| !defined.contains(vm) && !known.vms.contains_key(vm));
        vms.extend(gone.map(|(vm, name)| self.gone(vm, name)));
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(vms)
    }

    /// `None` for a VM that has nothing to do with virtseal. Of those nothing but the XML is looked at.
    fn listed(&self, defined: &DefinedDomain, known: &Known) -> Option<VmView> {
        let is_known = known.has(defined.vm);
        match Domain::parse(&defined.xml) {
            Ok(domain) => {
                let look = if is_known || domain.metadata.is_some() {
                    Look::Closely
                } else {
                    Look::AtXml
                };
                let (view, standings) = self.defined(defined, &domain, look, known);
                let concerns = |standing| matches!(standing, &Standing::OfAnotherVm(_));
                let is_damaged = known.damaged.contains_key(&defined.vm);
                let is_found = !self.running.findings(defined.vm).is_empty();
                let shown = is_damaged || is_found || standings.iter().any(concerns);
                (view.state != "plain" || shown).then_some(view)
            }
            Err(_) if !is_known && !defined.xml.contains(Metadata::NAMESPACE) => None,
            Err(error) => {
                let objects = self.kept_objects(defined.vm, known);
                Some(VmView {
                    name: defined.name.clone(),
                    uuid: defined.vm.to_string(),
                    depends_on: depends_on(&objects),
                    power: power(defined).into(),
                    state: "its XML can't be read".into(),
                    objects,
                    warnings: [
                        vec![unreadable(defined, &error).to_string()],
                        known.damaged_of(defined.vm),
                        self.running.findings(defined.vm),
                    ]
                    .concat(),
                })
            }
        }
    }

    fn known(&self, rule: PathRule) -> Result<Known, Problem> {
        let mut known = Known {
            rule,
            ..Known::default()
        };
        let (vms, envelopes) = (self.keystore.vms()?, self.keystore.envelopes()?);
        let names = VmNames::of_records(&vms.sound);
        for row in vms.damaged.iter().chain(&envelopes.damaged) {
            let (Some(vm), finding) = (row.vm, damaged::finding(row, &names)) else {
                continue;
            };
            known.damaged.entry(vm).or_default().push(finding);
        }
        for vm in vms.sound {
            known.vms.insert(vm.vm, vm);
        }
        for record in envelopes.sound {
            let id = record.envelope.id;
            known.by_vm.entry(record.envelope.vm).or_default().push(id);
            if !record.location.is_empty() {
                known.by_place.insert(record.location.clone(), id);
            }
            known.by_id.insert(id, record);
        }
        Ok(known)
    }

    fn defined(
        &self,
        defined: &DefinedDomain,
        domain: &Domain,
        look: Look,
        known: &Known,
    ) -> (VmView, Vec<Standing>) {
        let objects = domain::objects(domain);
        let mut views = Vec::with_capacity(objects.len());
        let mut standings = Vec::with_capacity(objects.len());
        let mut in_images = Vec::new();
        for object in &objects {
            let (view, standing, rival) = self.object(domain, object, look, known);
            in_images.extend(rival);
            views.push(view);
            standings.push(standing);
        }
        views.extend(self.detached(domain, &objects, known));
        let state = vm_state(domain, &objects, &standings);
        let view = VmView {
            name: defined.name.clone(),
            uuid: defined.vm.to_string(),
            depends_on: depends_on(&views),
            power: power(defined).into(),
            state: state.into(),
            warnings: [
                warnings(domain, state),
                known.damaged_of(defined.vm),
                rivals::of(domain, &known.by_id),
                in_images,
                self.side_doors(domain),
                self.running.findings(defined.vm),
            ]
            .concat(),
            objects: views,
        };
        (view, standings)
    }

    /// Only a sealed VM has any.
    fn side_doors(&self, domain: &Domain) -> Vec<String> {
        match &domain.metadata {
            Some(_) => side_doors::findings(domain, self.config().policy.of(domain)),
            None => Vec::new(),
        }
    }

    fn object(
        &self,
        domain: &Domain,
        object: &Object,
        look: Look,
        known: &Known,
    ) -> (ObjectView, Standing, Option<String>) {
        let path = match object.kind {
            ObjectKind::Vtpm => StateDir::of_domain(domain, &self.config().swtpm_dir)
                .ok()
                .map(|dir| dir.path().to_owned()),
            ObjectKind::Disk | ObjectKind::Nvram => object.path.clone(),
        };
        let (found, copy) = match (look, &path) {
            (Look::AtXml, _) | (Look::Closely, None) => (Found::OutOfSight, ImageCopy::None),
            (Look::Closely, Some(path)) => known.look_at(domain.uuid, object, path),
        };
        let kept = known.of(domain.uuid, object, &found, path.as_deref());
        let in_xml = match &object.state {
            ObjectState::Sealed(id) => domain
                .metadata
                .as_ref()
                .and_then(|metadata| metadata.envelope(*id)),
            ObjectState::Plain | ObjectState::Unsupported(_) => None,
        };
        let envelope = kept.or(in_xml);
        let carried = match found {
            Found::Encrypted(carried) => carried.map(|(_, vm)| vm),
            _ => None,
        };
        let owner = owner(kept, in_xml, domain.uuid);
        let by_image = || {
            let vm = carried.filter(|_| object.state == ObjectState::Plain)?;
            Some(if vm == domain.uuid {
                Owner::This
            } else {
                Owner::Other(vm)
            })
        };
        let standing = Facts {
            kind: object.kind,
            xml: &object.state,
            found,
            owner: owner.or_else(by_image),
            used: known.used(domain.uuid),
        }
        .standing();
        let standing = match standing {
            Standing::EnvelopeMissing if domain.metadata.is_none() => Standing::NotOurs,
            standing => standing,
        };
        let gone = envelope
            .filter(|_| standing.is_sealed())
            .and_then(|envelope| self.gone_providers(envelope));
        let view = ObjectView {
            object: object.label.clone(),
            state: gone.map_or_else(|| standing.to_string(), |gone| format!("locked: {gone}")),
            path: path.as_ref().map(|path| path.display().to_string()),
            envelope: match &object.state {
                ObjectState::Sealed(id) => Some(id.to_string()),
                _ => envelope.map(|envelope| envelope.id.to_string()),
            },
            generation: envelope.and_then(|envelope| envelope.generation.stored()),
            generation_verified: kept.is_some(),
            providers: envelope.map(|envelope| self.names(envelope)).unwrap_or_default(),
            shared_with: kept
                .map(|kept| known.names(&kept.shared_with))
                .unwrap_or_default(),
        };
        let rival = path.and_then(|path| rivals::in_image(&domain.name, &path, &copy, kept));
        (view, standing, rival)
    }

    /// What the keystore has for a VM and its XML does not name in any way: a disk that was detached, a TPM that was taken out.
    fn detached(&self, domain: &Domain, objects: &[Object], known: &Known) -> Vec<ObjectView> {
        let named = |record: &EnvelopeRecord| {
            let envelope = &record.envelope;
            let layers = domain::encrypted_layers(domain);
            layers.iter().any(|(id, _)| *id == envelope.id)
                || objects.iter().any(|object| match envelope.kind {
                    ObjectKind::Disk => {
                        object.state == ObjectState::Sealed(envelope.id)
                            || object.path.as_deref() == Some(Path::new(&record.location))
                    }
                    kind => object.kind == kind,
                })
        };
        let records = known.records_of(domain.uuid);
        let detached = records.filter(|record| record.state == EnvelopeState::Active && !named(record));
        detached
            .map(|record| self.kept_object(record, "sealed, not in the XML", known))
            .collect()
    }

    fn undefined(&self, vm: &VmRecord, known: &Known) -> VmView {
        let objects = self.kept_objects(vm.vm, known);
        VmView {
            name: vm.name.clone(),
            uuid: vm.vm.to_string(),
            depends_on: depends_on(&objects),
            power: "undefined".into(),
            state: "undefined".into(),
            objects,
            warnings: [known.damaged_of(vm.vm), self.running.findings(vm.vm)].concat(),
        }
    }

    /// A VM of which nothing is left but what was found.
    fn gone(&self, vm: VmId, name: String) -> VmView {
        VmView {
            name,
            uuid: vm.to_string(),
            depends_on: None,
            power: "undefined".into(),
            state: "undefined".into(),
            objects: Vec::new(),
            warnings: self.running.findings(vm),
        }
    }

    fn kept_objects(&self, vm: VmId, known: &Known) -> Vec<ObjectView> {
        known
            .records_of(vm)
            .map(|record| self.kept_object(record, record.state.as_str(), known))
            .collect()
    }

    fn kept_object(&self, record: &EnvelopeRecord, state: &str, known: &Known) -> ObjectView {
        ObjectView {
            object: record.envelope.kind.to_string(),
            state: match self.gone_providers(&record.envelope) {
                Some(gone) => format!("locked: {gone}"),
                None => state.to_owned(),
            },
            path: (!record.location.is_empty()).then(|| record.location.clone()),
            envelope: Some(record.envelope.id.to_string()),
            generation: record.envelope.generation.stored(),
            generation_verified: true,
            providers: self.names(&record.envelope),
            shared_with: known.names(&record.envelope.shared_with),
        }
    }

    /// Why nobody on this host can ever open it, if that is so.
    fn gone_providers(&self, envelope: &Envelope) -> Option<String> {
        let mut stanzas = envelope.stanzas.iter();
        if stanzas.any(|stanza| self.recipients.by_id(stanza.provider).is_some()) {
            return None;
        }
        let deleted = self.keystore.deleted_providers().map(|rows| rows.sound);
        let deleted = deleted.unwrap_or_default();
        let names: Vec<_> = envelope
            .stanzas
            .iter()
            .map(
                |stanza| match deleted.iter().find(|deleted| deleted.id == stanza.provider) {
                    Some(deleted) => format!("provider '{}' was deleted", deleted.name),
                    None => format!("provider '{}' is not on this host", stanza.provider_name),
                },
            )
            .collect();
        Some(names.join(", "))
    }

    /// A provider's name here, else the one that it had where the stanza was made.
    pub(super) fn names(&self, envelope: &Envelope) -> Vec<String> {
        envelope
            .stanzas
            .iter()
            .map(|stanza| match self.recipients.by_id(stanza.provider) {
                Some(known) => known.provider().name().to_owned(),
                None => stanza.provider_name.clone(),
            })
            .collect()
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

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// At files and state too.
    Closely,
    /// The VM has nothing to do with virtseal: its files are its own.
    AtXml,
}

/// What the keystore has, in the ways that it is asked for.
#[derive(Debug, Default)]
struct Known {
    by_id: BTreeMap<EnvelopeId, EnvelopeRecord>,
    by_vm: BTreeMap<VmId, Vec<EnvelopeId>>,
    by_place: BTreeMap<String, EnvelopeId>,
    vms: BTreeMap<VmId, VmRecord>,
    /// What can't be read, and what leads out.
    damaged: BTreeMap<VmId, Vec<String>>,
    /// Where files are looked at.
    rule: PathRule,
}

impl Known {
    fn has(&self, vm: VmId) -> bool {
        self.vms.contains_key(&vm) || self.by_vm.contains_key(&vm) || self.damaged.contains_key(&vm)
    }

    fn damaged_of(&self, vm: VmId) -> Vec<String> {
        self.damaged.get(&vm).cloned().unwrap_or_default()
    }

    fn names(&self, vms: &[VmId]) -> Vec<String> {
        let name = |vm: &VmId| {
            self.vms
                .get(vm)
                .map_or_else(|| vm.to_string(), |known| known.name.clone())
        };
        vms.iter().map(name).collect()
    }

    /// A path that the XML of a VM names. Also of what others share with it.
    fn permit(&self, vm: VmId, path: &Path) -> Result<PermittedPath, PathError> {
        let shown = path.display().to_string();
        let here = self.by_place.get(&shown).and_then(|id| self.by_id.get(id));
        let is_its = self.records_of(vm).any(|record| record.location == shown)
            || here.is_some_and(|record| record.envelope.serves(vm));
        self.rule.permit_known(path, is_its.then_some(path).into_iter())
    }

    fn look_at(&self, vm: VmId, object: &Object, path: &Path) -> (Found, ImageCopy) {
        let found = match object.kind {
            ObjectKind::Vtpm => found_state(path),
            ObjectKind::Disk | ObjectKind::Nvram => match self.permit(vm, path) {
                Ok(place) => return found_image(&place),
                Err(error) if error.is_missing() => Found::Nothing,
                Err(error) => Found::Unreadable(chain(&error)),
            },
        };
        (found, ImageCopy::None)
    }

    fn records_of(&self, vm: VmId) -> impl Iterator<Item = &EnvelopeRecord> {
        let ids = self.by_vm.get(&vm).into_iter().flatten();
        ids.filter_map(|id| self.by_id.get(id))
    }

    /// The envelope of an object: the one that the XML names, else the one that its image carries, else the one that was made
    /// for its place.
    fn of(&self, vm: VmId, object: &Object, found: &Found, path: Option<&Path>) -> Option<&Envelope> {
        if let ObjectState::Sealed(id) = &object.state {
            return self.by_id.get(id).map(|record| &record.envelope);
        }
        if let Found::Encrypted(Some((id, _))) = found {
            return self.by_id.get(id).map(|record| &record.envelope);
        }
        let place = path.map(|path| path.display().to_string());
        let at_place = place.and_then(|place| self.by_place.get(&place));
        let at_place = at_place.and_then(|id| self.by_id.get(id));
        // A variable store may have been moved, and a vTPM has no place of its own.
        let of_kind = || {
            let active = |record: &&EnvelopeRecord| record.state == EnvelopeState::Active;
            let of_vm = || {
                self.records_of(vm)
                    .filter(|record| record.envelope.kind == object.kind)
            };
            of_vm().find(active).or_else(|| of_vm().last())
        };
        let record = match object.kind {
            ObjectKind::Disk => at_place,
            ObjectKind::Nvram | ObjectKind::Vtpm => at_place.or_else(of_kind),
        };
        record.map(|record| &record.envelope)
    }

    /// Only an envelope of format 2, which the keystore has, tells that a vTPM was not used.
    fn used(&self, vm: VmId) -> Used {
        let noted = self.vms.get(&vm).is_some_and(|record| record.vtpm_seen);
        let vtpms = || {
            let kind = |record: &&EnvelopeRecord| record.envelope.kind == ObjectKind::Vtpm;
            self.records_of(vm).filter(kind).map(|record| &record.envelope)
        };
        if noted || vtpms().any(|envelope| envelope.seen) {
            return Used::Yes;
        }
        let tells = |envelope: &Envelope| envelope.format() == Envelope::FORMAT;
        if vtpms().next().is_some() && vtpms().all(tells) {
            Used::No
        } else {
            Used::NotKnown
        }
    }
}

/// Whether the VM may have the object of an envelope. One that only the XML has may claim to be shared with anybody.
fn owner(kept: Option<&Envelope>, in_xml: Option<&Envelope>, vm: VmId) -> Option<Owner> {
    let of = |envelope: &Envelope, serves| {
        if serves {
            Owner::This
        } else {
            Owner::Other(envelope.vm)
        }
    };
    match (kept, in_xml) {
        (Some(kept), _) => Some(of(kept, kept.serves(vm))),
        (None, Some(copy)) => Some(of(copy, copy.vm == vm)),
        (None, None) => None,
    }
}

/// In libvirt's own directory.
fn found_state(dir: &Path) -> Found {
    match State::read(dir) {
        Ok(State::Encrypted(_)) => Found::Encrypted(None),
        Ok(State::Absent) => Found::Nothing,
        Ok(State::Plain(_)) => Found::Plain,
        Err(error) => Found::Unreadable(chain(&error)),
    }
}

/// What is there, and the copy of an envelope in it.
fn found_image(place: &PermittedPath) -> (Found, ImageCopy) {
    let none = |found| (found, ImageCopy::None);
    match disk::identify(place) {
        Ok((format, copy)) if format.is_encrypted() => {
            let ids = match &copy {
                ImageCopy::Envelope(envelope) => Some((envelope.id, envelope.vm)),
                ImageCopy::None | ImageCopy::Unreadable(_) => None,
            };
            (Found::Encrypted(ids), copy)
        }
        Ok(_) => none(Found::Plain),
        Err(VolumeError::NotFound(_)) => none(Found::Nothing),
        Err(error) => none(Found::Unreadable(chain(&error))),
    }
}

fn power(defined: &DefinedDomain) -> &'static str {
    if defined.active { "running" } else { "off" }
}

fn unreadable(defined: &DefinedDomain, error: &DomainError) -> Problem {
    Problem::new(
        Code::Failed,
        format!("{}: its XML can't be read: {}", defined.name, chain(error)),
    )
    .next(format!(
        "virsh edit {0}, or virsh define FILE with an earlier dumpxml of it, then virtseal vm seal {0}",
        word(&defined.name)
    ))
}

const NOT_IN_XML: &str = "sealed, but the XML does not say so";

fn vm_state(domain: &Domain, objects: &[Object], standings: &[Standing]) -> &'static str {
    let sealed = objects
        .iter()
        .filter(|object| matches!(object.state, ObjectState::Sealed(_)))
        .count();
    let says_so = domain.metadata.is_some() && !standings.contains(&Standing::NotInXml);
    match sealed {
        _ if !says_so && standings.iter().any(Standing::is_sealed) => NOT_IN_XML,
        _ if domain.metadata.is_none() => "plain",
        sealed if sealed == objects.len() => "sealed",
        _ => "mixed",
    }
}

fn warnings(domain: &Domain, state: &str) -> Vec<String> {
    let mut warnings = Vec::new();
    if state == NOT_IN_XML {
        warnings.push(format!(
            "{} was sealed, and its XML does not say so: take it back by virtseal vm seal {}",
            domain.name,
            word(&domain.name)
        ));
    }
    let backend = domain.tpm.as_ref().map(|tpm| &tpm.backend);
    if let Some(TpmBackend::Emulator {
        secret: Some(_),
        persistent_state: false,
        ..
    }) = backend
        && domain.metadata.is_some()
    {
        warnings.push(format!(
            "libvirt may delete the vTPM's state of {}, when it ends as a transient domain or is undefined: shut it down, then \
             set persistent_state='yes' by virtseal vm seal {}",
            domain.name,
            word(&domain.name)
        ));
    }
    warnings
}

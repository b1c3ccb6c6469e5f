//! What `virtseal status` and `virtseal vm status` show.

use std::collections::BTreeMap;

use swtpm_state::{State, libvirt_state_dir};

use super::vms::{KnownVm, unreachable};
use super::{Daemon, lock};
use crate::api::{HostStatus, ObjectView, VmView, Vms};
use crate::domain::{self, Domain, Object, ObjectState};
use crate::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::failure::{Failure, chain};
use crate::keystore::EnvelopeRecord;
use crate::libvirt::DefinedDomain;

impl Daemon {
    /// Everything at a glance; never waits for a provider.
    pub fn status(&self) -> Result<HostStatus, Failure> {
        let domains = self.libvirt.domains();
        let libvirt = match &domains {
            Ok(_) => "connected".to_owned(),
            Err(error) => chain(error),
        };
        Ok(HostStatus {
            version: env!("CARGO_PKG_VERSION").into(),
            libvirt,
            libvirt_uri: self.config().libvirt_uri,
            providers: self.providers()?.providers,
            vms: self.sealed_vms(domains.unwrap_or_default())?,
            armed: lock(&self.arms).len() as i64,
            audit: self.audit.problem(),
        })
    }

    /// One VM, sealed or not; or all sealed ones.
    pub fn vm_status(&self, vm: Option<&str>) -> Result<Vms, Failure> {
        let Some(vm) = vm else {
            let domains = self.libvirt.domains().map_err(|error| unreachable(&error))?;
            return Ok(Vms {
                vms: self.sealed_vms(domains)?,
            });
        };
        let records = self.records()?;
        let view = match self.find_vm(vm)? {
            KnownVm::Defined(defined) => self.defined(&defined, &records),
            KnownVm::Undefined(known) => self.undefined(known.vm, known.name, &records),
        };
        Ok(Vms { vms: vec![view] })
    }

    fn sealed_vms(&self, domains: Vec<DefinedDomain>) -> Result<Vec<VmView>, Failure> {
        let records = self.records()?;
        let mut vms: Vec<_> = domains
            .iter()
            .map(|defined| self.defined(defined, &records))
            .filter(|view| view.state != "plain")
            .collect();
        for known in self.keystore.vms()? {
            if !domains.iter().any(|defined| defined.vm == known.vm) {
                vms.push(self.undefined(known.vm, known.name, &records));
            }
        }
        vms.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(vms)
    }

    fn records(&self) -> Result<BTreeMap<EnvelopeId, EnvelopeRecord>, Failure> {
        Ok(self
            .keystore
            .envelopes()?
            .into_iter()
            .map(|record| (record.envelope.id, record))
            .collect())
    }

    fn defined(&self, defined: &DefinedDomain, records: &BTreeMap<EnvelopeId, EnvelopeRecord>) -> VmView {
        let power = if defined.active { "running" } else { "off" };
        let (state, objects) = match Domain::parse(&defined.xml) {
            Ok(domain) => {
                let objects = domain::objects(&domain);
                let views = objects
                    .iter()
                    .map(|object| self.object(&domain, object, records))
                    .collect();
                (vm_state(&domain, &objects).to_owned(), views)
            }
            Err(error) => (chain(&error), Vec::new()),
        };
        VmView {
            name: defined.name.clone(),
            uuid: defined.vm.to_string(),
            hangs_on: hangs_on(&objects),
            power: power.into(),
            state,
            objects,
        }
    }

    fn object(
        &self,
        domain: &Domain,
        object: &Object,
        records: &BTreeMap<EnvelopeId, EnvelopeRecord>,
    ) -> ObjectView {
        let path = match object.kind {
            ObjectKind::Vtpm => Some(libvirt_state_dir(&self.config().swtpm_dir, &domain.uuid)),
            ObjectKind::Disk | ObjectKind::Nvram => object.path.clone(),
        };
        let mut view = ObjectView {
            object: object.label.clone(),
            state: String::new(),
            path: path.as_ref().map(|path| path.display().to_string()),
            envelope: None,
            generation: None,
            providers: Vec::new(),
        };
        match &object.state {
            ObjectState::Plain => view.state = "plain".into(),
            ObjectState::Unsupported(reason) => view.state = (*reason).into(),
            ObjectState::Sealed(id) => {
                let known = records.get(id).map(|record| &record.envelope);
                let carried = domain
                    .metadata
                    .as_ref()
                    .and_then(|metadata| metadata.envelope(*id));
                view.envelope = Some(id.to_string());
                let newest = known
                    .into_iter()
                    .chain(carried)
                    .max_by_key(|envelope| envelope.generation);
                let Some(envelope) = newest else {
                    view.state = "envelope missing".into();
                    return view;
                };
                view.generation = i64::try_from(envelope.generation.0).ok();
                view.providers = self.names(envelope);
                if let Some(gone) = self.gone_providers(envelope) {
                    view.state = format!("locked: {gone}");
                    return view;
                }
                let present = path.as_ref().is_some_and(|path| path.exists());
                view.state = match object.kind {
                    ObjectKind::Vtpm => vtpm_state(path.as_deref()),
                    _ if present => "sealed".into(),
                    _ => "file missing".into(),
                };
            }
        }
        view
    }

    fn undefined(&self, vm: VmId, name: String, records: &BTreeMap<EnvelopeId, EnvelopeRecord>) -> VmView {
        let objects = records
            .values()
            .filter(|record| record.envelope.vm == vm)
            .map(|record| ObjectView {
                object: record.envelope.kind.to_string(),
                state: match self.gone_providers(&record.envelope) {
                    Some(gone) => format!("locked: {gone}"),
                    None => record.state.as_str().into(),
                },
                path: (!record.location.is_empty()).then(|| record.location.clone()),
                envelope: Some(record.envelope.id.to_string()),
                generation: i64::try_from(record.envelope.generation.0).ok(),
                providers: self.names(&record.envelope),
            });
        let objects: Vec<_> = objects.collect();
        VmView {
            name,
            uuid: vm.to_string(),
            hangs_on: hangs_on(&objects),
            power: "undefined".into(),
            state: "undefined".into(),
            objects,
        }
    }

    /// Why nobody on this host can ever open it, if that is so.
    fn gone_providers(&self, envelope: &Envelope) -> Option<String> {
        let mut stanzas = envelope.stanzas.iter();
        if stanzas.any(|stanza| self.registry.by_id(stanza.provider).is_some()) {
            return None;
        }
        let deleted = self.keystore.deleted_providers().unwrap_or_default();
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
            .map(|stanza| match self.registry.by_id(stanza.provider) {
                Some(known) => known.provider().name().to_owned(),
                None => stanza.provider_name.clone(),
            })
            .collect()
    }
}

/// The provider that is the only one to open one of the objects.
fn hangs_on(objects: &[ObjectView]) -> Option<String> {
    let alone = objects.iter().find_map(|object| match &object.providers[..] {
        [only] => Some(only),
        [first, rest @ ..] if rest.iter().all(|other| other == first) => Some(first),
        _ => None,
    });
    alone.cloned()
}

fn vm_state(domain: &Domain, objects: &[Object]) -> &'static str {
    let sealed = objects
        .iter()
        .filter(|object| matches!(object.state, ObjectState::Sealed(_)))
        .count();
    match (domain.metadata.is_some(), sealed) {
        (false, _) => "plain",
        (true, sealed) if sealed == objects.len() => "sealed",
        (true, _) => "mixed",
    }
}

fn vtpm_state(dir: Option<&std::path::Path>) -> String {
    match dir.map(State::read) {
        Some(Ok(State::Encrypted(_))) => "sealed".into(),
        Some(Ok(State::Absent)) | None => "sealed, not used yet".into(),
        Some(Ok(State::Plain(_))) => "plain state".into(),
        Some(Err(error)) => chain(&error),
    }
}

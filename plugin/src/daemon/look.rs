//! Gathers what a status shows: what libvirt and the keystore have, and what is at the places that the XML names.
//! [`crate::vm::status`] says what that comes to.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::thread::Builder;

use super::glance::{Glance, Uses};
use super::{Daemon, lock, paths, running};
use crate::api::VmView;
use crate::domain::Domain;
use crate::host::libvirt::{DefinedDomain, DomainEntry, ReadXml};
use crate::host::permitted::PathRule;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ProviderId, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::store::StoreError;
use crate::vm::names::ProviderNames;
use crate::vm::status::known::Known;
use crate::vm::status::look::{self, Places};
use crate::vm::status::{damaged, view};
use crate::vm::{autostart, side_doors};

/// Looks for those who ask, for ever. For a thread of its own.
pub(crate) fn run(daemon: &Daemon) {
    daemon.glances.run(|| at_all(daemon));
}

/// How many envelopes have a stanza of each provider, at most two seconds ago.
pub(super) fn provider_uses(daemon: &Daemon) -> Result<Uses, Problem> {
    daemon.glances.uses(|| {
        let mut uses = BTreeMap::new();
        daemon
            .keystore
            .each_envelope(|record| count_uses(&mut uses, &record.envelope))?;
        Ok(uses)
    })
}

fn count_uses(uses: &mut BTreeMap<ProviderId, usize>, envelope: &Envelope) {
    let stanzas = envelope.stanzas.iter();
    for provider in stanzas.map(|stanza| stanza.provider).collect::<BTreeSet<_>>() {
        *uses.entry(provider).or_default() += 1;
    }
}

fn at_all(daemon: &Daemon) -> Result<Glance, Problem> {
    let (domains, records) = at_once(
        || daemon.background.domains_at_a_glance(),
        || Ok::<_, StoreError>((daemon.keystore.vms()?, daemon.keystore.envelopes()?)),
    );
    let (vms, envelopes) = records?;
    let mut damaged = damaged::records_beside(&vms, &envelopes, daemon.keystore.as_ref(), &daemon.host_store);
    let mut uses = BTreeMap::new();
    for record in &envelopes.sound {
        count_uses(&mut uses, &record.envelope);
    }
    daemon.inspected.begin_look();
    let known = Known::new(vms, envelopes).with_inspected(&daemon.inspected);
    let libvirt = match &domains {
        Ok(_) => Ok(()),
        Err(error) => Err(chain(error)),
    };
    let mut vms = listed(daemon, &domains.unwrap_or_default(), known)?;
    if libvirt.is_err() {
        vms = vms.iter().map(view::not_asked).collect();
    }
    // Of a VM that is listed, they stand there.
    let told: BTreeSet<_> = vms
        .iter()
        .flat_map(|vm| &vm.warnings)
        .map(|warning| &warning.what)
        .collect();
    damaged.retain(|finding| !told.contains(&finding.what));
    Ok(Glance {
        libvirt,
        vms: vms.into(),
        damaged: damaged.into(),
        uses: Arc::new(uses),
    })
}

/// What one comes to on a thread, while this one does the other. Without a thread, one after the other.
fn at_once<A: Send, B>(one: impl Fn() -> A + Send + Sync, other: impl FnOnce() -> B) -> (A, B) {
    std::thread::scope(|scope| {
        let thread = Builder::new().name("look".to_owned()).spawn_scoped(scope, &one);
        let other = other();
        let one = match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| resume_unwind(panic)),
            Err(_) => one(),
        };
        (one, other)
    })
}

/// The VMs that have to do with virtseal, sorted by name and UUID.
fn listed(
    daemon: &Daemon,
    domains: &[(DomainEntry, Arc<ReadXml>)],
    known: Known,
) -> Result<Vec<VmView>, Problem> {
    let rule = if domains.is_empty() {
        paths::rule_of_settings(daemon)
    } else {
        daemon.path_rule()
    };
    let known = Arc::new(on_this_host(daemon, known, rule)?);
    let (half, other) = domains.split_at(domains.len() / 2);
    let (mut vms, others) = at_once(
        || at_these(daemon, half, &known),
        || at_these(daemon, other, &known),
    );
    vms.extend(others);
    let defined: BTreeSet<VmId> = domains.iter().map(|(defined, _)| defined.vm).collect();
    let mut others: BTreeMap<_, _> = daemon.running.with_findings().into_iter().collect();
    others.extend(known.vms().map(|record| (record.vm, record.name.clone())));
    others.retain(|vm, _| !defined.contains(vm));
    let undefined = others.iter();
    vms.extend(undefined.map(|(vm, name)| view::undefined(*vm, name, daemon.running.findings(*vm), &known)));
    vms.sort_by(|a, b| (&a.name, &a.uuid).cmp(&(&b.name, &b.uuid)));
    Ok(vms)
}

/// Those of `domains` that have to do with virtseal.
fn at_these(daemon: &Daemon, domains: &[(DomainEntry, Arc<ReadXml>)], known: &Arc<Known>) -> Vec<VmView> {
    let closely = domains.iter().filter_map(|(_, xml)| xml.domain.as_ref().ok());
    let places = Places::of(closely.filter(|domain| is_ours(domain, known)), known);
    let vms = domains.iter();
    vms.filter_map(|(defined, xml)| at_defined(daemon, defined, xml, &places, known))
        .collect()
}

/// Whether the VM has to do with virtseal. Of others nothing but the XML is looked at.
fn is_ours(domain: &Domain, known: &Known) -> bool {
    domain.metadata.is_some() || known.has(domain.uuid)
}

/// `None` for a VM that has nothing to do with virtseal.
fn at_defined(
    daemon: &Daemon,
    defined: &DomainEntry,
    xml: &ReadXml,
    places: &Places,
    known: &Known,
) -> Option<VmView> {
    let is_known = known.has(defined.vm);
    match &xml.domain {
        Ok(domain) => {
            let seen = look::at_objects(domain, places, known);
            let found = found(daemon, defined, domain, known);
            view::listed(view::defined(defined, domain, &seen, found, known))
        }
        Err(_) if !is_known && !xml.names_us => None,
        Err(error) => {
            let found = daemon.running.findings(defined.vm);
            Some(view::unreadable(defined, error, found, known))
        }
    }
}

/// One VM, sealed or not, with what takes longer to see.
pub(super) fn at_one(daemon: &Daemon, defined: &DefinedDomain) -> Result<VmView, Problem> {
    let entry = defined.entry();
    let domain = Domain::parse(&defined.xml).map_err(|error| view::xml_unreadable(&entry, &error))?;
    let known = Arc::new(known(daemon, daemon.path_rule())?);
    let looked = defined.active.then(|| running::look_now(daemon, defined.vm));
    let places = Places::of(std::iter::once(&domain), &known);
    let seen = look::at_objects(&domain, &places, &known);
    let policy = daemon.config().policy.of(&domain);
    let (vm, theirs) = (domain.uuid, Arc::clone(&known));
    let permit = move |path: &Path| theirs.permit(vm, path);
    let mut found = found(daemon, &entry, &domain, &known);
    found.extend(side_doors::plain_layers(&domain, policy, permit));
    let unseen = looked.and_then(Result::err);
    let subject = Subject::Vm(defined.name.clone());
    found.extend(
        unseen.map(|problem| Finding::of(FindingCode::LiveUnknown, subject, problem.of(&defined.name))),
    );
    Ok(view::defined(&entry, &domain, &seen, found, &known).0)
}

/// On a VM's side doors and on who starts it with the host, which matter of a sealed one alone; and while it ran.
fn found(daemon: &Daemon, defined: &DomainEntry, domain: &Domain, known: &Known) -> Vec<Finding> {
    let mut found = Vec::new();
    if domain.metadata.is_some() {
        found.extend(side_doors::findings(domain, daemon.config().policy.of(domain)));
        if defined.autostart {
            let instead = Advice::Autostart(defined.name.clone());
            found.push(autostart::by_libvirt(&defined.name, instead));
        }
    }
    found.extend(lock(&daemon.autostarts).finding(defined.vm));
    found.extend(known.master_key_on_disk(domain));
    found.extend(daemon.running.findings(domain.uuid));
    found
}

/// What the keystore has of all VMs.
pub(super) fn known(daemon: &Daemon, rule: PathRule) -> Result<Known, Problem> {
    let known = Known::new(daemon.keystore.vms()?, daemon.keystore.envelopes()?);
    on_this_host(daemon, known, rule)
}

fn on_this_host(daemon: &Daemon, known: Known, rule: PathRule) -> Result<Known, Problem> {
    let providers = ProviderNames::of_host(&daemon.recipients, daemon.keystore.as_ref());
    let saved = daemon.host_store.saved_states()?.sound;
    let config = daemon.config();
    Ok(known
        .with_master_keys_on_disk(daemon.host_store.master_keys_on_disk()?.sound)
        .with_autostarts(&daemon.host_store.autostarts()?.sound)
        .with_saved_to_a_file(saved.iter().map(|state| state.vm))
        .with_outlook(config.policy, daemon.recipients.outlook())
        .on_host(rule, config.swtpm_dir, providers))
}

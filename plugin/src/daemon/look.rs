//! Gathers what a status shows: what libvirt and the keystore have, and what is at the places that the XML names.
//! [`crate::vm::status`] says what that comes to.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use super::glance::{Glance, Uses};
use super::{Daemon, paths, pools, running};
use crate::api::VmView;
use crate::domain::{Domain, Metadata};
use crate::host::libvirt::DefinedDomain;
use crate::host::permitted::PathRule;
use crate::model::envelope::VmId;
use crate::model::finding::{Finding, Subject};
use crate::model::problem::{Problem, chain};
use crate::vm::names::ProviderNames;
use crate::vm::side_doors;
use crate::vm::status::known::Known;
use crate::vm::status::look::{self, Look};
use crate::vm::status::{damaged, view};

/// Looks for those who ask, for ever. For a thread of its own.
pub fn run(daemon: &Daemon) {
    pools::step_back();
    daemon.glances.run(|| at_all(daemon));
}

/// How many envelopes have a stanza of each provider, at most two seconds ago.
pub(super) fn provider_uses(daemon: &Daemon) -> Result<Uses, Problem> {
    daemon.glances.uses(|| {
        let mut uses = BTreeMap::new();
        daemon.keystore.each_envelope(|record| {
            let stanzas = record.envelope.stanzas.iter();
            for provider in stanzas.map(|stanza| stanza.provider).collect::<BTreeSet<_>>() {
                *uses.entry(provider).or_default() += 1;
            }
        })?;
        Ok(Arc::new(uses))
    })
}

fn at_all(daemon: &Daemon) -> Result<Glance, Problem> {
    let domains = daemon.background.domains_at_a_glance();
    let libvirt = match &domains {
        Ok(_) => Ok(()),
        Err(error) => Err(chain(error)),
    };
    Ok(Glance {
        libvirt,
        vms: listed(daemon, &domains.unwrap_or_default())?.into(),
        damaged: damaged::records(daemon.keystore.as_ref(), &daemon.host_store).into(),
    })
}

/// The VMs that have to do with virtseal, sorted by name and UUID.
fn listed(daemon: &Daemon, domains: &[DefinedDomain]) -> Result<Vec<VmView>, Problem> {
    let rule = if domains.is_empty() {
        paths::rule_of_settings(daemon)
    } else {
        paths::rule(daemon)
    };
    let known = known(daemon, rule)?;
    let mut vms: Vec<_> = domains
        .iter()
        .filter_map(|defined| at_defined(daemon, defined, &known))
        .collect();
    let defined: BTreeSet<VmId> = domains.iter().map(|defined| defined.vm).collect();
    let mut others: BTreeMap<_, _> = daemon.running.with_findings().into_iter().collect();
    others.extend(known.vms().map(|record| (record.vm, record.name.clone())));
    others.retain(|vm, _| !defined.contains(vm));
    let undefined = others.iter();
    vms.extend(undefined.map(|(vm, name)| view::undefined(*vm, name, daemon.running.findings(*vm), &known)));
    vms.sort_by(|a, b| (&a.name, &a.uuid).cmp(&(&b.name, &b.uuid)));
    Ok(vms)
}

/// `None` for a VM that has nothing to do with virtseal. Of those nothing but the XML is looked at.
fn at_defined(daemon: &Daemon, defined: &DefinedDomain, known: &Known) -> Option<VmView> {
    let is_known = known.has(defined.vm);
    match Domain::parse(&defined.xml) {
        Ok(domain) => {
            let look = if is_known || domain.metadata.is_some() {
                Look::Closely
            } else {
                Look::AtXml
            };
            let seen = look::at_objects(&domain, look, known);
            let found = found(daemon, &domain);
            view::listed(view::defined(defined, &domain, &seen, found, known))
        }
        Err(_) if !is_known && !defined.xml.contains(Metadata::NAMESPACE) => None,
        Err(error) => {
            let found = daemon.running.findings(defined.vm);
            Some(view::unreadable(defined, &error, found, known))
        }
    }
}

/// One VM, sealed or not, with what takes longer to see.
pub(super) fn at_one(daemon: &Daemon, defined: &DefinedDomain) -> Result<VmView, Problem> {
    let domain = Domain::parse(&defined.xml).map_err(|error| view::xml_unreadable(defined, &error))?;
    let known = known(daemon, paths::rule(daemon))?;
    let looked = defined.active.then(|| running::look_now(daemon, defined.vm));
    let seen = look::at_objects(&domain, Look::Closely, &known);
    let policy = daemon.config().policy.of(&domain);
    let permit = |path: &Path| known.permit(domain.uuid, path);
    let subject = || Subject::Vm(defined.name.clone());
    let mut found = found(daemon, &domain);
    let layers = side_doors::plain_layers(&domain, policy, permit).into_iter();
    found.extend(layers.map(|words| Finding::warning(subject(), words)));
    let unseen = looked.and_then(Result::err);
    found.extend(unseen.map(|problem| Finding::of(subject(), problem.of(&defined.name))));
    Ok(view::defined(defined, &domain, &seen, found, &known).0)
}

/// On a VM's side doors, of which only a sealed one has any, and while it ran.
fn found(daemon: &Daemon, domain: &Domain) -> Vec<Finding> {
    let mut found = match &domain.metadata {
        Some(_) => side_doors::findings(domain, daemon.config().policy.of(domain)),
        None => Vec::new(),
    };
    found.extend(daemon.running.findings(domain.uuid));
    found
}

/// What the keystore has of all VMs.
pub(super) fn known(daemon: &Daemon, rule: PathRule) -> Result<Known, Problem> {
    let providers = ProviderNames::of_host(&daemon.recipients, daemon.keystore.as_ref());
    let known = Known::new(daemon.keystore.vms()?, daemon.keystore.envelopes()?);
    Ok(known.on_host(rule, daemon.config().swtpm_dir, providers))
}

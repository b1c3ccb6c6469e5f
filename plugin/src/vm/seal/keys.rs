//! Which providers the keys are for that a seal makes.

use super::Host;
use crate::domain::Domain;
use crate::model::act::{Act, StepCode};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ProviderId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::recipients::Provider;
use crate::vm::names::ProviderNames;

/// That one, or those of the policy.
pub(super) fn wrapping(host: &Host<'_>, provider: Option<&str>) -> Result<Vec<Provider>, Problem> {
    Ok(match provider {
        Some(name) => vec![host.recipients.find(name)?],
        None => host.recipients.policy()?,
    })
}

/// Whether each of these opens an envelope.
pub(super) fn open(wrapping: &[Provider], envelope: &Envelope) -> bool {
    let opens = |known: &Provider| {
        let id = known.provider().id();
        envelope.stanzas.iter().any(|stanza| stanza.provider == id)
    };
    wrapping.iter().all(opens)
}

/// Whether they do, and no others.
pub(super) fn are_of(wrapping: &[Provider], envelope: &Envelope) -> bool {
    let is_one = |id: ProviderId| wrapping.iter().any(|known| known.provider().id() == id);
    open(wrapping, envelope) && envelope.stanzas.iter().all(|stanza| is_one(stanza.provider))
}

/// Why those that can't wrap now can't.
pub(super) fn cannot_wrap(host: &Host<'_>, wrapping: &[Provider]) -> Vec<Problem> {
    let ids = wrapping.iter().map(|known| known.provider().id());
    ids.filter_map(|id| host.recipients.cannot_wrap(id)).collect()
}

/// What a seal leaves with other providers than those that new keys are for.
pub(super) fn stay<'e>(
    host: &Host<'_>,
    wrapping: &[Provider],
    domain: &Domain,
    known: impl Iterator<Item = (String, &'e Envelope)>,
) -> Option<Finding> {
    let names = ProviderNames::of_host(host.recipients, host.keystore);
    let stay: Vec<_> = known
        .filter(|(_, envelope)| envelope.vm == domain.uuid && !open(wrapping, envelope))
        .map(|(object, envelope)| format!("{object} (provider {})", names.of(envelope).join(", ")))
        .collect();
    (!stay.is_empty()).then(|| {
        let again =
            Advice::RekeyVm(domain.name.clone()).note("once new keys are for the provider that you want");
        let what = format!("these keep the keys that they have: {}", stay.join(", "));
        Finding::warning(FindingCode::NewKeysDiffer, Subject::Vm(domain.name.clone()), what).next(again)
    })
}

pub(super) fn told(wrapping: &[Provider]) -> Act {
    let names: Vec<_> = wrapping
        .iter()
        .map(|known| format!("'{}'", known.provider().name()))
        .collect();
    StepCode::WrapFor.told(match &names[..] {
        [one] => format!("new keys are for provider {one}"),
        several => format!("new keys are for the providers {}", several.join(" and ")),
    })
}

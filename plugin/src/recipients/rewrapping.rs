//! Envelopes with other stanzas around the same DEK.
//!
//! Each DEK is unwrapped, wrapped by whoever is to have it, unwrapped from every new stanza and compared, before the new
//! envelope, with a MAC by that DEK, is returned. Nothing is stored here, and no DEK leaves.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use super::{OpenError, Provider, Recipients, made_keks, opening};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, KekId, Payload, ProviderId, Stanza, Verified};
use crate::model::problem::{Problem, chain};
use crate::provider::kind::Kind;
use crate::provider::toolbox::deadline::each_within;
use crate::provider::{ErrorClass, KekScope, ProviderError, ProviderStatus};
use crate::secret::Dek;
use crate::store::{EnvelopeRecord, EnvelopeStore};

/// One stanza of the envelope to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RewrapTarget {
    /// The stanza that is at this place now.
    Keep(usize),
    /// One by the KEK that this provider uses now; the stanza that is there, if it is that already.
    Wrap(ProviderId),
    /// The same, and new whatever is there.
    Anew(ProviderId),
    /// One by a KEK of this provider that is another than its stanza has now.
    Rotate(ProviderId),
}

/// An envelope, and the stanzas that it should have.
#[derive(Clone, Debug)]
pub(crate) struct Rewrap {
    /// The envelope as the keystore has it.
    pub record: EnvelopeRecord,
    /// What it should become; never empty.
    pub targets: Vec<RewrapTarget>,
}

/// What became of a [`Rewrap`].
#[derive(Debug)]
pub(crate) enum Rewrapped {
    /// Every stanza is already what it should be.
    Unchanged,
    /// The next generation, verified.
    Changed(Box<Verified>),
    /// It can't be done.
    Left {
        reason: String,
        /// Whether it may work later.
        again: bool,
    },
}

/// A provider that is to wrap does not, whatever it is given: there is no point in going on.
#[derive(Debug)]
pub(crate) struct Blocked {
    pub name: String,
    pub kind: Option<&'static Kind>,
    pub source: ProviderError,
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "provider '{}' {}", self.name, chain(&self.source))
    }
}

impl From<Blocked> for Problem {
    fn from(blocked: Blocked) -> Self {
        let (code, next) = blocked.source.advice(&blocked.name, blocked.kind);
        Self::new(code, blocked.to_string()).advised(next)
    }
}

/// A wrap to be made: which envelope of the batch, in which target.
struct Order {
    at: (usize, usize),
    scope: KekScope,
    /// The KEK of its stanza now.
    old: Option<KekId>,
    /// Whether that has to go.
    rotate: bool,
    /// Whether its stanza may stay if that is by the right KEK.
    keep: bool,
    payload: Payload,
}

/// What a target of the new envelope gets: the stanza that is there, or a new one.
enum Filled {
    Kept,
    New(Stanza),
}

/// An envelope that is open, and what its targets have got so far.
struct Open<'a> {
    dek: &'a Dek,
    current: Verified,
    filled: Vec<Option<Filled>>,
}

/// It, or what has become of it already.
type Outcome<'a> = Result<Open<'a>, Rewrapped>;

impl Recipients {
    /// Why `provider` can't wrap now, without asking it.
    pub(crate) fn cannot_wrap(&self, provider: ProviderId) -> Option<Problem> {
        let Some(known) = self.by_id(provider) else {
            return Some(
                Problem::not_found(format!("provider {provider} is not on this host"))
                    .next(Advice::ListProviders),
            );
        };
        let source = known.provider().refuses()?;
        let name = known.provider().name().to_owned();
        let kind = known.row();
        Some(Blocked { name, kind, source }.into())
    }

    /// Why `provider` can't destroy KEKs now, without asking it; one that is not on this host has none to destroy.
    pub(crate) fn cannot_destroy(&self, provider: ProviderId) -> Option<Problem> {
        let known = self.by_id(provider)?;
        match known.provider().status() {
            _ if !known.keeps_keks() => None,
            ProviderStatus::NotBackedUp => None,
            _ => self.cannot_wrap(provider),
        }
    }

    /// Makes each of `work`, in its order, with one call per provider for opening and one for verifying.
    ///
    /// # Errors
    /// [`Blocked`] when a provider that is to wrap refuses as a whole; then nothing was made.
    pub(crate) fn rewrap(&self, work: &[Rewrap]) -> Result<Vec<Rewrapped>, Blocked> {
        let envelopes: Vec<_> = work.iter().map(|rewrap| &rewrap.record.envelope).collect();
        let opened = self.open_each(&envelopes);
        let mut orders: BTreeMap<ProviderId, Vec<Order>> = BTreeMap::new();
        let mut outcomes: Vec<Outcome<'_>> = Vec::new();
        for (number, (rewrap, dek)) in work.iter().zip(&opened).enumerate() {
            outcomes.push(match dek {
                Ok(dek) => open(number, rewrap, dek, &mut orders),
                Err(error) => Err(left(error)),
            });
        }
        for (provider, orders) in orders {
            for (at, answer) in self.fill(provider, orders)? {
                let (number, target) = at;
                match (answer, &mut outcomes[number]) {
                    (_, Err(_)) => {}
                    (Ok(filled), Ok(open)) => open.filled[target] = Some(filled),
                    (Err(error), outcome) => {
                        *outcome = Err(Rewrapped::Left {
                            reason: chain(&error),
                            again: false,
                        });
                    }
                }
            }
        }
        Ok(self.verify_all(work, outcomes))
    }

    /// Opens each of them, where [`Recipients::open_all`] opens all or none.
    pub(crate) fn open_each(&self, envelopes: &[&Envelope]) -> Vec<Result<Dek, OpenError>> {
        let deleted = self.keystore.deleted_providers().map(|rows| rows.sound);
        let deleted = deleted.unwrap_or_default();
        opening::open_each(&self.providers(), envelopes, self.deadline())
            .into_iter()
            .map(|opened| opened.map_err(|error| error.with_deleted(&deleted)))
            .collect()
    }

    #[expect(clippy::type_complexity, reason = "read once, right above")]
    fn fill(
        &self,
        provider: ProviderId,
        orders: Vec<Order>,
    ) -> Result<Vec<((usize, usize), Result<Filled, ProviderError>)>, Blocked> {
        let Some(known) = self.by_id(provider) else {
            return Err(Blocked {
                name: provider.to_string(),
                kind: None,
                source: ProviderError::Unusable("it is not on this host".to_owned()),
            });
        };
        let blocked = |source| Blocked {
            name: known.provider().name().to_owned(),
            kind: known.row(),
            source,
        };
        let places: Vec<_> = orders.iter().map(|order| order.at).collect();
        let (asked, keystore, mut last) = (known.clone(), Arc::clone(&self.keystore), None);
        let answers = each_within(self.deadline(), orders, move |order| {
            wrap(keystore.as_ref(), &asked, &order, &mut last)
        })
        .map_err(blocked)?;
        let mut filled = Vec::with_capacity(places.len());
        for (place, answer) in places.into_iter().zip(answers) {
            filled.push(match answer {
                Ok(Some(stanza)) => (place, Ok(Filled::New(stanza))),
                Ok(None) => (place, Ok(Filled::Kept)),
                // What is refused for good must not keep a job for ever.
                Err(error) if matches!(error.class(), ErrorClass::Key | ErrorClass::ForGood) => {
                    (place, Err(error))
                }
                Err(error) => return Err(blocked(error)),
            });
        }
        Ok(filled)
    }

    fn verify_all(&self, work: &[Rewrap], outcomes: Vec<Outcome<'_>>) -> Vec<Rewrapped> {
        let mut results = Vec::with_capacity(work.len());
        let mut probes: Vec<(usize, &Dek, Envelope)> = Vec::new();
        for (number, (rewrap, outcome)) in work.iter().zip(outcomes).enumerate() {
            let made = outcome.and_then(|open| {
                let dek = open.dek;
                let (next, fresh) = put_together(rewrap, open)?;
                // Each new stanza must open by itself; without any, what is left of the old ones must.
                if fresh.is_empty() {
                    probes.push((number, dek, next.clone().into_envelope()));
                }
                for stanza in fresh {
                    let mut alone = next.clone().into_envelope();
                    alone.stanzas = vec![next.stanzas[stanza].clone()];
                    probes.push((number, dek, alone));
                }
                Ok(next)
            });
            results.push(match made {
                Ok(next) => Rewrapped::Changed(Box::new(next)),
                Err(outcome) => outcome,
            });
        }
        let envelopes: Vec<_> = probes.iter().map(|(_, _, probe)| probe).collect();
        let opened = self.open_each(&envelopes);
        for ((number, dek, _), found) in probes.iter().zip(opened) {
            match found {
                Ok(found) if openssl::memcmp::eq(found.expose(), dek.expose()) => {}
                Ok(_) => {
                    results[*number] = Rewrapped::Left {
                        reason: "what was wrapped anew opens to another key".to_owned(),
                        again: false,
                    };
                }
                Err(error) => results[*number] = left(&error),
            }
        }
        results
    }
}

fn left(error: &OpenError) -> Rewrapped {
    Rewrapped::Left {
        reason: error.reasons(),
        again: error.may_pass(),
    }
}

/// Believes the envelope, and notes which wraps it takes.
fn open<'a>(
    number: usize,
    rewrap: &Rewrap,
    dek: &'a Dek,
    orders: &mut BTreeMap<ProviderId, Vec<Order>>,
) -> Outcome<'a> {
    let current = rewrap.record.verify(dek).map_err(|error| Rewrapped::Left {
        reason: chain(&error),
        again: false,
    })?;
    let filled = order(number, rewrap, dek, orders)?;
    Ok(Open { dek, current, filled })
}

/// Notes which wraps `rewrap` takes; what it keeps is filled in.
fn order(
    number: usize,
    rewrap: &Rewrap,
    dek: &Dek,
    orders: &mut BTreeMap<ProviderId, Vec<Order>>,
) -> Result<Vec<Option<Filled>>, Rewrapped> {
    let envelope = &rewrap.record.envelope;
    let keep = keeps_its_providers(rewrap);
    let mut filled = Vec::with_capacity(rewrap.targets.len());
    for (place, target) in rewrap.targets.iter().enumerate() {
        let (provider, rotate, keep) = match target {
            RewrapTarget::Keep(_) => {
                filled.push(Some(Filled::Kept));
                continue;
            }
            RewrapTarget::Wrap(provider) => (*provider, false, keep),
            RewrapTarget::Anew(provider) => (*provider, false, false),
            RewrapTarget::Rotate(provider) => (*provider, true, keep),
        };
        let payload = Payload::bind(dek, &envelope.binding()).map_err(|error| Rewrapped::Left {
            reason: chain(&error),
            again: true,
        })?;
        let old = stanza_of(envelope, provider).map(|at| envelope.stanzas[at].kek.clone());
        orders.entry(provider).or_default().push(Order {
            at: (number, place),
            scope: KekScope::Vm(envelope.vm),
            old,
            rotate,
            keep,
            payload,
        });
        filled.push(None);
    }
    Ok(filled)
}

/// Whether it comes out with a stanza of each provider that it has one of. If not, those that stay alone must be known to
/// open: whatever is to wrap does so anew, and is verified.
fn keeps_its_providers(rewrap: &Rewrap) -> bool {
    let stanzas = &rewrap.record.envelope.stanzas;
    let stays = |provider: ProviderId| {
        rewrap.targets.iter().any(|target| match target {
            RewrapTarget::Keep(at) => stanzas[*at].provider == provider,
            RewrapTarget::Wrap(other) | RewrapTarget::Anew(other) | RewrapTarget::Rotate(other) => {
                *other == provider
            }
        })
    };
    stanzas.iter().all(|stanza| stays(stanza.provider))
}

/// The first one: a provider that has several opens any of them.
fn stanza_of(envelope: &Envelope, provider: ProviderId) -> Option<usize> {
    envelope
        .stanzas
        .iter()
        .position(|stanza| stanza.provider == provider)
}

/// What was asked for a KEK, and which one it is: the objects of a VM, which mostly come one after the other, have the same.
type LastKek = Option<((KekScope, Option<KekId>), KekId)>;

/// `None` if the stanza that is there is what is wanted.
fn wrap(
    keystore: &dyn EnvelopeStore,
    known: &Provider,
    order: &Order,
    last: &mut LastKek,
) -> Result<Option<Stanza>, ProviderError> {
    let provider = known.provider();
    let retired = order.old.as_ref().filter(|_| order.rotate);
    let wanted = (order.scope, retired.cloned());
    let kek = match last.take().filter(|(asked, _)| *asked == wanted) {
        Some((_, kek)) => kek,
        None => {
            let kek = match retired {
                Some(old) => provider.rotate_kek(&order.scope, old)?,
                None => provider.create_kek(&order.scope)?,
            };
            if let KekScope::Vm(vm) = order.scope {
                made_keks::note(keystore, known, vm, &kek)?;
            }
            kek
        }
    };
    *last = Some((wanted, kek.clone()));
    if order.keep && order.old.as_ref() == Some(&kek) {
        return Ok(None);
    }
    provider.wrap(&kek, &order.payload).map(Some)
}

/// The next generation, and which of its stanzas are new.
fn put_together(rewrap: &Rewrap, open: Open<'_>) -> Result<(Verified, Vec<usize>), Rewrapped> {
    let envelope = &rewrap.record.envelope;
    let (mut stanzas, mut fresh) = (Vec::with_capacity(open.filled.len()), Vec::new());
    for (target, filled) in rewrap.targets.iter().zip(open.filled) {
        match (filled, target) {
            (Some(Filled::New(stanza)), _) => {
                fresh.push(stanzas.len());
                stanzas.push(stanza);
            }
            (Some(Filled::Kept), RewrapTarget::Keep(at)) => stanzas.push(envelope.stanzas[*at].clone()),
            (
                Some(Filled::Kept),
                RewrapTarget::Wrap(provider) | RewrapTarget::Anew(provider) | RewrapTarget::Rotate(provider),
            ) => {
                let at = stanza_of(envelope, *provider).expect("its KEK was read from there");
                stanzas.push(envelope.stanzas[at].clone());
            }
            (None, _) => {
                return Err(Rewrapped::Left {
                    reason: "it was not wrapped".to_owned(),
                    again: true,
                });
            }
        }
    }
    let next = open
        .current
        .with_stanzas(stanzas, open.dek)
        .map_err(|error| Rewrapped::Left {
            reason: chain(&error),
            again: false,
        })?;
    // A format 1 has changed by being read.
    match *next == *envelope {
        true => Err(Rewrapped::Unchanged),
        false => Ok((next, fresh)),
    }
}

//! Opening envelopes: which stanza to give to which provider, and what to say when none opens.
//!
//! All or nothing. Stanzas are tried in the envelope's order, those of usable providers first, so that a dead
//! provider costs its deadline only where nothing else opens the envelope; a provider that refuses as a whole is
//! asked once.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::Provider;
use crate::host::local_time::time_of_day;
use crate::model::advice::Advice;
use crate::model::envelope::{Binding, Envelope, EnvelopeError, ProviderId, Stanza, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::provider::kind::{KeysAt, Kind};
use crate::provider::toolbox::deadline::within;
use crate::provider::{ErrorClass, KeyProvider, ProviderError, ProviderName};
use crate::secret::Dek;
use crate::store::DeletedProvider;

/// Why an envelope does not open.
#[derive(Debug)]
pub(crate) struct OpenError {
    /// The envelope, its VM and its kind.
    pub binding: Binding,
    /// Why each of its providers did not open it, in the order of its stanzas; never empty.
    pub attempts: Vec<Attempt>,
}

/// Why one provider did not open an envelope.
#[derive(Debug)]
pub(crate) struct Attempt {
    pub provider: ProviderId,
    /// Its name on this host or, where it is not known, the one that the envelope hints at.
    pub name: String,
    /// Its kind, where it is here and can be used.
    pub kind: Option<&'static Kind>,
    pub why: Refusal,
    /// When it last did as asked.
    pub last_answer: Option<SystemTime>,
}

/// The reason of an [`Attempt`].
#[derive(Debug)]
pub(crate) enum Refusal {
    /// This host has no such provider.
    NotKnown {
        /// Its kind, if it was deleted here.
        kind: Option<String>,
    },
    /// The provider refuses.
    Provider(Arc<ProviderError>),
    /// It unwraps to a payload that was made for another envelope.
    Binding(EnvelopeError),
}

impl OpenError {
    /// The exit code: that of what is easiest to mend.
    pub(crate) fn code(&self) -> Code {
        self.easiest().0
    }

    /// What to run next.
    pub(crate) fn next(&self) -> Option<Advice> {
        self.easiest().1
    }

    /// Each provider's reason, for a reader who knows which object it is about: `provider 'kmip-prod' unreachable (3 of 3
    /// nodes: connect timed out), last answer 14:02, recipient 'breakglass' is locked`.
    pub(crate) fn reasons(&self) -> String {
        let role = |nth| if nth == 0 { "provider" } else { "recipient" };
        let reasons = self.attempts.iter().enumerate();
        let reasons: Vec<_> = reasons.map(|(nth, attempt)| attempt.reason(role(nth))).collect();
        reasons.join(", ")
    }

    /// Says of which kind providers are that are not on this host, as far as `deleted` has them.
    #[must_use]
    pub(super) fn with_deleted(mut self, deleted: &[DeletedProvider]) -> Self {
        for attempt in &mut self.attempts {
            let id = attempt.provider;
            if let Refusal::NotKnown { kind } = &mut attempt.why {
                *kind = deleted
                    .iter()
                    .find(|gone| gone.id == id)
                    .map(|gone| gone.kind.clone());
            }
        }
        self
    }

    /// Whether a provider that refuses everything now may open it later.
    pub(crate) fn may_pass(&self) -> bool {
        self.attempts
            .iter()
            .any(|attempt| matches!(&attempt.why, Refusal::Provider(error) if may_pass(error)))
    }

    /// Whether every one of its providers has said that it did not wrap this: nobody opens it, here or elsewhere.
    pub(crate) fn is_of_stanzas(&self) -> bool {
        self.attempts.iter().all(|attempt| match &attempt.why {
            Refusal::Binding(_) => true,
            Refusal::Provider(error) => matches!(**error, ProviderError::Tampered),
            Refusal::NotKnown { .. } => false,
        })
    }

    fn easiest(&self) -> (Code, Option<Advice>) {
        let effort = |code: Code| match code {
            Code::Locked => 0,
            Code::Unreachable => 1,
            Code::NotTrusted => 2,
            Code::NotFound => 4,
            _ => 3,
        };
        self.attempts
            .iter()
            .map(|attempt| attempt.advice(self.binding.vm))
            .min_by_key(|(code, _)| effort(*code))
            .unwrap_or((Code::Failed, None))
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Binding { envelope, vm, kind } = self.binding;
        write!(
            f,
            "can't open envelope {envelope} ({kind} of VM {vm}): {}",
            self.reasons()
        )
    }
}

/// How a provider comes back that is not on this host: only native ones have a backup of their own. `kind` is known if it
/// was deleted here.
pub(crate) fn bring_back(id: ProviderId, name: String, kind: Option<&str>) -> Advice {
    match kind {
        Some(kind) if Kind::named(kind).is_some_and(|kind| kind.keys == KeysAt::Host) => {
            Advice::RestoreProvider(name)
        }
        Some(kind) => Advice::AddAgain {
            kind: kind.to_owned(),
            name,
            id,
        },
        None => Advice::BringBack { name, id },
    }
}

// There may be several causes, so Display has them all and `source` none.
impl std::error::Error for OpenError {}

impl From<OpenError> for Problem {
    fn from(error: OpenError) -> Self {
        Self::from(&error)
    }
}

impl From<&OpenError> for Problem {
    fn from(error: &OpenError) -> Self {
        Self::new(error.code(), error.to_string()).advised(error.next())
    }
}

impl Attempt {
    /// The exit code for this reason alone, and what helps the VM that it keeps off.
    pub(crate) fn advice(&self, vm: VmId) -> (Code, Option<Advice>) {
        let damaged = (Code::Failed, Some(Advice::RestoreEnvelope(vm.to_string())));
        match &self.why {
            Refusal::NotKnown { kind } => {
                let back = bring_back(self.provider, self.name_to_type().to_owned(), kind.as_deref());
                (Code::NotFound, Some(back))
            }
            Refusal::Provider(error) => match **error {
                ProviderError::Tampered | ProviderError::Payload(_) => damaged,
                _ => error.advice(&self.name, self.kind),
            },
            Refusal::Binding(_) => damaged,
        }
    }

    fn reason(&self, role: &str) -> String {
        let name = &self.name;
        match &self.why {
            Refusal::NotKnown { .. } => {
                format!("{role} '{name}' ({}) is not known on this host", self.provider)
            }
            Refusal::Provider(error) => {
                let last = self
                    .last_answer
                    .filter(|_| matches!(**error, ProviderError::Unreachable(_)));
                let last = last.map(|at| format!(", last answer {}", time_of_day(at)));
                format!(
                    "{role} '{name}' {}{}",
                    chain(error.as_ref()),
                    last.unwrap_or_default()
                )
            }
            Refusal::Binding(error) => format!("{role} '{name}': {}", chain(error)),
        }
    }

    /// An unknown provider's name comes from the envelope, which anyone may have written.
    fn name_to_type(&self) -> &str {
        if self.name.parse::<ProviderName>().is_ok() {
            &self.name
        } else {
            "NAME"
        }
    }
}

fn may_pass(error: &ProviderError) -> bool {
    matches!(error.class(), ErrorClass::Client | ErrorClass::Trouble)
}

/// Else the provider would say the same of every stanza.
fn is_about_one(error: &ProviderError) -> bool {
    matches!(error.class(), ErrorClass::Key | ErrorClass::ForGood)
}

/// An envelope on its way to its DEK.
struct Job<'a> {
    envelope: &'a Envelope,
    untried: VecDeque<&'a Stanza>,
    attempts: Vec<Attempt>,
    dek: Option<Dek>,
    /// Nobody is left to be asked.
    failed: bool,
}

impl<'a> Job<'a> {
    fn new(envelope: &'a Envelope, usable: impl Fn(ProviderId) -> bool) -> Self {
        let (first, later): (Vec<_>, Vec<_>) = envelope
            .stanzas
            .iter()
            .partition(|stanza| usable(stanza.provider));
        Self {
            envelope,
            untried: first.into_iter().chain(later).collect(),
            attempts: Vec::new(),
            dek: None,
            failed: false,
        }
    }

    fn refused(&mut self, provider: &dyn KeyProvider, why: Refusal) {
        self.attempts.push(Attempt {
            provider: provider.id(),
            name: provider.name().to_owned(),
            kind: Kind::named(provider.kind()),
            why,
            last_answer: provider.last_answer(),
        });
    }

    fn unknown(&mut self, stanza: &Stanza) {
        self.attempts.push(Attempt {
            provider: stanza.provider,
            name: printable(&stanza.provider_name),
            kind: None,
            why: Refusal::NotKnown { kind: None },
            last_answer: None,
        });
    }

    fn into_result(mut self) -> Result<Dek, OpenError> {
        self.dek.take().ok_or_else(|| self.into_error())
    }

    fn into_error(mut self) -> OpenError {
        let stanzas = &self.envelope.stanzas;
        let place = |attempt: &Attempt| {
            stanzas
                .iter()
                .position(|stanza| stanza.provider == attempt.provider)
        };
        self.attempts.sort_by_key(place);
        OpenError {
            binding: self.envelope.binding(),
            attempts: self.attempts,
        }
    }
}

/// All of them, or the first that does not open.
pub(super) fn open_all(
    providers: &[Provider],
    envelopes: &[&Envelope],
    deadline: Duration,
) -> Result<Vec<Dek>, OpenError> {
    let mut opening = Opening::of(providers, envelopes, deadline);
    opening.run_until(|jobs| jobs.iter().any(|job| job.failed));
    match opening.jobs.iter().position(|job| job.failed) {
        Some(at) => Err(opening.jobs.swap_remove(at).into_error()),
        None => opening.jobs.into_iter().map(Job::into_result).collect(),
    }
}

/// Each of them as far as it goes. A provider that refuses everything is asked once, however many need it.
pub(super) fn open_each(
    providers: &[Provider],
    envelopes: &[&Envelope],
    deadline: Duration,
) -> Vec<Result<Dek, OpenError>> {
    let mut opening = Opening::of(providers, envelopes, deadline);
    opening.run_until(|_| false);
    opening.jobs.into_iter().map(Job::into_result).collect()
}

struct Opening<'a> {
    providers: HashMap<ProviderId, &'a Provider>,
    /// For one call of one of them.
    deadline: Duration,
    /// Those that said no to everything, and why.
    refusing: HashMap<ProviderId, Arc<ProviderError>>,
    jobs: Vec<Job<'a>>,
}

/// The jobs to give to each provider, with the stanza of each.
type Round<'a> = BTreeMap<ProviderId, Vec<(usize, &'a Stanza)>>;

impl<'a> Opening<'a> {
    fn of(providers: &'a [Provider], envelopes: &[&'a Envelope], deadline: Duration) -> Self {
        let mut opening = Self {
            providers: providers
                .iter()
                .map(|known| (known.provider().id(), known))
                .collect(),
            deadline,
            refusing: HashMap::new(),
            jobs: Vec::new(),
        };
        opening.jobs = envelopes
            .iter()
            .map(|envelope| Job::new(envelope, |id| opening.is_usable(id)))
            .collect();
        opening
    }

    fn is_usable(&self, id: ProviderId) -> bool {
        let known = self.providers.get(&id);
        known.is_some_and(|known| known.provider().status().is_usable())
    }

    /// The next stanza of every envelope that is still closed; none when all are open or have failed.
    fn next_round(&mut self) -> Round<'a> {
        let mut round = Round::new();
        for (at, job) in self.jobs.iter_mut().enumerate() {
            if job.dek.is_some() {
                continue;
            }
            match job.untried.pop_front() {
                Some(stanza) => round.entry(stanza.provider).or_default().push((at, stanza)),
                None => job.failed = true,
            }
        }
        round
    }

    /// Until every envelope is open or has failed, or it is `enough`.
    fn run_until(&mut self, enough: impl Fn(&[Job<'a>]) -> bool) {
        loop {
            let round = self.next_round();
            if round.is_empty() || enough(&self.jobs) {
                return;
            }
            for (provider, members) in round {
                self.ask(provider, &members);
            }
        }
    }

    fn ask(&mut self, id: ProviderId, members: &[(usize, &Stanza)]) {
        let Some(known) = self.providers.get(&id).copied() else {
            for (at, stanza) in members {
                self.jobs[*at].unknown(stanza);
            }
            return;
        };
        let provider = known.provider();
        if let Some(error) = self.refusing.get(&id).cloned() {
            return self.refuse(provider, members, &error);
        }
        let stanzas: Vec<_> = members.iter().map(|(_, stanza)| (*stanza).clone()).collect();
        let answer = if provider.may_hang() {
            let asked = known.clone();
            within(self.deadline, move || unwrap(asked.provider(), &stanzas))
        } else {
            unwrap(provider, &stanzas)
        };
        match answer {
            Ok(payloads) => {
                for ((at, _), payload) in members.iter().zip(payloads) {
                    let job = &mut self.jobs[*at];
                    match payload.dek(&job.envelope.binding()) {
                        Ok(dek) => job.dek = Some(dek),
                        Err(error) => {
                            job.refused(provider, Refusal::Binding(error));
                        }
                    }
                }
            }
            // A batch fails whole; the others may open, and the message must name the right one.
            Err(error) if is_about_one(&error) && members.len() > 1 => {
                for member in members {
                    self.ask(id, std::slice::from_ref(member));
                }
            }
            Err(error) => {
                let error = Arc::new(error);
                if !is_about_one(&error) {
                    self.refusing.insert(id, Arc::clone(&error));
                }
                self.refuse(provider, members, &error);
            }
        }
    }

    fn refuse(
        &mut self,
        provider: &dyn KeyProvider,
        members: &[(usize, &Stanza)],
        error: &Arc<ProviderError>,
    ) {
        for (at, _) in members {
            self.jobs[*at].refused(provider, Refusal::Provider(Arc::clone(error)));
        }
    }
}

fn unwrap(
    provider: &dyn KeyProvider,
    stanzas: &[Stanza],
) -> Result<Vec<crate::model::envelope::Payload>, ProviderError> {
    let payloads = provider.unwrap_many(&stanzas.iter().collect::<Vec<_>>())?;
    if payloads.len() == stanzas.len() {
        Ok(payloads)
    } else {
        let count = format!("{} payloads for {} stanzas", payloads.len(), stanzas.len());
        Err(ProviderError::internal("unwrapping a batch")(count))
    }
}

/// One line, of bounded length, without anything a terminal would act on.
pub(super) fn printable(hint: &str) -> String {
    hint.chars().take(64).flat_map(char::escape_debug).collect()
}

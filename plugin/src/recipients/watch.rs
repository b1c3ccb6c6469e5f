//! How each provider has been doing: its state, since when, when it last answered; and what keeps asking.
//!
//! One thread waits until a provider is due, or is woken by a change. A probe that may hang has a thread while it runs, so one
//! that hangs holds up no other, and nobody who wants to know waits for any: [`Watches::report`] reads memory.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::api::{ProviderState, words};
use crate::model::backoff::Backoff;
use crate::model::deadlines::IDLE;
use crate::model::deadlines::provider::PROBE_SOONEST;
use crate::model::envelope::ProviderId;
use crate::model::finding::Finding;
use crate::provider::{KeyProvider, ProviderStatus};

/// How a provider is, and has been.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    /// Its state, with the reason.
    pub status: ProviderStatus,
    /// Since when it has been in this state, as far as virtseald has seen.
    pub since: SystemTime,
    /// When its server or token last did as asked.
    pub last_answer: Option<SystemTime>,
    /// What is about to go wrong.
    pub warnings: Vec<Finding>,
}

/// How often providers are probed, and how long an answer may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Pace {
    pub(super) interval: Duration,
    pub(super) patience: Duration,
}

impl Pace {
    /// How long to wait after that many probes in a row that went wrong.
    fn pause(self, failures: u32) -> Duration {
        match failures {
            0 => self.interval,
            some => Backoff::new(PROBE_SOONEST, self.interval).pause(some),
        }
    }
}

/// The watches of all providers; their thread ends with them.
pub(super) struct Watches {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    pace: Pace,
    of: HashMap<ProviderId, Watch>,
    ended: bool,
}

/// One provider's.
struct Watch {
    provider: Weak<dyn KeyProvider>,
    state: ProviderState,
    since: SystemTime,
    warnings: Vec<Finding>,
    /// When to probe it next.
    due: Instant,
    /// How many probes in a row went wrong.
    failures: u32,
    /// The probe that is under way.
    probing: Option<(Instant, SystemTime)>,
}

impl Watches {
    pub(super) fn new(pace: Pace) -> Self {
        let shared = Arc::new(Shared::default());
        shared.state().pace = pace;
        let working = Arc::clone(&shared);
        let started = std::thread::Builder::new()
            .name("watch".to_owned())
            .spawn(move || working.run());
        if let Err(error) = started {
            // Calls still show how they are.
            tracing::warn!(%error, "can't start the thread that probes the providers");
        }
        Self { shared }
    }

    /// Changes the pace, and probes all at once if it did change.
    pub(super) fn set_pace(&self, change: impl FnOnce(&mut Pace)) {
        let mut state = self.shared.state();
        let before = state.pace.interval;
        change(&mut state.pace);
        if state.pace.interval != before {
            state.of.values_mut().for_each(|watch| watch.due = Instant::now());
            self.shared.wake.notify_all();
        }
    }

    /// Probes `provider` from now on, for as long as it is there.
    pub(super) fn add(&self, provider: &Arc<dyn KeyProvider>) {
        let watch = Watch {
            provider: Arc::downgrade(provider),
            state: provider.status().state(),
            since: SystemTime::now(),
            warnings: Vec::new(),
            due: Instant::now(),
            failures: 0,
            probing: None,
        };
        self.shared.state().of.insert(provider.id(), watch);
        self.shared.wake.notify_all();
    }

    /// Lets go of a provider that was deleted.
    pub(super) fn remove(&self, id: ProviderId) {
        self.shared.state().of.remove(&id);
    }

    /// How `provider` is. Waits for nothing; a change that this sees wakes the watch.
    pub(super) fn report(&self, provider: &dyn KeyProvider) -> Report {
        let (report, changed) = self.shared.note(provider);
        if changed && let Some(watch) = self.shared.state().of.get_mut(&provider.id()) {
            watch.due = Instant::now();
            self.shared.wake.notify_all();
        }
        report
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.ended = true;
        state.of.clear();
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn run(self: &Arc<Self>) {
        let mut state = self.state();
        while !state.ended {
            let due = state.take_due();
            if due.is_empty() {
                let next = state.of.values().filter(|watch| watch.probing.is_none());
                let next = next.map(|watch| watch.due).min();
                let pause = next.map_or(IDLE, |next| next.saturating_duration_since(Instant::now()));
                (state, _) = self
                    .wake
                    .wait_timeout(state, pause)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(state);
            for provider in due {
                self.start(provider);
            }
            state = self.state();
        }
    }

    fn start(self: &Arc<Self>, provider: Arc<dyn KeyProvider>) {
        if !provider.may_hang() {
            return self.probe(&provider);
        }
        let this = Arc::clone(self);
        let asked = Arc::clone(&provider);
        let started = std::thread::Builder::new()
            .name("probe".to_owned())
            .spawn(move || this.probe(&asked));
        if let Err(error) = started {
            tracing::warn!(provider = provider.name(), %error, "can't start a thread to probe it");
            self.probed(&provider, Outcome::Bad);
        }
    }

    fn probe(&self, provider: &Arc<dyn KeyProvider>) {
        provider.probe();
        if let Some(watch) = self.state().of.get_mut(&provider.id()) {
            watch.probing = None;
        }
        let (report, _) = self.note(provider.as_ref());
        self.probed(
            provider,
            match report.status {
                ProviderStatus::Unreachable(_)
                | ProviderStatus::NotTrusted(_)
                | ProviderStatus::Degraded(_) => Outcome::Bad,
                ProviderStatus::NotBackedUp | ProviderStatus::Locked | ProviderStatus::Ready => Outcome::Good,
            },
        );
    }

    /// When to ask again.
    fn probed(&self, provider: &Arc<dyn KeyProvider>, outcome: Outcome) {
        let wanted = provider.probe_within().unwrap_or(IDLE);
        let mut state = self.state();
        let pace = state.pace;
        if let Some(watch) = state.of.get_mut(&provider.id()) {
            watch.probing = None;
            watch.failures = match outcome {
                Outcome::Good => 0,
                Outcome::Bad => watch.failures + 1,
            };
            watch.due = Instant::now() + pace.pause(watch.failures).min(wanted);
            self.wake.notify_all();
        }
    }

    /// Looks at `provider`, and notes what has changed: also whether its state has.
    fn note(&self, provider: &dyn KeyProvider) -> (Report, bool) {
        let (found, last_answer, warnings) = (provider.status(), provider.last_answer(), provider.warnings());
        let mut state = self.state();
        let patience = state.pace.patience;
        let Some(watch) = state.of.get_mut(&provider.id()) else {
            let since = SystemTime::now();
            let report = Report {
                status: found,
                since,
                last_answer,
                warnings,
            };
            return (report, false);
        };
        let status = match watch.silence(last_answer).filter(|silence| *silence > patience) {
            Some(silence) => unless_it_says_more(found, silence),
            None => found,
        };
        let changed = status.state() != watch.state;
        if changed {
            tell_change(provider.name(), watch.state, &status);
            watch.state = status.state();
            watch.since = SystemTime::now();
        }
        for warning in warnings
            .iter()
            .filter(|warning| !watch.warnings.contains(warning))
        {
            tracing::warn!(provider = provider.name(), "{warning}");
        }
        watch.warnings.clone_from(&warnings);
        let report = Report {
            status,
            since: watch.since,
            last_answer,
            warnings,
        };
        (report, changed)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain values that are replaced whole are behind this.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Those whose probes begin now.
    fn take_due(&mut self) -> Vec<Arc<dyn KeyProvider>> {
        self.of.retain(|_, watch| watch.provider.strong_count() > 0);
        let now = Instant::now();
        let idle = self.of.values_mut().filter(|watch| watch.probing.is_none());
        idle.filter(|watch| watch.due <= now)
            .filter_map(|watch| {
                watch.probing = Some((now, SystemTime::now()));
                watch.provider.upgrade()
            })
            .collect()
    }
}

/// How a probe went.
enum Outcome {
    Good,
    Bad,
}

impl Watch {
    /// For how long a probe has been under way without anything having come from the provider since.
    fn silence(&self, last_answer: Option<SystemTime>) -> Option<Duration> {
        let (began, at) = self.probing?;
        let silent = last_answer.is_none_or(|last| last < at);
        silent.then(|| began.elapsed())
    }
}

fn unless_it_says_more(found: ProviderStatus, silence: Duration) -> ProviderStatus {
    match found {
        ProviderStatus::Ready | ProviderStatus::Degraded(_) => {
            ProviderStatus::Unreachable(format!("no answer for {} s", silence.as_secs()))
        }
        other => other,
    }
}

fn tell_change(provider: &str, before: ProviderState, now: &ProviderStatus) {
    let before = words(&before);
    match now {
        ProviderStatus::Unreachable(_) | ProviderStatus::NotTrusted(_) | ProviderStatus::Degraded(_) => {
            tracing::warn!(provider, "was {before}, is {now}");
        }
        ProviderStatus::NotBackedUp | ProviderStatus::Locked | ProviderStatus::Ready => {
            tracing::info!(provider, "was {before}, is {now}");
        }
    }
}

#[cfg(test)]
mod tests;

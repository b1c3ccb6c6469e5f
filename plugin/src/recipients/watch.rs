//! How each provider has been doing: its state, since when, when it last answered; and the threads that keep asking.
//!
//! One thread per provider probes it, so one that hangs holds up no other, and nobody who wants to know waits for any:
//! [`Watches::report`] reads memory. A thread ends with its provider.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use crate::model::envelope::ProviderId;
use crate::provider::{KeyProvider, ProviderStatus};

/// The first pause after a probe that went wrong; each further one doubles it, up to the interval.
const SOONEST: Duration = Duration::from_secs(5);

/// How a provider is, and has been.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Its state, with the reason.
    pub status: ProviderStatus,
    /// Since when it has been in this state, as far as virtseald has seen.
    pub since: SystemTime,
    /// When its server or token last did as asked.
    pub last_answer: Option<SystemTime>,
    /// What is about to go wrong.
    pub warnings: Vec<String>,
}

/// How often providers are probed, and how long an answer may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    pub(super) interval: Duration,
    pub(super) patience: Duration,
}

impl Pace {
    /// How long to wait after that many probes in a row that went wrong.
    fn pause(self, failures: u32) -> Duration {
        match failures {
            0 => self.interval,
            some => SOONEST.saturating_mul(1 << (some - 1).min(16)).min(self.interval),
        }
    }
}

/// The watches of all providers.
pub(super) struct Watches {
    pace: Arc<Mutex<Pace>>,
    of: Mutex<HashMap<ProviderId, Watched>>,
}

impl Watches {
    pub(super) fn new(pace: Pace) -> Self {
        Self {
            pace: Arc::new(Mutex::new(pace)),
            of: Mutex::default(),
        }
    }

    /// Changes the pace, and probes all at once if it did change.
    pub(super) fn set_pace(&self, change: impl FnOnce(&mut Pace)) {
        let mut pace = lock(&self.pace);
        let before = *pace;
        change(&mut pace);
        let changed = pace.interval != before.interval;
        drop(pace);
        if changed {
            lock(&self.of).values().for_each(|watched| watched.0.nudge());
        }
    }

    /// Probes `provider` from now on, for as long as it is there.
    pub(super) fn add(&self, provider: &Arc<dyn KeyProvider>) {
        let watch = Arc::new(Watch::new(provider.as_ref(), Arc::clone(&self.pace)));
        let (working, weak) = (Arc::clone(&watch), Arc::downgrade(provider));
        let started = std::thread::Builder::new()
            .name("probe".to_owned())
            .spawn(move || working.run(&weak));
        if let Err(error) = started {
            // Calls still show how it is.
            tracing::warn!(provider = provider.name(), %error, "can't start the thread that probes it");
        }
        lock(&self.of).insert(provider.id(), Watched(watch));
    }

    /// Lets go of a provider that was deleted.
    pub(super) fn remove(&self, id: ProviderId) {
        lock(&self.of).remove(&id);
    }

    /// How `provider` is. Waits for nothing.
    pub(super) fn report(&self, provider: &dyn KeyProvider) -> Report {
        let watch = lock(&self.of)
            .get(&provider.id())
            .map(|watched| Arc::clone(&watched.0));
        match watch {
            Some(watch) => watch.note(provider),
            None => Report {
                status: provider.status(),
                since: SystemTime::now(),
                last_answer: provider.last_answer(),
                warnings: provider.warnings(),
            },
        }
    }
}

/// Ends its thread when dropped.
struct Watched(Arc<Watch>);

impl Drop for Watched {
    fn drop(&mut self) {
        lock(&self.0.call).ended = true;
        self.0.wake.notify_all();
    }
}

/// One provider's.
struct Watch {
    pace: Arc<Mutex<Pace>>,
    noted: Mutex<Noted>,
    /// What its thread is told.
    call: Mutex<Call>,
    wake: Condvar,
}

struct Noted {
    state: &'static str,
    since: SystemTime,
    warnings: Vec<String>,
    /// The probe that is under way.
    probing: Option<(Instant, SystemTime)>,
}

#[derive(Default)]
struct Call {
    ended: bool,
    now: bool,
}

impl Watch {
    fn new(provider: &dyn KeyProvider, pace: Arc<Mutex<Pace>>) -> Self {
        Self {
            pace,
            noted: Mutex::new(Noted {
                state: provider.status().as_str(),
                since: SystemTime::now(),
                warnings: Vec::new(),
                probing: None,
            }),
            call: Mutex::default(),
            wake: Condvar::new(),
        }
    }

    fn run(&self, provider: &Weak<dyn KeyProvider>) {
        let mut failures = 0;
        while let Some(provider) = provider.upgrade() {
            lock(&self.noted).probing = Some((Instant::now(), SystemTime::now()));
            provider.probe();
            lock(&self.noted).probing = None;
            failures = match self.note(provider.as_ref()).status {
                ProviderStatus::Unreachable(_)
                | ProviderStatus::NotTrusted(_)
                | ProviderStatus::Degraded(_) => failures + 1,
                ProviderStatus::NotBackedUp | ProviderStatus::Locked | ProviderStatus::Ready => 0,
            };
            // Not kept while this waits: the provider may be going.
            drop(provider);
            let pause = lock(&self.pace).pause(failures);
            if !self.wait(pause) {
                return;
            }
        }
    }

    /// Returns false if it is to end.
    fn wait(&self, pause: Duration) -> bool {
        let call = lock(&self.call);
        let idle = |call: &mut Call| !call.ended && !call.now;
        let (mut call, _) = self
            .wake
            .wait_timeout_while(call, pause, idle)
            .unwrap_or_else(PoisonError::into_inner);
        call.now = false;
        !call.ended
    }

    fn nudge(&self) {
        lock(&self.call).now = true;
        self.wake.notify_all();
    }

    /// Looks at `provider`, and notes what has changed.
    fn note(&self, provider: &dyn KeyProvider) -> Report {
        let (found, last_answer, warnings) = (provider.status(), provider.last_answer(), provider.warnings());
        let patience = lock(&self.pace).patience;
        let mut noted = lock(&self.noted);
        let status = match noted.silence(last_answer).filter(|silence| *silence > patience) {
            Some(silence) => unless_it_says_more(found, silence),
            None => found,
        };
        if status.as_str() != noted.state {
            tell_change(provider.name(), noted.state, &status);
            noted.state = status.as_str();
            noted.since = SystemTime::now();
        }
        for warning in warnings
            .iter()
            .filter(|warning| !noted.warnings.contains(warning))
        {
            tracing::warn!(provider = provider.name(), "{warning}");
        }
        noted.warnings.clone_from(&warnings);
        Report {
            status,
            since: noted.since,
            last_answer,
            warnings,
        }
    }
}

impl Noted {
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

fn tell_change(provider: &str, before: &str, now: &ProviderStatus) {
    match now {
        ProviderStatus::Unreachable(_) | ProviderStatus::NotTrusted(_) | ProviderStatus::Degraded(_) => {
            tracing::warn!(provider, "was {before}, is {now}");
        }
        ProviderStatus::NotBackedUp | ProviderStatus::Locked | ProviderStatus::Ready => {
            tracing::info!(provider, "was {before}, is {now}");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values that are replaced whole are behind these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

//! What `status` shows, as it was at most `MAX_AGE` ago: however many ask, one thread looks, on the background connection.
//!
//! It looks while somebody asks, and for a while after that. What root has changed is looked at anew, and where a look costs
//! little, root is shown what is there now.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::api::VmView;
use crate::model::envelope::ProviderId;
use crate::model::finding::Finding;
use crate::model::problem::Problem;

/// No answer is older than this.
const MAX_AGE: Duration = Duration::from_secs(2);
/// From one look to the next, while somebody asks.
const EVERY: Duration = Duration::from_millis(1200);
/// After what root has changed; a host that starts many VMs is not looked at all the time.
const AT_LEAST: Duration = Duration::from_millis(200);
/// For how long after the last question.
const ASKED: Duration = Duration::from_secs(20);
/// A look that takes less is made for root each time.
const CHEAP: Duration = Duration::from_millis(100);
/// How long a question waits for a look.
const PATIENCE: Duration = Duration::from_secs(5);

/// How old an answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    /// As fresh as can be had for little.
    Now,
    /// At most `MAX_AGE`.
    Lately,
}

/// What a look has seen.
#[derive(Clone, Debug)]
pub(super) struct Glance {
    /// Whether libvirt has told its part, or why not.
    pub(super) libvirt: Result<(), String>,
    /// The VMs, sorted by name and UUID.
    pub(super) vms: Arc<[VmView]>,
    /// Records of the keystore that can't be read.
    pub(super) damaged: Arc<[Finding]>,
}

/// How many envelopes have a stanza of each provider.
pub(super) type Uses = Arc<BTreeMap<ProviderId, usize>>;

/// The last look, and who waits for another.
#[derive(Debug, Default)]
pub(super) struct Glances {
    state: Mutex<State>,
    changed: Condvar,
    /// With when it was counted.
    uses: Mutex<Option<(Instant, Uses)>>,
}

#[derive(Debug, Default)]
struct State {
    /// When it was begun: what it has seen may be as old.
    last: Option<Look>,
    asked: Option<Instant>,
    /// Nothing that was begun before this is shown.
    outdated: Option<Instant>,
}

#[derive(Debug)]
struct Look {
    begun: Instant,
    took: Duration,
    seen: Result<Glance, Problem>,
}

impl State {
    fn fresh(&self) -> Option<&Result<Glance, Problem>> {
        let look = self.last.as_ref()?;
        let is_fresh =
            look.begun.elapsed() < MAX_AGE && self.outdated.is_none_or(|outdated| look.begun >= outdated);
        is_fresh.then_some(&look.seen)
    }

    /// How long nobody needs a look; `None` if nobody asks at all.
    fn rest(&self) -> Option<Duration> {
        self.asked.filter(|asked| asked.elapsed() < ASKED)?;
        let Some(Look { begun, .. }) = &self.last else {
            return Some(Duration::ZERO);
        };
        let is_outdated = self.outdated.is_some_and(|outdated| *begun < outdated);
        let every = if is_outdated { AT_LEAST } else { EVERY };
        Some(every.saturating_sub(begun.elapsed()))
    }
}

impl Glances {
    /// Something has changed: what was seen before this is not shown.
    pub(super) fn expire(&self) {
        self.state().outdated = Some(Instant::now());
        self.changed.notify_all();
    }

    /// What there is to see, at most [`MAX_AGE`] old.
    pub(super) fn take(&self, age: Age) -> Result<Glance, Problem> {
        let asked = Instant::now();
        let mut state = self.state();
        state.asked = Some(asked);
        if age == Age::Now && state.last.as_ref().is_some_and(|look| look.took < CHEAP) {
            state.outdated = Some(asked);
        }
        self.changed.notify_all();
        loop {
            if let Some(seen) = state.fresh() {
                return seen.clone();
            }
            let left = PATIENCE.saturating_sub(asked.elapsed());
            if left.is_zero() {
                // What was seen last is better than nothing, with the reason: one asks because libvirt hangs.
                let old = state.last.as_ref().and_then(|look| look.seen.as_ref().ok());
                return Ok(Glance {
                    libvirt: Err(silent()),
                    vms: old.map_or_else(Arc::default, |old| Arc::clone(&old.vms)),
                    damaged: old.map_or_else(Arc::default, |old| Arc::clone(&old.damaged)),
                });
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Looks whenever that is needed, for ever.
    pub(super) fn run(&self, look: impl Fn() -> Result<Glance, Problem>) {
        let mut state = self.state();
        loop {
            state = match state.rest() {
                Some(Duration::ZERO) => {
                    drop(state);
                    let begun = Instant::now();
                    let seen = look();
                    let mut state = self.state();
                    let took = begun.elapsed();
                    state.last = Some(Look { begun, took, seen });
                    self.changed.notify_all();
                    state
                }
                Some(rest) => {
                    let waited = self.changed.wait_timeout(state, rest);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    // Nobody has asked for long: that is the memory of nobody.
                    state.last = None;
                    self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    /// What `count` has counted, at most [`MAX_AGE`] ago.
    pub(super) fn uses(&self, count: impl FnOnce() -> Result<Uses, Problem>) -> Result<Uses, Problem> {
        let mut counted = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        let outdated = self.state().outdated;
        match &*counted {
            Some((at, uses)) if at.elapsed() < MAX_AGE && outdated.is_none_or(|outdated| *at >= outdated) => {
                Ok(Arc::clone(uses))
            }
            _ => {
                let begun = Instant::now();
                let uses = count()?;
                *counted = Some((begun, Arc::clone(&uses)));
                Ok(uses)
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn silent() -> String {
    format!(
        "libvirt or the keystore does not answer within {} s",
        PATIENCE.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn seen(count: usize) -> Glance {
        Glance {
            libvirt: Ok(()),
            vms: (0..count)
                .map(|n| VmView::fixture("a", n as u128))
                .collect::<Vec<_>>()
                .into(),
            damaged: Arc::default(),
        }
    }

    #[test]
    fn many_who_ask_share_a_look_and_what_changed_is_looked_at_anew() {
        let glances: &'static Glances = Box::leak(Box::default());
        let looks: &'static AtomicUsize = Box::leak(Box::default());
        std::thread::spawn(|| glances.run(|| Ok(seen(looks.fetch_add(1, Ordering::SeqCst)))));
        let askers: Vec<_> = (0..20)
            .map(|_| std::thread::spawn(|| glances.take(Age::Lately).unwrap()))
            .collect();
        let seen: Vec<_> = askers
            .into_iter()
            .map(|asker| asker.join().unwrap().vms.len())
            .collect();
        assert!(seen.iter().all(|count| *count == seen[0]), "{seen:?}");
        glances.expire();
        let (before, after) = (seen[0], glances.take(Age::Lately).unwrap().vms.len());
        assert!(after > before, "{after} is what was seen before");
        let now = glances.take(Age::Now).unwrap().vms.len();
        assert!(now > after, "{now} is what was seen before");
    }

    fn look(begun: Instant) -> Look {
        Look {
            begun,
            took: Duration::ZERO,
            seen: Ok(seen(1)),
        }
    }

    #[test]
    fn what_is_too_old_is_not_fresh() {
        let mut state = State {
            last: Some(look(Instant::now())),
            ..State::default()
        };
        assert!(state.fresh().is_some());
        assert_eq!(state.rest(), None, "nobody has asked");
        state.asked = Some(Instant::now());
        assert!(state.rest() > Some(Duration::ZERO));
        state.outdated = Some(Instant::now());
        assert!(state.fresh().is_none());
        state.outdated = None;
        state.last = Instant::now().checked_sub(MAX_AGE).map(look);
        assert!(state.fresh().is_none());
        assert_eq!(state.rest(), Some(Duration::ZERO));
    }
}

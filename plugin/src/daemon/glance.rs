//! What `status` shows, as it was at most `MAX_AGE` ago: however many ask, one thread looks, on the background connection.
//!
//! It looks while somebody asks, and for a while after that. What root has changed is looked at anew, and where a look costs
//! little, root is shown what is there now.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::{Pid, gettid};

use super::pools;
use crate::api::VmView;
use crate::model::advice::Advice;
use crate::model::deadlines::status::{ASKED, AT_LEAST, CHEAP, EVERY, MAX_AGE, PATIENCE};
use crate::model::envelope::ProviderId;
use crate::model::finding::Finding;
use crate::model::problem::Problem;
use crate::vm::status::view;

/// How old an answer may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Age {
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
    /// Records of the keystore that can't be read, and that are of no VM that is listed.
    pub(super) damaged: Arc<[Finding]>,
    pub(super) uses: Uses,
}

/// How many envelopes have a stanza of each provider.
pub(super) type Uses = Arc<BTreeMap<ProviderId, usize>>;

/// The last look, and who waits for another.
#[derive(Debug, Default)]
pub(super) struct Glances {
    state: Mutex<State>,
    changed: Condvar,
    uses: OneLook<BTreeMap<ProviderId, usize>>,
}

#[derive(Debug, Default)]
struct State {
    /// When it was begun: what it has seen may be as old.
    last: Option<Look>,
    asked: Option<Instant>,
    /// Nothing that was begun before this is shown.
    outdated: Option<Instant>,
    /// The thread that looks.
    looker: Option<Pid>,
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
                    vms: old.map_or_else(Arc::default, |old| old.vms.iter().map(view::not_asked).collect()),
                    damaged: old.map_or_else(Arc::default, |old| Arc::clone(&old.damaged)),
                    uses: old.map_or_else(Arc::default, |old| Arc::clone(&old.uses)),
                });
            }
            if age == Age::Now {
                state.looker.into_iter().for_each(pools::bring_forward);
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Looks whenever that is needed, for ever; behind the threads of starts, unless root waits.
    pub(super) fn run(&self, look: impl Fn() -> Result<Glance, Problem>) {
        pools::step_back();
        let mut state = self.state();
        state.looker = Some(gettid());
        loop {
            state = match state.rest() {
                Some(Duration::ZERO) => {
                    drop(state);
                    let begun = Instant::now();
                    let seen = look();
                    let mut state = self.state();
                    pools::step_back();
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
    pub(super) fn uses(
        &self,
        count: impl FnOnce() -> Result<BTreeMap<ProviderId, usize>, Problem>,
    ) -> Result<Uses, Problem> {
        let outdated = self.state().outdated;
        let age = outdated.map_or(MAX_AGE, |outdated| outdated.elapsed().min(MAX_AGE));
        self.uses.take(age, count)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What several ask for, and one of them looks for. Whoever else asks meanwhile waits for that, and not for ever.
#[derive(Debug)]
pub(super) struct OneLook<T> {
    seen: Mutex<Seen<T>>,
    changed: Condvar,
}

/// Who looks now, and what was seen last, with when.
type Seen<T> = (Looking, Option<(Instant, Arc<T>)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looking {
    Somebody,
    Nobody,
}

impl<T> Default for OneLook<T> {
    fn default() -> Self {
        Self {
            seen: Mutex::new((Looking::Nobody, None)),
            changed: Condvar::new(),
        }
    }
}

impl<T> OneLook<T> {
    /// What was seen at most `age` ago, or `look` sees now.
    ///
    /// # Errors
    /// Those of `look`; when somebody else's look takes too long.
    pub(super) fn take(
        &self,
        age: Duration,
        look: impl FnOnce() -> Result<T, Problem>,
    ) -> Result<Arc<T>, Problem> {
        let waited = self
            .changed
            .wait_timeout_while(self.seen(), PATIENCE, |seen| seen.0 == Looking::Somebody);
        let (mut seen, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if seen.0 == Looking::Somebody {
            return Err(Problem::unreachable(silent()).next(Advice::ShowStatus));
        }
        if let Some((at, last)) = &seen.1
            && at.elapsed() < age
        {
            return Ok(Arc::clone(last));
        }
        seen.0 = Looking::Somebody;
        drop(seen);
        let _ended = Ended(self);
        let begun = Instant::now();
        let new = Arc::new(look()?);
        self.seen().1 = Some((begun, Arc::clone(&new)));
        Ok(new)
    }

    /// Nobody needs the last look any more.
    pub(super) fn forget(&self) {
        self.seen().1 = None;
    }

    fn seen(&self) -> MutexGuard<'_, Seen<T>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of a look, also of one that panics.
struct Ended<'a, T>(&'a OneLook<T>);

impl<T> Drop for Ended<'_, T> {
    fn drop(&mut self) {
        self.0.seen().0 = Looking::Nobody;
        self.0.changed.notify_all();
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
    use crate::model::problem::Code;

    fn seen(count: usize) -> Glance {
        Glance {
            libvirt: Ok(()),
            vms: (0..count)
                .map(|n| VmView::fixture("a", n as u128))
                .collect::<Vec<_>>()
                .into(),
            damaged: Arc::default(),
            uses: Arc::default(),
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

    /// Of this thread: proc_pid_stat(5).
    fn nice() -> usize {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let behind_its_name = stat.rsplit(')').next().unwrap();
        behind_its_name
            .split_whitespace()
            .nth(16)
            .unwrap()
            .parse()
            .unwrap()
    }

    /// Needs root, or `LimitNICE`.
    #[test]
    fn who_looks_steps_back_unless_root_waits() {
        let glances: &'static Glances = Box::leak(Box::default());
        std::thread::spawn(|| glances.run(|| Ok(seen(nice()))));
        let looked_at = |age| glances.take(age).unwrap().vms.len();
        assert_ne!(looked_at(Age::Lately), 0);
        assert_eq!(looked_at(Age::Now), 0);
        glances.expire();
        assert_ne!(looked_at(Age::Lately), 0);
    }

    #[test]
    fn one_looks_and_the_others_see_it_or_are_told_that_it_takes_too_long() {
        let (orphans, looks) = (OneLook::default(), AtomicUsize::new(0));
        let look = || Ok(looks.fetch_add(1, Ordering::SeqCst));
        std::thread::scope(|scope| {
            let (begin, begun) = std::sync::mpsc::channel();
            let (end, ended) = std::sync::mpsc::channel::<()>();
            let orphans = &orphans;
            scope.spawn(move || {
                orphans.take(Duration::ZERO, || {
                    begin.send(()).unwrap();
                    ended.recv().unwrap();
                    look()
                })
            });
            begun.recv().unwrap();
            let late = orphans.take(Duration::ZERO, look).unwrap_err();
            assert_eq!(late.code, Code::Unreachable);
            let other = scope.spawn(move || orphans.take(Duration::from_secs(60), look));
            end.send(()).unwrap();
            assert_eq!(*other.join().unwrap().unwrap(), 0);
        });
        let failed = orphans.take(Duration::ZERO, || Err(Problem::failed("no")));
        assert!(failed.is_err());
        assert_eq!(*orphans.take(Duration::from_secs(60), look).unwrap(), 0);
        orphans.forget();
        assert_eq!(*orphans.take(Duration::from_secs(60), look).unwrap(), 1);
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

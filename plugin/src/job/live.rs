//! What is known of jobs beyond their rows, for as long as the daemon lives: who is at work, how far, and who wants to know.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::progress::{Meter, Pace};
use super::runner::{Decision, PLACES, Standing};
use crate::model::job::JobId;
use crate::store::JobRecord;

/// A job that waits is tried again after this time, and after twice that, up to the limit.
const PATIENCE: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(60);

/// What became of a job's time at work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stint {
    /// It goes on after this time.
    Rests(Duration),
    /// It goes on when something has changed; why, where its row can't say so.
    Waits(Option<String>),
    /// It is over.
    Ended,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Live {
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    slots: BTreeMap<JobId, Slot>,
    is_woken: bool,
}

#[derive(Debug)]
struct Slot {
    at_work: bool,
    /// Not before; news end the waiting.
    pauses_until: Option<Instant>,
    waits_until: Option<Instant>,
    patience: Duration,
    /// Beyond what its row says.
    waits_for: Option<String>,
    is_stopped: bool,
    has_begun: bool,
    meter: Meter,
    /// Counts changes, for those who watch.
    changes: watch::Sender<u64>,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            at_work: false,
            pauses_until: None,
            waits_until: None,
            patience: PATIENCE.start,
            waits_for: None,
            is_stopped: false,
            has_begun: false,
            meter: Meter::default(),
            changes: watch::Sender::new(0),
        }
    }
}

impl Slot {
    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

/// A job that is at work until this is dropped.
#[derive(Debug)]
pub struct AtWork<'a> {
    live: &'a Live,
    id: JobId,
}

/// What is known of a job now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Units that are done, where its row does not count them.
    pub done: Option<u64>,
    /// How fast it goes.
    pub pace: Option<Pace>,
    /// What it waits for, beyond what its row says.
    pub waits_for: Option<String>,
}

impl Live {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that a panic could leave half-done is kept behind it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &mut State) {
        state.is_woken = true;
        self.woken.notify_all();
    }

    /// Something has changed that a job may wait for.
    pub fn ring(&self) {
        let mut state = self.state();
        state.slots.values_mut().for_each(|slot| slot.waits_until = None);
        self.wake(&mut state);
    }

    /// A job was started by this daemon: nobody has tried it before.
    pub fn started(&self, id: JobId) {
        self.state().slots.entry(id).or_default();
    }

    /// Until there may be something to do; until `limit` at the latest.
    pub fn wait(&self, limit: Option<Instant>) {
        let time = limit.map_or(PATIENCE.end, |limit| {
            limit.saturating_duration_since(Instant::now())
        });
        let (mut state, _) = self
            .woken
            .wait_timeout_while(self.state(), time.min(PATIENCE.end), |state| !state.is_woken)
            .unwrap_or_else(PoisonError::into_inner);
        state.is_woken = false;
    }

    /// How the jobs that run stand. What is known of others goes, unless somebody watches.
    pub fn standing(&self, running: &[JobRecord]) -> Vec<Standing> {
        let mut state = self.state();
        let is_running = |id: &JobId| running.iter().any(|job| job.id == *id);
        state
            .slots
            .retain(|id, slot| slot.at_work || slot.changes.receiver_count() > 0 || is_running(id));
        let standing = |job: &JobRecord| {
            let slot = state.slots.entry(job.id).or_insert_with(|| Slot {
                has_begun: true,
                ..Slot::default()
            });
            Standing {
                id: job.id,
                subject: job.subject.clone(),
                at_work: slot.at_work,
                rests_until: slot.pauses_until.max(slot.waits_until),
            }
        };
        running.iter().map(standing).collect()
    }

    /// Tells those in line what they wait for.
    pub fn note_in_line(&self, decision: &Decision) {
        let mut state = self.state();
        for id in &decision.in_line {
            if let Some(slot) = state.slots.get_mut(id) {
                let why = format!("its turn: {PLACES} others are at work");
                if slot.waits_for.replace(why.clone()) != Some(why) {
                    slot.changed();
                }
            }
        }
    }

    /// A job goes to work.
    pub fn begin(&self, id: JobId) -> AtWork<'_> {
        let mut state = self.state();
        let slot = state.slots.entry(id).or_default();
        slot.at_work = true;
        slot.waits_for = None;
        // One that was stopped before runs no more, and its row says so.
        slot.is_stopped = false;
        AtWork { live: self, id }
    }

    /// Makes a job that is at work give up soon. Says whether it is at work: then it takes back what it has begun.
    pub fn stop(&self, id: JobId) -> bool {
        let mut state = self.state();
        let slot = state.slots.entry(id).or_default();
        slot.is_stopped = true;
        slot.changed();
        let at_work = slot.at_work;
        self.wake(&mut state);
        at_work
    }

    /// A receiver that awakes when the job has changed.
    pub fn subscribe(&self, id: JobId) -> watch::Receiver<u64> {
        let mut state = self.state();
        let slot = state.slots.entry(id).or_insert_with(|| Slot {
            has_begun: true,
            ..Slot::default()
        });
        slot.changes.subscribe()
    }

    /// What is known of a job that has `total` units.
    pub fn seen(&self, id: JobId, total: u64) -> Seen {
        let state = self.state();
        let Some(slot) = state.slots.get(&id) else {
            return Seen::default();
        };
        Seen {
            done: slot.meter.done(),
            pace: slot.meter.pace(Instant::now(), total),
            waits_for: slot.waits_for.clone(),
        }
    }
}

impl AtWork<'_> {
    /// `done` units are done.
    pub fn note(&self, done: u64) {
        let mut state = self.live.state();
        if let Some(slot) = state.slots.get_mut(&self.id) {
            slot.meter.note(Instant::now(), done);
            slot.patience = PATIENCE.start;
            slot.changed();
        }
    }

    /// Notes that it begins. Says whether nobody has begun it before: what an earlier try has left is not known.
    #[must_use]
    pub fn begins_first(&self) -> bool {
        let mut state = self.live.state();
        let slot = state.slots.entry(self.id).or_default();
        !std::mem::replace(&mut slot.has_begun, true)
    }

    /// Whether an admin has ended it.
    pub fn is_stopped(&self) -> bool {
        let state = self.live.state();
        state.slots.get(&self.id).is_none_or(|slot| slot.is_stopped)
    }

    /// Ends its time at work.
    pub fn end(self, stint: Stint) {
        let mut state = self.live.state();
        let now = Instant::now();
        if let Some(slot) = state.slots.get_mut(&self.id) {
            slot.waits_for = None;
            match stint {
                Stint::Rests(time) => slot.pauses_until = Some(now + time),
                Stint::Waits(why) => {
                    slot.waits_for = why;
                    slot.patience = (slot.patience * 2).min(PATIENCE.end);
                    slot.waits_until = Some(now + slot.patience);
                    slot.meter = Meter::default();
                }
                Stint::Ended => {}
            }
        }
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        let mut state = self.live.state();
        if let Some(slot) = state.slots.get_mut(&self.id) {
            slot.at_work = false;
            if std::thread::panicking() {
                slot.waits_until = Some(Instant::now() + PATIENCE.end);
            }
            slot.changed();
        }
        self.live.wake(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::runner::decide;
    use crate::model::envelope::VmId;
    use crate::model::job::{JobState, Subject};
    use crate::store::Pass;

    fn record(id: i64) -> JobRecord {
        JobRecord {
            id: JobId(id),
            subject: Subject::EnvelopesOf(VmId::random()),
            task: String::new(),
            state: JobState::Running,
            pass: Pass::All,
            cursor: String::new(),
            total: 10,
            seen: 0,
            changed: 0,
            left: 0,
            waiting: String::new(),
            failure: String::new(),
            created: 0,
            updated: 0,
        }
    }

    fn begun(live: &Live, running: &[JobRecord]) -> Vec<JobId> {
        let decision = decide(&live.standing(running), Instant::now());
        live.note_in_line(&decision);
        decision.begin
    }

    #[test]
    fn one_that_waits_is_left_alone_until_there_is_news_and_one_that_rests_longer() {
        let (live, running) = (Live::default(), [record(1), record(2)]);
        assert_eq!(begun(&live, &running), [JobId(1), JobId(2)]);
        let (one, other) = (live.begin(JobId(1)), live.begin(JobId(2)));
        assert!(
            !one.begins_first(),
            "of a daemon before this one, for all that is known"
        );
        assert_eq!(begun(&live, &running), []);
        one.end(Stint::Waits(Some("the disk is full".to_owned())));
        other.end(Stint::Rests(Duration::from_secs(9)));
        assert_eq!(begun(&live, &running), []);
        assert_eq!(live.seen(JobId(1), 10).waits_for.unwrap(), "the disk is full");
        live.ring();
        assert_eq!(begun(&live, &running), [JobId(1)]);
    }

    #[test]
    fn a_fifth_is_in_line_and_hears_so_and_those_who_watch_are_told_of_all() {
        let live = Live::default();
        let running: Vec<_> = (1..=5).map(record).collect();
        live.started(JobId(5));
        let mut watched = live.subscribe(JobId(5));
        let first = begun(&live, &running);
        assert_eq!(first, [1, 2, 3, 4].map(JobId));
        assert!(watched.has_changed().unwrap());
        watched.borrow_and_update();
        assert!(live.seen(JobId(5), 10).waits_for.unwrap().contains("4 others"));
        let mut at_work: Vec<_> = first.into_iter().map(|id| live.begin(id)).collect();
        at_work.pop().unwrap().end(Stint::Ended);
        assert_eq!(begun(&live, &running[..3]), []);
        assert_eq!(begun(&live, &[&running[..3], &running[4..]].concat()), [JobId(5)]);
        let last = live.begin(JobId(5));
        assert!(last.begins_first() && !last.begins_first());
        last.note(4);
        assert!(watched.has_changed().unwrap());
        assert_eq!(live.seen(JobId(5), 10).done, Some(4));
        assert!(!last.is_stopped() && live.stop(JobId(5)) && last.is_stopped());
        last.end(Stint::Ended);
        assert!(!live.stop(JobId(5)));
        drop(watched);
        live.standing(&[]);
        assert_eq!(live.seen(JobId(5), 10), Seen::default());
    }
}

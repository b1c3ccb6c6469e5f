//! What is known of jobs beyond their rows, for as long as the daemon lives: who is at work, how far, and who wants to know.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::progress::{Meter, Pace};
use super::runner::{Decision, PLACES, Standing};
use crate::model::backoff::Backoff;
use crate::model::deadlines::job::RETRY;
use crate::model::job::JobId;
use crate::store::JobRecord;

const BACKOFF: Backoff = Backoff::new(RETRY.start, RETRY.end);

/// What became of a job's time at work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Stint {
    /// It goes on after this time.
    Rests(Duration),
    /// It goes on when something has changed; why, where its row can't say so.
    Waits(Option<String>),
    /// It is over.
    Ended,
}

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct Live {
    state: Mutex<State>,
    woken: Condvar,
}

#[derive(Debug, Default)]
struct State {
    slots: BTreeMap<JobId, Slot>,
    is_woken: bool,
}

#[derive(Debug, Default)]
struct Slot {
    at_work: bool,
    /// Not before; news end the waiting.
    pauses_until: Option<Instant>,
    waits_until: Option<Instant>,
    /// How often in a row it has waited, and come no further.
    waits: u32,
    /// Beyond what its row says.
    waits_for: Option<String>,
    /// When an admin has ended it.
    stopped: Option<Instant>,
    has_begun: bool,
    /// When it last came further, or began.
    moved: Option<Instant>,
    meter: Meter,
    /// Counts changes, for those who watch.
    changes: watch::Sender<u64>,
}

impl Slot {
    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

/// A job that is at work until this is dropped.
#[derive(Debug)]
pub(crate) struct AtWork<'a> {
    live: &'a Live,
    id: JobId,
}

/// What is known of a job now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Units that are done, where its row does not count them.
    pub done: Option<u64>,
    /// How fast it goes.
    pub pace: Option<Pace>,
    /// What it waits for, beyond what its row says.
    pub waits_for: Option<String>,
    /// It was ended, and has not come to its end for this long.
    pub ending: Option<Duration>,
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
    pub(crate) fn ring(&self) {
        let mut state = self.state();
        state.slots.values_mut().for_each(|slot| slot.waits_until = None);
        self.wake(&mut state);
    }

    /// A job was started by this daemon: nobody has tried it before.
    pub(crate) fn started(&self, id: JobId) {
        self.state().slots.entry(id).or_default();
    }

    /// Until there may be something to do; until `limit` at the latest.
    pub(crate) fn wait(&self, limit: Option<Instant>) {
        let time = limit.map_or(RETRY.end, |limit| limit.saturating_duration_since(Instant::now()));
        let (mut state, _) = self
            .woken
            .wait_timeout_while(self.state(), time.min(RETRY.end), |state| !state.is_woken)
            .unwrap_or_else(PoisonError::into_inner);
        state.is_woken = false;
    }

    /// How the jobs that run stand. What is known of others goes, unless somebody watches.
    pub(crate) fn standing(&self, running: &[JobRecord]) -> Vec<Standing> {
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
    pub(crate) fn note_in_line(&self, decision: &Decision) {
        let mut state = self.state();
        for id in &decision.in_line {
            if let Some(slot) = state.slots.get_mut(id) {
                let why = format!("for its turn: {PLACES} others are running");
                if slot.waits_for.replace(why.clone()) != Some(why) {
                    slot.changed();
                }
            }
        }
    }

    pub(crate) fn begin(&self, id: JobId) -> AtWork<'_> {
        let mut state = self.state();
        let slot = state.slots.entry(id).or_default();
        slot.at_work = true;
        slot.moved.get_or_insert_with(Instant::now);
        slot.waits_for = None;
        // One that was stopped before runs no more, and its row says so.
        slot.stopped = None;
        AtWork { live: self, id }
    }

    /// Makes a job that is at work give up soon. Says whether it is at work: then it takes back what it has begun.
    pub(crate) fn stop(&self, id: JobId) -> bool {
        let mut state = self.state();
        // One that is not known here is of a daemon before this one.
        let slot = state.slots.entry(id).or_insert_with(|| Slot {
            has_begun: true,
            ..Slot::default()
        });
        slot.stopped.get_or_insert_with(Instant::now);
        slot.changed();
        let at_work = slot.at_work;
        self.wake(&mut state);
        at_work
    }

    /// A receiver that awakes when the job has changed.
    pub(crate) fn subscribe(&self, id: JobId) -> watch::Receiver<u64> {
        let mut state = self.state();
        let slot = state.slots.entry(id).or_insert_with(|| Slot {
            has_begun: true,
            ..Slot::default()
        });
        slot.changes.subscribe()
    }

    /// What is known of a job that has `total` units.
    pub(crate) fn seen(&self, id: JobId, total: u64) -> Seen {
        let state = self.state();
        let Some(slot) = state.slots.get(&id) else {
            return Seen::default();
        };
        Seen {
            done: slot.meter.done(),
            pace: slot.meter.pace(Instant::now(), total),
            waits_for: slot.waits_for.clone(),
            ending: slot
                .stopped
                .filter(|_| slot.at_work)
                .map(|stopped| stopped.elapsed()),
        }
    }
}

impl AtWork<'_> {
    pub(crate) fn note(&self, done: u64) {
        let mut state = self.live.state();
        if let Some(slot) = state.slots.get_mut(&self.id) {
            slot.meter.note(Instant::now(), done);
            slot.moved = Some(Instant::now());
            slot.waits = 0;
            slot.changed();
        }
    }

    /// It waits for this, and may wait for ever.
    pub(crate) fn note_stuck(&self, what: &str) {
        let mut state = self.live.state();
        if let Some(slot) = state.slots.get_mut(&self.id)
            && slot.waits_for.as_deref() != Some(what)
        {
            slot.waits_for = Some(what.to_owned());
            slot.changed();
        }
    }

    /// Notes that it begins. Says whether nobody has begun it before: what an earlier try has left is not known.
    pub(crate) fn begins_first(&self) -> bool {
        let mut state = self.live.state();
        let slot = state.slots.entry(self.id).or_default();
        !std::mem::replace(&mut slot.has_begun, true)
    }

    /// When it last came further, or began: what others began to make before that, it may have passed already.
    pub(crate) fn moved(&self) -> Instant {
        let state = self.live.state();
        let moved = state.slots.get(&self.id).and_then(|slot| slot.moved);
        moved.unwrap_or_else(Instant::now)
    }

    /// Whether an admin has ended it.
    pub(crate) fn is_stopped(&self) -> bool {
        let state = self.live.state();
        state
            .slots
            .get(&self.id)
            .is_none_or(|slot| slot.stopped.is_some())
    }

    pub(crate) fn end(self, stint: Stint) {
        let mut state = self.live.state();
        let now = Instant::now();
        if let Some(slot) = state.slots.get_mut(&self.id) {
            slot.waits_for = None;
            match stint {
                Stint::Rests(time) => slot.pauses_until = Some(now + time),
                Stint::Waits(why) => {
                    slot.waits_for = why;
                    slot.waits += 1;
                    slot.waits_until = Some(now + BACKOFF.pause(slot.waits));
                    slot.meter = Meter::default();
                }
                Stint::Ended => slot.moved = None,
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
                slot.waits_until = Some(Instant::now() + RETRY.end);
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
        assert_eq!(live.seen(JobId(5), 10).ending, None);
        assert!(!last.is_stopped() && live.stop(JobId(5)) && last.is_stopped());
        last.note_stuck("a disk");
        let seen = live.seen(JobId(5), 10);
        assert!(seen.ending.is_some() && seen.waits_for.as_deref() == Some("a disk"));
        last.end(Stint::Ended);
        assert!(!live.stop(JobId(5)));
        drop(watched);
        live.standing(&[]);
        assert_eq!(live.seen(JobId(5), 10), Seen::default());
    }

    /// A seal that took its KEK before a sweep came by, and ends after it, would keep one that is retired.
    #[test]
    fn what_began_before_its_last_batch_may_have_escaped_it_however_often_it_waits() {
        let live = Live::default();
        let first = live.begin(JobId(1));
        let began = first.moved();
        std::thread::sleep(Duration::from_millis(2));
        let sealing_since = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        first.note(1);
        assert!(began < sealing_since && sealing_since < first.moved());
        let worked = first.moved();
        first.end(Stint::Waits(None));
        assert_eq!(live.begin(JobId(1)).moved(), worked);
    }

    #[test]
    fn what_was_stopped_unseen_may_have_been_begun_by_a_daemon_before() {
        let live = Live::default();
        assert!(!live.stop(JobId(1)));
        assert!(!live.begin(JobId(1)).begins_first());
    }
}

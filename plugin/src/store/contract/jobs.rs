//! What every store must do for jobs.

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;

use crate::model::envelope::fixture::{changed, envelope, version};
use crate::model::envelope::{Envelope, EnvelopeId, KekId, Verified, VmId};
use crate::model::job::{JobId, JobState, Subject};
use crate::store::{EnvelopeStore, JobRecord, LeftBehind, NewJob, Pass, RetiredKek, StoreError, Verdict};

pub(super) fn sweep<'a>(subject: &'a Subject, left: &'a [LeftBehind]) -> NewJob<'a> {
    let (task, total) = ("{}", 0);
    NewJob {
        subject,
        task,
        total,
        left,
    }
}

/// One step of a sweep that finds each envelope as it wants it; what it has looked at.
fn step(store: &dyn EnvelopeStore, job: &mut JobRecord, most: u32) -> Vec<Envelope> {
    let batch = store.next_of_job(job, most).unwrap().whole().unwrap();
    let looked: Vec<_> = batch.into_iter().map(|record| record.envelope).collect();
    let verdicts: Vec<_> = looked
        .iter()
        .map(|envelope| Verdict::Unchanged(envelope.id))
        .collect();
    *job = match looked.is_empty() {
        true => store.end_pass(job.id).unwrap(),
        false => store.commit_batch(job.id, &verdicts).unwrap(),
    };
    looked
}

/// What others do while a sweep is at work.
#[derive(Clone, Debug)]
enum Meanwhile {
    Make,
    Change(prop::sample::Index),
    Withdraw(prop::sample::Index),
    Step(u32),
}

/// However a sweep and others take turns: at its end it has looked at each envelope as that is now.
pub(super) fn a_sweep_sees_what_comes_and_changes_meanwhile(store: &dyn EnvelopeStore) {
    let acts = prop_oneof![
        Just(Meanwhile::Make),
        any::<prop::sample::Index>().prop_map(Meanwhile::Change),
        any::<prop::sample::Index>().prop_map(Meanwhile::Withdraw),
        (1..4_u32).prop_map(Meanwhile::Step),
    ];
    let check = |acts: Vec<Meanwhile>| {
        let vm = VmId::random();
        let mut made: Vec<Verified> = (0..3).map(|_| envelope(vm)).collect();
        for envelope in &made {
            store.put(envelope, "").unwrap();
        }
        let subject = Subject::EnvelopesOf(vm);
        let mut job = store.insert_job(&sweep(&subject, &[])).unwrap();
        let mut looked = BTreeMap::new();
        let note = |seen: Vec<Envelope>, looked: &mut BTreeMap<EnvelopeId, Envelope>| {
            looked.extend(seen.into_iter().map(|envelope| (envelope.id, envelope)));
        };
        for (nth, act) in acts.into_iter().enumerate() {
            match act {
                Meanwhile::Make => {
                    let new = envelope(vm);
                    store.insert_pending(&new, "").unwrap();
                    made.push(new);
                }
                Meanwhile::Change(at) => {
                    let newer = version(at.get(&made), nth as u64 + 2, 1);
                    // One that was withdrawn comes back so, as from an XML.
                    store.put(&newer, "").unwrap();
                }
                Meanwhile::Withdraw(at) => drop(store.withdraw(at.get(&made).id).unwrap()),
                Meanwhile::Step(_) if job.state != JobState::Running => {}
                Meanwhile::Step(most) => note(step(store, &mut job, most), &mut looked),
            }
            // A sweep that had ended is over: what comes then is for the next one.
            if job.state != JobState::Running {
                break;
            }
        }
        let mut steps = 0;
        while job.state == JobState::Running {
            note(step(store, &mut job, 2), &mut looked);
            steps += 1;
            prop_assert!(steps < 100, "it goes on for ever");
        }
        prop_assert_eq!(job.state, JobState::Done);
        for record in store.envelopes_of(vm).unwrap().whole().unwrap() {
            prop_assert_eq!(looked.get(&record.envelope.id), Some(&record.envelope));
        }
        Ok(())
    };
    let acts = prop::collection::vec(acts, 0..16);
    let mut runner = TestRunner::new(ProptestConfig::with_cases(24));
    runner.run(&acts, check).unwrap();
}

pub(super) fn a_sweep_replaces_what_is_still_there_and_retires_its_keks(store: &dyn EnvelopeStore) {
    let vm = VmId::random();
    let (stays, changes) = (envelope(vm), envelope(vm));
    for envelope in [&stays, &changes] {
        store.put(envelope, "").unwrap();
    }
    let subject = Subject::EnvelopesOf(vm);
    let job = store.insert_job(&sweep(&subject, &[])).unwrap();
    let rewrapped = |of: &Verified| {
        let next = changed(&version(of, 2, 2), |envelope| {
            envelope.stanzas[0].kek = KekId("new".to_owned());
        });
        Verdict::Replace(Box::new(of.clone().into_envelope()), Box::new(next))
    };
    // A start has adopted a later one meanwhile.
    let adopted = version(&changes, 7, 7);
    store.put(&adopted, "").unwrap();
    let job = store
        .commit_batch(job.id, &[rewrapped(&stays), rewrapped(&changes)])
        .unwrap();
    assert_eq!((job.seen, job.changed, job.left), (2, 1, 1));
    assert_eq!(store.envelope(changes.id).unwrap().unwrap().envelope, *adopted);
    let now = store.envelope(stays.id).unwrap().unwrap().envelope;
    assert_eq!(now.stanzas[0].kek, KekId("new".to_owned()));
    let retired = RetiredKek {
        vm,
        provider: stays.stanzas[0].provider,
        kek: stays.stanzas[0].kek.clone(),
    };
    assert!(store.retired_of(retired.provider).unwrap().contains(&retired.kek));
    assert_eq!(store.retired_keks().unwrap().whole().unwrap(), [retired]);
    // Its next pass has that one alone.
    let job = store.end_pass(job.id).unwrap();
    assert_eq!((job.state, job.pass), (JobState::Running, Pass::Left));
    let next = store.next_of_job(&job, 9).unwrap().whole().unwrap();
    assert_eq!(next.len(), 1);
    assert_eq!(next[0].envelope, *adopted);
}

pub(super) fn a_sweep_is_incomplete_with_what_it_can_not_change(store: &dyn EnvelopeStore) {
    let vm = VmId::random();
    let all = [0; 3].map(|_| envelope(vm));
    for envelope in &all {
        store.put(envelope, "").unwrap();
    }
    let left = LeftBehind {
        envelope: all[2].id,
        reason: "two versions".to_owned(),
        again: false,
    };
    let subject = Subject::AllEnvelopes;
    let mut job = store
        .insert_job(&sweep(&subject, std::slice::from_ref(&left)))
        .unwrap();
    assert_eq!(job.total, 3);
    store.job_waits(job.id, "main is locked").unwrap();
    assert_eq!(store.job(job.id).unwrap().unwrap().waiting, "main is locked");
    let looked: Vec<_> = step(store, &mut job, 9)
        .into_iter()
        .map(|envelope| envelope.id)
        .collect();
    assert_eq!(looked, [all[0].id, all[1].id]);
    assert!(step(store, &mut job, 9).is_empty());
    assert_eq!(
        (job.state, job.left, job.waiting.as_str()),
        (JobState::Incomplete, 1, "")
    );
    assert_eq!(store.left_behind(job.id, 9).unwrap(), [left]);
    // One that is gone has nothing left to be done.
    let job = store.resume_job(job.id, &[]).unwrap();
    assert_eq!((job.state, job.seen, job.left), (JobState::Running, 0, 0));
}

pub(super) fn jobs_about_the_same_exclude_each_other(store: &dyn EnvelopeStore) {
    let (web, db) = (VmId::random(), VmId::random());
    let image = |path: &str| Subject::Image {
        vm: web,
        path: path.to_owned(),
    };
    let start = |subject: &Subject| {
        let total = 100;
        let task = "{}";
        let left = &[];
        store.insert_job(&NewJob {
            subject,
            task,
            total,
            left,
        })
    };
    let of_web = start(&Subject::EnvelopesOf(web)).unwrap();
    start(&Subject::EnvelopesOf(db)).unwrap();
    assert_eq!(start(&image("/a")).unwrap().total, 100);
    start(&image("/b")).unwrap();
    for refused in [Subject::EnvelopesOf(web), Subject::AllEnvelopes, image("/a")] {
        assert!(
            matches!(start(&refused), Err(StoreError::JobRunning(_))),
            "{refused:?}"
        );
    }
    assert_eq!(store.running_jobs().unwrap().len(), 4);
    store.abort_job(of_web.id).unwrap();
    start(&Subject::EnvelopesOf(web)).unwrap();
    assert!(matches!(
        store.resume_job(of_web.id, &[]),
        Err(StoreError::JobRunning(_))
    ));
    assert_eq!(store.jobs(2).unwrap().whole().unwrap().len(), 2);
}

pub(super) fn a_sweep_that_waits_ends_with_all_that_it_has_not_come_to(store: &dyn EnvelopeStore) {
    for _ in 0..3 {
        store.put(&envelope(VmId::random()), "").unwrap();
    }
    let job = store.insert_job(&sweep(&Subject::AllEnvelopes, &[])).unwrap();
    // One that works is left alone.
    assert_eq!(store.end_waiting(job.id).unwrap().state, JobState::Running);
    let first = store.next_of_job(&job, 1).unwrap().sound.remove(0);
    store
        .commit_batch(job.id, &[Verdict::Unchanged(first.envelope.id)])
        .unwrap();
    store.job_waits(job.id, "it is locked").unwrap();
    let ended = store.end_waiting(job.id).unwrap();
    assert_eq!(
        (ended.state, ended.left, ended.waiting.as_str()),
        (JobState::Incomplete, 2, "")
    );
    let left = store.left_behind(job.id, 10).unwrap();
    assert!(
        left.iter()
            .all(|left| left.again && left.reason == "it is locked")
    );
    assert!(left.iter().all(|left| left.envelope != first.envelope.id));
    // Its thread comes too late, and it makes room for another.
    let late = store
        .commit_batch(job.id, &[Verdict::Unchanged(left[0].envelope)])
        .unwrap();
    assert_eq!((late.state, late.left), (JobState::Incomplete, 2));
    let other = store.insert_job(&sweep(&Subject::AllEnvelopes, &[])).unwrap();
    assert!(matches!(store.resume_job(job.id, &[]), Err(StoreError::JobRunning(id)) if id == other.id.0));
    store.abort_job(other.id).unwrap();
    assert_eq!(store.resume_job(job.id, &[]).unwrap().state, JobState::Running);
}

pub(super) fn a_job_ends_once_and_can_be_taken_up_again(store: &dyn EnvelopeStore) {
    let subject = Subject::Image {
        vm: VmId::random(),
        path: "/a".to_owned(),
    };
    let new = NewJob {
        subject: &subject,
        task: "{}",
        total: 100,
        left: &[],
    };
    let job = store.insert_job(&new).unwrap();
    let failed = store.end_job(job.id, Some("{\"why\": 1}")).unwrap();
    assert_eq!(
        (failed.state, failed.failure.as_str()),
        (JobState::Failed, "{\"why\": 1}")
    );
    assert_eq!(store.abort_job(job.id).unwrap().state, JobState::Failed);
    let again = store.resume_job(job.id, &[]).unwrap();
    assert_eq!((again.state, again.failure.as_str()), (JobState::Running, ""));
    assert_eq!(store.abort_job(job.id).unwrap().state, JobState::Aborted);
    // It was done at that very moment.
    let done = store.end_job(job.id, None).unwrap();
    assert_eq!((done.state, done.seen), (JobState::Done, 100));
    assert!(matches!(
        store.abort_job(JobId(4711)),
        Err(StoreError::UnknownJob(4711))
    ));
}

//! What comes, changes or ends while a sweep is at work.

use super::*;

#[test]
fn an_envelope_that_changes_meanwhile_is_not_overwritten() {
    let host = Host::with_envelopes(1);
    let before = host.envelopes().remove(0);
    let job = host.start(&Task::AddRecipient {
        provider: host.spare.id(),
    });
    let work = [Rewrap {
        record: host.stores.keystore.envelope(before.id).unwrap().unwrap(),
        targets: vec![RewrapTarget::Keep(0), RewrapTarget::Wrap(host.spare.id())],
    }];
    let Rewrapped::Changed(next) = host.recipients.rewrap(&work).unwrap().remove(0) else {
        panic!("not rewrapped");
    };
    // A start has adopted a later generation from the domain's XML.
    let adopted = host.changed(&before, |envelope| envelope.generation = Generation::of_test(7));
    host.stores.keystore.put(&adopted, "").unwrap();
    let record = host
        .stores
        .keystore
        .commit_batch(job, &[Verdict::Replace(Box::new(before), next)])
        .unwrap();
    assert_eq!((record.changed, record.left), (0, 1));
    assert_eq!(host.envelopes(), [adopted.into_envelope()]);
    let job = host.run();
    let job = if job.pass == Pass::Left && job.state == JobState::Running {
        host.run()
    } else {
        job
    };
    assert_eq!((job.state, job.changed), (JobState::Done, 1));
    assert_eq!(host.envelopes()[0].generation, Generation::of_test(8));
    host.assert_whole();
}

#[test]
fn what_is_sealed_meanwhile_is_not_forgotten() {
    let mut host = Host::with_envelopes(10);
    let job = host.start(&host.move_to_spare());
    for _ in 0..8 {
        host.step(1);
        host.seal(Some("main"));
    }
    let ended = host.run();
    assert_eq!((ended.id, ended.state, ended.changed), (job, JobState::Done, 18));
    assert_eq!((ended.total, ended.seen), (18, 18));
    host.assert_moved_to_spare();
}

#[test]
fn one_job_at_a_time_and_an_aborted_one_stays_where_it_is() {
    let host = Host::with_envelopes(10);
    let task = Task::AddRecipient {
        provider: host.spare.id(),
    };
    let job = host.start(&task);
    assert!(task.start(host.stores.keystore.as_ref(), &[]).is_err());
    assert!(matches!(host.step(4), Some(Step::Worked(_))));
    let aborted = host.stores.keystore.abort_job(job).unwrap();
    assert_eq!((aborted.state, aborted.changed), (JobState::Aborted, 4));
    assert!(host.step(4).is_none());
    let again = host.sweep(&task);
    assert_eq!((again.state, again.changed), (JobState::Done, 6));
    host.assert_whole();
    assert_eq!(host.stores.keystore.jobs(10).unwrap().whole().unwrap().len(), 2);
}

#[test]
fn sweeps_of_two_vms_go_side_by_side_and_see_their_own_envelopes_alone() {
    let host = Host::with_envelopes(6);
    let of = |at: usize| Task::Rekey {
        to: vec![host.spare.id()],
        vm: Some(host.envelopes()[at].vm),
    };
    let (one, other) = (of(0), of(3));
    let ids = [host.start(&one), host.start(&other)];
    assert!(
        one.start(host.stores.keystore.as_ref(), &[]).is_err(),
        "twice the same VM"
    );
    assert!(
        host.move_to_spare()
            .start(host.stores.keystore.as_ref(), &[])
            .is_err()
    );
    for (id, task) in ids.into_iter().zip([&one, &other]).rev() {
        let job = loop {
            if let Step::Ended(job) = host.step_of(id, task, 50) {
                break job;
            }
        };
        assert_eq!(
            (job.state, job.total, job.seen, job.changed),
            (JobState::Done, 1, 1, 1)
        );
    }
    let changed = host
        .envelopes()
        .iter()
        .filter(|envelope| envelope.generation == Generation::of_test(2))
        .count();
    assert_eq!(changed, 2);
    host.assert_whole();
    assert!(
        host.move_to_spare()
            .start(host.stores.keystore.as_ref(), &[])
            .is_ok()
    );
}

#[test]
fn an_aborted_job_can_be_resumed_and_sees_all_of_them_again() {
    let host = Host::with_envelopes(5);
    let job = host.start(&host.move_to_spare());
    host.step(2);
    host.stores.keystore.abort_job(job).unwrap();
    let other = host.start(&host.move_to_spare());
    assert!(
        host.stores.keystore.resume_job(job, &[]).is_err(),
        "beside another one"
    );
    host.stores.keystore.abort_job(other).unwrap();
    let resumed = host.stores.keystore.resume_job(job, &[]).unwrap();
    assert_eq!(
        (resumed.state, resumed.seen, resumed.pass),
        (JobState::Running, 0, Pass::All)
    );
    let ended = host.run();
    assert_eq!((ended.id, ended.state, ended.changed), (job, JobState::Done, 3));
    host.assert_providers(&[&host.spare]);
}

#[test]
fn a_restarted_host_goes_on_once_it_is_unlocked() {
    let host = Host::with_envelopes(30);
    host.start(&host.move_to_spare());
    assert!(matches!(host.step(11), Some(Step::Worked(_))));
    let host = host.restarted();
    let job = host.run();
    assert!(job.waiting.contains("unlock spare"), "{}", job.waiting);
    assert_eq!(job.seen, 11);
    host.spare.unlock(&secret("p")).unwrap();
    let job = host.run();
    assert_eq!((job.state, job.seen, job.left), (JobState::Running, 30, 19));
    host.main.unlock(&secret("p")).unwrap();
    let job = host.run();
    assert_eq!((job.state, job.changed), (JobState::Done, 30));
    host.assert_moved_to_spare();
}

#[test]
fn what_comes_while_a_job_waits_is_taken_along() {
    let mut host = Host::with_envelopes(3);
    host.main.lock();
    let job = host.sweep(&host.move_to_spare());
    assert_eq!((job.pass, job.left), (Pass::Left, 3));
    host.main.unlock(&secret("p")).unwrap();
    let sealed = host.seal(Some("main"));
    let left = host.stores.keystore.left_behind(job.id, 10).unwrap();
    assert!(left.iter().any(|left| left.envelope == sealed && left.again));
    let job = host.run();
    assert_eq!((job.state, job.changed, job.left), (JobState::Done, 4, 0));
    host.assert_moved_to_spare();
}

#[test]
fn what_comes_back_behind_a_job_is_taken_along() {
    let host = Host::with_envelopes(3);
    let before = host.envelopes();
    host.start(&host.move_to_spare());
    assert!(matches!(host.step(2), Some(Step::Worked(job)) if job.changed == 2));
    // From a host that did not take part, by the XML of the VM that comes from there.
    let gone =
        |known: &&Envelope| host.stores.keystore.envelope(known.id).unwrap().unwrap().envelope != **known;
    let travelled = host.changed(before.iter().find(gone).unwrap(), |envelope| {
        envelope.generation = Generation::of_test(7);
    });
    host.stores.keystore.put(&travelled, "").unwrap();
    let job = host.run();
    assert_eq!((job.state, job.changed), (JobState::Running, 3));
    let job = host.run();
    assert_eq!((job.state, job.changed, job.left), (JobState::Done, 4, 0));
    host.assert_moved_to_spare();
}

#[test]
fn what_is_sealed_at_the_very_end_is_not_forgotten() {
    let mut host = Host::with_envelopes(1);
    let job = host.start(&host.move_to_spare());
    host.step(1);
    // Nothing is left to be read, and the job has not ended yet.
    host.seal(Some("main"));
    let ended = host.stores.keystore.end_pass(job).unwrap();
    assert_eq!((ended.state, ended.left), (JobState::Running, 1));
    assert_eq!(host.run().state, JobState::Done);
    host.assert_providers(&[&host.spare]);
}

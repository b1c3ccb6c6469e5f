use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::model::envelope::{Binding, EnvelopeId, Generation, ObjectKind, Precedence, Verified};
use crate::provider::KeyProvider;
use crate::provider::native::NativeProvider;
use crate::secret::SecretBytes;
use crate::store::{CopyNews, CopyPlace, Pass, Stores};

fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}

fn ready(recipients: &Recipients, name: &str) -> Arc<NativeProvider> {
    let provider = recipients
        .add_by(|table| NativeProvider::create(table, &name.parse().unwrap(), &secret("p")))
        .unwrap();
    back_up(&provider);
    provider
}

fn back_up(provider: &NativeProvider) {
    provider
        .confirm_backup(provider.backup(None).unwrap().generation)
        .unwrap();
}

struct Host {
    dir: tempfile::TempDir,
    stores: Stores,
    recipients: Recipients,
    main: Arc<NativeProvider>,
    spare: Arc<NativeProvider>,
    /// SHA-256 of each DEK.
    deks: BTreeMap<EnvelopeId, [u8; 32]>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let recipients = Recipients::open(&stores, Duration::from_secs(30)).unwrap();
        let (main, spare) = (ready(&recipients, "main"), ready(&recipients, "spare"));
        Self {
            dir,
            stores,
            recipients,
            main,
            spare,
            deks: BTreeMap::new(),
        }
    }

    fn with_envelopes(count: usize) -> Self {
        let mut host = Self::new();
        for _ in 0..count {
            host.seal(None);
        }
        host
    }

    fn seal(&mut self, provider: Option<&str>) -> EnvelopeId {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Disk,
        };
        let (envelope, dek) = self.recipients.seal_new(provider, &binding).unwrap();
        self.stores.keystore.put(&envelope, "/images/disk.qcow2").unwrap();
        self.deks.insert(envelope.id, openssl::sha::sha256(dek.expose()));
        envelope.id
    }

    fn move_to_spare(&self) -> Task {
        Task::Move {
            from: self.main.id(),
            to: self.spare.id(),
            vm: None,
        }
    }

    fn start(&self, task: &Task) -> JobId {
        task.start(self.stores.keystore.as_ref(), &[]).unwrap().id
    }

    fn step(&self, batch: u32) -> Option<Step> {
        let running = self.stores.keystore.running_jobs().unwrap().into_iter().next()?;
        let task = serde_json::from_str(&running.task).unwrap();
        Some(
            step(
                self.stores.keystore.as_ref(),
                &self.recipients,
                &task,
                running.id,
                batch,
            )
            .unwrap(),
        )
    }

    /// Until the job ends or waits.
    fn run(&self) -> JobRecord {
        loop {
            match self.step(50).unwrap() {
                Step::Worked(_) => {}
                Step::Waits(job) | Step::Ended(job) => return job,
            }
        }
    }

    fn sweep(&self, task: &Task) -> JobRecord {
        self.start(task);
        self.run()
    }

    /// `envelope` after `change`, as one who opened it would have left it.
    fn changed(&self, envelope: &Envelope, change: impl FnOnce(&mut Envelope)) -> Verified {
        let dek = self.recipients.open_envelope(envelope).unwrap();
        let mut changed = envelope.clone();
        change(&mut changed);
        Verified::of_test(changed, &dek)
    }

    fn envelopes(&self) -> Vec<Envelope> {
        let records = self.stores.keystore.envelopes().unwrap().whole().unwrap();
        records.into_iter().map(|record| record.envelope).collect()
    }

    /// Every envelope opens to the DEK that it was made with.
    fn assert_whole(&self) {
        for envelope in self.envelopes() {
            let dek = self.recipients.open_envelope(&envelope).unwrap();
            assert_eq!(openssl::sha::sha256(dek.expose()), self.deks[&envelope.id]);
        }
        assert_eq!(self.envelopes().len(), self.deks.len());
    }

    fn assert_providers(&self, expected: &[&NativeProvider]) {
        let expected: Vec<_> = expected.iter().map(|provider| provider.id()).collect();
        for envelope in self.envelopes() {
            let found: Vec<_> = envelope.stanzas.iter().map(|stanza| stanza.provider).collect();
            assert_eq!(found, expected);
        }
    }
}

#[test]
fn moved_to_another_provider_they_open_without_the_first() {
    let host = Host::with_envelopes(120);
    let task = host.move_to_spare();
    let job = host.sweep(&task);
    assert_eq!(
        (job.state, job.seen, job.changed, job.left),
        (JobState::Done, 120, 120, 0)
    );
    host.main.lock();
    host.assert_providers(&[&host.spare]);
    host.assert_whole();
    assert!(
        host.envelopes()
            .iter()
            .all(|envelope| envelope.generation == Generation::of_test(2))
    );
    assert!(host.step(50).is_none());
}

#[test]
fn recipients_come_and_go_and_the_last_one_stays() {
    let host = Host::with_envelopes(10);
    let spare = host.spare.id();
    assert_eq!(host.sweep(&Task::AddRecipient { provider: spare }).changed, 10);
    host.assert_providers(&[&host.main, &host.spare]);
    host.main.lock();
    host.assert_whole();
    // Who is to open them alone must really open them first.
    let job = host.sweep(&Task::RemoveRecipient { provider: spare });
    assert_eq!((job.state, job.left), (JobState::Running, 10));
    assert!(
        job.waiting.contains("provider 'main' is locked"),
        "{}",
        job.waiting
    );
    host.assert_providers(&[&host.main, &host.spare]);
    host.main.unlock(&secret("p")).unwrap();
    let job = host.run();
    assert_eq!((job.state, job.changed, job.left), (JobState::Done, 10, 0));
    host.assert_providers(&[&host.main]);

    let task = Task::RemoveRecipient {
        provider: host.main.id(),
    };
    assert!(host.envelopes().iter().all(|envelope| task.would_close(envelope)));
    let job = host.sweep(&task);
    assert_eq!((job.state, job.left), (JobState::Incomplete, 10));
    host.assert_providers(&[&host.main]);
    host.assert_whole();
}

#[test]
fn a_rotation_waits_for_the_backup_and_takes_the_newest_kek() {
    let host = Host::with_envelopes(20);
    let task = Task::Rotate {
        provider: host.main.id(),
    };
    assert_eq!(host.sweep(&task).changed, 0, "all have the KEK in use");
    host.main.rotate(&secret("p")).unwrap();
    let job = host.sweep(&task);
    assert_eq!((job.state, job.seen), (JobState::Running, 0));
    assert!(
        job.waiting.contains("virtseal provider backup main"),
        "{}",
        job.waiting
    );
    host.assert_whole();
    back_up(&host.main);
    let job = host.run();
    assert_eq!((job.state, job.changed), (JobState::Done, 20));
    for envelope in host.envelopes() {
        assert!(envelope.stanzas[0].kek.0.starts_with("v2:vm:"));
    }
    host.assert_whole();
    // The copies still need the first generation, and say so.
    let needed = host.stores.host_store.needed_keks().unwrap().whole().unwrap();
    assert_eq!(needed.len(), 2 * 20);
    assert!(needed.iter().all(|needed| needed.kek.0.starts_with("v1:vm:")));
    let envelope = &host.envelopes()[0];
    let first = host.changed(envelope, |envelope| envelope.generation = Generation::of_test(1));
    for (version, left) in [(first.into_envelope(), 2), (envelope.clone(), 1)] {
        host.stores
            .host_store
            .note_copies(CopyPlace::Xml, &[(envelope.id, CopyNews::Has(Box::new(version)))])
            .unwrap();
        let needed = host.stores.host_store.needed_keks().unwrap().whole().unwrap();
        assert_eq!(
            needed
                .iter()
                .filter(|needed| needed.envelope == envelope.id)
                .count(),
            left
        );
    }
}

#[test]
fn rekeyed_they_follow_the_policy() {
    let mut host = Host::with_envelopes(3);
    host.seal(Some("spare"));
    let task = Task::Rekey {
        to: vec![host.spare.id(), host.main.id()],
        vm: None,
    };
    assert_eq!(host.sweep(&task).state, JobState::Done);
    host.assert_providers(&[&host.spare, &host.main]);
    host.assert_whole();
    assert_eq!(host.sweep(&task).changed, 0, "done twice, it changes nothing");
    let one = host.envelopes()[0].clone();
    let task = Task::Rekey {
        to: vec![host.main.id()],
        vm: Some(one.vm),
    };
    assert_eq!(host.sweep(&task).changed, 1);
    assert_eq!(
        host.stores
            .keystore
            .envelope(one.id)
            .unwrap()
            .unwrap()
            .envelope
            .stanzas
            .len(),
        1
    );
    host.assert_whole();
    // Of one VM: a later generation whatever was there, as it is to outrank another host's.
    let before = host.stores.keystore.envelope(one.id).unwrap().unwrap().envelope;
    assert_eq!(host.sweep(&task).changed, 1);
    let after = host.stores.keystore.envelope(one.id).unwrap().unwrap().envelope;
    assert!(
        after.supersedes(&before) == Precedence::Newer && after.stanzas[0].body != before.stanzas[0].body
    );
    assert_eq!(after.stanzas[0].kek, before.stanzas[0].kek);
    host.assert_whole();
}

#[test]
fn new_envelopes_get_all_recipients_or_none() {
    let mut host = Host::new();
    host.recipients
        .set_recipients(vec!["spare".to_owned(), "main".to_owned(), "spare".to_owned()]);
    host.seal(None);
    host.assert_providers(&[&host.spare, &host.main]);
    host.assert_whole();
    host.main.lock();
    let binding = host.envelopes()[0].binding();
    let failure = Problem::from(host.recipients.seal_new(None, &binding).unwrap_err());
    assert_eq!(
        failure.to_string(),
        "provider 'main' is locked. Next: virtseal provider unlock main"
    );
    host.recipients
        .set_recipients(vec!["main".to_owned(), "hsm".to_owned()]);
    let failure = Problem::from(host.recipients.seal_new(None, &binding).unwrap_err());
    assert!(failure.message.contains("\"hsm\""), "{failure}");
    assert_eq!(host.envelopes().len(), 1);
}

#[test]
fn a_stanza_that_is_to_open_alone_is_made_anew_if_it_can_not_be_known_to() {
    let host = Host::with_envelopes(3);
    let (main, spare) = (host.main.id(), host.spare.id());
    host.sweep(&Task::AddRecipient { provider: spare });
    for envelope in host.envelopes() {
        let damaged = host.changed(&envelope, |envelope| {
            envelope.generation = Generation::of_test(3);
            envelope.stanzas[1].body[20] ^= 1;
        });
        host.stores.keystore.put(&damaged, "").unwrap();
    }
    let job = host.sweep(&Task::RemoveRecipient { provider: main });
    assert_eq!((job.state, job.left), (JobState::Incomplete, 3));
    host.assert_whole();
    let to = Task::Move {
        from: main,
        to: spare,
        vm: None,
    };
    assert_eq!(host.sweep(&to).changed, 3);
    host.main.lock();
    host.assert_providers(&[&host.spare]);
    host.assert_whole();
}

#[test]
fn an_adopted_generation_leaves_the_image_in_doubt() {
    let host = Host::with_envelopes(1);
    let travelled = host.changed(&host.envelopes()[0], |envelope| {
        envelope.generation = Generation::of_test(2);
    });
    let needed = |host: &Host| host.stores.host_store.needed_keks().unwrap().whole().unwrap();
    assert_eq!(needed(&host), []);
    host.stores.keystore.put(&travelled, "").unwrap();
    let places: Vec<_> = needed(&host).iter().map(|needed| needed.place).collect();
    assert_eq!(places, [CopyPlace::Image, CopyPlace::Xml]);
    // What is found counts as long as the envelope is known.
    let mut unknown = travelled.into_envelope();
    unknown.id = EnvelopeId::random();
    host.stores
        .host_store
        .copy_is_behind(&unknown, CopyPlace::Xml)
        .unwrap();
    assert_eq!(needed(&host).len(), 2);
}

#[test]
fn a_damaged_envelope_is_left_alone_and_named() {
    let host = Host::with_envelopes(7);
    let bad = host.changed(&host.envelopes()[3], |envelope| {
        envelope.generation = Generation::of_test(2);
        envelope.stanzas[0].body[20] ^= 1;
    });
    host.stores.keystore.put(&bad, "").unwrap();
    let job = host.sweep(&host.move_to_spare());
    assert_eq!((job.state, job.changed, job.left), (JobState::Incomplete, 6, 1));
    let left = host.stores.keystore.left_behind(job.id, 10).unwrap();
    assert_eq!((left[0].envelope, left[0].again), (bad.id, false));
    assert!(left[0].reason.contains("tampered"), "{}", left[0].reason);
    assert_eq!(
        host.stores.keystore.envelope(bad.id).unwrap().unwrap().envelope,
        *bad
    );
}

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
    host.assert_providers(&[&host.spare]);
    host.assert_whole();
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
        loop {
            let stepped = step(host.stores.keystore.as_ref(), &host.recipients, task, id, 50).unwrap();
            if let Step::Ended(job) = stepped {
                assert_eq!(
                    (job.state, job.total, job.seen, job.changed),
                    (JobState::Done, 1, 1, 1)
                );
                break;
            }
        }
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
    let Host {
        dir,
        stores,
        recipients,
        main,
        spare,
        deks,
    } = host;
    drop((recipients, main, spare, stores));
    let stores = Stores::open(dir.path()).unwrap();
    let recipients = Recipients::open(&stores, Duration::from_secs(30)).unwrap();
    let native = |name: &str| {
        recipients
            .find(name)
            .unwrap()
            .of_kind::<NativeProvider>()
            .unwrap()
    };
    let (main, spare) = (native("main"), native("spare"));
    let host = Host {
        dir,
        stores,
        recipients,
        main,
        spare,
        deks,
    };
    let job = host.run();
    assert!(job.waiting.contains("unlock spare"), "{}", job.waiting);
    assert_eq!(job.seen, 11);
    host.spare.unlock(&secret("p")).unwrap();
    let job = host.run();
    assert_eq!((job.state, job.seen, job.left), (JobState::Running, 30, 19));
    host.main.unlock(&secret("p")).unwrap();
    let job = host.run();
    assert_eq!((job.state, job.changed), (JobState::Done, 30));
    host.assert_providers(&[&host.spare]);
    host.assert_whole();
}

#[test]
fn what_comes_while_a_job_waits_is_taken_along() {
    let mut host = Host::with_envelopes(3);
    host.main.lock();
    let job = host.sweep(&Task::Move {
        from: host.main.id(),
        to: host.spare.id(),
        vm: None,
    });
    assert_eq!((job.pass, job.left), (Pass::Left, 3));
    host.main.unlock(&secret("p")).unwrap();
    let sealed = host.seal(Some("main"));
    let left = host.stores.keystore.left_behind(job.id, 10).unwrap();
    assert!(left.iter().any(|left| left.envelope == sealed && left.again));
    let job = host.run();
    assert_eq!((job.state, job.changed, job.left), (JobState::Done, 4, 0));
    host.assert_providers(&[&host.spare]);
    host.assert_whole();
}

#[test]
fn what_comes_back_behind_a_job_is_taken_along() {
    let host = Host::with_envelopes(3);
    let before = host.envelopes();
    host.start(&Task::Move {
        from: host.main.id(),
        to: host.spare.id(),
        vm: None,
    });
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
    host.assert_providers(&[&host.spare]);
    host.assert_whole();
}

#[test]
fn what_is_sealed_at_the_very_end_is_not_forgotten() {
    let mut host = Host::with_envelopes(1);
    let job = host.start(&Task::Move {
        from: host.main.id(),
        to: host.spare.id(),
        vm: None,
    });
    host.step(1);
    // Nothing is left to be read, and the job has not ended yet.
    host.seal(Some("main"));
    let ended = host.stores.keystore.end_pass(job).unwrap();
    assert_eq!((ended.state, ended.left), (JobState::Running, 1));
    assert_eq!(host.run().state, JobState::Done);
    host.assert_providers(&[&host.spare]);
}

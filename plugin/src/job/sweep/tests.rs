mod meanwhile;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::model::envelope::{Binding, EnvelopeId, Generation, ObjectKind, Precedence, Verified};
use crate::provider::KeyProvider;
use crate::provider::native::NativeProvider;
use crate::secret::SecretBytes;
use crate::store::{CopyNews, CopyPlace, Pass, StaleCopy, Stores};

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

    /// As after a restart of its virtseald: everything is locked.
    fn restarted(self) -> Self {
        let Self {
            dir,
            deks,
            stores,
            recipients,
            main,
            spare,
        } = self;
        drop((recipients, main, spare, stores));
        let stores = Stores::open(dir.path()).unwrap();
        let recipients = Recipients::open(&stores, Duration::from_secs(30)).unwrap();
        let native = |name: &str| recipients.find(name).unwrap().of_kind().unwrap();
        let (main, spare) = (native("main"), native("spare"));
        Self {
            dir,
            stores,
            recipients,
            main,
            spare,
            deks,
        }
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
        Some(self.step_of(running.id, &task, batch))
    }

    fn step_of(&self, job: JobId, task: &Task, batch: u32) -> Step {
        let keystore = self.stores.keystore.as_ref();
        step(keystore, &self.recipients, Beside::NOTHING, task, job, batch).unwrap()
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

    fn assert_moved_to_spare(&self) {
        self.assert_providers(&[&self.spare]);
        self.assert_whole();
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
fn a_job_gives_up_after_a_week_of_the_same_and_can_be_taken_up_again() {
    let host = Host::with_envelopes(4);
    let id = host.start(&host.move_to_spare());
    assert!(matches!(host.step(1), Some(Step::Worked(_))));
    host.spare.lock();
    let waiting = host.run();
    assert_eq!((waiting.state, waiting.changed), (JobState::Running, 1));
    let later = |time: Duration, why: &str| {
        let keystore = host.stores.keystore.as_ref();
        waits_at(SystemTime::now() + time, keystore, &waiting, why).unwrap()
    };
    let hour = Duration::from_secs(3600);
    assert!(matches!(later(GIVES_UP - hour, &waiting.waiting), Step::Waits(_)));
    let Step::Ended(job) = later(GIVES_UP + hour, &waiting.waiting) else {
        panic!("it waits for ever");
    };
    assert_eq!((job.state, job.changed, job.left), (JobState::Incomplete, 1, 3));
    let left = host.stores.keystore.left_behind(id, 10).unwrap();
    assert!(
        left.iter()
            .all(|left| left.reason.contains("provider 'spare' is locked")),
        "{left:?}"
    );

    host.spare.unlock(&secret("p")).unwrap();
    host.assert_whole();
    host.stores.keystore.resume_job(id, &[]).unwrap();
    let job = host.run();
    assert_eq!((job.state, job.left), (JobState::Done, 0));
    host.assert_providers(&[&host.spare]);
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
    let host_store = &host.stores.host_store;
    let noted = || host_store.stale_copies(CopyPlace::Xml, None, 100).unwrap();
    let of_it = |all: Vec<StaleCopy>| all.into_iter().find(|copy| copy.envelope == envelope.id);
    let seen = of_it(noted()).unwrap();
    // It is behind again before the copy that was written is told of.
    host_store.copy_is_behind(envelope, CopyPlace::Xml).unwrap();
    for (seen, left) in [(&seen, 2), (&of_it(noted()).unwrap(), 1)] {
        host_store
            .note_copies(CopyPlace::Xml, &[(seen.clone(), CopyNews::Follows)])
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
fn a_vm_whose_keys_are_going_is_left_alone_and_what_was_being_made_is_waited_for() {
    let host = Host::with_envelopes(2);
    let going = host.envelopes()[0].vm;
    let task = host.move_to_spare();
    let id = host.start(&task);
    let is_leaving = |vm| vm == going;
    let step = |unfinished: &dyn Fn() -> Option<String>| {
        let beside = Beside {
            is_leaving: &is_leaving,
            unfinished,
        };
        step(
            host.stores.keystore.as_ref(),
            &host.recipients,
            beside,
            &task,
            id,
            50,
        )
        .unwrap()
    };
    assert!(matches!(step(&|| None), Step::Worked(job) if (job.changed, job.left) == (1, 1)));
    let sealing = || Some("VM x is being sealed".to_owned());
    for _ in 0..2 {
        let waits = step(&sealing);
        assert!(
            matches!(&waits, Step::Waits(job) if job.waiting == sealing().unwrap() && job.pass == Pass::All)
        );
    }
    assert!(matches!(step(&|| None), Step::Waits(job) if job.pass == Pass::Left));
    host.stores.keystore.shred_vm(going).unwrap();
    assert!(matches!(step(&|| None), Step::Ended(job) if job.state == JobState::Done));
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

//! Jobs of the daemon over a KMIP provider.

use std::sync::Arc;
use std::time::Duration;

use super::super::fixture::{Fake, Fault, Kept, Kmip, identity, secret, settings};
use super::KmipProvider;
use crate::job::sweep::{self, Step, Task};
use crate::model::envelope::{Binding, Envelope, EnvelopeId, ObjectKind, VmId};
use crate::provider::kmip::ServerTrust;
use crate::provider::native::NativeProvider;
use crate::provider::{KekScope, KeyProvider};
use crate::recipients::Recipients;
use crate::store::{JobRecord, Stores};
use virtseal_testkit::servers::Authority;

/// A host with a KMIP provider and a native one.
struct Host {
    stores: Stores,
    recipients: Recipients,
    kmip: Arc<KmipProvider>,
    native: Arc<NativeProvider>,
    _dir: tempfile::TempDir,
}

impl Host {
    fn at(authority: &Authority, port: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let recipients = Recipients::open(&stores, Duration::from_secs(30)).unwrap();
        let provider = recipients
            .add_by(|table| KmipProvider::create(table, &"kms".parse().unwrap(), settings(&[port])))
            .unwrap();
        provider.set_identity(&identity(authority, false)).unwrap();
        provider.trust(ServerTrust::Ca(authority.pem())).unwrap();
        let native = recipients
            .add_by(|table| NativeProvider::create(table, &"main".parse().unwrap(), &secret("p")))
            .unwrap();
        native
            .confirm_backup(native.backup(None).unwrap().generation)
            .unwrap();
        Self {
            stores,
            recipients,
            kmip: provider,
            native,
            _dir: dir,
        }
    }

    fn sealed(&self, vm: VmId) -> Envelope {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm,
            kind: ObjectKind::Disk,
        };
        let (envelope, _) = self.recipients.seal_new(Some("kms"), &binding).unwrap();
        self.stores.keystore.insert_pending(&envelope, "/x").unwrap();
        (*envelope).clone()
    }

    fn run(&self, task: &Task) -> JobRecord {
        let id = task.start(self.stores.keystore.as_ref(), &[]).unwrap().id;
        for _ in 0..50 {
            match sweep::step(
                self.stores.keystore.as_ref(),
                &self.recipients,
                sweep::Beside::NOTHING,
                task,
                id,
                10,
            )
            .unwrap()
            {
                Step::Ended(job) => return job,
                Step::Waits(job) => panic!("waits: {}", job.waiting),
                Step::Worked(_) => {}
            }
        }
        panic!("the job never ends");
    }

    fn kek_of(&self, envelope: &Envelope) -> String {
        let records = self
            .stores
            .keystore
            .envelopes_of(envelope.vm)
            .unwrap()
            .whole()
            .unwrap();
        let record = records
            .into_iter()
            .find(|record| record.envelope.id == envelope.id);
        record.unwrap().envelope.stanzas.remove(0).kek.0
    }
}

#[test]
fn a_kek_that_a_job_has_retired_never_comes_back() {
    let kmip = Kmip::with(false, |_| {});
    let host = Host::at(&kmip.authority, kmip.server.port());
    let envelope = host.sealed(VmId::random());
    let first = host.kek_of(&envelope);
    let (from, to) = (host.kmip.id(), host.native.id());
    for (from, to) in [(from, to), (to, from)] {
        let job = host.run(&Task::Move { from, to, vm: None });
        assert_eq!(job.state.as_str(), "done");
    }
    let second = host.kek_of(&envelope);
    assert_ne!(first, second);
    let job = host.run(&Task::Rotate { provider: from });
    assert_eq!((job.state.as_str(), job.changed), ("done", 1));
    let third = host.kek_of(&envelope);
    assert!(third != first && third != second);
    let now = host.kmip.create_kek(&KekScope::Vm(envelope.vm)).unwrap();
    assert_eq!(now.0, third);
    assert_eq!(kmip.server.keys(), 3);
}

/// Two objects of a VM, a clock that goes back, a rotation, and a VM that is new after it.
#[test]
fn a_rotation_makes_one_kek_for_a_vm_whatever_the_clock_says() {
    let kmip = Kmip::with(false, |_| {});
    let host = Host::at(&kmip.authority, kmip.server.port());
    let vm = VmId::random();
    let objects = [host.sealed(vm), host.sealed(vm)];
    assert_eq!(kmip.server.keys(), 1);
    for rotations in 1..4 {
        kmip.server.turn_clock_back(3600);
        let job = host.run(&Task::Rotate {
            provider: host.kmip.id(),
        });
        assert_eq!((job.state.as_str(), job.changed), ("done", 1 + rotations as u64));
        assert_eq!(kmip.server.keys(), 1 + rotations);
        assert_eq!(host.kek_of(&objects[0]), host.kek_of(&objects[1]));
        assert_eq!(host.kek_of(&host.sealed(vm)), host.kek_of(&objects[0]));
    }
}

/// Seen before: on a server with unique names, a rotation asked for the same name for ever.
#[test]
fn a_create_that_is_refused_for_good_ends_the_job() {
    let authority = Authority::new();
    let server = Fake::start(&authority);
    let host = Host::at(&authority, server.port());
    let envelopes = [host.sealed(VmId::random()), host.sealed(VmId::random())];
    let rotate = Task::Rotate {
        provider: host.kmip.id(),
    };
    // Non Unique Name Attribute, Operation Not Supported, Permission Denied.
    for reason in [0x35, 0x5, 0xC] {
        server.has(&[Fault::RefusesCreate(reason)]);
        let job = host.run(&rotate);
        assert_eq!((job.state.as_str(), job.changed, job.left), ("incomplete", 0, 2));
        let left = host.stores.keystore.left_behind(job.id, 10).unwrap();
        assert!(left[0].reason.contains("Create refused"), "{left:?}");
    }
    server.has(&[]);
    let job = host.run(&rotate);
    assert_eq!((job.state.as_str(), job.changed), ("done", 2));
    for envelope in &envelopes {
        assert_ne!(host.kek_of(envelope), envelope.stanzas[0].kek.0);
    }
    assert_eq!(server.keys(), 4);
    // Trouble is waited for.
    server.has(&[Fault::RefusesCreate(0x100)]);
    let id = rotate.start(host.stores.keystore.as_ref(), &[]).unwrap().id;
    let step = sweep::step(
        host.stores.keystore.as_ref(),
        &host.recipients,
        sweep::Beside::NOTHING,
        &rotate,
        id,
        10,
    )
    .unwrap();
    assert!(matches!(step, Step::Waits(_)), "{step:?}");
}

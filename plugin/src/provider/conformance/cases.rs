//! What every kind must do. Each case runs once for each kind.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use virtseal_testkit::servers::Manner;

use super::{Faulty, Fixture, Server};
use crate::host::own_process;
use crate::model::envelope::{Binding, EnvelopeId, KekId, ObjectKind, Payload, ProviderId, Stanza, VmId};
use crate::provider::{KekScope, KeyProvider, ProviderError, ProviderStatus};
use crate::secret::Dek;

fn binding() -> Binding {
    Binding {
        envelope: EnvelopeId::random(),
        vm: VmId::random(),
        kind: ObjectKind::Disk,
    }
}

/// A payload, wrapped under the KEK of its VM.
struct Wrapped {
    binding: Binding,
    payload: Payload,
    stanza: Stanza,
}

impl Wrapped {
    fn by(provider: &dyn KeyProvider) -> Self {
        let binding = binding();
        let payload = Payload::bind(&Dek::random().unwrap(), &binding).unwrap();
        let kek = provider.create_kek(&KekScope::Vm(binding.vm)).unwrap();
        let stanza = provider.wrap(&kek, &payload).unwrap();
        Self {
            binding,
            payload,
            stanza,
        }
    }

    fn assert_opened_by(&self, provider: &dyn KeyProvider) {
        let opened = provider.unwrap_many(&[&self.stanza]).unwrap();
        assert_eq!(opened.len(), 1);
        assert_eq!(opened[0].expose(), self.payload.expose());
    }
}

/// The refusal of a stanza that `change` was made to.
fn refusal(provider: &dyn KeyProvider, good: &Stanza, change: impl FnOnce(&mut Stanza)) -> ProviderError {
    let mut changed = good.clone();
    change(&mut changed);
    assert_ne!(&changed, good);
    provider
        .unwrap_many(&[&changed])
        .expect_err("a changed stanza must not open")
}

pub(in crate::provider) fn wrap_and_unwrap<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    assert_eq!(provider.status(), ProviderStatus::Ready);
    let wrapped = Wrapped::by(provider);
    assert_eq!(wrapped.stanza.provider, provider.id());
    assert_eq!(wrapped.stanza.provider_name, provider.name());
    wrapped.assert_opened_by(provider);
    wrapped.assert_opened_by(provider);
    let again = provider.wrap(&wrapped.stanza.kek, &wrapped.payload).unwrap();
    assert_ne!(again.body, wrapped.stanza.body, "the same ciphertext twice");
}

pub(in crate::provider) fn has_one_kek_per_scope<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let vm = VmId::random();
    let scopes = [KekScope::Vm(vm), KekScope::Vm(VmId::random()), KekScope::Provider];
    let keks: Vec<_> = scopes
        .iter()
        .map(|scope| provider.create_kek(scope).unwrap())
        .collect();
    assert!(keks[0] != keks[1] && keks[1] != keks[2] && keks[0] != keks[2]);
    assert_eq!(provider.create_kek(&scopes[0]).unwrap(), keks[0]);
}

pub(in crate::provider) fn rotated_kek_takes_the_place_of_the_old<F: Fixture>() {
    let mut fixture = F::new();
    let wrapped = Wrapped::by(fixture.provider());
    let (scope, first) = (KekScope::Vm(wrapped.binding.vm), wrapped.stanza.kek.clone());
    let mut last = first.clone();
    for _ in 0..2 {
        fixture.retire();
        let provider = fixture.provider();
        let new = provider.rotate_kek(&scope, &last).unwrap();
        assert_ne!(new, last);
        // Whoever has an earlier one, or none, gets the same.
        assert_eq!(provider.rotate_kek(&scope, &last).unwrap(), new);
        assert_eq!(provider.rotate_kek(&scope, &first).unwrap(), new);
        assert_eq!(provider.create_kek(&scope).unwrap(), new);
        last = new;
    }
    let stanza = fixture.provider().wrap(&last, &wrapped.payload).unwrap();
    assert_eq!(stanza.kek, last);
    fixture.restart();
    let provider = fixture.provider();
    provider.unlock(&fixture.credential()).unwrap();
    assert_eq!(provider.create_kek(&scope).unwrap(), last);
    wrapped.assert_opened_by(provider);
    let opened = provider.unwrap_many(&[&stanza, &wrapped.stanza]).unwrap();
    assert!(
        opened
            .iter()
            .all(|payload| payload.expose() == wrapped.payload.expose())
    );
}

pub(in crate::provider) fn batch_comes_back_in_order<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped: Vec<_> = (0..40).map(|_| Wrapped::by(provider)).collect();
    let stanzas: Vec<_> = wrapped.iter().rev().map(|one| &one.stanza).collect();
    let opened = provider.unwrap_many(&stanzas).unwrap();
    assert_eq!(opened.len(), stanzas.len());
    for (payload, one) in opened.iter().zip(wrapped.iter().rev()) {
        assert_eq!(payload.expose(), one.payload.expose());
    }
    assert!(provider.unwrap_many(&[]).unwrap().is_empty());
}

pub(in crate::provider) fn one_bad_stanza_fails_the_batch<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped: Vec<_> = (0..3).map(|_| Wrapped::by(provider)).collect();
    let mut bad = wrapped[1].stanza.clone();
    bad.body[0] ^= 1;
    assert!(
        provider
            .unwrap_many(&[&wrapped[0].stanza, &bad, &wrapped[2].stanza])
            .is_err()
    );
}

pub(in crate::provider) fn wrong_binding<F: Fixture>() {
    let fixture = F::new();
    let wrapped = Wrapped::by(fixture.provider());
    let opened = fixture.provider().unwrap_many(&[&wrapped.stanza]).unwrap();
    opened[0].dek(&wrapped.binding).unwrap();
    assert!(opened[0].dek(&binding()).is_err());
}

pub(in crate::provider) fn tampered_stanza<F: Fixture>() {
    let fixture = F::new();
    let wrapped = Wrapped::by(fixture.provider());
    for byte in 0..wrapped.stanza.body.len() {
        // One bit of each byte, another one for its neighbour.
        let error = refusal(fixture.provider(), &wrapped.stanza, |stanza| {
            stanza.body[byte] ^= 1 << (byte % 8);
        });
        assert!(matches!(error, ProviderError::Tampered), "byte {byte}: {error:?}");
    }
    for length in [
        0,
        1,
        12,
        28,
        wrapped.stanza.body.len() - 1,
        wrapped.stanza.body.len() + 1,
        1 << 20,
    ] {
        let error = refusal(fixture.provider(), &wrapped.stanza, |stanza| {
            stanza.body.resize(length, 0);
        });
        assert!(
            matches!(error, ProviderError::Tampered),
            "{length} bytes: {error:?}"
        );
    }
    wrapped.assert_opened_by(fixture.provider());
}

pub(in crate::provider) fn stanza_put_under_another_kek_is_refused<F: Fixture>() {
    let fixture = F::new();
    let (one, other) = (Wrapped::by(fixture.provider()), Wrapped::by(fixture.provider()));
    let error = refusal(fixture.provider(), &one.stanza, |stanza| {
        stanza.kek = other.stanza.kek;
    });
    assert!(matches!(error, ProviderError::Tampered), "{error:?}");
}

pub(in crate::provider) fn unknown_kek_and_mechanism<F: Fixture>() {
    let fixture = F::new();
    let wrapped = Wrapped::by(fixture.provider());
    for kek in [
        fixture.unknown_kek(),
        KekId(String::new()),
        KekId("../../etc".to_owned()),
    ] {
        let error = refusal(fixture.provider(), &wrapped.stanza, |stanza| {
            stanza.kek = kek.clone();
        });
        assert!(
            matches!(&error, ProviderError::UnknownKek(named) if *named == kek),
            "{error:?}"
        );
        let error = fixture.provider().wrap(&kek, &wrapped.payload).unwrap_err();
        assert!(
            matches!(&error, ProviderError::UnknownKek(named) if *named == kek),
            "{error:?}"
        );
    }
    let error = refusal(fixture.provider(), &wrapped.stanza, |stanza| {
        stanza.mechanism = "ROT13".to_owned();
    });
    assert!(
        matches!(&error, ProviderError::UnknownMechanism(named) if named == "ROT13"),
        "{error:?}"
    );
}

pub(in crate::provider) fn stanza_of_another_provider_is_refused<F: Fixture>() {
    let (fixture, other) = (F::new(), F::new());
    let wrapped = Wrapped::by(other.provider());
    assert!(fixture.provider().unwrap_many(&[&wrapped.stanza]).is_err());
    refusal(fixture.provider(), &wrapped.stanza, |stanza| {
        stanza.provider = fixture.provider().id();
    });
    refusal(other.provider(), &wrapped.stanza, |stanza| {
        stanza.provider = ProviderId::random();
    });
}

pub(in crate::provider) fn locked<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped = Wrapped::by(provider);
    provider.lock();
    provider.lock();
    assert_eq!(provider.status(), ProviderStatus::Locked);
    let kek = &wrapped.stanza.kek;
    assert!(matches!(
        provider.unwrap_many(&[&wrapped.stanza]),
        Err(ProviderError::Locked)
    ));
    assert!(matches!(
        provider.wrap(kek, &wrapped.payload),
        Err(ProviderError::Locked)
    ));
    assert!(matches!(
        provider.create_kek(&KekScope::Provider),
        Err(ProviderError::Locked)
    ));
    // One with nothing to destroy may say so without being unlocked.
    match provider.destroy_kek(kek, wrapped.binding.vm) {
        Err(error) => assert!(matches!(error, ProviderError::Locked), "{error:?}"),
        Ok(receipt) => assert!(!receipt.destroyed, "{receipt:?}"),
    }
    provider.unlock(&fixture.credential()).unwrap();
    assert_eq!(provider.status(), ProviderStatus::Ready);
    wrapped.assert_opened_by(provider);
}

/// PIN, passphrase, token, secret id or client key: whatever unlocks it.
pub(in crate::provider) fn wrong_pin<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped = Wrapped::by(provider);
    provider.lock();
    let error = provider.unlock(&fixture.wrong_credential()).unwrap_err();
    assert!(
        matches!(error, ProviderError::WrongCredential | ProviderError::WrongPin(_)),
        "{error:?}"
    );
    assert_eq!(provider.status(), ProviderStatus::Locked);
    assert!(matches!(
        provider.unwrap_many(&[&wrapped.stanza]),
        Err(ProviderError::Locked)
    ));
    provider.unlock(&fixture.credential()).unwrap();
    assert_eq!(provider.status(), ProviderStatus::Ready);
    wrapped.assert_opened_by(provider);
}

pub(in crate::provider) fn restart_locks_and_loses_nothing<F: Fixture>() {
    let mut fixture = F::new();
    let wrapped = Wrapped::by(fixture.provider());
    let id = fixture.provider().id();
    fixture.restart();
    assert_eq!(fixture.provider().id(), id);
    assert_eq!(fixture.provider().status(), ProviderStatus::Locked);
    assert!(fixture.provider().unwrap_many(&[&wrapped.stanza]).is_err());
    fixture.provider().unlock(&fixture.credential()).unwrap();
    wrapped.assert_opened_by(fixture.provider());
    let kek = fixture
        .provider()
        .create_kek(&KekScope::Vm(wrapped.binding.vm))
        .unwrap();
    assert_eq!(kek, wrapped.stanza.kek);
}

pub(in crate::provider) fn lock_during_use_is_clean<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped = Wrapped::by(provider);
    let (stop, opened, refused) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    match provider.unwrap_many(&[&wrapped.stanza]) {
                        Ok(payloads) => {
                            assert_eq!(payloads[0].expose(), wrapped.payload.expose());
                            opened.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(ProviderError::Locked) => {
                            refused.fetch_add(1, Ordering::SeqCst);
                            std::thread::yield_now();
                        }
                        Err(error) => panic!("{error:?}"),
                    }
                }
            });
        }
        let _end = Raise(&stop);
        for _ in 0..20 {
            provider.lock();
            // Another thread can't have unlocked it: a call that begins now must fail.
            let refusal = provider.unwrap_many(&[&wrapped.stanza]);
            assert!(matches!(refusal, Err(ProviderError::Locked)));
            wait_for_more(&refused);
            provider.unlock(&fixture.credential()).unwrap();
            wrapped.assert_opened_by(provider);
            wait_for_more(&opened);
        }
    });
}

/// Raises a flag when dropped, also by a failed assertion: the threads that watch it must not run for ever.
struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Until another thread has counted one more, which on a busy machine takes its time.
fn wait_for_more(counted: &AtomicUsize) {
    let (before, began) = (counted.load(Ordering::SeqCst), Instant::now());
    while counted.load(Ordering::SeqCst) == before {
        assert!(began.elapsed() < Duration::from_secs(60), "no thread gets there");
        std::thread::sleep(Duration::from_micros(50));
    }
}

pub(in crate::provider) fn eight_threads<F: Fixture>() {
    let fixture = F::new();
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                for _ in 0..25 / F::USES_PER_KEK {
                    let wrapped = Wrapped::by(fixture.provider());
                    for _ in 0..F::USES_PER_KEK {
                        wrapped.assert_opened_by(fixture.provider());
                    }
                }
            });
        }
    });
}

pub(in crate::provider) fn destroy_receipt_is_true<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped = Wrapped::by(provider);
    let (kek, vm) = (&wrapped.stanza.kek, wrapped.binding.vm);
    let receipt = provider.destroy_kek(kek, vm).unwrap();
    assert_eq!(receipt.kek, wrapped.stanza.kek);
    assert!(!receipt.observed.is_empty());
    assert_eq!(
        provider.unwrap_many(&[&wrapped.stanza]).is_err(),
        receipt.destroyed
    );
    assert!(provider.destroy_kek(&fixture.unknown_kek(), vm).is_err());
}

/// What it wrapped lives on in backups: a KEK that comes back under its name would be taken for it.
pub(in crate::provider) fn name_of_a_destroyed_kek_is_not_used_again<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped = Wrapped::by(provider);
    let (kek, vm) = (&wrapped.stanza.kek, wrapped.binding.vm);
    if !provider.destroy_kek(kek, vm).unwrap().destroyed {
        // Then it is the same one still, and opens.
        return wrapped.assert_opened_by(provider);
    }
    let next = provider.create_kek(&KekScope::Vm(vm)).unwrap();
    assert_ne!(next, *kek);
    let stanza = provider.wrap(&next, &wrapped.payload).unwrap();
    let opened = provider.unwrap_many(&[&stanza]).unwrap();
    assert_eq!(opened[0].expose(), wrapped.payload.expose());
    assert!(provider.unwrap_many(&[&wrapped.stanza]).is_err());
}

/// Of another VM, and of all VMs of the provider, which other hosts may have too.
pub(in crate::provider) fn kek_that_others_need_is_not_destroyed<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let of_a_vm = Wrapped::by(provider);
    let mut shared = Wrapped::by(provider);
    let kek = provider.create_kek(&KekScope::Provider).unwrap();
    shared.stanza = provider.wrap(&kek, &shared.payload).unwrap();
    for (wrapped, vm) in [(&of_a_vm, VmId::random()), (&shared, shared.binding.vm)] {
        let receipt = provider.destroy_kek(&wrapped.stanza.kek, vm).unwrap();
        assert!(!receipt.destroyed, "{receipt:?}");
        wrapped.assert_opened_by(provider);
    }
}

/// In a process of its own: other tests' memory would count.
pub(in crate::provider) fn ten_thousand_unwraps_without_a_leak<F: Fixture>() {
    own_process::run(leaks_nothing::<F>);
}

fn leaks_nothing<F: Fixture>() {
    let fixture = F::new();
    let wrapped: Vec<_> = (0..4).map(|_| Wrapped::by(fixture.provider())).collect();
    let stanzas = wrapped.iter().map(|one| &one.stanza).cycle();
    let stanzas: Vec<_> = stanzas.take(F::UNWRAPS_PER_CALL).collect();
    let unwrap = |times: usize| {
        for _ in 0..times / stanzas.len() {
            let payloads = fixture.provider().unwrap_many(&stanzas).unwrap();
            assert_eq!(payloads.len(), stanzas.len());
        }
    };
    unwrap(1_000);
    let before = Footprint::now();
    unwrap(10_000);
    let after = Footprint::now();
    assert!(
        after.resident_kib <= before.resident_kib + 512,
        "{before:?}, then {after:?}"
    );
    // A few threads that have come meanwhile have three each; what each call leaves behind would be hundreds.
    assert!(
        after.mappings <= before.mappings + 16,
        "{before:?}, then {after:?}"
    );
    // A few connections that are kept for later are no leak.
    assert!(
        after.descriptors <= before.descriptors + 4,
        "{before:?}, then {after:?}"
    );
}

/// From the crash of a server to its return nothing is lost but time.
pub(in crate::provider) fn restarted_server<F: Faulty>() {
    let mut faulty = F::new(Server::Own);
    let wrapped = Wrapped::by(faulty.provider());
    faulty.kill_server();
    let error = faulty.provider().unwrap_many(&[&wrapped.stanza]).unwrap_err();
    assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
    let status = faulty.provider().status();
    assert!(matches!(status, ProviderStatus::Unreachable(_)), "{status}");
    faulty.start_server();
    let began = Instant::now();
    loop {
        faulty.probe();
        match faulty.provider().status() {
            ProviderStatus::Ready => break,
            status => assert!(began.elapsed() < Duration::from_secs(60), "{status}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    wrapped.assert_opened_by(faulty.provider());
}

pub(in crate::provider) fn killed_connection<F: Faulty>() {
    let faulty = F::new(Server::Shared);
    let wrapped = Wrapped::by(faulty.provider());
    for _ in 0..10 {
        faulty.cut();
        wrapped.assert_opened_by(faulty.provider());
        assert_eq!(faulty.provider().status(), ProviderStatus::Ready);
    }
}

pub(in crate::provider) fn slow_server<F: Faulty>() {
    let faulty = F::new(Server::Shared);
    let wrapped = Wrapped::by(faulty.provider());
    faulty.be(Manner::Stalled);
    let began = Instant::now();
    let error = faulty.provider().unwrap_many(&[&wrapped.stanza]).unwrap_err();
    let took = began.elapsed();
    assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
    assert!(took >= F::TIMEOUT.mul_f32(0.9), "{took:?}");
    assert!(took < F::TIMEOUT + Duration::from_secs(3), "{took:?}");
    let status = faulty.provider().status();
    assert!(matches!(status, ProviderStatus::Unreachable(_)), "{status}");
    faulty.be(Manner::Forward);
    wrapped.assert_opened_by(faulty.provider());
    assert_eq!(faulty.provider().status(), ProviderStatus::Ready);
}

#[derive(Debug)]
struct Footprint {
    resident_kib: usize,
    mappings: usize,
    descriptors: usize,
}

impl Footprint {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let resident = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        Self {
            resident_kib: resident.split_whitespace().nth(1).unwrap().parse().unwrap(),
            mappings: std::fs::read_to_string("/proc/self/maps")
                .unwrap()
                .lines()
                .count(),
            descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        }
    }
}

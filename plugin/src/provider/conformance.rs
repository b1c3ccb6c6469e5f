//! What every key provider must do, run against each for real.
//!
//! A new kind implements [`Fixture`] and gets its line of `conformance!` at the end.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use super::kmip::Mode;
use super::kmip::fixture::Kmip;
use super::native::NativeProvider;
use super::transit::TransitProvider;
use super::transit::bao::{Bao, secret};
use super::{KekScope, KeyProvider, ProviderError, ProviderStatus};
use crate::envelope::{Binding, EnvelopeId, KekId, ObjectKind, Payload, ProviderId, Stanza, VmId};
use crate::keystore::Keystore;
use crate::secret::{Dek, SecretBytes};

/// A provider of one kind with all that it needs around it, `Ready` when made.
pub(super) trait Fixture: Sync {
    /// How many stanzas the leak test unwraps with one call: more where a call is a round trip.
    const UNWRAPS_PER_CALL: usize = 4;

    /// Runs `case`, in surroundings that a process can't give itself where the kind needs such.
    fn around(case: fn()) {
        case();
    }

    /// A new one, which has nothing in common with any other.
    fn new() -> Self;

    fn provider(&self) -> &dyn KeyProvider;

    /// What unlocks it.
    fn credential(&self) -> SecretBytes;

    /// What a restart of the daemon does to it; it must be unlocked then.
    fn restart(&mut self);

    /// A well-formed name of a KEK that it never made.
    fn unknown_kek(&self) -> KekId;
}

struct Native {
    dir: tempfile::TempDir,
    provider: Option<NativeProvider>,
}

impl Native {
    fn keystore(dir: &tempfile::TempDir) -> Arc<Keystore> {
        Arc::new(Keystore::open(dir.path()).unwrap())
    }
}

impl Fixture for Native {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = "main".parse().unwrap();
        let passphrase = SecretBytes::take(&mut b"credential".to_vec()).unwrap();
        let provider = NativeProvider::create(Self::keystore(&dir), &name, &passphrase).unwrap();
        let backup = provider.backup(None).unwrap();
        provider.confirm_backup(backup.generation).unwrap();
        Self {
            dir,
            provider: Some(provider),
        }
    }

    fn provider(&self) -> &dyn KeyProvider {
        self.provider.as_ref().unwrap()
    }

    fn credential(&self) -> SecretBytes {
        SecretBytes::take(&mut b"credential".to_vec()).unwrap()
    }

    fn restart(&mut self) {
        self.provider = None;
        let keystore = Self::keystore(&self.dir);
        let record = keystore.providers().unwrap().remove(0);
        self.provider = Some(NativeProvider::open(keystore, &record).unwrap());
    }

    fn unknown_kek(&self) -> KekId {
        KekId(format!("v2:vm:{}", VmId::random()))
    }
}

/// A transit engine with a key per VM, and an AppRole with the policy that the manual gives.
struct Transit {
    /// Ends with the last fixture.
    _bao: Arc<Bao>,
    keystore: Arc<Keystore>,
    secret_id: String,
    provider: Option<TransitProvider>,
    _dir: tempfile::TempDir,
}

impl Transit {
    fn with(scope: &str) -> Self {
        let (bao, dir) = (Bao::shared(), tempfile::tempdir().unwrap());
        let keystore = Native::keystore(&dir);
        let mount = bao.engine();
        let (role_id, secret_id) = bao.approle(&bao.policy(&mount), "1h", "2h");
        let settings = serde_json::json!({
            "address": bao.address, "mount": mount, "kek_scope": scope, "timeout_ms": 20000,
            "auth": {"method": "approle", "role_id": role_id}
        });
        let settings = serde_json::from_value(settings).unwrap();
        let provider = TransitProvider::create(&keystore, &"vault".parse().unwrap(), settings).unwrap();
        provider.unlock(&secret(&secret_id)).unwrap();
        Self {
            _bao: bao,
            keystore,
            secret_id,
            provider: Some(provider),
            _dir: dir,
        }
    }
}

impl Fixture for Transit {
    fn new() -> Self {
        Self::with("vm")
    }

    fn provider(&self) -> &dyn KeyProvider {
        self.provider.as_ref().unwrap()
    }

    fn credential(&self) -> SecretBytes {
        secret(&self.secret_id)
    }

    fn restart(&mut self) {
        self.provider = None;
        let record = self.keystore.providers().unwrap().remove(0);
        self.provider = Some(TransitProvider::open(&record).unwrap());
    }

    fn unknown_kek(&self) -> KekId {
        KekId(format!("virtseal-{}:v1", VmId::random()))
    }
}

/// The same with one shared key and a derived context for each VM.
struct TransitShared(Transit);

impl Fixture for TransitShared {
    fn new() -> Self {
        Self(Transit::with("provider"))
    }

    fn provider(&self) -> &dyn KeyProvider {
        self.0.provider()
    }

    fn credential(&self) -> SecretBytes {
        self.0.credential()
    }

    fn restart(&mut self) {
        self.0.restart();
    }

    fn unknown_kek(&self) -> KekId {
        KekId(format!("virtseal-{}/{}:v1", VmId::random(), VmId::random()))
    }
}

impl Fixture for Kmip {
    const UNWRAPS_PER_CALL: usize = 40;

    fn new() -> Self {
        Self::new()
    }

    fn provider(&self) -> &dyn KeyProvider {
        self.provider()
    }

    fn credential(&self) -> SecretBytes {
        SecretBytes::take(&mut Self::CREDENTIAL.as_bytes().to_vec()).unwrap()
    }

    fn restart(&mut self) {
        self.restart();
    }

    fn unknown_kek(&self) -> KekId {
        KekId("4711".to_owned())
    }
}

/// Whose KEKs never leave the server.
struct KmipServer(Kmip);

impl Fixture for KmipServer {
    fn new() -> Self {
        Self(Kmip::with(true, |settings| settings.mode = Mode::Server))
    }

    fn provider(&self) -> &dyn KeyProvider {
        self.0.provider()
    }

    fn credential(&self) -> SecretBytes {
        Fixture::credential(&self.0)
    }

    fn restart(&mut self) {
        self.0.restart();
    }

    fn unknown_kek(&self) -> KekId {
        self.0.unknown_kek()
    }
}

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

fn wraps_and_unwraps<F: Fixture>() {
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

fn has_one_kek_per_scope<F: Fixture>() {
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

fn batch_comes_back_in_order<F: Fixture>() {
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

fn one_bad_stanza_fails_the_batch<F: Fixture>() {
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

fn payload_serves_its_binding_only<F: Fixture>() {
    let fixture = F::new();
    let wrapped = Wrapped::by(fixture.provider());
    let opened = fixture.provider().unwrap_many(&[&wrapped.stanza]).unwrap();
    opened[0].dek(&wrapped.binding).unwrap();
    assert!(opened[0].dek(&binding()).is_err());
}

fn every_changed_byte_is_refused<F: Fixture>() {
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

fn stanza_put_under_another_kek_is_refused<F: Fixture>() {
    let fixture = F::new();
    let (one, other) = (Wrapped::by(fixture.provider()), Wrapped::by(fixture.provider()));
    let error = refusal(fixture.provider(), &one.stanza, |stanza| {
        stanza.kek = other.stanza.kek;
    });
    assert!(matches!(error, ProviderError::Tampered), "{error:?}");
}

fn unknown_kek_and_mechanism_are_named<F: Fixture>() {
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

fn stanza_of_another_provider_is_refused<F: Fixture>() {
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

fn locked_refuses_everything<F: Fixture>() {
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
    assert!(matches!(provider.destroy_kek(kek), Err(ProviderError::Locked)));
    let wrong = SecretBytes::take(&mut b"not it".to_vec()).unwrap();
    assert!(matches!(
        provider.unlock(&wrong),
        Err(ProviderError::WrongCredential | ProviderError::WrongPin(_))
    ));
    assert_eq!(provider.status(), ProviderStatus::Locked);
    provider.unlock(&fixture.credential()).unwrap();
    assert_eq!(provider.status(), ProviderStatus::Ready);
    wrapped.assert_opened_by(provider);
}

fn restart_locks_and_loses_nothing<F: Fixture>() {
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

fn lock_during_use_is_clean<F: Fixture>() {
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

fn eight_threads_get_what_they_asked_for<F: Fixture>() {
    let fixture = F::new();
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                for _ in 0..25 {
                    Wrapped::by(fixture.provider()).assert_opened_by(fixture.provider());
                }
            });
        }
    });
}

fn destroy_receipt_is_true<F: Fixture>() {
    let fixture = F::new();
    let provider = fixture.provider();
    let wrapped = Wrapped::by(provider);
    let receipt = provider.destroy_kek(&wrapped.stanza.kek).unwrap();
    assert_eq!(receipt.kek, wrapped.stanza.kek);
    assert!(!receipt.observed.is_empty());
    assert_eq!(
        provider.unwrap_many(&[&wrapped.stanza]).is_err(),
        receipt.destroyed
    );
    assert!(provider.destroy_kek(&fixture.unknown_kek()).is_err());
}

/// In a process of its own: other tests' memory would count.
fn many_unwraps_leave_nothing_behind<F: Fixture>() {
    const ALONE: &str = "VIRTSEAL_TEST_ALONE";
    if std::env::var_os(ALONE).is_none() {
        let name = std::thread::current().name().unwrap().to_owned();
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--nocapture", "--test-threads=1"])
            .env(ALONE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let complained = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}{complained}"
        );
        return;
    }
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
    assert!(
        after.mappings <= before.mappings + 4,
        "{before:?}, then {after:?}"
    );
    // A few connections that are kept for later are no leak.
    assert!(
        after.descriptors <= before.descriptors + 4,
        "{before:?}, then {after:?}"
    );
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

macro_rules! conformance {
    ($kind:ident, $fixture:ty: $($case:ident),* $(,)?) => {
        mod $kind {
            $(
                #[test]
                fn $case() {
                    <$fixture as super::Fixture>::around(super::$case::<$fixture>);
                }
            )*
        }
    };
    ($kind:ident, $fixture:ty) => {
        conformance! { $kind, $fixture:
            wraps_and_unwraps,
            has_one_kek_per_scope,
            batch_comes_back_in_order,
            one_bad_stanza_fails_the_batch,
            payload_serves_its_binding_only,
            every_changed_byte_is_refused,
            stanza_put_under_another_kek_is_refused,
            unknown_kek_and_mechanism_are_named,
            stanza_of_another_provider_is_refused,
            locked_refuses_everything,
            restart_locks_and_loses_nothing,
            lock_during_use_is_clean,
            eight_threads_get_what_they_asked_for,
            destroy_receipt_is_true,
            many_unwraps_leave_nothing_behind,
        }
    };
}

conformance!(native, super::Native);
conformance!(transit, super::Transit);
conformance!(transit_shared, super::TransitShared);
conformance!(softhsm, crate::provider::pkcs11::stand::SoftHsm);
conformance!(softhsm_key_wrap, crate::provider::pkcs11::stand::SoftHsmKeyWrap);
conformance!(softhsm_cbc, crate::provider::pkcs11::stand::SoftHsmCbc);
conformance!(nss, crate::provider::pkcs11::stand::Nss);
conformance!(kmip, super::Kmip);
// Where it differs from the one above.
conformance! { kmip_server, super::KmipServer:
    wraps_and_unwraps,
    batch_comes_back_in_order,
    one_bad_stanza_fails_the_batch,
    payload_serves_its_binding_only,
    every_changed_byte_is_refused,
    stanza_put_under_another_kek_is_refused,
    unknown_kek_and_mechanism_are_named,
    stanza_of_another_provider_is_refused,
    destroy_receipt_is_true,
}

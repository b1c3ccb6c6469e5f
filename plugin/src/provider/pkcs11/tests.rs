use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use cryptoki::object::{Attribute, AttributeType};
use virtseal_testkit::servers::{Removed, SoftHsm, token_directory};

use super::stand::{
    Host, PATIENCE, PIN, SOFTHSM, directory, next_label, secret, softhsm_settings, with_softhsm,
};
use super::*;
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, VmId};
use crate::provider::PinRefusal;
use crate::secret::Dek;
use crate::store::Stores;

fn payload() -> Payload {
    let binding = Binding {
        envelope: EnvelopeId::random(),
        vm: VmId::random(),
        kind: ObjectKind::Disk,
    };
    Payload::bind(&Dek::random().unwrap(), &binding).unwrap()
}

pub(super) fn wrapped(provider: &Pkcs11Provider) -> (Payload, Stanza) {
    let payload = payload();
    let kek = provider.create_kek(&KekScope::Vm(VmId::random())).unwrap();
    let stanza = provider.wrap(&kek, &payload).unwrap();
    (payload, stanza)
}

pub(super) fn assert_opens(provider: &Pkcs11Provider, (payload, stanza): &(Payload, Stanza)) {
    let opened = provider.unwrap_many(&[stanza]).unwrap();
    assert_eq!(opened[0].expose(), payload.expose());
}

pub(super) fn refusal(provider: &Pkcs11Provider, (_, stanza): &(Payload, Stanza)) -> ProviderError {
    provider.unwrap_many(&[stanza]).expect_err("it must not open")
}

fn wrong_pin(result: Result<(), ProviderError>) -> PinRefusal {
    match result {
        Err(ProviderError::WrongPin(refusal)) => refusal,
        other => panic!("{other:?}"),
    }
}

fn pkcs11_tool(args: &[&str]) -> String {
    let output = Command::new("pkcs11-tool")
        .args(["--module", SOFTHSM])
        .args(args)
        .output()
        .expect("pkcs11-tool: install opensc");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn change_pin(label: &str, old: &str, new: &str) {
    let login = ["--token-label", label, "--login", "--pin", old];
    pkcs11_tool(&[&login[..], &["--change-pin", "--new-pin", new]].concat());
}

fn has_seen_a_wrong_pin(label: &str) -> bool {
    let slots = pkcs11_tool(&["--list-slots"]);
    let token = slots.split("token label").find(|token| {
        let line = token.lines().next().unwrap_or_default();
        line.trim_start_matches([' ', ':']) == label
    });
    token.expect("the token is listed").contains("user PIN count low")
}

#[test]
fn wrong_pin_is_sent_once() {
    with_softhsm("ALL", || {
        let label = next_label();
        let host = Host::with(softhsm_settings(&label));
        let provider = host.pkcs11();
        let sealed = wrapped(provider);
        assert_eq!(
            wrong_pin(provider.unlock(&secret("not it"))),
            PinRefusal::UnlockedByAnother
        );
        assert_opens(provider, &sealed);
        provider.lock();
        // SoftHSM raises its flag with the first wrong PIN, and takes it down with the right one.
        assert_eq!(
            wrong_pin(provider.unlock(&secret("not it"))),
            PinRefusal::FewTries
        );
        assert_eq!(provider.status(), ProviderStatus::Locked);
        assert!(has_seen_a_wrong_pin(&label));
        provider.unlock(&secret(PIN)).unwrap();
        assert!(!has_seen_a_wrong_pin(&label));
        provider.lock();
        assert_eq!(
            wrong_pin(provider.unlock(&secret("not it"))),
            PinRefusal::KnownToBeWrong
        );
        assert!(!has_seen_a_wrong_pin(&label));
        provider.unlock(&secret(PIN)).unwrap();
        assert_opens(provider, &sealed);
        assert_eq!(provider.status(), ProviderStatus::Ready);
    });
}

/// What the conformance suite runs.
pub(in crate::provider) fn token_taken_out_and_put_back(mechanisms: &str) {
    with_softhsm(mechanisms, || {
        let label = next_label();
        let host = Host::with(softhsm_settings(&label));
        let other = Host::with(softhsm_settings(&next_label()));
        let (sealed, elsewhere) = (wrapped(host.pkcs11()), wrapped(other.pkcs11()));
        for _ in 0..3 {
            let removed = Removed::take(&directory(), &label).unwrap();
            let error = refusal(host.pkcs11(), &sealed);
            assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
            assert!(matches!(host.pkcs11().status(), ProviderStatus::Unreachable(_)));
            assert_opens(other.pkcs11(), &elsewhere);
            removed.put_back().unwrap();
            host.pkcs11().link.get().allow_reset();
            assert_opens(host.pkcs11(), &sealed);
            assert_eq!(host.pkcs11().status(), ProviderStatus::Ready);
        }
    });
}

/// A session that has not used a KEK before has to look for it.
#[test]
fn token_taken_out_before_its_kek_was_used_is_not_an_unknown_kek() {
    with_softhsm("ALL", || {
        let label = next_label();
        let mut host = Host::with(softhsm_settings(&label));
        let sealed = wrapped(host.pkcs11());
        for _ in 0..2 {
            host.reopen(PATIENCE);
            let provider = host.pkcs11();
            provider.unlock(&secret(PIN)).unwrap();
            let removed = Removed::take(&directory(), &label).unwrap();
            let error = refusal(provider, &sealed);
            assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
            assert!(matches!(provider.status(), ProviderStatus::Unreachable(_)));
            let error = provider.create_kek(&KekScope::Vm(VmId::random())).unwrap_err();
            assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
            removed.put_back().unwrap();
            assert_opens(provider, &sealed);
            assert_eq!(provider.status(), ProviderStatus::Ready);
        }
    });
}

#[test]
fn probe_notices_what_nobody_asked_for() {
    with_softhsm("ALL", || {
        let label = next_label();
        let host = Host::with(softhsm_settings(&label));
        let sealed = wrapped(host.pkcs11());
        let removed = Removed::take(&directory(), &label).unwrap();
        host.pkcs11().probe();
        assert!(matches!(host.pkcs11().status(), ProviderStatus::Unreachable(_)));
        removed.put_back().unwrap();
        host.pkcs11().probe();
        assert_eq!(host.pkcs11().status(), ProviderStatus::Ready);
        assert_opens(host.pkcs11(), &sealed);
    });
}

#[test]
fn token_that_comes_after_its_pin_is_logged_in_to() {
    with_softhsm("ALL", || {
        let label = next_label();
        let mut host = Host::with(softhsm_settings(&label));
        let sealed = wrapped(host.pkcs11());
        host.reopen(PATIENCE);
        let provider = host.pkcs11();
        let removed = Removed::take(&directory(), &label).unwrap();
        provider.link.get().allow_reset();
        assert!(matches!(
            provider.unlock(&secret(PIN)),
            Err(ProviderError::Unreachable(_))
        ));
        assert!(matches!(provider.status(), ProviderStatus::Unreachable(_)));
        removed.put_back().unwrap();
        provider.probe();
        assert_eq!(provider.status(), ProviderStatus::Ready);
        assert_opens(provider, &sealed);
    });
}

#[test]
fn pin_changed_meanwhile_locks_after_one_try() {
    with_softhsm("ALL", || {
        let label = next_label();
        let host = Host::with(softhsm_settings(&label));
        let provider = host.pkcs11();
        let sealed = wrapped(provider);
        let removed = Removed::take(&directory(), &label).unwrap();
        refusal(provider, &sealed);
        removed.put_back().unwrap();
        change_pin(&label, PIN, "another one");
        assert!(matches!(refusal(provider, &sealed), ProviderError::WrongPin(_)));
        assert_eq!(provider.status(), ProviderStatus::Locked);
        assert!(matches!(refusal(provider, &sealed), ProviderError::Locked));
        assert_eq!(
            wrong_pin(provider.unlock(&secret(PIN))),
            PinRefusal::KnownToBeWrong
        );
        provider.unlock(&secret("another one")).unwrap();
        assert_opens(provider, &sealed);
    });
}

#[test]
fn another_token_of_that_label_never_sees_the_pin() {
    with_softhsm("ALL", || {
        let label = next_label();
        let host = Host::with(softhsm_settings(&label));
        let sealed = wrapped(host.pkcs11());
        let _removed = Removed::take(&directory(), &label).unwrap();
        SoftHsm::make_in(&directory(), &label).unwrap();
        let error = refusal(host.pkcs11(), &sealed);
        assert!(error.to_string().contains("is another one"), "{error}");
    });
}

/// SoftHSM reads a key's file before it uses the key; opening a FIFO waits for a writer, for ever.
struct Hanging {
    file: PathBuf,
    saved: PathBuf,
    pipe: PathBuf,
}

impl Hanging {
    fn on_keys_of(label: &str) -> Vec<Self> {
        let files = fs::read_dir(token_directory(&directory(), label).unwrap()).unwrap();
        let files = files.map(|entry| entry.unwrap().path());
        files
            .filter(|path| {
                path.extension().is_some_and(|end| end == "object") && !path.ends_with("token.object")
            })
            .map(Self::on)
            .collect()
    }

    fn on(file: PathBuf) -> Self {
        let hanging = Self {
            saved: file.with_extension("saved"),
            pipe: file.with_extension("pipe"),
            file,
        };
        nix::unistd::mkfifo(&hanging.pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::rename(&hanging.file, &hanging.saved).unwrap();
        fs::hard_link(&hanging.pipe, &hanging.file).unwrap();
        hanging
    }

    fn let_go(self) {
        fs::rename(&self.saved, &self.file).unwrap();
        // Nobody may be waiting at this one.
        let _ = fs::OpenOptions::new()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&self.pipe);
    }
}

/// What the conformance suite runs.
pub(in crate::provider) fn hanging_module(mechanisms: &str) {
    with_softhsm(mechanisms, || {
        let label = next_label();
        let mut host = Host::with(softhsm_settings(&label));
        let sealed = wrapped(host.pkcs11());
        let deadline = Duration::from_millis(700);
        host.reopen(deadline);
        let provider = host.pkcs11();
        provider.unlock(&secret(PIN)).unwrap();
        assert_opens(provider, &sealed);
        let hanging = Hanging::on_keys_of(&label);

        let began = Instant::now();
        let error = refusal(provider, &sealed);
        assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
        assert!(began.elapsed() >= deadline && began.elapsed() < deadline + PATIENCE);
        std::thread::sleep(Duration::from_millis(50));
        // From now on nobody waits, a start least of all.
        let again = Instant::now();
        for _ in 0..100 {
            assert!(matches!(
                refusal(provider, &sealed),
                ProviderError::Unreachable(_)
            ));
        }
        assert!(again.elapsed() < deadline, "{:?}", again.elapsed());
        let status = provider.status();
        assert!(status.to_string().contains("has not answered for"), "{status}");

        hanging.into_iter().for_each(Hanging::let_go);
        let began = Instant::now();
        while provider.unwrap_many(&[&sealed.1]).is_err() {
            assert!(began.elapsed() < PATIENCE, "{}", provider.status());
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_opens(provider, &sealed);
        assert_eq!(provider.status(), ProviderStatus::Ready);
    });
}

#[test]
fn lock_does_not_wait_for_a_hanging_module() {
    with_softhsm("ALL", || {
        let label = next_label();
        let mut host = Host::with(softhsm_settings(&label));
        let sealed = wrapped(host.pkcs11());
        host.reopen(Duration::from_millis(500));
        let provider = host.pkcs11();
        provider.unlock(&secret(PIN)).unwrap();
        assert_opens(provider, &sealed);
        let hanging = Hanging::on_keys_of(&label);
        refusal(provider, &sealed);
        let began = Instant::now();
        provider.lock();
        assert!(began.elapsed() < Duration::from_secs(20));
        assert_eq!(provider.status(), ProviderStatus::Locked);
        assert!(matches!(refusal(provider, &sealed), ProviderError::Locked));
        hanging.into_iter().for_each(Hanging::let_go);
        let began = Instant::now();
        while let Err(error) = provider.unlock(&secret(PIN)) {
            assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
            assert!(began.elapsed() < PATIENCE, "{error}");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_opens(provider, &sealed);
    });
}

#[test]
fn keks_of_every_size_stay_in_the_token() {
    with_softhsm("ALL", || {
        for bits in [128, 192, 256] {
            let mut settings = softhsm_settings(&next_label());
            settings.key_bits = KeyBits::try_from(bits).unwrap();
            settings.kek_scope = ScopeSetting::Provider;
            let host = Host::with(settings);
            let provider = host.pkcs11();
            let kek = provider.create_kek(&KekScope::Provider).unwrap();
            let owner = provider.owner();
            let seen = provider.link.get().call(move |token| {
                let found = kek::find(token, &owner, &kek)?;
                let read = |which| Ok::<_, TokenError>(token.session.get_attributes(found.key, &[which])?);
                Ok([
                    read(AttributeType::Sensitive)?,
                    read(AttributeType::AlwaysSensitive)?,
                    read(AttributeType::NeverExtractable)?,
                    read(AttributeType::Local)?,
                    read(AttributeType::Verify)?,
                    read(AttributeType::Wrap)?,
                    read(AttributeType::Derive)?,
                    read(AttributeType::ValueLen)?,
                    read(AttributeType::Value)?,
                ]
                .concat())
            });
            let length = cryptoki::types::Ulong::try_from(bits as usize / 8).unwrap();
            // And no value.
            assert_eq!(
                seen.unwrap(),
                [
                    Attribute::Sensitive(true),
                    Attribute::AlwaysSensitive(true),
                    Attribute::NeverExtractable(true),
                    Attribute::Local(true),
                    Attribute::Verify(false),
                    Attribute::Wrap(false),
                    Attribute::Derive(false),
                    Attribute::ValueLen(length),
                ]
            );
            assert_opens(provider, &wrapped(provider));
        }
    });
}

#[test]
fn one_kek_serves_all_vms_unless_told_otherwise() {
    with_softhsm("ALL", || {
        let mut settings = softhsm_settings(&next_label());
        settings.kek_scope = ScopeSetting::Provider;
        let host = Host::with(settings);
        let (one, two) = (wrapped(host.pkcs11()), wrapped(host.pkcs11()));
        assert_eq!(one.1.kek, two.1.kek);
        assert_eq!(one.1.mechanism, "AES-GCM");
        let opened = host.pkcs11().unwrap_many(&[&one.1, &two.1]).unwrap();
        assert_eq!(opened[1].expose(), two.0.expose());
    });
}

#[test]
fn token_brings_its_provider_to_another_host() {
    with_softhsm("ALL", || {
        let mut settings = softhsm_settings(&next_label());
        settings.kek_scope = ScopeSetting::Provider;
        let lost = Host::with(settings.clone());
        let (id, sealed) = (lost.pkcs11().id(), wrapped(lost.pkcs11()));
        drop(lost);
        let new = Host::with(settings);
        assert_eq!(new.pkcs11().id(), id);
        assert_opens(new.pkcs11(), &sealed);
    });
}

#[test]
fn token_that_can_do_nothing_is_refused_by_what_it_lacks() {
    with_softhsm("CKM_AES_KEY_GEN,CKM_AES_CBC_PAD,CKM_SHA256", || {
        let state = tempfile::tempdir().unwrap();
        let stores = Stores::open(state.path()).unwrap();
        for scope in [ScopeSetting::Vm, ScopeSetting::Provider] {
            let mut settings = softhsm_settings("kek-0");
            settings.kek_scope = scope;
            let name = "hsm".parse().unwrap();
            let pin = secret(PIN);
            let made =
                Pkcs11Provider::create_within(PATIENCE, &stores.providers(), &name, settings, &pin, &[]);
            let text = crate::model::problem::chain(&made.err().unwrap());
            for part in ["AES-256", "CKM_AES_GCM", "CKM_AES_KEY_WRAP", "CKM_SHA256_HMAC"] {
                assert!(text.contains(part), "{text}");
            }
            assert!(!text.contains("CKM_AES_CBC_PAD"), "{text}");
        }
        assert!(stores.keystore.providers().unwrap().whole().unwrap().is_empty());
    });
}

#[test]
fn adding_says_what_is_wrong_and_leaves_nothing() {
    with_softhsm("ALL", || {
        let state = tempfile::tempdir().unwrap();
        let stores = Stores::open(state.path()).unwrap();
        let add = |settings: Pkcs11Settings, pin: &str| {
            let name = "hsm".parse().unwrap();
            let made = Pkcs11Provider::create_within(
                PATIENCE,
                &stores.providers(),
                &name,
                settings,
                &secret(pin),
                &[],
            );
            crate::model::problem::chain(&made.err().unwrap())
        };
        let no_token = add(softhsm_settings("nobody"), PIN);
        assert!(no_token.contains("no token labelled 'nobody'"), "{no_token}");
        assert!(no_token.contains("'kek-0' (serial "), "{no_token}");
        let mut no_module = softhsm_settings("kek-0");
        no_module.module = "/etc/passwd".into();
        assert!(add(no_module, PIN).contains("can't load the PKCS#11 module: /etc/passwd"));
        assert!(add(softhsm_settings("kek-0"), "not it").contains("does not accept this PIN"));
        let mut no_slot = softhsm_settings("kek-0");
        no_slot.token = TokenChoice::Slot(7);
        assert!(add(no_slot, PIN).contains("no token in slot 7"));
        assert!(stores.keystore.providers().unwrap().whole().unwrap().is_empty());
    });
}

#[test]
fn tokens_are_found_by_serial_and_slot() {
    with_softhsm("ALL", || {
        let label = next_label();
        let mut settings = softhsm_settings(&label);
        settings.kek_scope = ScopeSetting::Provider;
        let host = Host::with(settings.clone());
        let sealed = wrapped(host.pkcs11());
        let serial = host.pkcs11().link.get().serial().unwrap().clone();
        let slot = host.pkcs11().link.get().find().unwrap();
        drop(host);
        for token in [TokenChoice::Serial(serial), TokenChoice::Slot(slot)] {
            let mut settings = settings.clone();
            settings.token = token;
            assert_opens(Host::with(settings).pkcs11(), &sealed);
        }
    });
}

#[test]
fn token_serves_one_provider_per_host() {
    with_softhsm("ALL", || {
        let state = tempfile::tempdir().unwrap();
        let stores = Stores::open(state.path()).unwrap();
        let add = |name: &str, label: &str, others: &[Arc<Pkcs11Provider>]| {
            let (name, settings, pin) = (name.parse().unwrap(), softhsm_settings(label), secret(PIN));
            Pkcs11Provider::create_within(PATIENCE, &stores.providers(), &name, settings, &pin, others)
        };
        let one = [Arc::new(add("one", "kek-0", &[]).unwrap())];
        assert!(matches!(add("two", "kek-0", &one), Err(Pkcs11Error::TokenInUse(name)) if name == "one"));
        add("two", "kek-1", &one).unwrap();
    });
}

/// Templates are wishes for some modules, so the searches here are as wide as theirs may be.
#[test]
fn objects_of_others_are_not_taken_for_a_kek() {
    with_softhsm("ALL", || {
        let label = next_label();
        let host = Host::with(softhsm_settings(&label));
        let provider = host.pkcs11();
        let (one, other) = (wrapped(provider), wrapped(provider));
        let owner = provider.owner();
        let (kek, foreign) = (one.1.kek.clone(), other.1.kek.clone());
        let found = provider.link.get().call(move |token| {
            let mut keys = Vec::new();
            for id in [&kek, &foreign] {
                keys.push(kek::find(token, &owner, id)?.key);
            }
            kek::is_told_from_others(&token.session, &keys, &kek)
        });
        assert!(found.unwrap());
    });
}

#[test]
fn key_that_may_not_decrypt_is_no_kek() {
    with_softhsm("ALL", || {
        let label = next_label();
        let mut host = Host::with(softhsm_settings(&label));
        let sealed = wrapped(host.pkcs11());
        let (owner, id) = (host.pkcs11().owner(), sealed.1.kek.clone());
        let changed = host.pkcs11().link.get().call(move |token| {
            let key = kek::find(token, &owner, &id)?.key;
            let forbidden = [Attribute::Decrypt(false), Attribute::Encrypt(false)];
            Ok(token.writable()?.update_attributes(key, &forbidden)?)
        });
        changed.unwrap();
        host.reopen(PATIENCE);
        host.pkcs11().unlock(&secret(PIN)).unwrap();
        let error = refusal(host.pkcs11(), &sealed);
        assert!(
            matches!(&error, ProviderError::KekUnusable { why, .. } if why.contains("decrypt")),
            "{error:?}"
        );
    });
}

#[test]
fn retired_kek_does_not_come_back_when_its_successor_vanishes() {
    with_softhsm("ALL", || {
        let host = Host::with(softhsm_settings(&next_label()));
        let provider = host.pkcs11();
        let vm = VmId::random();
        let scope = KekScope::Vm(vm);
        let old = provider.create_kek(&scope).unwrap();
        let new = provider.rotate_kek(&scope, &old).unwrap();
        assert!(provider.destroy_kek(&new, vm).unwrap().destroyed);
        // As long as nothing says that it was retired, it is the one in use.
        assert_eq!(provider.create_kek(&scope).unwrap(), old);
        host.retire(vm, &old);
        let next = provider.create_kek(&scope).unwrap();
        assert!(next != old && next != new && next.0 < old.0);
        assert_eq!(provider.create_kek(&scope).unwrap(), next);
        assert_eq!(provider.rotate_kek(&scope, &old).unwrap(), next);
    });
}

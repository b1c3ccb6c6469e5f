use super::*;
use crate::api::words;
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeError, EnvelopeId, KekId, ObjectKind, Stanza, VmId};
use crate::model::problem::{Code, Problem};
use crate::provider::kind::Kind;
use crate::provider::native::NativeProvider;
use crate::provider::transit::TransitSettings;
use crate::provider::{
    ErrorClass, KekScope, KeyProvider, PinRefusal, ProviderError, ProviderName, ProviderStatus,
};
use crate::secret::SecretBytes;
use crate::store::{DeletedProvider, HostStore, Stores};

const DEADLINE: Duration = Duration::from_secs(30);

fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}

fn name(text: &str) -> ProviderName {
    text.parse().unwrap()
}

fn binding() -> Binding {
    Binding {
        envelope: EnvelopeId::random(),
        vm: VmId::random(),
        kind: ObjectKind::Disk,
    }
}

fn ready(recipients: &Recipients, as_name: &str) -> Arc<NativeProvider> {
    let provider = recipients
        .add_by(|table| NativeProvider::create(table, &name(as_name), &secret("p")))
        .unwrap();
    provider
        .confirm_backup(provider.backup(None).unwrap().generation)
        .unwrap();
    provider
}

struct Host {
    dir: tempfile::TempDir,
    recipients: Recipients,
    main: Arc<NativeProvider>,
    spare: Arc<NativeProvider>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let recipients = Recipients::open(&Stores::open(dir.path()).unwrap(), DEADLINE).unwrap();
        let (main, spare) = (ready(&recipients, "main"), ready(&recipients, "spare"));
        Self {
            dir,
            recipients,
            main,
            spare,
        }
    }

    /// An envelope that main and spare open, in this order.
    fn sealed_twice(&self) -> (Envelope, Dek) {
        let binding = binding();
        let (envelope, dek) = self.recipients.seal_new(None, &binding).unwrap();
        let payload = Payload::bind(&dek, &binding).unwrap();
        let mut envelope = envelope.into_envelope();
        envelope
            .stanzas
            .push(wrapped_by(self.spare.as_ref(), &binding, &payload));
        (envelope, dek)
    }
}

#[test]
fn sealed_by_the_default_and_opened_again() {
    let host = Host::new();
    let (envelope, dek) = host.recipients.seal_new(None, &binding()).unwrap();
    assert_eq!(envelope.stanzas[0].provider, host.main.id());
    assert_eq!(
        host.recipients.open_envelope(&envelope).unwrap().expose(),
        dek.expose()
    );
    let (envelope, _) = host.recipients.seal_new(Some("spare"), &binding()).unwrap();
    assert_eq!(envelope.stanzas[0].provider_name, "spare");
    let (envelope, _) = host
        .recipients
        .seal_new(Some(&host.spare.id().to_string()), &binding())
        .unwrap();
    assert_eq!(envelope.stanzas[0].provider, host.spare.id());
}

#[test]
fn batch_keeps_its_order() {
    let host = Host::new();
    let mut sealed = Vec::new();
    for nth in 0..9 {
        let provider = if nth % 2 == 0 { "main" } else { "spare" };
        sealed.push(host.recipients.seal_new(Some(provider), &binding()).unwrap());
    }
    let envelopes: Vec<_> = sealed.iter().map(|(envelope, _)| &**envelope).collect();
    let deks = host.recipients.open_all(&envelopes).unwrap();
    for (opened, (_, dek)) in deks.iter().zip(&sealed) {
        assert_eq!(opened.expose(), dek.expose());
    }
    assert!(host.recipients.open_all(&[]).unwrap().is_empty());
}

#[test]
fn second_provider_opens_when_the_first_can_not() {
    let host = Host::new();
    let (mut envelope, dek) = host.sealed_twice();
    host.main.lock();
    assert_eq!(
        host.recipients.open_envelope(&envelope).unwrap().expose(),
        dek.expose()
    );
    host.main.unlock(&secret("p")).unwrap();
    envelope.stanzas[0].body[20] ^= 1;
    let whole = host.sealed_twice();
    let deks = host.recipients.open_all(&[&whole.0, &envelope]).unwrap();
    assert_eq!(deks[0].expose(), whole.1.expose());
    assert_eq!(deks[1].expose(), dek.expose());
}

#[test]
fn all_or_nothing_and_every_reason_is_told() {
    let host = Host::new();
    let (good, _) = host.recipients.seal_new(Some("spare"), &binding()).unwrap();
    let (mut bad, _) = host.sealed_twice();
    bad.stanzas[1].body[20] ^= 1;
    host.main.lock();
    let error = host.recipients.open_all(&[&good, &bad]).unwrap_err();
    assert_eq!(error.binding, bad.binding());
    assert_eq!(error.code(), Code::Locked);
    assert_eq!(error.next(), Some(Advice::UnlockProvider("main".to_owned())));
    let text = Problem::from(error).to_string();
    for part in [
        &bad.id.to_string(),
        "provider 'main' is locked",
        "recipient 'spare' can't open",
        "unlock main",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn swapped_envelope_is_refused() {
    let host = Host::new();
    let (one, _) = host.recipients.seal_new(None, &binding()).unwrap();
    let (other, _) = host.recipients.seal_new(None, &binding()).unwrap();
    let mut one = one.into_envelope();
    one.stanzas.clone_from(&other.stanzas);
    let error = host.recipients.open_envelope(&one).unwrap_err();
    assert!(matches!(
        error.attempts[0].why,
        Refusal::Binding(EnvelopeError::BindingMismatch(_))
    ));
    assert_eq!(
        (error.code(), error.next()),
        (Code::Failed, Some(Advice::RestoreEnvelope(one.vm.to_string())))
    );
}

#[test]
fn unknown_provider_is_named_by_its_hint_in_one_line() {
    let (host, elsewhere) = (Host::new(), Host::new());
    let (envelope, _) = elsewhere.recipients.seal_new(None, &binding()).unwrap();
    let mut envelope = envelope.into_envelope();
    let error = host.recipients.open_envelope(&envelope).unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(
        error.next().unwrap().to_string(),
        format!(
            "virtseal provider restore main --input FILE (native) or virtseal provider add KIND main --id {} … (others)",
            elsewhere.main.id()
        )
    );
    assert!(
        error
            .to_string()
            .contains(&format!("provider 'main' ({}) is not known", elsewhere.main.id()))
    );

    envelope.stanzas[0].provider_name = "x\n\u{1b}[2J; rm -rf /".repeat(20);
    let error = host.recipients.open_envelope(&envelope).unwrap_err();
    assert!(!error.to_string().contains(char::is_control));
    assert!(error.to_string().len() < 500);
    assert!(matches!(error.next(), Some(Advice::BringBack { name, .. }) if name == "NAME"));
}

#[test]
fn deleted_provider_comes_back_as_its_kind_does() {
    let host = Host::new();
    let (envelope, _) = host.recipients.seal_new(None, &binding()).unwrap();
    let id = host.main.id();
    host.recipients.delete(id, crate::store::IfNeeded::Goes).unwrap();
    let error = host.recipients.open_envelope(&envelope).unwrap_err();
    assert_eq!(
        error.next().unwrap().to_string(),
        "virtseal provider restore main --input FILE"
    );
    let kmip = DeletedProvider {
        id,
        name: "main".to_owned(),
        kind: "kmip".to_owned(),
        deleted: 0,
    };
    assert_eq!(
        error.with_deleted(&[kmip]).next().unwrap().to_string(),
        format!("virtseal provider add kmip main --id {id} …")
    );
}

/// One of each.
fn every_refusal() -> Vec<ProviderError> {
    let text = || "x".to_owned();
    let kek = || KekId("7".into());
    let mut all = vec![
        ProviderError::Locked,
        ProviderError::LockedBecause(text()),
        ProviderError::LockedByPin,
        ProviderError::IdentityDamaged(text()),
        ProviderError::NotBackedUp,
        ProviderError::WrongCredential,
        ProviderError::UnknownKek(kek()),
        ProviderError::UnknownMechanism(text()),
        ProviderError::Unreachable(text()),
        ProviderError::NotTrusted(text()),
        ProviderError::NotSignedByOurs(text()),
        ProviderError::ServerSealed,
        ProviderError::CredentialRefused(text()),
        ProviderError::Trouble(text()),
        ProviderError::BesideTheQuestion(text()),
        ProviderError::RefusesUs(text()),
        ProviderError::TurnedAway(text()),
        ProviderError::CertificateRefused(text()),
        ProviderError::CertificateWanted(text()),
        ProviderError::KekUnusable {
            kek: kek(),
            why: text(),
        },
        ProviderError::Refused(text()),
        ProviderError::Unusable(text()),
        ProviderError::internal("x")("y"),
        ProviderError::Tampered,
    ];
    for refusal in [
        PinRefusal::Wrong,
        PinRefusal::FewTries,
        PinRefusal::LastTry,
        PinRefusal::NotTheLastTry,
        PinRefusal::Blocked,
        PinRefusal::NoneIsSet,
        PinRefusal::KnownToBeWrong,
        PinRefusal::UnlockedByAnother,
    ] {
        all.push(ProviderError::WrongPin(refusal));
    }
    all
}

#[test]
fn every_refusal_of_a_start_names_what_leads_out() {
    for error in every_refusal() {
        let attempt = |why| Attempt {
            provider: ProviderId::random(),
            name: "kms".to_owned(),
            kind: Kind::named("kmip"),
            why,
            last_answer: None,
        };
        let shown = format!("{error:?}");
        let is_about_trust = error.class() == ErrorClass::Client
            && !matches!(error, ProviderError::WrongPin(_) | ProviderError::WrongCredential)
            || matches!(error, ProviderError::IdentityDamaged(_));
        let (code, next) = attempt(Refusal::Provider(Arc::new(error))).advice(VmId::random());
        let next = next
            .unwrap_or_else(|| panic!("{shown} leads nowhere"))
            .to_string();
        assert!(
            !next.contains("delete") && !next.contains("--force"),
            "{shown}: {next}"
        );
        assert_eq!(code == Code::NotTrusted, is_about_trust, "{shown}");
    }
}

#[test]
fn unknown_kek_says_where_to_look() {
    let (code, next) = ProviderError::UnknownKek(KekId("7".into())).advice("kms", None);
    assert_eq!(code, Code::Failed);
    assert_eq!(
        next.unwrap().to_string(),
        "restore that key at 'kms' from a backup, if there is one; virtseal provider show kms"
    );
}

#[test]
fn refusals_to_seal_say_what_to_run() {
    let dir = tempfile::tempdir().unwrap();
    let recipients = Recipients::open(&Stores::open(dir.path()).unwrap(), DEADLINE).unwrap();
    let failure =
        |provider: Option<&str>| Problem::from(recipients.seal_new(provider, &binding()).unwrap_err());
    assert_eq!(failure(None).code, Code::NotFound);
    let provider = recipients
        .add_by(|table| NativeProvider::create(table, &name("main"), &secret("p")))
        .unwrap();
    assert_eq!(
        failure(None).to_string(),
        "provider 'main' has not been backed up. Next: virtseal provider backup main --output FILE"
    );
    provider.lock();
    assert_eq!(failure(None).code, Code::Locked);
    assert_eq!(
        failure(Some("nobody")).to_string(),
        "there is no key provider \"nobody\" on this host. Next: virtseal provider list"
    );
}

#[test]
fn restart_keeps_everything_and_locks_it() {
    let host = Host::new();
    let (envelope, dek) = host.sealed_twice();
    host.recipients
        .set_default(&host.recipients.find("spare").unwrap())
        .unwrap();
    let Host {
        dir,
        recipients,
        main,
        spare,
    } = host;
    drop((recipients, main, spare));
    let stores = Stores::open(dir.path()).unwrap();
    let later = ProviderId::random();
    stores
        .keystore
        .insert_provider(later, "hsm", "hologram", &serde_json::json!({"slot": 3}))
        .unwrap();
    let recipients = Recipients::open(&stores, DEADLINE).unwrap();
    let states: Vec<_> = recipients
        .providers()
        .iter()
        .map(|known| {
            format!(
                "{} {} {}",
                known.provider().name(),
                known.kind(),
                words(&known.provider().status().state())
            )
        })
        .collect();
    assert_eq!(
        states,
        [
            "hsm hologram degraded",
            "main native locked",
            "spare native locked"
        ]
    );
    assert_eq!(recipients.default_provider().unwrap().provider().name(), "spare");
    assert_eq!(
        recipients.open_envelope(&envelope).unwrap_err().code(),
        Code::Locked
    );
    recipients
        .find("spare")
        .unwrap()
        .provider()
        .unlock(&secret("p"))
        .unwrap();
    assert_eq!(
        recipients.open_envelope(&envelope).unwrap().expose(),
        dek.expose()
    );
    let error = recipients.seal_new(Some("hsm"), &binding()).unwrap_err();
    assert!(
        Problem::from(error)
            .to_string()
            .contains("does not know the kind \"hologram\"")
    );
    assert_eq!(stores.keystore.providers().unwrap().whole().unwrap().len(), 3);
}

#[test]
fn native_row_without_a_root_key_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    stores
        .keystore
        .insert_provider(ProviderId::random(), "main", "native", &serde_json::json!({}))
        .unwrap();
    let recipients = Recipients::open(&stores, DEADLINE).unwrap();
    let status = recipients.find("main").unwrap().provider().status();
    assert!(status.to_string().contains("root key is missing"), "{status}");
}

#[test]
fn restored_provider_opens_at_once() {
    let (here, there) = (Host::new(), tempfile::tempdir().unwrap());
    let (envelope, dek) = here.recipients.seal_new(None, &binding()).unwrap();
    let backup = here.main.backup(Some(&secret("b"))).unwrap();
    let recipients = Recipients::open(&Stores::open(there.path()).unwrap(), DEADLINE).unwrap();
    recipients
        .add_by(|table| {
            NativeProvider::restore(
                table,
                &name("from-a"),
                &backup.bytes,
                Some(&secret("b")),
                &secret("q"),
            )
        })
        .unwrap();
    assert_eq!(
        recipients.open_envelope(&envelope).unwrap().expose(),
        dek.expose()
    );
    assert!(recipients.seal_new(None, &binding()).is_ok());
}

#[test]
fn transit_rows_come_back_locked_or_with_what_is_wrong_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let id = ProviderId::random();
    let settings =
        |address: &str| serde_json::json!({"address": address, "auth": {"method": "token"}, "id": id});
    let recipients = Recipients::open(&stores, DEADLINE).unwrap();
    let good = TransitSettings::parse(&settings("https://192.0.2.1:8200").to_string()).unwrap();
    recipients
        .add_by(|table| {
            crate::provider::transit::TransitProvider::create(table, &name("vault"), good.clone())
        })
        .unwrap();
    assert!(matches!(
        recipients.add_by(|table| crate::provider::transit::TransitProvider::create(
            table,
            &name("other"),
            good
        )),
        Err(StoreError::ProviderExists { .. })
    ));
    let bad = settings("http://kms.example:8200");
    stores
        .keystore
        .insert_provider(ProviderId::random(), "bad", "transit", &bad)
        .unwrap();
    // Nothing listens there: neither the start nor `status` asks.
    let recipients = Recipients::open(&stores, DEADLINE).unwrap();
    let vault = recipients.find("vault").unwrap();
    assert_eq!((vault.kind(), vault.provider().id()), ("transit", id));
    assert_eq!(vault.provider().status(), ProviderStatus::Locked);
    assert_eq!(recipients.default_provider().unwrap().provider().id(), id);
    let status = recipients.find("bad").unwrap().provider().status().to_string();
    assert!(status.contains("in the clear"), "{status}");
}

fn wrapped_by(provider: &dyn KeyProvider, binding: &Binding, payload: &Payload) -> Stanza {
    let kek = provider.create_kek(&KekScope::Vm(binding.vm)).unwrap();
    provider.wrap(&kek, payload).unwrap()
}

#[test]
fn whoever_changes_the_providers_the_roster_follows() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let recipients = Recipients::open(&stores, DEADLINE).unwrap();
    let main = recipients
        .add_by(|table| NativeProvider::create(table, &name("main"), &secret("p")))
        .unwrap();
    main.confirm_backup(1).unwrap();
    let names = || -> Vec<String> {
        let providers = recipients.providers();
        let names = providers.iter().map(|known| known.provider().name().to_owned());
        names.collect()
    };
    // As another host of a fleet would, or another part of this daemon.
    let other = ProviderId::random();
    stores
        .keystore
        .insert_provider(other, "hsm", "hologram", &serde_json::json!({}))
        .unwrap();
    assert_eq!(names(), ["hsm", "main"]);
    assert_eq!(recipients.default_provider().unwrap().provider().name(), "main");
    stores.keystore.set_default_provider(other).unwrap();
    assert_eq!(recipients.default_provider().unwrap().provider().name(), "hsm");
    // Who was there stays what it was: unlocked.
    let known = recipients.find("main").unwrap();
    assert_eq!(known.provider().status(), ProviderStatus::Ready);
    stores
        .keystore
        .delete_provider(other, crate::store::IfNeeded::Goes)
        .unwrap();
    assert_eq!(names(), ["main"]);
    assert!(recipients.default_provider().is_none());
    // A row that can't be read takes nobody away.
    let raw = rusqlite::Connection::open(dir.path().join(HostStore::FILE)).unwrap();
    raw.execute("UPDATE providers SET settings = '{'", []).unwrap();
    let third = ProviderId::random();
    stores
        .keystore
        .insert_provider(third, "kms", "hologram", &serde_json::json!({}))
        .unwrap();
    assert_eq!(names(), ["kms", "main"]);
    assert_eq!(known.provider().status(), ProviderStatus::Ready);
    // Nor does it keep who was deleted.
    stores
        .keystore
        .delete_provider(third, crate::store::IfNeeded::Goes)
        .unwrap();
    assert_eq!(names(), ["main"]);
}

/// What a new kind takes is a folder and a row: nothing here, and nothing in the daemon, has its name.
#[test]
fn a_kind_is_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let recipients = Recipients::open(&stores, DEADLINE).unwrap();
    let kind = Kind::named("dummy").unwrap();
    recipients.add(kind, &name("new"), "{}", None).unwrap();
    let (envelope, dek) = recipients.seal_new(Some("new"), &binding()).unwrap();
    drop(recipients);
    let again = Recipients::open(&stores, DEADLINE).unwrap();
    let provider = again.find("new").unwrap();
    assert!(provider.kind() == "dummy" && provider.keeps_keks());
    assert_eq!(again.open_envelope(&envelope).unwrap().expose(), dek.expose());
    again
        .delete(provider.provider().id(), crate::store::IfNeeded::Goes)
        .unwrap();
    assert!(again.find("new").is_err() && Kind::named("another").is_none());
}

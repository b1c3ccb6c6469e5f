//! Against a real OpenBao: what only a transit engine can show. The rest is in the conformance suite.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::bao::{Bao, Proxy, secret};
use super::*;
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, VmId};
use crate::provider::kind::Kind;
use crate::secret::Dek;
use crate::store::Stores;

/// Unlocked, with the manual's policy.
struct Host {
    provider: Tested,
    mount: String,
    policy: String,
}

/// A provider with a keystore of its own.
pub(super) struct Tested {
    provider: Arc<TransitProvider>,
    _dir: tempfile::TempDir,
}

impl Tested {
    pub(super) fn new(settings: TransitSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stores = Stores::open(dir.path()).unwrap();
        let table = stores.providers();
        let provider = TransitProvider::create(&table, &"vault".parse().unwrap(), settings).unwrap();
        let provider = Arc::new(provider);
        watch(Arc::downgrade(&provider));
        Self { provider, _dir: dir }
    }
}

/// As the watch of the recipients does.
fn watch(provider: std::sync::Weak<TransitProvider>) {
    std::thread::spawn(move || {
        while let Some(found) = provider.upgrade() {
            found.probe();
            let within = found.probe_within().unwrap_or(Duration::from_millis(100));
            drop(found);
            std::thread::sleep(within.min(Duration::from_millis(500)));
        }
    });
}

impl std::ops::Deref for Tested {
    type Target = TransitProvider;

    fn deref(&self) -> &TransitProvider {
        &self.provider
    }
}

fn provider(settings: Value) -> Tested {
    let settings: TransitSettings = serde_json::from_value(settings).unwrap();
    Tested::new(settings.validated().unwrap())
}

impl Host {
    /// With a token that `request` describes, by way of `address`.
    fn with_token(bao: &Bao, address: &str, request: Value) -> Self {
        let mount = bao.engine();
        let policy = bao.policy(&mount);
        let provider = provider(json!({
            "address": address, "mount": mount, "auth": {"method": "token"}, "timeout_ms": 5000
        }));
        provider.unlock(&secret(&bao.token(&policy, request))).unwrap();
        Self {
            provider,
            mount,
            policy,
        }
    }

    fn new(bao: &Bao) -> Self {
        Self::with_token(bao, &bao.address, json!({"period": "1h"}))
    }

    fn with_approle(bao: &Bao, ttl: &str, max_ttl: &str) -> Self {
        let mount = bao.engine();
        let policy = bao.policy(&mount);
        let (role_id, secret_id) = bao.approle(&policy, ttl, max_ttl);
        let provider = provider(json!({
            "address": bao.address, "mount": mount, "auth": {"method": "approle", "role_id": role_id}
        }));
        provider.unlock(&secret(&secret_id)).unwrap();
        Self {
            provider,
            mount,
            policy,
        }
    }

    fn token(&self) -> String {
        let session = self.provider.link.get().state().session.clone().unwrap();
        String::from_utf8(session.token.expose().to_vec()).unwrap()
    }

    fn opens(&self, sealed: &Sealed) {
        sealed.opened_by(&self.provider);
    }

    fn refusal(&self, sealed: &Sealed) -> ProviderError {
        self.provider.unwrap_many(&[&sealed.stanza]).unwrap_err()
    }
}

pub(super) struct Sealed {
    vm: VmId,
    payload: Payload,
    pub(super) stanza: Stanza,
}

impl Sealed {
    pub(super) fn of(provider: &TransitProvider, vm: VmId) -> Self {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm,
            kind: ObjectKind::Disk,
        };
        let payload = Payload::bind(&Dek::random().unwrap(), &binding).unwrap();
        let kek = provider.create_kek(&KekScope::Vm(vm)).unwrap();
        let stanza = provider.wrap(&kek, &payload).unwrap();
        Self { vm, payload, stanza }
    }

    fn by(host: &Host) -> Self {
        Self::of(&host.provider, VmId::random())
    }

    pub(super) fn opened_by(&self, provider: &TransitProvider) {
        let opened = provider.unwrap_many(&[&self.stanza]).unwrap();
        assert_eq!(opened[0].expose(), self.payload.expose());
    }
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "it takes too long until {what}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn eight_disks_of_a_vm_cost_one_round_trip() {
    let bao = Bao::shared();
    let proxy = Proxy::before(&bao);
    let host = Host::with_token(&bao, &proxy.address, json!({"period": "1h"}));
    let vm = VmId::random();
    let disks: Vec<_> = (0..8).map(|_| Sealed::of(&host.provider, vm)).collect();
    let stanzas: Vec<_> = disks.iter().map(|disk| &disk.stanza).collect();
    let before = proxy.requests();
    let opened = host.provider.unwrap_many(&stanzas).unwrap();
    assert_eq!(proxy.requests(), before + 1);
    for (payload, disk) in opened.iter().zip(&disks) {
        assert_eq!(payload.expose(), disk.payload.expose());
    }
}

#[test]
fn sealed_and_restarted_server_is_locked_until_it_is_unsealed() {
    let bao = Bao::stored(tempfile::tempdir().unwrap());
    let host = Host::new(&bao);
    let sealed = Sealed::by(&host);
    bao.ask("POST", "sys/seal", &json!({}));
    let error = host.refusal(&sealed);
    assert!(matches!(error, ProviderError::ServerSealed), "{error:?}");
    let (code, next) = error.advice("vault", Kind::named("transit"));
    assert_eq!(code, crate::model::problem::Code::Locked);
    assert!(next.unwrap().to_string().contains("operator unseal"));
    assert_eq!(host.provider.status(), ProviderStatus::Locked);
    assert!(host.provider.warnings()[0].what.contains("is sealed"));
    bao.unseal();
    host.opens(&sealed);
    assert_eq!(host.provider.status(), ProviderStatus::Ready);

    bao.kill();
    assert!(matches!(host.refusal(&sealed), ProviderError::Unreachable(_)));
    assert!(matches!(host.provider.status(), ProviderStatus::Unreachable(_)));
    bao.start();
    bao.wait_for_listener();
    assert!(matches!(host.refusal(&sealed), ProviderError::ServerSealed));
    bao.unseal();
    host.provider.probe();
    assert_eq!(host.provider.status(), ProviderStatus::Ready);
    host.opens(&sealed);
}

#[test]
fn unlock_of_an_absent_server_is_remembered_and_a_lock_forgets_it() {
    let bao = Bao::stored(tempfile::tempdir().unwrap());
    let host = Host::new(&bao);
    let sealed = Sealed::by(&host);
    let token = secret(&host.token());
    host.provider.lock();
    bao.kill();
    assert!(matches!(
        host.provider.unlock(&token),
        Err(ProviderError::Unreachable(_))
    ));
    assert!(matches!(host.provider.status(), ProviderStatus::Unreachable(_)));
    bao.start();
    bao.wait_for_listener();
    bao.unseal();
    // Nobody asks: the background finds it.
    wait_for("it is ready", || host.provider.status() == ProviderStatus::Ready);
    host.opens(&sealed);
    host.provider.lock();
    bao.kill();
    assert!(host.provider.unlock(&token).is_err());
    host.provider.lock();
    assert_eq!(host.provider.status(), ProviderStatus::Locked);
    assert!(matches!(host.refusal(&sealed), ProviderError::Locked));
}

#[test]
fn expired_and_revoked_tokens_are_not_trusted_until_there_is_a_new_one() {
    let bao = Bao::shared();
    let host = Host::with_token(&bao, &bao.address, json!({"ttl": "2s", "renewable": false}));
    let sealed = Sealed::by(&host);
    let is_warned = || matches!(host.provider.status(), ProviderStatus::Degraded(why) if why.contains("can't be renewed"));
    wait_for("the end of the token is announced", is_warned);
    wait_for("the token ends", || {
        host.provider.unwrap_many(&[&sealed.stanza]).is_err()
    });
    let expect_refusal = || {
        let error = host.refusal(&sealed);
        assert!(matches!(error, ProviderError::CredentialRefused(_)), "{error:?}");
        let (code, next) = error.advice("vault", Kind::named("transit"));
        assert_eq!(code, crate::model::problem::Code::NotTrusted);
        assert_eq!(next.unwrap().to_string(), "virtseal provider unlock vault");
        assert!(matches!(host.provider.status(), ProviderStatus::NotTrusted(_)));
    };
    expect_refusal();
    let token = bao.token(&host.policy, json!({"period": "1h"}));
    host.provider.unlock(&secret(&token)).unwrap();
    host.opens(&sealed);
    assert_eq!(host.provider.status(), ProviderStatus::Ready);
    bao.ask("POST", "auth/token/revoke", &json!({"token": token}));
    expect_refusal();
}

#[test]
fn revoked_login_is_repeated_and_a_revoked_role_is_not_hammered() {
    let bao = Bao::shared();
    let host = Host::with_approle(&bao, "1h", "2h");
    let sealed = Sealed::by(&host);
    let first = host.token();
    bao.ask("POST", "auth/token/revoke", &json!({"token": first}));
    host.opens(&sealed);
    assert_ne!(host.token(), first);
    bao.ask("DELETE", "sys/auth/approle", &Value::Null);
    assert!(matches!(
        host.refusal(&sealed),
        ProviderError::CredentialRefused(_) | ProviderError::Refused(_) | ProviderError::Unusable(_)
    ));
}

#[test]
fn token_outlives_its_time_by_renewal_and_its_maximum_by_a_new_login() {
    let bao = Bao::shared();
    let host = Host::with_approle(&bao, "3s", "6s");
    let sealed = Sealed::by(&host);
    let first = host.token();
    let until = Instant::now() + Duration::from_secs(9);
    while Instant::now() < until {
        host.opens(&sealed);
        std::thread::sleep(Duration::from_millis(500));
    }
    assert_ne!(host.token(), first);
    assert_eq!(host.provider.status(), ProviderStatus::Ready);
}

#[test]
fn deleted_key_is_unknown_and_is_not_made_up_again() {
    let bao = Bao::shared();
    let host = Host::new(&bao);
    let sealed = Sealed::by(&host);
    let other = Sealed::by(&host);
    let kek = &sealed.stanza.kek;
    let receipt = host.provider.destroy_kek(kek, sealed.vm).unwrap();
    assert!(receipt.destroyed, "{receipt:?}");
    assert!(matches!(host.refusal(&sealed), ProviderError::UnknownKek(unknown) if unknown == *kek));
    let again = host.provider.wrap(kek, &sealed.payload).unwrap_err();
    assert!(matches!(again, ProviderError::UnknownKek(_)), "{again:?}");
    let both = host
        .provider
        .unwrap_many(&[&other.stanza, &sealed.stanza])
        .unwrap_err();
    assert!(matches!(both, ProviderError::UnknownKek(unknown) if unknown == *kek));
    assert_eq!(host.provider.status(), ProviderStatus::Ready);
}

#[test]
fn key_that_may_not_be_deleted_stays_and_the_receipt_says_so() {
    let bao = Bao::shared();
    let host = Host::new(&bao);
    let sealed = Sealed::by(&host);
    let policy = json!({"policy": format!(
        "path \"{0}/keys/virtseal-*\" {{ capabilities = [\"read\"] }} path \"{0}/decrypt/virtseal-*\" {{ capabilities = [\"update\"] }}",
        host.mount
    )});
    bao.ask("POST", &format!("sys/policies/acl/{}", host.policy), &policy);
    let receipt = host.provider.destroy_kek(&sealed.stanza.kek, sealed.vm).unwrap();
    assert!(!receipt.destroyed);
    assert!(receipt.observed.contains("deletion_allowed"), "{receipt:?}");
    host.opens(&sealed);
    let error = host
        .provider
        .create_kek(&KekScope::Vm(VmId::random()))
        .unwrap_err();
    assert!(
        matches!(&error, ProviderError::Refused(why) if why.contains("policy")),
        "{error:?}"
    );
}

#[test]
fn rotated_keys_open_the_old() {
    let bao = Bao::shared();
    let host = Host::new(&bao);
    let vm = VmId::random();
    let sealed = Sealed::of(&host.provider, vm);
    let old = &sealed.stanza.kek;
    let new = host.provider.rotate(old).unwrap();
    assert_eq!(new.0, old.0.replace(":v1", ":v2"));
    assert_eq!(host.provider.create_kek(&KekScope::Vm(vm)).unwrap(), new);
    host.opens(&sealed);
    // An old version is not the whole key.
    let receipt = host.provider.destroy_kek(old, vm).unwrap();
    assert!(
        !receipt.destroyed && receipt.observed.contains("trim"),
        "{receipt:?}"
    );
    let key = host.mount.clone() + "/keys/" + old.0.split(':').next().unwrap();
    bao.ask(
        "POST",
        &format!("{key}/config"),
        &json!({"min_decryption_version": 2}),
    );
    assert!(matches!(host.refusal(&sealed), ProviderError::KekUnusable { kek, .. } if kek == *old));
}

#[test]
fn derived_kek_is_not_destroyed_and_a_plain_key_is_not_shared() {
    let bao = Bao::shared();
    let mount = bao.engine();
    let policy = bao.policy(&mount);
    let shared = |key: &str| {
        let made = provider(json!({
            "address": bao.address, "mount": mount, "auth": {"method": "token"}, "kek_scope": "provider", "key": key
        }));
        made.unlock(&secret(&bao.token(&policy, json!({"period": "1h"}))))
            .unwrap();
        made
    };
    let provider = shared("virtseal-hosts");
    let sealed = Sealed::of(&provider, VmId::random());
    assert!(sealed.stanza.kek.0.starts_with("virtseal-hosts/"));
    let receipt = provider.destroy_kek(&sealed.stanza.kek, sealed.vm).unwrap();
    assert!(
        !receipt.destroyed && receipt.observed.contains("derived"),
        "{receipt:?}"
    );
    sealed.opened_by(&provider);

    bao.ask(
        "POST",
        &format!("{mount}/keys/virtseal-plain"),
        &json!({"derived": false}),
    );
    let error = shared("virtseal-plain")
        .create_kek(&KekScope::Provider)
        .unwrap_err();
    assert!(
        matches!(&error, ProviderError::Refused(why) if why.contains("derived=true")),
        "{error:?}"
    );
    bao.ask(
        "POST",
        &format!("{mount}/keys/virtseal-rsa"),
        &json!({"type": "rsa-2048"}),
    );
    let error = shared("virtseal-rsa")
        .create_kek(&KekScope::Provider)
        .unwrap_err();
    assert!(
        matches!(&error, ProviderError::Refused(why) if why.contains("rsa-2048")),
        "{error:?}"
    );
}

#[test]
fn namespace_is_where_engine_and_login_are() {
    let bao = Bao::shared();
    let namespace = format!("n-{}", uuid::Uuid::new_v4());
    bao.ask("POST", &format!("sys/namespaces/{namespace}"), &json!({}));
    bao.ask(
        "POST",
        &format!("{namespace}/sys/mounts/transit"),
        &json!({"type": "transit"}),
    );
    let inside =
        provider(json!({"address": bao.address, "namespace": namespace, "auth": {"method": "token"}}));
    let token = bao.ask(
        "POST",
        &format!("{namespace}/auth/token/create"),
        &json!({"policies": ["default"]}),
    );
    let token = secret(token["auth"]["client_token"].as_str().unwrap());
    inside.unlock(&token).unwrap();
    let outside = provider(json!({"address": bao.address, "auth": {"method": "token"}}));
    // The root token works everywhere; the engine is in the namespace only.
    inside.unlock(&secret("root")).unwrap();
    Sealed::of(&inside, VmId::random()).opened_by(&inside);
    outside.unlock(&secret("root")).unwrap();
    let error = outside.create_kek(&KekScope::Provider).unwrap_err();
    assert!(
        matches!(&error, ProviderError::Unusable(why) if why.contains("no handler")),
        "{error:?}"
    );
}

#[test]
fn stanza_can_not_reach_for_the_keys_of_others() {
    let bao = Bao::shared();
    let host = Host::new(&bao);
    let sealed = Sealed::by(&host);
    for kek in ["payroll:v1", "../sys/raw:v1", "virtseal-x/../y:v1", "a%2fb:v1"] {
        let mut stanza = sealed.stanza.clone();
        stanza.kek = KekId(kek.to_owned());
        let error = host.provider.unwrap_many(&[&stanza]).unwrap_err();
        assert!(matches!(error, ProviderError::UnknownKek(_)), "{kek}: {error:?}");
    }
}

#[test]
fn a_shared_key_is_made_once_and_its_restore_finds_its_place() {
    let bao = Bao::shared();
    let mount = bao.engine();
    let policy = bao.policy(&mount);
    let provider = provider(json!({
        "address": bao.address, "mount": mount, "auth": {"method": "token"}, "kek_scope": "provider"
    }));
    provider
        .unlock(&secret(&bao.token(&policy, json!({"period": "1h"}))))
        .unwrap();
    let sealed = Sealed::of(&provider, VmId::random());
    let key = KekName::parse(&sealed.stanza.kek).unwrap().key;
    // Somebody deletes it, with a backup at hand.
    let config = json!({"exportable": true, "allow_plaintext_backup": true, "deletion_allowed": true});
    bao.ask("POST", &format!("{mount}/keys/{key}/config"), &config);
    let backup = bao.ask("GET", &format!("{mount}/backup/{key}"), &json!(null))["data"]["backup"].clone();
    bao.ask("DELETE", &format!("{mount}/keys/{key}"), &json!(null));

    for vm in [sealed.vm, VmId::random()] {
        let error = provider.create_kek(&KekScope::Vm(vm)).unwrap_err();
        assert!(
            matches!(&error, ProviderError::Refused(why) if why.contains("restore it") && why.contains(key.as_str())),
            "{error:?}"
        );
    }
    let error = provider.unwrap_many(&[&sealed.stanza]).unwrap_err();
    assert!(matches!(error, ProviderError::UnknownKek(_)), "{error:?}");
    bao.ask(
        "POST",
        &format!("{mount}/restore/{key}"),
        &json!({"backup": backup}),
    );
    sealed.opened_by(&provider);
    assert_eq!(
        provider.create_kek(&KekScope::Vm(sealed.vm)).unwrap(),
        sealed.stanza.kek
    );
}

#[test]
fn a_deleted_key_of_a_vm_leaves_its_name_free_for_a_restore() {
    let bao = Bao::shared();
    let host = Host::new(&bao);
    let vm = VmId::random();
    let first = KekName::parse(&host.provider.create_kek(&KekScope::Vm(vm)).unwrap()).unwrap();
    assert!(
        first.key.as_str().starts_with(&format!("virtseal-{vm}-g1-")),
        "{first:?}"
    );
    bao.ask(
        "POST",
        &format!("{}/keys/{}/config", host.mount, first.key),
        &json!({"deletion_allowed": true}),
    );
    bao.ask(
        "DELETE",
        &format!("{}/keys/{}", host.mount, first.key),
        &json!(null),
    );
    let second = KekName::parse(&host.provider.create_kek(&KekScope::Vm(vm)).unwrap()).unwrap();
    assert!(
        second.key.as_str().starts_with(&format!("virtseal-{vm}-g2-")),
        "{second:?}"
    );
    assert_eq!(host.provider.create_kek(&KekScope::Vm(vm)).unwrap(), second.id());
}

#[test]
fn a_key_from_before_names_were_used_once_stays_in_use() {
    let bao = Bao::shared();
    let host = Host::new(&bao);
    let vm = VmId::random();
    bao.ask(
        "POST",
        &format!("{}/keys/virtseal-{vm}", host.mount),
        &json!({"type": "aes256-gcm96"}),
    );
    let kek = host.provider.create_kek(&KekScope::Vm(vm)).unwrap();
    assert_eq!(kek.0, format!("virtseal-{vm}:v1"));
}

#[test]
fn a_version_that_the_server_does_not_decrypt_any_more_names_the_setting() {
    let bao = Bao::shared();
    let host = Host::new(&bao);
    let sealed = Sealed::by(&host);
    host.provider.rotate(&sealed.stanza.kek).unwrap();
    let key = KekName::parse(&sealed.stanza.kek).unwrap().key;
    let config = format!("{}/keys/{key}/config", host.mount);
    bao.ask("POST", &config, &json!({"min_decryption_version": 2}));
    let error = host.refusal(&sealed);
    assert!(
        matches!(&error, ProviderError::KekUnusable { why, .. } if why.contains("min_decryption_version")),
        "{error:?}"
    );
    bao.ask("POST", &config, &json!({"min_decryption_version": 1}));
    host.opens(&sealed);
}

#[test]
fn a_mount_without_an_engine_is_not_ready() {
    let bao = Bao::shared();
    let mount = bao.engine();
    for wrong in [format!("{mount}-not"), "sys/policies".to_owned()] {
        let provider = provider(json!({"address": bao.address, "mount": wrong, "auth": {"method": "token"}}));
        let root = bao.token("root", json!({}));
        provider.unlock(&secret(&root)).unwrap();
        let status = provider.status();
        assert!(
            matches!(&status, ProviderStatus::Degraded(why) if why.contains(&wrong)),
            "{status:?}"
        );
    }
}

//! The kinds, each with what it needs around it.

use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::{Faulty, Fixture, Server};
use crate::model::envelope::{KekId, Stanza, VmId};
use crate::provider::kmip::fixture::Kmip;
use crate::provider::kmip::{self, KmipProvider, Mode};
use crate::provider::native::NativeProvider;
use crate::provider::pkcs11::stand;
use crate::provider::transit::TransitProvider;
use crate::provider::transit::bao::{Bao, Proxy, secret};
use crate::provider::{ChangeError, KeyProvider, SettingsChange};
use crate::secret::SecretBytes;
use crate::store::Stores;
use virtseal_testkit::servers::{Authority, Manner, Relay};

/// What a change of settings comes to, and whether it was recorded.
pub(in crate::provider) fn change(
    provider: &dyn KeyProvider,
    settings: &impl Serialize,
    credential: Option<&SecretBytes>,
    trial: Option<&[Stanza]>,
) -> (Result<(), ChangeError>, bool) {
    let recorded = Cell::new(false);
    let changed = provider.change(&SettingsChange {
        settings: &serde_json::to_value(settings).unwrap(),
        credential,
        trial,
        others: &[],
        record: &|| {
            recorded.set(true);
            Ok(())
        },
    });
    (changed, recorded.get())
}

pub(super) struct Native {
    dir: tempfile::TempDir,
    provider: Option<NativeProvider>,
}

impl Native {
    fn stores(dir: &tempfile::TempDir) -> Stores {
        Stores::open(dir.path()).unwrap()
    }
}

impl Fixture for Native {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let name = "main".parse().unwrap();
        let passphrase = SecretBytes::take(&mut b"credential".to_vec()).unwrap();
        let provider = NativeProvider::create(&Self::stores(&dir).providers(), &name, &passphrase).unwrap();
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
        let stores = Self::stores(&self.dir);
        let record = stores.keystore.providers().unwrap().whole().unwrap().remove(0);
        self.provider = Some(NativeProvider::open(&stores.providers(), &record).unwrap());
    }

    fn retire(&mut self) {
        let provider = self.provider.as_ref().unwrap();
        let generation = provider.rotate(&self.credential()).unwrap();
        provider.confirm_backup(generation).unwrap();
    }

    fn unknown_kek(&self) -> KekId {
        KekId(format!("v2:vm:{}", VmId::random()))
    }
}

/// How a transit provider logs in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Login {
    Token,
    AppRole,
    Certificate,
}

/// A transit engine, and a login with the policy that the manual gives.
pub(super) struct Transit {
    /// Ends with the last fixture.
    bao: Arc<Bao>,
    proxy: Option<Proxy>,
    stores: Stores,
    credential: String,
    /// Of a client that the server does not know.
    stranger: Option<String>,
    provider: Option<TransitProvider>,
    _dir: tempfile::TempDir,
}

impl Transit {
    fn with(scope: &str, login: Login) -> Self {
        let bao = match login {
            Login::Certificate => Bao::shared_tls(),
            _ => Bao::shared(),
        };
        Self::on(bao, login, |settings| settings["kek_scope"] = json!(scope))
    }

    /// By way of a proxy.
    fn faulty(server: Server, login: Login) -> Self {
        let directory = || tempfile::tempdir_in("/dev/shm").unwrap();
        let bao = match (server, login) {
            (Server::Own, Login::Certificate) => Arc::new(Bao::stored_tls(directory())),
            (Server::Own, _) => Arc::new(Bao::stored(directory())),
            (Server::Shared, Login::Certificate) => Bao::shared_tls(),
            (Server::Shared, _) => Bao::shared(),
        };
        let proxy = Proxy::before(&bao);
        let address = proxy.address.clone();
        let mut made = Self::on(bao, login, |settings| {
            settings["address"] = json!(address);
            settings["timeout_ms"] = json!(Self::TIMEOUT.as_millis());
        });
        made.proxy = Some(proxy);
        made
    }

    const TIMEOUT: Duration = Duration::from_millis(2_500);

    fn on(bao: Arc<Bao>, login: Login, change: impl FnOnce(&mut Value)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stores = Native::stores(&dir);
        let mount = bao.engine();
        let policy = bao.policy(&mount);
        let (auth, credential, stranger) = match login {
            Login::Token => {
                let token = bao.token(&policy, json!({"period": "1h"}));
                (json!({"method": "token"}), token, None)
            }
            Login::AppRole => {
                let (role_id, secret_id) = bao.approle(&policy, "1h", "2h");
                (json!({"method": "approle", "role_id": role_id}), secret_id, None)
            }
            Login::Certificate => {
                let hosts = Authority::named("hosts");
                let role = bao.certificate_role(&policy, &hosts.pem());
                let stranger = Authority::named("strangers").client("host1", 50).pem();
                let auth = json!({"method": "cert", "role": role});
                (auth, hosts.client("host1", 50).pem(), Some(stranger))
            }
        };
        let mut settings = json!({"address": bao.address, "mount": mount, "auth": auth, "timeout_ms": 20000});
        if login == Login::Certificate {
            settings["ca"] = json!(bao.ca());
        }
        change(&mut settings);
        let settings = serde_json::from_value(settings).unwrap();
        let provider =
            TransitProvider::create(&stores.providers(), &"vault".parse().unwrap(), settings).unwrap();
        provider.unlock(&secret(&credential)).unwrap();
        Self {
            bao,
            proxy: None,
            stores,
            credential,
            stranger,
            provider: Some(provider),
            _dir: dir,
        }
    }

    fn transit(&self) -> &TransitProvider {
        self.provider.as_ref().unwrap()
    }

    fn proxy(&self) -> &Proxy {
        self.proxy.as_ref().unwrap()
    }
}

macro_rules! transit {
    ($(#[$doc:meta])* $name:ident: $scope:literal, $login:ident, $unknown:literal) => {
        $(#[$doc])*
        pub(super) struct $name(Transit);

        impl Fixture for $name {
            const UNWRAPS_PER_CALL: usize = 40;

            fn new() -> Self {
                Self(Transit::with($scope, Login::$login))
            }

            fn provider(&self) -> &dyn KeyProvider {
                self.0.transit()
            }

            fn credential(&self) -> SecretBytes {
                secret(&self.0.credential)
            }

            fn wrong_credential(&self) -> SecretBytes {
                secret(self.0.stranger.as_deref().unwrap_or("not it"))
            }

            fn restart(&mut self) {
                self.0.provider = None;
                let record = self.0.stores.keystore.providers().unwrap().whole().unwrap().remove(0);
                self.0.provider = Some(TransitProvider::open(&self.0.stores.providers(), &record).unwrap());
            }

            fn unknown_kek(&self) -> KekId {
                KekId(format!($unknown, VmId::random()))
            }
        }
    };
}

macro_rules! faulty_transit {
    ($name:ident: $login:ident) => {
        pub(super) struct $name(Transit);

        impl Faulty for $name {
            const TIMEOUT: Duration = Transit::TIMEOUT;

            fn new(server: Server) -> Self {
                Self(Transit::faulty(server, Login::$login))
            }

            fn provider(&self) -> &dyn KeyProvider {
                self.0.transit()
            }

            fn probe(&self) {
                self.0.transit().probe();
            }

            fn kill_server(&mut self) {
                self.0.bao.kill();
                self.0.proxy().cut();
            }

            fn start_server(&mut self) {
                self.0.bao.start();
                self.0.bao.wait_for_listener();
                self.0.bao.unseal();
            }

            fn cut(&self) {
                self.0.proxy().cut();
            }

            fn be(&self, manner: Manner) {
                self.0.proxy().be(manner);
            }
        }
    };
}

transit!(
    /// A key per VM, used with a token.
    TransitToken: "vm", Token, "virtseal-{}:v1"
);
transit!(
    /// The same with an AppRole.
    TransitAppRole: "vm", AppRole, "virtseal-{}:v1"
);
transit!(
    /// The same over TLS, with a client's certificate.
    TransitCert: "vm", Certificate, "virtseal-{}:v1"
);
transit!(
    /// One shared key with a derived context for each VM.
    TransitShared: "provider", AppRole, "virtseal-{0}/{0}:v1"
);
faulty_transit!(TransitTokenFaulty: Token);
faulty_transit!(TransitAppRoleFaulty: AppRole);
faulty_transit!(TransitCertFaulty: Certificate);

impl Fixture for Kmip {
    const UNWRAPS_PER_CALL: usize = 100;
    const USES_PER_KEK: usize = 5;

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
pub(super) struct KmipServer(Kmip);

impl Fixture for KmipServer {
    const UNWRAPS_PER_CALL: usize = 50;
    const USES_PER_KEK: usize = 5;

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

/// A provider that reaches its server through a proxy.
struct BehindProxy {
    provider: KmipProvider,
    proxy: Relay,
    kmip: Kmip,
    _dir: tempfile::TempDir,
}

impl BehindProxy {
    const TIMEOUT: Duration = Duration::from_millis(2_500);

    fn with(mode: Mode) -> Self {
        let kmip = Kmip::with(false, |_| {});
        let proxy = Relay::to(kmip.server.port()).unwrap();
        let (provider, dir) = kmip.another(|settings| {
            settings.mode = mode;
            settings.endpoints = kmip::fixture::settings(&[proxy.port()]).endpoints;
            settings.timeout_ms = Self::TIMEOUT.as_millis().try_into().unwrap();
        });
        Self {
            provider,
            proxy,
            kmip,
            _dir: dir,
        }
    }
}

macro_rules! faulty_kmip {
    ($name:ident: $mode:ident) => {
        pub(super) struct $name(BehindProxy);

        impl Faulty for $name {
            const TIMEOUT: Duration = BehindProxy::TIMEOUT;

            fn new(_: Server) -> Self {
                Self(BehindProxy::with(Mode::$mode))
            }

            fn provider(&self) -> &dyn KeyProvider {
                &self.0.provider
            }

            fn probe(&self) {
                self.0.provider.probe();
            }

            fn kill_server(&mut self) {
                self.0.kmip.server.kill();
                self.0.proxy.cut();
            }

            fn start_server(&mut self) {
                self.0.kmip.server.run().unwrap();
            }

            fn cut(&self) {
                self.0.proxy.cut();
            }

            fn be(&self, manner: Manner) {
                self.0.proxy.be(manner).unwrap();
            }
        }
    };
}

faulty_kmip!(KmipFaulty: Local);
faulty_kmip!(KmipServerFaulty: Server);

macro_rules! pkcs11 {
    ($(#[$doc:meta])* $name:ident: $settings:ident, $around:expr) => {
        $(#[$doc])*
        pub(super) struct $name(stand::Host);

        impl Fixture for $name {
            fn around(case: fn()) {
                let around: fn(fn()) = $around;
                around(case);
            }

            fn new() -> Self {
                Self(stand::Host::with(stand::$settings(&stand::next_label())))
            }

            fn provider(&self) -> &dyn KeyProvider {
                self.0.pkcs11()
            }

            fn credential(&self) -> SecretBytes {
                secret(stand::PIN)
            }

            fn restart(&mut self) {
                self.0.reopen(stand::PATIENCE);
            }

            fn unknown_kek(&self) -> KekId {
                KekId(hex::encode(VmId::random().0.as_bytes()))
            }
        }
    };
}

pkcs11!(
    /// SoftHSM as it comes: AES-GCM.
    SoftHsm: softhsm_settings, |case| stand::with_softhsm("ALL", case)
);
pkcs11!(
    /// A token without AES-GCM: a session object, wrapped.
    SoftHsmKeyWrap: softhsm_settings, |case| stand::with_softhsm(stand::WITHOUT_GCM, case)
);
pkcs11!(
    /// A token with CBC and HMAC only.
    SoftHsmCbc: softhsm_settings,
    |case| stand::with_softhsm(stand::CBC_ONLY, case)
);
pkcs11!(
    /// Another module, by other people.
    Nss: nss_settings, stand::with_nss
);

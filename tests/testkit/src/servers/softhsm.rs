//! SoftHSM tokens in a directory of their own, which can be taken out and put back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::{directory, text};
use crate::SealedHost;

/// Of every token.
const SO_PIN: &str = "12345678";

/// The tokens. virtseald must be started by [`SoftHsm::start_daemon`] to see them.
pub struct SoftHsm {
    dir: TempDir,
}

impl SoftHsm {
    /// The user PIN of every token.
    pub const PIN: &str = "4 digits and more";
    /// The module.
    pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
    /// What `SOFTHSM2_CONF` names, in the directory of the tokens.
    pub const CONFIGURATION: &str = "softhsm2.conf";

    /// Without any token.
    ///
    /// # Errors
    /// The module is not installed.
    pub fn new() -> Result<Self> {
        ensure!(
            Path::new(Self::MODULE).is_file(),
            "{} is missing: install softhsm2",
            Self::MODULE
        );
        let dir = directory()?;
        Self::configure(dir.path(), "ALL")?;
        fs::write(dir.path().join("pin"), Self::PIN)?;
        Ok(Self { dir })
    }

    /// Makes `directory` one for tokens, which have these `mechanisms`, as SoftHSM writes them.
    ///
    /// # Errors
    /// It can't be written.
    pub fn configure(directory: &Path, mechanisms: &str) -> Result<()> {
        let tokens = directory.join("tokens");
        fs::create_dir(&tokens)?;
        let text = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.mechanisms = {mechanisms}\n",
            tokens.display()
        );
        Ok(fs::write(directory.join(Self::CONFIGURATION), text)?)
    }

    /// Makes a token in such a directory, with [`SoftHsm::PIN`].
    ///
    /// # Errors
    /// The tool is missing, or refuses.
    pub fn make_in(directory: &Path, label: &str) -> Result<()> {
        let output = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", label])
            .args(["--so-pin", SO_PIN, "--pin", Self::PIN])
            .env("SOFTHSM2_CONF", directory.join(Self::CONFIGURATION))
            .output()
            .context("softhsm2-util did not start: install softhsm2")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "softhsm2-util: {complaint}");
        Ok(())
    }

    /// What tells a program started through it where the tokens are: `env NAME=VALUE`.
    #[must_use]
    pub fn launcher(&self) -> [String; 2] {
        let configuration = self.dir.path().join(Self::CONFIGURATION);
        [
            "env".to_owned(),
            format!("SOFTHSM2_CONF={}", configuration.display()),
        ]
    }

    /// Starts virtseald where it sees the tokens.
    ///
    /// # Errors
    /// As [`SealedHost::start_daemon`].
    pub fn start_daemon(&self, sealed: &mut SealedHost) -> Result<()> {
        sealed.start_daemon_through(&self.launcher().each_ref().map(String::as_str))
    }

    /// A file with [`SoftHsm::PIN`].
    #[must_use]
    pub fn pin_file(&self) -> PathBuf {
        self.dir.path().join("pin")
    }

    /// Makes a token.
    ///
    /// # Errors
    /// The tool is missing, or refuses.
    pub fn make(&self, label: &str) -> Result<()> {
        Self::make_in(self.dir.path(), label)
    }

    /// What the security officer of the token `label` does with pkcs11-tool.
    ///
    /// # Errors
    /// The tool is missing, or refuses.
    pub fn tool(&self, label: &str, arguments: &[&str]) -> Result<()> {
        let output = Command::new("pkcs11-tool")
            .args(["--module", Self::MODULE, "--token-label", label])
            .args(["--so-pin", SO_PIN])
            .args(arguments)
            .env("SOFTHSM2_CONF", self.dir.path().join(Self::CONFIGURATION))
            .output()
            .context("pkcs11-tool did not start: install opensc")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "pkcs11-tool: {complaint}");
        Ok(())
    }

    /// Takes a token out of its slot.
    ///
    /// # Errors
    /// There is none of that label.
    pub fn remove(&self, label: &str) -> Result<Removed> {
        Removed::take(self.dir.path(), label)
    }

    /// Adds a provider for the token `label`, and leaves it unlocked.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn add_to(&self, sealed: &SealedHost, name: &str, label: &str) -> Result<()> {
        let pin = self.pin_file();
        let mut add = vec!["provider", "add", "pkcs11", name, "--module", Self::MODULE];
        add.extend(["--token-label", label, "--pin-file", text(&pin)?]);
        sealed.virtseal(&add)?.succeeded().map(drop)
    }

    /// Unlocks a provider with the PIN.
    ///
    /// # Errors
    /// When virtseal refuses.
    pub fn unlock(&self, sealed: &SealedHost, name: &str) -> Result<()> {
        let pin = self.pin_file();
        sealed
            .virtseal(&["provider", "unlock", name, "--pin-file", text(&pin)?])?
            .succeeded()
            .map(drop)
    }
}

/// Where SoftHSM keeps the token `label` of `directory`.
///
/// # Errors
/// There is none of that label.
pub fn token_directory(directory: &Path, label: &str) -> Result<PathBuf> {
    for entry in fs::read_dir(directory.join("tokens"))? {
        let token = entry?.path();
        // SoftHSM writes the label there.
        let object = fs::read(token.join("token.object")).unwrap_or_default();
        if memchr::memmem::find(&object, label.as_bytes()).is_some() {
            return Ok(token);
        }
    }
    anyhow::bail!("there is no token {label}")
}

/// A token that is not in its slot.
#[must_use]
pub struct Removed {
    from: PathBuf,
    to: PathBuf,
}

impl Removed {
    /// Takes the token `label` of `directory` out of its slot.
    ///
    /// # Errors
    /// There is none of that label.
    pub fn take(directory: &Path, label: &str) -> Result<Self> {
        let from = token_directory(directory, label)?;
        let to = directory.join(format!("removed-{label}"));
        fs::rename(&from, &to)?;
        Ok(Self { from, to })
    }

    /// Puts it back.
    ///
    /// # Errors
    /// Its place is taken.
    pub fn put_back(self) -> Result<()> {
        Ok(fs::rename(&self.to, &self.from)?)
    }
}

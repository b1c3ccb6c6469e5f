//! SoftHSM tokens in a directory of their own, which can be taken out and put back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::{directory, text};
use crate::SealedHost;

/// The tokens. virtseald must be started by [`SoftHsm::start_daemon`] to see them.
pub struct SoftHsm {
    dir: TempDir,
}

impl SoftHsm {
    /// The user PIN of every token.
    pub const PIN: &str = "4 digits and more";
    /// The module.
    pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";

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
        let tokens = dir.path().join("tokens");
        fs::create_dir(&tokens)?;
        let text = format!(
            "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n",
            tokens.display()
        );
        fs::write(dir.path().join("softhsm2.conf"), text)?;
        fs::write(dir.path().join("pin"), Self::PIN)?;
        Ok(Self { dir })
    }

    /// What tells a program started through it where the tokens are: `env NAME=VALUE`.
    #[must_use]
    pub fn launcher(&self) -> [String; 2] {
        let configuration = self.dir.path().join("softhsm2.conf");
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
        let output = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", label])
            .args(["--so-pin", "12345678", "--pin", Self::PIN])
            .env("SOFTHSM2_CONF", self.dir.path().join("softhsm2.conf"))
            .output()
            .context("softhsm2-util did not start: install softhsm2")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "softhsm2-util: {complaint}");
        Ok(())
    }

    /// Takes a token out of its slot.
    ///
    /// # Errors
    /// There is none of that label.
    pub fn remove(&self, label: &str) -> Result<Removed> {
        for entry in fs::read_dir(self.dir.path().join("tokens"))? {
            let from = entry?.path();
            let object = fs::read(from.join("token.object")).unwrap_or_default();
            if memchr::memmem::find(&object, label.as_bytes()).is_some() {
                let to = self.dir.path().join(format!("removed-{label}"));
                fs::rename(&from, &to)?;
                return Ok(Removed { from, to });
            }
        }
        anyhow::bail!("there is no token {label}")
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

/// A token that is not in its slot.
#[must_use]
pub struct Removed {
    from: PathBuf,
    to: PathBuf,
}

impl Removed {
    /// Puts it back.
    ///
    /// # Errors
    /// Its place is taken.
    pub fn put_back(self) -> Result<()> {
        Ok(fs::rename(&self.to, &self.from)?)
    }
}

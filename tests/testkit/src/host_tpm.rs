//! The TPM of a host: a swtpm in its namespace, which keeps its keys when it is switched off.

use std::fs;
use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result};
use openssl::base64::encode_block;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::sign::Signer;

use crate::{Host, Output, Process, SealedHost, require_programs, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(60);
const STATE: &str = "/run/host-tpm";

/// A TPM of a [`SealedHost`], on or off. Dropping it ends it.
pub struct HostTpm {
    process: Option<Process>,
    port: u16,
}

impl HostTpm {
    /// Switches one on and makes it that of `sealed`, whose daemon starts again for that and is unlocked.
    ///
    /// # Errors
    /// A program is missing, or something does not start.
    pub fn of(sealed: &mut SealedHost) -> Result<Self> {
        require_programs(&[("swtpm", "swtpm"), ("tpm2_pcrextend", "tpm2-tools")])?;
        let mut tpm = Self {
            process: None,
            port: free_pair_of_ports()?,
        };
        tpm.power_on(sealed.host())?;
        sealed.configure(&format!("tpm: {}\n", tpm.tcti()))?;
        sealed.kill_and_restart()?;
        sealed.unlock()?;
        Ok(tpm)
    }

    /// How virtseald and tpm2-tools reach it.
    #[must_use]
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    /// Switches it on, off before if it was on: PCRs are zero then, keys are those that it had.
    ///
    /// # Errors
    /// It does not start.
    pub fn power_on(&mut self, host: &Host) -> Result<()> {
        self.power_off();
        fs::create_dir_all(host.path(STATE))?;
        let server = format!("--server=type=tcp,port={},bindaddr=127.0.0.1", self.port);
        let control = format!("--ctrl=type=tcp,port={},bindaddr=127.0.0.1", self.port + 1);
        let state = format!("--tpmstate=dir={STATE}");
        let flags = "--flags=not-need-init,startup-clear";
        self.process = Some(host.spawn(
            "host-tpm",
            &["swtpm", "socket", "--tpm2", &state, flags, &server, &control],
        )?);
        let port = self.port;
        wait_until(START_DEADLINE, "swtpm to listen", || {
            Ok((listens(port)? && listens(port + 1)?).then_some(()))
        })
    }

    /// Switches it off.
    pub fn power_off(&mut self) {
        drop(self.process.take());
    }

    /// Its process.
    ///
    /// # Errors
    /// It is off.
    pub fn process(&mut self) -> Result<&mut Process> {
        self.process.as_mut().context("the TPM is off")
    }

    /// Extends a PCR, as what boots a host does.
    ///
    /// # Errors
    /// tpm2-tools refuses.
    pub fn extend(&self, host: &Host, pcr: u8) -> Result<()> {
        let digest = format!("{pcr}:sha256={}", "11".repeat(32));
        let mut extend = host.command("tpm2_pcrextend");
        Output::of(extend.args(["-T", &self.tcti(), &digest]))?
            .succeeded()
            .map(drop)
    }
}

/// What signs kernels: a key outside of the host.
pub struct KernelKey(PKey<Private>);

impl KernelKey {
    /// A new one.
    ///
    /// # Errors
    /// OpenSSL makes none.
    pub fn generate() -> Result<Self> {
        Ok(Self(PKey::from_rsa(Rsa::generate(2048)?)?))
    }

    /// Writes its public half to `path` on the host.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write_public(&self, host: &Host, path: &str) -> Result<()> {
        Ok(fs::write(host.path(path), self.0.public_key_to_pem()?)?)
    }

    /// Signs what PCR 11 of the host is now, where systemd-stub leaves it. The digest is that of tpm2-tools.
    ///
    /// # Errors
    /// tpm2-tools refuse, or it can't be written.
    pub fn sign_kernel(&self, host: &Host, tpm: &HostTpm) -> Result<()> {
        let script = "cd /run && tpm2_startauthsession -S trial && tpm2_policypcr -Q -S trial -l sha256:11 -L policy && \
                      tpm2_flushcontext trial";
        let mut shell = host.command("sh");
        let shell = shell.env("TPM2TOOLS_TCTI", tpm.tcti()).args(["-c", script]);
        Output::of(shell)?.succeeded()?;
        let policy = fs::read(host.path("/run/policy"))?;
        let signature = Signer::new(MessageDigest::sha256(), &self.0)?.sign_oneshot_to_vec(&policy)?;
        let (policy, signature) = (hex::encode(policy), encode_block(&signature));
        let entry = serde_json::json!({"pcrs": [11], "pkfp": "", "pol": policy, "sig": signature});
        fs::create_dir_all(host.path("/run/systemd"))?;
        let file = host.path("/run/systemd/tpm2-pcr-signature.json");
        Ok(fs::write(
            file,
            serde_json::json!({"sha256": [entry]}).to_string(),
        )?)
    }
}

/// Without a connection, which would be a client: swtpm serves one at a time. See proc_net_tcp(5): address, then state.
fn listens(port: u16) -> Result<bool> {
    let listening = format!(": 0100007F:{port:04X} 00000000:0000 0A ");
    Ok(fs::read_to_string("/proc/net/tcp")?.contains(&listening))
}

/// The TSS wants the control channel one port above the commands.
fn free_pair_of_ports() -> Result<u16> {
    for _ in 0..100 {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return Ok(port);
        }
    }
    anyhow::bail!("no two free ports in a row")
}

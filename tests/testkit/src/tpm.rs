//! Software TPMs, which keep their keys when they are switched off: of a host of the stage, and of no host.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use openssl::base64::encode_block;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::sign::Signer;
use tempfile::TempDir;

use crate::{Host, Output, Process, SealedHost, require_programs, wait_until};

const START_DEADLINE: Duration = Duration::from_secs(60);
const STATE: &str = "/run/host-tpm";
/// Leaves the digest of a policy of what PCR 11 is now in the file `policy`.
const POLICY_OF_PCR_11: &str = "tpm2_startauthsession -S trial && tpm2_policypcr -Q -S trial -l sha256:11 -L policy && \
                                tpm2_flushcontext trial";

/// A running swtpm of no host, with a state of its own. Dropping it ends it and deletes its state.
#[derive(Debug)]
pub struct Swtpm {
    state: TempDir,
    port: u16,
    process: Child,
}

impl Swtpm {
    /// # Errors
    /// swtpm is missing, or does not start.
    pub fn start() -> Result<Self> {
        require_programs(&[("swtpm", "swtpm"), ("tpm2_pcrextend", "tpm2-tools")])?;
        let state = tempfile::tempdir()?;
        // Taken by somebody else in between: the next one, then.
        for _ in 0..20 {
            let port = free_pair_of_ports()?;
            if let Some(process) = Self::power_on(state.path(), port)? {
                return Ok(Self { state, port, process });
            }
        }
        anyhow::bail!("swtpm found no port to listen on")
    }

    /// `None` if it ended at once.
    fn power_on(state: &Path, port: u16) -> Result<Option<Child>> {
        let mut process = Command::new("swtpm")
            .args(arguments(&state.display().to_string(), port))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(state.join("log"))?)
            .spawn()?;
        let listens = wait_until(START_DEADLINE, "swtpm to listen", || {
            match process.try_wait()? {
                Some(_) => Ok(Some(false)),
                None => Ok(listens(port)?.then_some(true)),
            }
        })?;
        Ok(listens.then_some(process))
    }

    /// How tpm2-tools and virtseald reach it.
    #[must_use]
    pub fn tcti(&self) -> String {
        tcti(self.port)
    }

    /// What a host's reset does: PCRs are what they were at the start, keys are still there.
    ///
    /// # Errors
    /// It does not start again.
    pub fn reboot(&mut self) -> Result<()> {
        self.off()?;
        self.process = Self::power_on(self.state.path(), self.port)?.context("swtpm does not start again")?;
        Ok(())
    }

    /// # Errors
    /// Those of the operating system.
    pub fn off(&mut self) -> Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Stops and continues it, like a chip that hangs.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.process.id().try_into()?), signal)?)
    }

    /// Extends a PCR, as firmware does when it measures something.
    ///
    /// # Errors
    /// tpm2-tools refuse.
    pub fn extend(&self, pcr: u8) -> Result<()> {
        self.shell(&format!("tpm2_pcrextend {}", extension(pcr)))?
            .succeeded()
            .map(drop)
    }

    /// What an admin does with tpm2-tools. What a resource manager would flush then is flushed.
    ///
    /// # Errors
    /// There is no shell.
    pub fn shell(&self, script: &str) -> Result<Output> {
        let script = format!("{script}\nstatus=$?; tpm2_flushcontext -t; exit $status");
        let mut shell = Command::new("sh");
        shell
            .env("TPM2TOOLS_TCTI", self.tcti())
            .current_dir(self.state.path());
        Output::of(shell.args(["-c", &script]))
    }

    /// As who builds a kernel does, for what PCR 11 is now: writes its signature where systemd looks for it below `root`.
    ///
    /// # Errors
    /// tpm2-tools refuse, or it can't be written.
    pub fn sign_kernel(&self, root: &Path, key: &KernelKey) -> Result<()> {
        self.shell(POLICY_OF_PCR_11)?.succeeded()?;
        key.write_signature(&fs::read(self.state.path().join("policy"))?, root)
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        let _ = self.off();
    }
}

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
        tcti(self.port)
    }

    /// Switches it on, off before if it was on: PCRs are zero then, keys are those that it had.
    ///
    /// # Errors
    /// It does not start.
    pub fn power_on(&mut self, host: &Host) -> Result<()> {
        self.power_off();
        fs::create_dir_all(host.path(STATE))?;
        let arguments = arguments(STATE, self.port);
        let argv = std::iter::once("swtpm").chain(arguments.iter().map(String::as_str));
        self.process = Some(host.spawn("host-tpm", &argv.collect::<Vec<_>>())?);
        wait_until(START_DEADLINE, "swtpm to listen", || {
            Ok(listens(self.port)?.then_some(()))
        })
    }

    /// Switches it off.
    pub fn power_off(&mut self) {
        drop(self.process.take());
    }

    /// Frees what a client that was killed has left in it, as a kernel's resource manager does, which this one does not have.
    ///
    /// # Errors
    /// tpm2-tools refuses.
    pub fn forget_clients(&self, host: &Host) -> Result<()> {
        for kind in ["--transient-object", "--loaded-session"] {
            let mut flush = host.command("tpm2_flushcontext");
            Output::of(flush.args(["-T", &self.tcti(), kind]))?.succeeded()?;
        }
        Ok(())
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
        let mut extend = host.command("tpm2_pcrextend");
        Output::of(extend.args(["-T", &self.tcti(), &extension(pcr)]))?
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

    /// Its public half, in PEM.
    ///
    /// # Errors
    /// OpenSSL fails.
    pub fn public_pem(&self) -> Result<Vec<u8>> {
        Ok(self.0.public_key_to_pem()?)
    }

    /// Writes its public half to `path` on the host.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write_public(&self, host: &Host, path: &str) -> Result<()> {
        Ok(fs::write(host.path(path), self.public_pem()?)?)
    }

    /// Signs what PCR 11 of the host is now, where systemd-stub leaves it. The digest is that of tpm2-tools.
    ///
    /// # Errors
    /// tpm2-tools refuse, or it can't be written.
    pub fn sign_kernel(&self, host: &Host, tpm: &HostTpm) -> Result<()> {
        let mut shell = host.command("sh");
        let shell = shell.env("TPM2TOOLS_TCTI", tpm.tcti());
        Output::of(shell.args(["-c", &format!("cd /run && {POLICY_OF_PCR_11}")]))?.succeeded()?;
        self.write_signature(&fs::read(host.path("/run/policy"))?, &host.path("/"))
    }

    /// Signs the digest of a policy. There is an entry of no use beside it, as there may be.
    fn write_signature(&self, policy: &[u8], root: &Path) -> Result<()> {
        let signature = Signer::new(MessageDigest::sha256(), &self.0)?.sign_oneshot_to_vec(policy)?;
        let json = serde_json::json!({"sha1": [], "sha256": [
            {"pcrs": [11], "pkfp": "00", "pol": "no digest", "sig": ""},
            {"pcrs": [11], "pkfp": "00", "pol": hex::encode(policy), "sig": encode_block(&signature)},
        ]});
        let directory = root.join("run/systemd");
        fs::create_dir_all(&directory)?;
        Ok(fs::write(
            directory.join("tpm2-pcr-signature.json"),
            json.to_string(),
        )?)
    }
}

fn tcti(port: u16) -> String {
    format!("swtpm:host=127.0.0.1,port={port}")
}

fn extension(pcr: u8) -> String {
    format!("{pcr}:sha256={}", "11".repeat(32))
}

/// Of swtpm.
fn arguments(state: &str, port: u16) -> [String; 6] {
    let flags = "--flags=not-need-init,startup-clear".to_owned();
    [
        "socket".to_owned(),
        "--tpm2".to_owned(),
        flags,
        format!("--tpmstate=dir={state}"),
        format!("--server=type=tcp,port={port},bindaddr=127.0.0.1"),
        format!("--ctrl=type=tcp,port={},bindaddr=127.0.0.1", port + 1),
    ]
}

/// On both ports, without a connection, which would be a client: swtpm serves one at a time. See proc_net_tcp(5): address, then
/// state.
fn listens(port: u16) -> Result<bool> {
    let sockets = fs::read_to_string("/proc/net/tcp")?;
    let has = |port: u16| sockets.contains(&format!(": 0100007F:{port:04X} 00000000:0000 0A "));
    Ok(has(port) && has(port + 1))
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

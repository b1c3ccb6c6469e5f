//! A TPM for tests: a real swtpm with a state of its own.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use openssl::base64::encode_block;
use openssl::hash::MessageDigest;
use openssl::pkey::{PKey, Private};
use openssl::rsa::Rsa;
use openssl::sign::Signer;
use tempfile::TempDir;
use tss_esapi::handles::PcrHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::structures::{Digest, DigestValues};

use super::session::Session;
use super::{SigningKey, Tcti, Tpm};

/// A running swtpm. Dropping it ends it and deletes its state.
pub(crate) struct Stand {
    state: TempDir,
    port: u16,
    swtpm: Child,
}

impl Stand {
    pub(crate) fn start() -> Self {
        let state = tempfile::tempdir().unwrap();
        // Taken by somebody else in between: the next one, then.
        for _ in 0..20 {
            let port = free_pair_of_ports();
            if let Some(swtpm) = power_on(state.path(), port) {
                return Self { state, port, swtpm };
            }
        }
        panic!("swtpm found no port to listen on");
    }

    pub(crate) fn tcti(&self) -> Tcti {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
            .parse()
            .unwrap()
    }

    pub(crate) fn tpm(&self) -> Tpm {
        Tpm::new(self.tcti(), Duration::from_secs(30))
    }

    /// What a host's reset does: PCRs are what they were at the start, keys are still there.
    pub(crate) fn reboot(&mut self) {
        self.off();
        self.swtpm = power_on(self.state.path(), self.port).expect("swtpm starts again on its port");
    }

    pub(crate) fn off(&mut self) {
        self.swtpm.kill().unwrap();
        self.swtpm.wait().unwrap();
    }

    /// As firmware does when it measures something.
    pub(crate) fn extend(&self, pcr: u8) {
        let handle = match pcr {
            7 => PcrHandle::Pcr7,
            11 => PcrHandle::Pcr11,
            other => panic!("PCR {other}"),
        };
        let mut values = DigestValues::new();
        values.set(
            HashingAlgorithm::Sha256,
            Digest::try_from(&[0x11; 32][..]).unwrap(),
        );
        self.session()
            .context()
            .execute_with_nullauth_session(|context| context.pcr_extend(handle, values))
            .unwrap();
    }

    /// What an admin does with tpm2-tools, in the shell. Says whether it succeeded. What a resource manager would flush then
    /// is flushed.
    pub(crate) fn shell(&self, script: &str) -> bool {
        let output = Command::new("sh")
            .args([
                "-c",
                &format!("{script}\nstatus=$?; tpm2_flushcontext -t; exit $status"),
            ])
            .env("TPM2TOOLS_TCTI", self.tcti().to_string())
            .current_dir(self.state.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.code() != Some(127),
            "install the package tpm2-tools: {said}"
        );
        output.status.success()
    }

    /// As who builds a kernel does, for what PCR 11 is now: writes its signature where systemd looks for it below `root`. The
    /// digest is that of tpm2-tools.
    pub(crate) fn sign_kernel(&self, root: &Path, key: &PKey<Private>) {
        assert!(self.shell(
            "tpm2_startauthsession -S trial && tpm2_policypcr -Q -S trial -l sha256:11 -L policy && \
             tpm2_flushcontext trial"
        ));
        let policy = fs::read(self.state.path().join("policy")).unwrap();
        let mut signer = Signer::new(MessageDigest::sha256(), key).unwrap();
        let signature = signer.sign_oneshot_to_vec(&policy).unwrap();
        let json = serde_json::json!({"sha1": [], "sha256": [
            {"pcrs": [11], "pkfp": "00", "pol": "no digest", "sig": ""},
            {"pcrs": [11], "pkfp": "00", "pol": hex::encode(policy), "sig": encode_block(&signature)},
        ]});
        let directory = root.join("run/systemd");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("tpm2-pcr-signature.json"), json.to_string()).unwrap();
    }

    pub(super) fn session(&self) -> Session {
        Session::open(&self.tcti()).unwrap()
    }

    /// Stops and continues, like a chip that hangs.
    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.swtpm.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }
}

/// A key that signs kernels, and its public half.
pub(crate) fn signing_key() -> (PKey<Private>, SigningKey) {
    let key = PKey::from_rsa(Rsa::generate(2048).unwrap()).unwrap();
    let public = SigningKey::from_pem(&key.public_key_to_pem().unwrap()).unwrap();
    (key, public)
}

impl Drop for Stand {
    fn drop(&mut self) {
        let _ = self.swtpm.kill();
        let _ = self.swtpm.wait();
    }
}

/// The TSS wants the control channel one port above the commands.
fn free_pair_of_ports() -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

/// Without a connection, which would be a client: swtpm serves one at a time. See proc_net_tcp(5): address, then state.
fn listens(port: u16) -> bool {
    let listening = format!(": 0100007F:{port:04X} 00000000:0000 0A ");
    fs::read_to_string("/proc/net/tcp").unwrap().contains(&listening)
}

fn power_on(state: &Path, port: u16) -> Option<Child> {
    let log = state.join("log");
    let mut swtpm = Command::new("swtpm")
        .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
        .arg(format!("--tpmstate=dir={}", state.display()))
        .arg(format!("--server=type=tcp,port={port},bindaddr=127.0.0.1"))
        .arg(format!("--ctrl=type=tcp,port={},bindaddr=127.0.0.1", port + 1))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(log).unwrap())
        .spawn()
        .expect("swtpm can't be started: install the package swtpm");
    let started = Instant::now();
    while !(listens(port) && listens(port + 1)) {
        if swtpm.try_wait().unwrap().is_some() {
            return None;
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "swtpm opened no port"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    Some(swtpm)
}

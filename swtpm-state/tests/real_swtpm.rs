//! Against states that swtpm itself wrote. Needs the Debian package `swtpm`, and `swtpm-tools` for `swtpm_ioctl`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code: a failure to set up is a failed test"
)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use swtpm_state::{EncryptedState, FormatError, OpenError, PlainState, STATE_FILE_NAME, State, StateKey};
use tempfile::TempDir;

const PASSPHRASE: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
const DEADLINE: Duration = Duration::from_secs(20);

/// A directory with state, control socket and passphrase of one TPM.
struct Tpm {
    dir: TempDir,
    key_option: Option<String>,
}

impl Tpm {
    fn plain() -> Self {
        Self {
            dir: TempDir::new().unwrap(),
            key_option: None,
        }
    }

    fn encrypted(mode: &str) -> Self {
        let tpm = Self::plain();
        let file = tpm.dir.path().join("passphrase");
        fs::write(&file, PASSPHRASE).unwrap();
        Self {
            key_option: Some(format!("pwdfile={},mode={mode}", file.display())),
            ..tpm
        }
    }

    fn state_dir(&self) -> PathBuf {
        self.dir.path().join("tpm2")
    }

    fn state_file(&self) -> PathBuf {
        self.state_dir().join(STATE_FILE_NAME)
    }

    /// Starts swtpm, sends INIT, which creates the state or loads it, and SHUTDOWN. Says how INIT went.
    fn power_on_and_off(&self) -> Result<(), String> {
        fs::create_dir_all(self.state_dir()).unwrap();
        let socket = self.dir.path().join("control");
        let mut swtpm = self.start(&socket);
        wait_for(&socket, &mut swtpm);
        let initialized = control(&socket, "-i");
        control(&socket, "-s").unwrap();
        swtpm.wait().unwrap();
        initialized
    }

    fn start(&self, socket: &Path) -> Child {
        let mut command = Command::new("swtpm");
        command
            .args(["socket", "--tpm2", "--tpmstate"])
            .arg(format!("dir={}", self.state_dir().display()));
        command
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", socket.display()));
        if let Some(key) = &self.key_option {
            command.arg("--key").arg(key);
        }
        let spawned = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        spawned.expect("swtpm can't be started: install the package swtpm")
    }

    fn encrypted_state(&self) -> EncryptedState {
        match State::read(&self.state_dir()).unwrap() {
            State::Encrypted(state) => state,
            other => panic!("{other:?}"),
        }
    }

    fn plain_state(&self) -> PlainState {
        match State::read(&self.state_dir()).unwrap() {
            State::Plain(state) => state,
            other => panic!("{other:?}"),
        }
    }
}

/// Waits for a connection and not for the socket's file: swtpm makes the file first and listens on it later.
fn wait_for(socket: &Path, swtpm: &mut Child) {
    let started = Instant::now();
    while UnixStream::connect(socket).is_err() {
        assert!(
            swtpm.try_wait().unwrap().is_none(),
            "swtpm ended before it opened its control channel"
        );
        assert!(started.elapsed() < DEADLINE, "swtpm opened no control channel");
        sleep(Duration::from_millis(2));
    }
}

/// What `swtpm_ioctl` printed when its command failed.
fn control(socket: &Path, command: &str) -> Result<(), String> {
    let output = Command::new("swtpm_ioctl")
        .arg("--unix")
        .arg(socket)
        .arg(command)
        .output();
    let output = output.expect("swtpm_ioctl can't be started: install the package swtpm-tools");
    let said = || {
        [&output.stdout[..], &output.stderr[..]]
            .map(String::from_utf8_lossy)
            .concat()
    };
    if output.status.success() {
        Ok(())
    } else {
        Err(said())
    }
}

fn key() -> StateKey {
    StateKey::derive(PASSPHRASE.as_bytes()).unwrap()
}

/// libtpms starts its persistent state with a two-byte version and this number.
fn is_libtpms_state(bytes: &[u8]) -> bool {
    bytes.get(2..6) == Some(&[0xab, 0x36, 0x47, 0x23])
}

#[test]
fn a_state_goes_from_absent_to_encrypted_and_opens() {
    let tpm = Tpm::encrypted("aes-256-cbc");
    assert!(matches!(State::read(&tpm.state_dir()), Ok(State::Absent)));
    tpm.power_on_and_off().unwrap();
    let state = tpm.encrypted_state();
    state.authenticate(&key()).unwrap();
    let opened = state.open(&key()).unwrap();
    assert!(is_libtpms_state(&opened));

    let file = fs::read(tpm.state_file()).unwrap();
    assert!(
        !file.windows(32).any(|window| opened.starts_with(window)),
        "the state is in the file as it is"
    );

    // A second power-on loads the same TPM: swtpm and this crate agree on what the file says.
    tpm.power_on_and_off().unwrap();
    assert!(is_libtpms_state(&tpm.encrypted_state().open(&key()).unwrap()));
}

#[test]
fn a_plain_state_is_called_plain() {
    let tpm = Tpm::plain();
    tpm.power_on_and_off().unwrap();
    assert!(is_libtpms_state(tpm.plain_state().as_bytes()));
}

#[test]
fn a_wrong_passphrase_is_refused_by_us_and_by_swtpm() {
    let tpm = Tpm::encrypted("aes-256-cbc");
    tpm.power_on_and_off().unwrap();
    for wrong in [
        PASSPHRASE.to_uppercase(),
        format!("{PASSPHRASE}\n"),
        PASSPHRASE[1..].to_owned(),
    ] {
        let key = StateKey::derive(wrong.as_bytes()).unwrap();
        assert!(matches!(
            tpm.encrypted_state().authenticate(&key),
            Err(OpenError::NotAuthentic)
        ));
        assert!(matches!(
            tpm.encrypted_state().open(&key),
            Err(OpenError::NotAuthentic)
        ));
    }
    fs::write(tpm.dir.path().join("passphrase"), PASSPHRASE.to_uppercase()).unwrap();
    let refusal = tpm.power_on_and_off().expect_err("swtpm took a wrong passphrase");
    assert!(refusal.contains("0x101"), "{refusal}");
    tpm.encrypted_state().authenticate(&key()).unwrap();
}

#[test]
fn a_128_bit_state_is_refused_by_name() {
    let tpm = Tpm::encrypted("aes-cbc");
    tpm.power_on_and_off().unwrap();
    let bytes = fs::read(tpm.state_file()).unwrap();
    assert_eq!(State::parse(&bytes).unwrap_err(), FormatError::ShortKey);
}

#[test]
fn a_flipped_bit_anywhere_is_refused() {
    let tpm = Tpm::encrypted("aes-256-cbc");
    tpm.power_on_and_off().unwrap();
    let original = fs::read(tpm.state_file()).unwrap();
    for at in 0..original.len() {
        let mut bytes = original.clone();
        bytes[at] ^= 1 << (at % 8);
        // The oldest readable version is a lower bound, not a fact about the contents: 0 and 2 are as good as 1.
        let harmless = at == 1 && bytes[1] <= 2;
        assert_eq!(opens(&bytes), harmless, "a flipped bit in byte {at}");
    }
}

#[test]
fn a_file_cut_off_anywhere_is_refused() {
    for tpm in [Tpm::plain(), Tpm::encrypted("aes-256-cbc")] {
        tpm.power_on_and_off().unwrap();
        let original = fs::read(tpm.state_file()).unwrap();
        for length in 0..original.len() {
            assert!(
                State::parse(&original[..length]).is_err(),
                "cut to {length} bytes"
            );
            let mut bytes = original[..length].to_vec();
            if let Some(declared) = bytes.get_mut(6..10) {
                declared.copy_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
            }
            assert!(
                !opens(&bytes),
                "cut to {length} bytes, with a header that says so"
            );
        }
        assert!(opens(&original));
    }
}

fn opens(file: &[u8]) -> bool {
    match State::parse(file) {
        Ok(State::Encrypted(state)) => state.open(&key()).is_ok(),
        Ok(State::Plain(_)) => true,
        Ok(State::Absent) | Err(_) => false,
    }
}

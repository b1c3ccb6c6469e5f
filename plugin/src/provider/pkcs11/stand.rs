//! Real tokens for tests: SoftHSM and NSS.
//!
//! Modules read their environment when they are loaded, and a process can't change its own safely. So a test that
//! needs tokens runs in a process of its own, with tokens made for it in a directory of its own.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use virtseal_testkit::servers::SoftHsm as SoftHsmTokens;

use super::{Pkcs11Provider, Pkcs11Settings};
use crate::host::own_process;
use crate::model::envelope::{KekId, VmId};
use crate::provider::KeyProvider;
use crate::secret::SecretBytes;
use crate::store::{Mark, RetiredKek, Stores, VmRecord};

pub(in crate::provider) const SOFTHSM: &str = SoftHsmTokens::MODULE;
const NSS: &str = "/usr/lib/x86_64-linux-gnu/libsoftokn3.so";
pub(in crate::provider) const PIN: &str = SoftHsmTokens::PIN;
/// NSS derives a key from the PIN for every use of an object, with this many iterations at the most.
const NSS_ITERATIONS: &str = "NSS_MAX_MP_PBE_ITERATION_COUNT";
/// Where SoftHSM finds its configuration.
const SOFTHSM2_CONF: &str = "SOFTHSM2_CONF";
/// Where p11-kit's client looks for its service.
const SERVICE: &str = "P11_KIT_SERVER_ADDRESS";
/// Where the tokens of this process are.
const DIRECTORY: &str = "VIRTSEAL_TEST_TOKENS";
/// For a call, on a machine that has other things to do.
pub(in crate::provider) const PATIENCE: Duration = Duration::from_secs(60);
/// SoftHSM's setting for a token that can wrap, but knows no AES-GCM.
pub(in crate::provider) const WITHOUT_GCM: &str = "-CKM_AES_GCM";
/// For one that has CBC and HMAC only.
pub(in crate::provider) const CBC_ONLY: &str = "-CKM_AES_GCM,CKM_AES_KEY_WRAP,CKM_AES_KEY_WRAP_PAD";
/// How many a test may use.
const TOKENS: usize = 3;

pub(in crate::provider) fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}

pub(in crate::provider) fn directory() -> PathBuf {
    PathBuf::from(std::env::var_os(DIRECTORY).expect("the test runs with tokens"))
}

/// The next token of this process that no one has used.
pub(in crate::provider) fn next_label() -> String {
    static USED: AtomicUsize = AtomicUsize::new(0);
    let number = USED.fetch_add(1, Ordering::SeqCst);
    assert!(number < TOKENS, "more than {TOKENS} tokens in one test");
    format!("kek-{number}")
}

/// Runs `test`, which is the current one, in a process that has SoftHSM tokens. `mechanisms` is SoftHSM's setting.
pub(in crate::provider) fn with_softhsm(mechanisms: &str, test: fn()) {
    with_tokens(test, |directory| make_tokens(directory, mechanisms));
}

/// As [`with_softhsm`]; `prepare` makes what else there has to be in the directory before the process starts.
pub(super) fn with_softhsm_and(test: fn(), prepare: impl FnOnce(&Path)) {
    with_tokens(test, |directory| {
        make_tokens(directory, "ALL");
        prepare(directory);
    });
}

fn make_tokens(directory: &Path, mechanisms: &str) {
    SoftHsmTokens::configure(directory, mechanisms).unwrap();
    for number in 0..TOKENS {
        SoftHsmTokens::make_in(directory, &format!("kek-{number}")).unwrap();
    }
}

/// Runs `test`, which is the current one, in a process that has NSS databases.
pub(in crate::provider) fn with_nss(test: fn()) {
    with_tokens(test, |directory| {
        assert!(Path::new(NSS).exists(), "{NSS} is missing: install libnss3");
        fs::write(directory.join("pin"), PIN).unwrap();
        for number in 0..TOKENS {
            let database = directory.join(format!("kek-{number}"));
            fs::create_dir(&database).unwrap();
            let mut tool = Command::new("certutil");
            tool.env(NSS_ITERATIONS, "1").args(["-N", "-d"]);
            tool.arg(format!("sql:{}", database.display()));
            run(tool.arg("-f").arg(directory.join("pin")), "libnss3-tools");
        }
    });
}

/// The string that NSS wants for `C_Initialize`: all databases, each a token.
fn nss_args() -> String {
    let directory = directory();
    let token = |number| {
        format!(
            "0x{:x}=[configDir='sql:{}/kek-{number}' tokenDescription='kek-{number}' slotDescription='kek-{number}']",
            number + 16,
            directory.display()
        )
    };
    let tokens: Vec<_> = (0..TOKENS).map(token).collect();
    format!("flags=noCertDB,noModDB tokens=<{}>", tokens.join(" "))
}

pub(super) fn run(command: &mut Command, package: &str) {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}: install {package}"));
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {complained}");
}

/// Of the service that p11-kit's client asks.
pub(super) fn socket_in(directory: &Path) -> PathBuf {
    directory.join("service")
}

fn with_tokens(test: fn(), prepare: impl FnOnce(&Path)) {
    if own_process::is_this() {
        return test();
    }
    // SoftHSM truncates and writes a key's file once per attribute, which some file systems take half a second for.
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    prepare(directory.path());
    let mut service = OsString::from("unix:path=");
    service.push(socket_in(directory.path()));
    own_process::start([
        (DIRECTORY, directory.path().as_os_str()),
        (
            SOFTHSM2_CONF,
            directory.path().join(SoftHsmTokens::CONFIGURATION).as_os_str(),
        ),
        (SERVICE, &service),
        (NSS_ITERATIONS, "1".as_ref()),
    ]);
}

/// Settings for the token called `label`, with a KEK per VM as the conformance suite wants it.
pub(in crate::provider) fn softhsm_settings(label: &str) -> Pkcs11Settings {
    let json = serde_json::json!({"module": SOFTHSM, "token": {"label": label}, "kek_scope": "vm"});
    serde_json::from_value(json).unwrap()
}

pub(in crate::provider) fn nss_settings(label: &str) -> Pkcs11Settings {
    let json = serde_json::json!({
        "module": NSS, "token": {"label": label}, "kek_scope": "vm", "init_args": nss_args()
    });
    serde_json::from_value(json).unwrap()
}

/// A host with one pkcs11 provider.
pub(in crate::provider) struct Host {
    stores: Stores,
    _state: tempfile::TempDir,
    provider: Option<Pkcs11Provider>,
}

impl Host {
    pub(in crate::provider) fn with(settings: Pkcs11Settings) -> Self {
        let state = tempfile::tempdir().unwrap();
        let stores = Stores::open(state.path()).unwrap();
        let name = "hsm".parse().unwrap();
        let pin = secret(PIN);
        let provider =
            Pkcs11Provider::create_within(PATIENCE, &stores.providers(), &name, settings, &pin, &[]).unwrap();
        Self {
            stores,
            _state: state,
            provider: Some(provider),
        }
    }

    pub(in crate::provider) fn pkcs11(&self) -> &Pkcs11Provider {
        self.provider.as_ref().unwrap()
    }

    /// As a job does that has put another in the place of `kek`.
    pub(in crate::provider) fn retire(&self, vm: VmId, kek: &KekId) {
        let record = VmRecord {
            vm,
            name: "vm".to_owned(),
            sealed_at: 0,
            vtpm_seen: false,
        };
        let retired = RetiredKek {
            vm,
            provider: self.pkcs11().id(),
            kek: kek.clone(),
        };
        self.stores
            .keystore
            .bring_back_vm(&record, Mark::Sealed, &[retired])
            .unwrap();
    }

    pub(in crate::provider) fn reopen(&mut self, deadline: Duration) {
        let record = self
            .stores
            .keystore
            .providers()
            .unwrap()
            .whole()
            .unwrap()
            .remove(0);
        let module = PathBuf::from(record.settings["module"].as_str().unwrap());
        self.reopen_by(&module, deadline);
    }

    /// As if its module had been another one.
    pub(super) fn reopen_by(&mut self, module: &Path, deadline: Duration) {
        self.provider = None;
        let mut record = self
            .stores
            .keystore
            .providers()
            .unwrap()
            .whole()
            .unwrap()
            .remove(0);
        record.settings["module"] = serde_json::json!(module);
        self.provider =
            Some(Pkcs11Provider::open_within(deadline, &self.stores.providers(), &record).unwrap());
    }
}

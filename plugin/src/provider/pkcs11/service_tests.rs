//! Modules whose service is not there: at boot, in the middle, or for some calls only.
//!
//! Two of them. p11-kit's client is a real one, and asks a real server for SoftHSM's tokens over a socket. The other is
//! SoftHSM, with a wrapper before it that answers for the functions that a test names.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::stand::{
    Host, PATIENCE, PIN, SOFTHSM, directory, next_label, run, secret, socket_in, softhsm_settings,
    with_softhsm_and,
};
use super::tests::{assert_opens, refusal, wrapped};
use super::*;
use crate::provider::ErrorClass;
use crate::store::Stores;

const CLIENT: &str = "/usr/lib/x86_64-linux-gnu/pkcs11/p11-kit-client.so";

/// p11-kit's server of SoftHSM's tokens, killed when dropped.
struct Service(Child);

impl Service {
    fn start() -> Self {
        let socket = socket_in(&directory());
        let child = Command::new("p11-kit")
            .args(["server", "--foreground", "--provider", SOFTHSM, "--name"])
            .arg(&socket)
            .arg("pkcs11:")
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("p11-kit server: {error}: install p11-kit"));
        let began = Instant::now();
        while !socket.exists() {
            assert!(began.elapsed() < PATIENCE, "the service never listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self(child)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // With the processes that serve its connections.
        let group = Pid::from_raw(self.0.id().try_into().unwrap());
        killpg(group, Signal::SIGKILL).unwrap();
        self.0.wait().unwrap();
        fs::remove_file(socket_in(&directory())).unwrap();
    }
}

fn through(module: &Path, label: &str) -> Pkcs11Settings {
    let mut settings = softhsm_settings(label);
    settings.module = module.to_owned();
    settings
}

fn is_unreachable(provider: &Pkcs11Provider) -> bool {
    matches!(provider.status(), ProviderStatus::Unreachable(_))
}

/// Nobody asks for anything but the watch, now and then.
fn comes_back(provider: &Pkcs11Provider) {
    let began = Instant::now();
    while provider.status() != ProviderStatus::Ready {
        assert!(began.elapsed() < PATIENCE, "{}", provider.status());
        provider.link.get().allow_reset();
        provider.probe();
    }
}

/// Looks for the KEK: p11-kit's protocol has no mechanism with which it could be used.
fn find(provider: &Pkcs11Provider, (_, stanza): &(Payload, Stanza)) -> Result<(), ProviderError> {
    let (owner, kek) = (provider.owner(), stanza.kek.clone());
    provider.link.get().call(move |token| {
        token.keks.clear();
        kek::find(token, &owner, &kek).map(drop)
    })
}

#[test]
fn service_that_comes_late_and_dies_in_between_costs_no_second_pin() {
    assert!(
        Path::new(CLIENT).exists(),
        "{CLIENT} is missing: install p11-kit-modules"
    );
    with_softhsm_and(
        || {
            let mut host = Host::with(softhsm_settings(&next_label()));
            let sealed = wrapped(host.pkcs11());
            // As after a boot: the service is not up, and the PIN comes by a credential.
            host.reopen_by(Path::new(CLIENT), PATIENCE);
            let provider = host.pkcs11();
            let error = provider.unlock(&secret(PIN)).unwrap_err();
            assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
            assert!(is_unreachable(provider), "{}", provider.status());
            // It comes, goes while a session is open, and comes again.
            for _ in 0..3 {
                let service = Service::start();
                comes_back(provider);
                find(provider, &sealed).unwrap();
                drop(service);
                for _ in 0..2 {
                    for error in [find(provider, &sealed).unwrap_err(), refusal(provider, &sealed)] {
                        assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
                    }
                }
                let error = provider.create_kek(&KekScope::Vm(VmId::random())).unwrap_err();
                assert!(matches!(error, ProviderError::Unreachable(_)), "{error:?}");
                assert!(is_unreachable(provider), "{}", provider.status());
            }
        },
        |_| {},
    );
}

/// A module that hands everything on to SoftHSM, but for the functions in `answers` beside it: each line has the place of one in
/// CK_FUNCTION_LIST (PKCS#11 2.40, section 3.6) and what it answers.
const WRAPPER: &str = r#"
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned long U;
typedef U (*Function)(U, U, U, U, U, U, U, U);
typedef struct { unsigned char version[2]; Function function[68]; } List;
static List *real, ours;

static int refused(int place, U *answer) {
    char path[4096];
    int named;
    snprintf(path, sizeof path, "%s/answers", getenv("VIRTSEAL_TEST_TOKENS"));
    FILE *file = fopen(path, "r");
    if (!file) return 0;
    while (fscanf(file, "%d %lx", &named, answer) == 2)
        if (named == place) { fclose(file); return 1; }
    fclose(file);
    return 0;
}
#define F(n) static U f##n(U a, U b, U c, U d, U e, U f, U g, U h) { \
    U answer; return refused(n, &answer) ? answer : real->function[n](a, b, c, d, e, f, g, h); }
#define P(n) ours.function[n] = f##n;
#define EACH(M) M(0) M(1) M(4) M(5) M(6) M(7) M(8) M(12) M(13) M(15) M(18) M(19) M(20) M(22) M(24) M(26) M(27) M(28) \
    M(29) M(30) M(33) M(34) M(58)
EACH(F)

U C_GetFunctionList(List **list) {
    void *module = dlopen(SOFTHSM, RTLD_NOW);
    U (*get)(List **) = module ? dlsym(module, "C_GetFunctionList") : 0;
    if (!get || get(&real)) return 5;
    memcpy(&ours, real, sizeof ours);
    EACH(P)
    *list = &ours;
    return 0;
}
"#;

const INITIALIZE: usize = 0;
const GET_SLOT_LIST: usize = 4;
const GET_TOKEN_INFO: usize = 6;
const OPEN_SESSION: usize = 12;
const GET_SESSION_INFO: usize = 15;
const LOGIN: usize = 18;
const GET_ATTRIBUTE_VALUE: usize = 24;
const FIND_OBJECTS_INIT: usize = 26;
const DECRYPT_INIT: usize = 33;
const DECRYPT: usize = 34;

fn with_wrapper(test: fn()) {
    with_softhsm_and(test, |directory| {
        let source = directory.join("wrapper.c");
        fs::write(&source, WRAPPER).unwrap();
        let mut compiler = Command::new("gcc");
        compiler.args([
            "-shared",
            "-fPIC",
            "-O1",
            &format!("-DSOFTHSM=\"{SOFTHSM}\""),
            "-o",
        ]);
        run(compiler.arg(directory.join("wrapper.so")).arg(source), "gcc");
    });
}

fn wrapper() -> std::path::PathBuf {
    directory().join("wrapper.so")
}

/// From now on `functions` answer with `answer`.
fn answers(functions: &[usize], answer: u64) {
    let lines: String = functions
        .iter()
        .map(|place| format!("{place} {answer:x}\n"))
        .collect();
    fs::write(directory().join("answers"), lines).unwrap();
}

/// What modules say whose service is gone: CKR_GENERAL_ERROR, FUNCTION_FAILED, DEVICE_ERROR, DEVICE_MEMORY, DEVICE_REMOVED,
/// KEY_HANDLE_INVALID, OBJECT_HANDLE_INVALID, SESSION_CLOSED, SESSION_HANDLE_INVALID, TOKEN_NOT_PRESENT,
/// USER_NOT_LOGGED_IN, CRYPTOKI_NOT_INITIALIZED, and codes of their own.
const GONE: [u64; 14] = [
    0x5,
    0x6,
    0x30,
    0x31,
    0x32,
    0x60,
    0x82,
    0xB0,
    0xB3,
    0xE0,
    0x101,
    0x190,
    0x8000_0001,
    0xDEAD_BEEF,
];

#[test]
fn what_may_mean_gone_proves_nothing_of_a_key_and_keeps_the_pin() {
    with_wrapper(|| {
        let host = Host::with(through(&wrapper(), &next_label()));
        let provider = host.pkcs11();
        let sealed = wrapped(provider);
        for answer in GONE {
            for functions in [
                &[GET_SLOT_LIST, OPEN_SESSION, GET_SESSION_INFO, DECRYPT_INIT][..],
                &[GET_ATTRIBUTE_VALUE, FIND_OBJECTS_INIT, DECRYPT_INIT],
                &[DECRYPT],
                &[LOGIN, DECRYPT_INIT],
            ] {
                answers(functions, answer);
                provider.link.get().allow_reset();
                let error = refusal(provider, &sealed);
                assert_eq!(
                    error.class(),
                    ErrorClass::Trouble,
                    "{functions:?} {answer:#x}: {error:?}"
                );
                assert!(is_unreachable(provider), "{functions:?} {answer:#x}");
                answers(&[], 0);
                comes_back(provider);
                assert_opens(provider, &sealed);
            }
        }
        // What a token says of the body alone is believed.
        answers(&[DECRYPT], 0x40);
        assert!(matches!(refusal(provider, &sealed), ProviderError::Tampered));
    });
}

#[test]
fn module_that_can_not_be_initialized_at_boot_keeps_the_pin() {
    with_wrapper(|| {
        let mut host = Host::with(through(&wrapper(), &next_label()));
        let sealed = wrapped(host.pkcs11());
        for answer in GONE {
            host.reopen(PATIENCE);
            let provider = host.pkcs11();
            answers(&[INITIALIZE, GET_SLOT_LIST], answer);
            provider.link.get().allow_reset();
            let error = provider.unlock(&secret(PIN)).unwrap_err();
            assert!(
                matches!(error, ProviderError::Unreachable(_)),
                "{answer:#x}: {error:?}"
            );
            assert!(is_unreachable(provider), "{answer:#x}: {}", provider.status());
            answers(&[], 0);
            comes_back(provider);
            assert_opens(provider, &sealed);
        }
    });
}

#[test]
fn token_that_does_not_describe_itself_is_named_by_its_slot() {
    with_wrapper(|| {
        let label = next_label();
        let named = Host::with(through(&wrapper(), &label));
        let slot = named.pkcs11().link.get().find().unwrap();
        let sealed = wrapped(named.pkcs11());
        answers(&[GET_TOKEN_INFO], 0x6);
        let state = tempfile::tempdir().unwrap();
        let stores = Stores::open(state.path()).unwrap();
        let add = |token: TokenChoice| {
            let mut settings = through(&wrapper(), &label);
            settings.token = token;
            let name = "odd".parse().unwrap();
            Pkcs11Provider::create_within(PATIENCE, &stores.providers(), &name, settings, &secret(PIN), &[])
        };
        for choice in [
            TokenChoice::Label(label.clone()),
            TokenChoice::Serial("7".to_owned()),
        ] {
            let error = crate::model::problem::chain(&add(choice).err().unwrap());
            let choice = format!("does not describe itself (choose it by --slot {slot})");
            assert!(error.contains(&choice), "{error}");
        }
        // And so it is found.
        let provider = add(TokenChoice::Slot(slot)).unwrap();
        assert_opens(&provider, &wrapped(&provider));
        assert_eq!(provider.status(), ProviderStatus::Ready);
        answers(&[], 0);
        assert_opens(named.pkcs11(), &sealed);
    });
}

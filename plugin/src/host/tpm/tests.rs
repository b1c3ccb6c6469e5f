use std::time::Instant;

use nix::sys::signal::Signal;
use tss_esapi::constants::CapabilityType;
use tss_esapi::handles::AuthHandle;
use tss_esapi::structures::CapabilityData;
use virtseal_testkit::Swtpm;

use super::bound::{Hex, Parent};
use super::policy::PolicyError;
use super::signed::{NotASigningKey, Unsigned};
use super::*;

fn session(stand: &Swtpm) -> Session {
    Session::open(&stand.tcti().parse().unwrap()).unwrap()
}

fn secret(bytes: &[u8]) -> Arc<SecretBytes> {
    Arc::new(SecretBytes::take(&mut bytes.to_vec()).unwrap())
}

fn pcrs(text: &str) -> PcrList {
    text.parse().unwrap()
}

#[test]
fn opens_what_it_sealed_also_after_a_reboot() {
    let mut stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    for length in [1, 32, Tpm::MAX_BYTES] {
        let secret = secret(&vec![0xa5; length]);
        let sealed = tpm
            .bind(&secret, &BindPolicy::exactly(PcrList::default()))
            .unwrap();
        let stored = BoundToTpm::from_bytes(&sealed.to_bytes()).unwrap();
        assert_eq!(stored, sealed);
        assert_eq!(tpm.open(&stored, None).unwrap().expose(), secret.expose());
        if length == 32 {
            stand.reboot().unwrap();
            assert_eq!(tpm.open(&stored, None).unwrap().expose(), secret.expose());
        }
    }
    let long = secret(&[0; Tpm::MAX_BYTES + 1]);
    assert!(matches!(
        tpm.bind(&long, &BindPolicy::exactly(PcrList::default())),
        Err(TpmError::TooLong)
    ));
}

#[test]
fn says_which_pcrs_differ_and_opens_again_when_they_are_as_they_were() {
    let mut stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let seven = tpm
        .bind(&secret(b"seven"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    let both = tpm
        .bind(&secret(b"both"), &BindPolicy::exactly(pcrs("7, 11")))
        .unwrap();
    stand.extend(11).unwrap();
    assert_eq!(tpm.open(&seven, None).unwrap().expose(), b"seven");
    let error = tpm.open(&both, None).unwrap_err();
    assert_eq!(error.to_string(), "PCR 11 differs from when it was enrolled");
    stand.extend(7).unwrap();
    let error = tpm.open(&both, None).unwrap_err();
    assert_eq!(error.to_string(), "PCRs 7,11 differ from when it was enrolled");
    assert!(!error.may_pass());
    // Sealed to what they are now, and then they change back.
    let now = tpm
        .bind(&secret(b"now"), &BindPolicy::exactly(pcrs("7,11")))
        .unwrap();
    assert_eq!(tpm.open(&now, None).unwrap().expose(), b"now");
    stand.reboot().unwrap();
    assert_eq!(tpm.open(&both, None).unwrap().expose(), b"both");
    assert!(matches!(tpm.open(&now, None), Err(TpmError::PcrsDiffer(_))));
}

#[test]
fn what_was_tampered_with_does_not_open() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let sealed = tpm
        .bind(&secret(b"secret"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    for at in [0, 2, 20, sealed.private.len() / 2, sealed.private.len() - 1] {
        let mut other = sealed.clone();
        other.private[at] ^= 1;
        let error = tpm.open(&other, None).unwrap_err();
        assert!(matches!(error, TpmError::Damaged), "private {at}: {error:?}");
    }
    for at in 0..sealed.public.len() {
        let mut other = sealed.clone();
        other.public[at] ^= 1;
        let error = tpm.open(&other, None).unwrap_err();
        assert!(
            matches!(error, TpmError::Damaged | TpmError::Failed { .. }),
            "public {at}: {error:?}"
        );
    }
    // A policy that another PCR value would satisfy can't be put in the place of the first.
    stand.extend(7).unwrap();
    let weaker = tpm
        .bind(&secret(b"other"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    let swapped = BoundToTpm {
        public: weaker.public.clone(),
        pcrs: weaker.pcrs.clone(),
        ..sealed.clone()
    };
    assert!(matches!(tpm.open(&swapped, None), Err(TpmError::Damaged)));
    let json = String::from_utf8(sealed.to_bytes()).unwrap();
    for bad in [
        json.replace("\"version\":1", "\"version\":3"),
        json.replace("\"version\":1", "\"version\":1,\"pin_salt\":\"00\""),
        json.replace("\"version\":1", "\"version\":2,\"signed_by\":\"00\""),
        json.replace("from-seed", "from-elsewhere"),
        json.replace("\"pcrs\":{", "\"pcrs\":{\"24\":\"00\","),
        json.replace("\"pcrs\":{", "\"pcrs\":{\"255\":\"00\","),
        json[..json.len() / 2].to_owned(),
        "x".repeat(20_000),
    ] {
        assert!(BoundToTpm::from_bytes(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn another_tpm_and_a_cleared_one_are_told_apart_from_damage() {
    let (stand, other) = (Swtpm::start().unwrap(), Swtpm::start().unwrap());
    let sealed = Tpm::of(&stand)
        .bind(&secret(b"secret"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert!(matches!(
        Tpm::of(&other).open(&sealed, None),
        Err(TpmError::AnotherTpm)
    ));
    session(&stand)
        .context()
        .execute_with_nullauth_session(|context| context.clear(AuthHandle::Platform))
        .unwrap();
    assert!(matches!(
        Tpm::of(&stand).open(&sealed, None),
        Err(TpmError::AnotherTpm)
    ));
}

#[test]
fn the_persistent_storage_key_is_used_where_there_is_one() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let before = tpm
        .bind(&secret(b"before"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert_eq!(before.parent, Parent::FromSeed);
    session(&stand).keep_storage_key();
    let after = tpm
        .bind(&secret(b"after"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert_eq!(after.parent, Parent::Persistent);
    assert_eq!(tpm.open(&before, None).unwrap().expose(), b"before");
    assert_eq!(tpm.open(&after, None).unwrap().expose(), b"after");
}

/// As the message says it; the owner's password is PASSWORD.
const MAKE_STORAGE_KEY: &str = "tpm2_createprimary -C o -P PASSWORD -c srk.ctx && tpm2_evictcontrol -C o -P PASSWORD -c srk.ctx 0x81000001";

#[test]
fn an_owner_password_is_named_and_what_the_message_says_helps() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let before = tpm
        .bind(&secret(b"before"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert!(
        stand
            .shell("tpm2_changeauth -c o PASSWORD")
            .unwrap()
            .status
            .success()
    );
    for error in [
        tpm.bind(&secret(b"x"), &BindPolicy::exactly(PcrList::default()))
            .unwrap_err(),
        tpm.open(&before, None).unwrap_err(),
    ] {
        assert!(matches!(error, TpmError::OwnerPassword), "{error:?}");
        assert!(error.to_string().contains(MAKE_STORAGE_KEY), "{error}");
        assert!(!error.may_pass());
    }
    assert!(stand.shell(MAKE_STORAGE_KEY).unwrap().status.success());
    let after = tpm
        .bind(&secret(b"after"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert_eq!(after.parent, Parent::Persistent);
    assert_eq!(tpm.open(&after, None).unwrap().expose(), b"after");
    // The one from before is for the passphrase and another enrolment.
    assert!(matches!(tpm.open(&before, None), Err(TpmError::OwnerPassword)));
}

#[test]
fn a_lockout_is_named_and_hits_only_storage_keys_of_others() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let own = tpm
        .bind(&secret(b"own"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert!(
        stand
            .shell(&MAKE_STORAGE_KEY.replace("-P PASSWORD ", ""))
            .unwrap()
            .status
            .success()
    );
    let theirs = tpm
        .bind(&secret(b"theirs"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert_eq!(
        (own.parent, theirs.parent),
        (Parent::FromSeed, Parent::Persistent)
    );
    // Somebody guesses a password, once too often.
    assert!(
        stand
            .shell(
                "tpm2_dictionarylockout -s -n 1 -t 1000 -l 1000 && \
         tpm2_nvdefine 0x1500001 -C o -p right -s 8 -a 'authread|authwrite'"
            )
            .unwrap()
            .status
            .success()
    );
    assert!(
        !stand
            .shell("tpm2_nvread 0x1500001 -C 0x1500001 -P wrong -s 8")
            .unwrap()
            .status
            .success()
    );
    assert_eq!(tpm.open(&own, None).unwrap().expose(), b"own");
    let error = tpm.open(&theirs, None).unwrap_err();
    assert!(matches!(error, TpmError::LockedOut { .. }), "{error:?}");
    let clear = "tpm2_dictionarylockout --clear-lockout";
    assert!(error.to_string().contains(clear), "{error}");
    assert!(stand.shell(clear).unwrap().status.success());
    assert_eq!(tpm.open(&theirs, None).unwrap().expose(), b"theirs");
}

#[test]
fn a_hanging_tpm_costs_its_deadline_once() {
    let stand = Swtpm::start().unwrap();
    let sealed = Tpm::of(&stand)
        .bind(&secret(b"secret"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    let deadline = Duration::from_millis(1500);
    let tpm = Tpm::new(stand.tcti().parse().unwrap(), deadline);
    stand.signal(Signal::SIGSTOP).unwrap();
    let started = Instant::now();
    assert!(matches!(tpm.open(&sealed, None), Err(TpmError::Silent(_))));
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    let started = Instant::now();
    let error = tpm.open(&sealed, None).unwrap_err();
    assert_eq!(error.to_string(), "the TPM did not answer within 1.5 s");
    assert!(error.may_pass());
    assert!(started.elapsed() < deadline, "{:?}", started.elapsed());
    stand.signal(Signal::SIGCONT).unwrap();
    let started = Instant::now();
    while tpm.open(&sealed, None).is_err() {
        assert!(started.elapsed() < Duration::from_secs(20), "it never recovered");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_absent_tpm_is_named() {
    let absent = |tcti: &str| {
        let tpm = Tpm::new(tcti.parse().unwrap(), Duration::from_secs(10));
        tpm.bind(&secret(b"x"), &BindPolicy::exactly(PcrList::default()))
            .unwrap_err()
    };
    let error = absent("device:/dev/no-such-tpm");
    assert_eq!(error.to_string(), "this host has no TPM at /dev/no-such-tpm");
    let error = absent("device:/proc/self/mem/x");
    assert!(matches!(error, TpmError::Device { .. }), "{error:?}");
    let mut stand = Swtpm::start().unwrap();
    let tcti = stand.tcti();
    stand.off().unwrap();
    let error = absent(&tcti);
    assert!(matches!(error, TpmError::Unreachable(..)), "{error:?}");
    assert!(error.to_string().contains(&tcti) && error.may_pass(), "{error}");
}

#[test]
fn nothing_stays_in_the_tpm_after_a_hundred_rounds() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let sealed = tpm
        .bind(&secret(b"secret"), &BindPolicy::exactly(pcrs("7,11")))
        .unwrap();
    let started = Instant::now();
    for round in 0..100 {
        match round % 10 {
            9 => drop(
                tpm.bind(&secret(b"secret"), &BindPolicy::exactly(PcrList::default()))
                    .unwrap(),
            ),
            _ => drop(tpm.open(&sealed, None).unwrap()),
        }
    }
    println!("100 rounds in {:?}", started.elapsed());
    let mut broken = sealed.clone();
    broken.private[30] ^= 1;
    stand.extend(11).unwrap();
    for _ in 0..5 {
        assert!(tpm.open(&broken, None).is_err());
        assert!(tpm.open(&sealed, None).is_err());
    }
    // Transient objects, loaded sessions, saved sessions.
    for range in [0x8000_0000, 0x0200_0000, 0x0300_0000] {
        let (handles, _) = session(&stand)
            .context()
            .get_capability(CapabilityType::Handles, range, 16)
            .unwrap();
        match handles {
            CapabilityData::Handles(handles) => assert!(handles.is_empty(), "{range:x}: {handles:?}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn many_callers_take_turns() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let sealed = tpm
        .bind(&secret(b"secret"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(tpm.open(&sealed, None).unwrap().expose(), b"secret"));
        }
    });
}

#[test]
fn lists_of_pcrs_and_ways_to_a_tpm_are_checked() {
    assert_eq!(pcrs("11,7,7").to_string(), "7,11");
    assert_eq!(pcrs("7+11").to_string(), "7,11");
    assert_eq!(pcrs("7,9,4").changed_by_updates(), Some(pcrs("4,9")));
    assert_eq!(pcrs("7,11").changed_by_updates(), None);
    for bad in ["", "7,", "24", "16", "23", "seven", "-1", "7 11", "7++11"] {
        assert!(bad.parse::<PcrList>().is_err(), "{bad:?}");
    }
    assert_eq!(Tcti::default().to_string(), "device:/dev/tpmrm0");
    for bad in ["", "/dev/tpm0", "libtss2-tcti-evil.so:x", "swtpm:port=x"] {
        assert!(bad.parse::<Tcti>().is_err(), "{bad:?}");
    }
}

fn pin(text: &str) -> Option<Arc<SecretBytes>> {
    Some(secret(text.as_bytes()))
}

fn with_pin(text: &str) -> BindPolicy {
    BindPolicy::new(PcrList::default(), None)
        .unwrap()
        .with_pin(pin(text))
}

#[test]
fn a_pin_opens_it_and_no_other_does() {
    let mut stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let sealed = tpm.bind(&secret(b"secret"), &with_pin("1234 öäü")).unwrap();
    let sealed = BoundToTpm::from_bytes(&sealed.to_bytes()).unwrap();
    assert!(sealed.needs_pin());
    assert!(matches!(tpm.open(&sealed, None), Err(TpmError::NeedsPin)));
    let opens = |text: &str| tpm.open(&sealed, pin(text).as_ref());
    assert_eq!(opens("1234 öäü").unwrap().expose(), b"secret");
    let error = opens("1234").unwrap_err();
    assert!(matches!(error, TpmError::WrongPin { left: Some(2) }), "{error:?}");
    assert!(
        error.to_string().contains("2 tries are left") && !error.may_pass(),
        "{error}"
    );
    // Other PCRs cost no try.
    stand.extend(7).unwrap();
    for _ in 0..4 {
        assert!(matches!(opens("1234 öäü"), Err(TpmError::PcrsDiffer(_))));
    }
    stand.reboot().unwrap();
    assert_eq!(opens("1234 öäü").unwrap().expose(), b"secret");
    // What was sealed without a PIN opens with one too, and its policy is taken over.
    let without = tpm
        .bind(&secret(b"without"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert_eq!(
        tpm.open(&without, pin("x").as_ref()).unwrap().expose(),
        b"without"
    );
    let again = tpm.bind(&secret(b"again"), &sealed.policy(pin("other").as_ref()));
    let again = again.unwrap();
    assert_eq!(
        tpm.open(&again, pin("other").as_ref()).unwrap().expose(),
        b"again"
    );
    // The salt of another one makes it another PIN, no damage.
    let other_salt = BoundToTpm {
        pin_salt: again.pin_salt,
        ..sealed.clone()
    };
    let error = tpm.open(&other_salt, pin("1234 öäü").as_ref()).unwrap_err();
    assert!(matches!(error, TpmError::WrongPin { .. }), "{error:?}");
}

#[test]
fn too_many_wrong_pins_lock_the_tpm_and_it_says_for_how_long() {
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let sealed = tpm.bind(&secret(b"secret"), &with_pin("right")).unwrap();
    let plain = tpm
        .bind(&secret(b"plain"), &BindPolicy::exactly(PcrList::default()))
        .unwrap();
    assert!(
        stand
            .shell("tpm2_dictionarylockout -s -n 2 -t 600 -l 1000")
            .unwrap()
            .status
            .success()
    );
    let opens = |text: &str| tpm.open(&sealed, pin(text).as_ref());
    let left = |error: TpmError| match error {
        TpmError::WrongPin { left } => left,
        other => panic!("{other:?}"),
    };
    assert_eq!(left(opens("wrong").unwrap_err()), Some(1));
    assert_eq!(left(opens("wrong").unwrap_err()), Some(0));
    let error = opens("right").unwrap_err();
    let TpmError::LockedOut { one_more_in } = &error else {
        panic!("{error:?}")
    };
    assert_eq!(*one_more_in, Some(Duration::from_secs(600)));
    for part in ["one more in 10 minutes", "tpm2_dictionarylockout --clear-lockout"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    // Nobody else is hit, and the message helps.
    assert_eq!(tpm.open(&plain, None).unwrap().expose(), b"plain");
    assert!(
        stand
            .shell("tpm2_dictionarylockout --clear-lockout")
            .unwrap()
            .status
            .success()
    );
    assert_eq!(opens("right").unwrap().expose(), b"secret");
}

#[test]
fn signed_kernels_open_it_and_no_others_do() {
    let mut stand = Swtpm::start().unwrap();
    let root = tempfile::tempdir().unwrap();
    let tpm = Tpm::of(&stand).with_root(root.path());
    let (key, public) = SigningKey::pair();
    let (stranger, _) = SigningKey::pair();
    let policy = BindPolicy::new(pcrs("7,11"), Some(public.clone())).unwrap();
    let sealed = tpm.bind(&secret(b"secret"), &policy).unwrap();
    let sealed = BoundToTpm::from_bytes(&sealed.to_bytes()).unwrap();
    assert_eq!(sealed.pcrs(), pcrs("7,11"));
    assert_eq!(sealed.signed_by().unwrap().fingerprint(), public.fingerprint());
    let refused = |why: Unsigned| match tpm.open(&sealed, None).unwrap_err() {
        TpmError::NotSigned { key, why: found } => {
            assert_eq!((key, found), (public.fingerprint(), why));
        }
        other => panic!("{other:?}"),
    };
    let opens = || assert_eq!(tpm.open(&sealed, None).unwrap().expose(), b"secret");
    refused(Unsigned::NoFile);
    stand.sign_kernel(root.path(), &key).unwrap();
    opens();
    // Another kernel, then its signature.
    stand.extend(11).unwrap();
    refused(Unsigned::OtherBoot);
    stand.sign_kernel(root.path(), &stranger).unwrap();
    refused(Unsigned::ByOthers);
    stand.sign_kernel(root.path(), &key).unwrap();
    opens();
    // That of a file which is nothing of the kind is no reason to refuse, a bad file alone is.
    let etc = root.path().join("etc/systemd");
    std::fs::create_dir_all(&etc).unwrap();
    std::fs::write(etc.join("tpm2-pcr-signature.json"), "{").unwrap();
    opens();
    stand.extend(11).unwrap();
    match tpm.open(&sealed, None).unwrap_err() {
        TpmError::NotSigned {
            why: Unsigned::Unreadable(why),
            ..
        } => {
            assert!(why.starts_with("/etc/systemd/tpm2-pcr-signature.json: "), "{why}");
        }
        other => panic!("{other:?}"),
    }
    stand.sign_kernel(root.path(), &key).unwrap();
    opens();
    // The other PCR is not for the key to sign.
    stand.extend(7).unwrap();
    assert_eq!(
        tpm.open(&sealed, None).unwrap_err().to_string(),
        "PCR 7 differs from when it was enrolled"
    );
    stand.reboot().unwrap();
    stand.sign_kernel(root.path(), &key).unwrap();
    opens();
    // The key of another can't be put in the place of the first.
    let swapped = BoundToTpm {
        signed_by: Some(Hex(SigningKey::pair().1.to_der())),
        ..sealed.clone()
    };
    assert!(matches!(
        tpm.open(&swapped, None),
        Err(TpmError::NotSigned { .. })
    ));
    let stripped = BoundToTpm {
        signed_by: None,
        ..sealed.clone()
    };
    assert!(matches!(tpm.open(&stripped, None), Err(TpmError::Damaged)));
}

#[test]
fn a_signed_kernel_and_a_pin_go_together() {
    let stand = Swtpm::start().unwrap();
    let root = tempfile::tempdir().unwrap();
    let tpm = Tpm::of(&stand).with_root(root.path());
    let (key, public) = SigningKey::pair();
    let policy = BindPolicy::new(pcrs("11"), Some(public))
        .unwrap()
        .with_pin(pin("p"));
    let sealed = tpm.bind(&secret(b"secret"), &policy).unwrap();
    // Without the signature no try of the PIN is lost.
    for _ in 0..4 {
        let error = tpm.open(&sealed, pin("wrong").as_ref()).unwrap_err();
        assert!(matches!(error, TpmError::NotSigned { .. }), "{error:?}");
    }
    stand.sign_kernel(root.path(), &key).unwrap();
    assert_eq!(tpm.open(&sealed, pin("p").as_ref()).unwrap().expose(), b"secret");
    let error = tpm.open(&sealed, pin("wrong").as_ref()).unwrap_err();
    assert!(matches!(error, TpmError::WrongPin { .. }), "{error:?}");
}

#[test]
fn pcr_11_and_a_key_want_each_other() {
    let (_, public) = SigningKey::pair();
    assert!(matches!(
        BindPolicy::new(pcrs("7,11"), None),
        Err(PolicyError::Unsigned)
    ));
    assert!(matches!(
        BindPolicy::new(pcrs("7"), Some(public)),
        Err(PolicyError::NothingToSign(_))
    ));
    for bad in [
        &b""[..],
        b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n",
    ] {
        assert!(matches!(SigningKey::from_pem(bad), Err(NotASigningKey::Pem(_))));
    }
    // Who hands over the private key is not served with it.
    let private = openssl::rsa::Rsa::generate(2048)
        .unwrap()
        .private_key_to_pem()
        .unwrap();
    assert!(matches!(
        SigningKey::from_pem(&private),
        Err(NotASigningKey::Pem(_))
    ));
    let small = openssl::rsa::Rsa::generate(1024)
        .unwrap()
        .public_key_to_pem()
        .unwrap();
    assert!(matches!(SigningKey::from_pem(&small), Err(NotASigningKey::Kind)));
}

#[test]
fn a_call_that_panics_when_it_is_late_stops_none_after_it() {
    let turn = Turn::default();
    let late = || {
        turn.take::<()>(|| {
            turn.is_late();
            panic!("by the library")
        });
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(late)).unwrap_err();
    assert_eq!(*turn.running(), Running::None);
    assert_eq!(turn.take(|| *turn.running()), Running::InTime);
}

use std::path::Path;
use std::time::Duration;

use virtseal_testkit::Swtpm;

use super::super::tests::{created, find_in_memory, payload, secret};
use super::*;
use crate::host::tpm::{PcrList, SigningKey};
use crate::model::envelope::{Payload, Stanza};
use crate::provider::{KekScope, KeyProvider, ProviderError, ProviderStatus};
use crate::store::Stores;

/// A provider that is backed up, with something that it wrapped.
fn at_work(dir: &Path) -> (NativeProvider, Payload, Stanza) {
    let provider = created(dir);
    let generation = provider.backup(None).unwrap().generation;
    provider.confirm_backup(generation).unwrap();
    let (payload, binding) = payload();
    let kek = provider.create_kek(&KekScope::Vm(binding.vm)).unwrap();
    let stanza = provider.wrap(&kek, &payload).unwrap();
    (provider, payload, stanza)
}

/// While these PCRs are what they are, 11 among them too.
fn of(pcrs: &str) -> BindPolicy {
    BindPolicy::exactly(pcrs.parse().unwrap())
}

fn pin(text: &str) -> Option<Arc<SecretBytes>> {
    Some(Arc::new(secret(text)))
}

/// As the next daemon finds it.
fn reopened(provider: NativeProvider, dir: &Path) -> NativeProvider {
    drop(provider);
    let stores = Stores::open(dir).unwrap();
    let record = stores.keystore.providers().unwrap().whole().unwrap().remove(0);
    NativeProvider::open(&stores.providers(), &record).unwrap()
}

fn unlock(provider: &NativeProvider, tpm: &Tpm) -> Result<(), NativeError> {
    provider.unlock_by_tpm(tpm, provider.locks(), None)
}

fn unwraps(provider: &NativeProvider, stanza: &Stanza, payload: &Payload) -> bool {
    provider.unwrap_many(&[stanza]).unwrap()[0].expose() == payload.expose()
}

#[test]
fn it_unlocks_after_a_restart_and_the_passphrase_still_does() {
    let dir = tempfile::tempdir().unwrap();
    let mut stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, payload, stanza) = at_work(dir.path());
    assert!(matches!(unlock(&provider, &tpm), Err(NativeError::NotEnrolled)));
    provider.lock();
    assert!(matches!(
        provider.enroll_tpm(&tpm, &of("7")),
        Err(NativeError::Locked)
    ));
    provider.unlock(&secret("sealing")).unwrap();
    provider.enroll_tpm(&tpm, &of("7")).unwrap();
    let enrollment = provider.tpm_enrollment().unwrap().unwrap();
    assert_eq!(
        (enrollment.pcrs, enrollment.stale),
        (Some(PcrList::default()), false)
    );

    stand.reboot().unwrap();
    let provider = reopened(provider, dir.path());
    assert_eq!(provider.status(), ProviderStatus::Locked);
    unlock(&provider, &tpm).unwrap();
    assert_eq!(provider.status(), ProviderStatus::Ready);
    assert!(unwraps(&provider, &stanza, &payload));

    assert_eq!(provider.remove_tpm().unwrap(), Change::Changed);
    assert_eq!(provider.remove_tpm().unwrap(), Change::Unchanged);
    let provider = reopened(provider, dir.path());
    assert!(matches!(unlock(&provider, &tpm), Err(NativeError::NotEnrolled)));
    provider.unlock(&secret("sealing")).unwrap();
    assert!(unwraps(&provider, &stanza, &payload));
}

#[test]
fn other_pcrs_say_why_and_the_passphrase_leads_back() {
    let dir = tempfile::tempdir().unwrap();
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, payload, stanza) = at_work(dir.path());
    provider.enroll_tpm(&tpm, &of("7,11")).unwrap();
    stand.extend(7).unwrap();
    let provider = reopened(provider, dir.path());
    assert!(unlock(&provider, &tpm).is_err());
    assert_eq!(provider.status(), ProviderStatus::Locked);
    let why = "it is not opened by the TPM: PCR 7 differs from when it was enrolled";
    assert_eq!(provider.why_locked(), Some(WhyLocked::NotOpened(why.to_owned())));
    let refused = provider.unwrap_many(&[&stanza]).unwrap_err();
    assert_eq!(refused.to_string(), format!("is locked: {why}"));

    provider.unlock(&secret("sealing")).unwrap();
    assert_eq!(provider.why_locked(), None);
    assert!(unwraps(&provider, &stanza, &payload));
    provider.enroll_tpm(&tpm, &of("7,11")).unwrap();
    let provider = reopened(provider, dir.path());
    unlock(&provider, &tpm).unwrap();
    assert!(unwraps(&provider, &stanza, &payload));
    provider.lock();
    assert!(matches!(
        provider.unwrap_many(&[&stanza]),
        Err(ProviderError::Locked)
    ));
}

#[test]
fn a_lost_tpm_costs_nothing_but_this_way_in() {
    let dir = tempfile::tempdir().unwrap();
    let (mut stand, other) = (Swtpm::start().unwrap(), Swtpm::start().unwrap());
    let (provider, payload, stanza) = at_work(dir.path());
    provider.enroll_tpm(&Tpm::of(&stand), &of("7")).unwrap();
    // What can't be enrolled leaves what was there.
    stand.off().unwrap();
    let short = Tpm::new(stand.tcti().parse().unwrap(), Duration::from_secs(5));
    let failed = provider.enroll_tpm(&short, &of("7")).unwrap_err();
    assert!(
        matches!(&failed, NativeError::Tpm(error) if error.may_pass()),
        "{failed:?}"
    );
    stand.reboot().unwrap();
    let provider = reopened(provider, dir.path());
    unlock(&provider, &Tpm::of(&stand)).unwrap();

    let provider = reopened(provider, dir.path());
    let error = unlock(&provider, &Tpm::of(&other)).unwrap_err();
    assert!(
        matches!(error, NativeError::Tpm(TpmError::AnotherTpm)),
        "{error:?}"
    );
    stand.off().unwrap();
    assert!(unlock(&provider, &short).is_err());
    provider.unlock(&secret("sealing")).unwrap();
    assert!(unwraps(&provider, &stanza, &payload));
    // To the new one, then.
    provider.enroll_tpm(&Tpm::of(&other), &of("7")).unwrap();
    let provider = reopened(provider, dir.path());
    unlock(&provider, &Tpm::of(&other)).unwrap();
}

#[test]
fn a_lock_wins_over_an_unlock_that_began_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, ..) = at_work(dir.path());
    provider.enroll_tpm(&tpm, &of("7")).unwrap();
    let began = provider.locks();
    provider.lock();
    assert!(matches!(
        provider.unlock_by_tpm(&tpm, began, None),
        Err(NativeError::Locked)
    ));
    assert_eq!(provider.status(), ProviderStatus::Locked);
    assert_eq!(provider.why_locked(), None);
    unlock(&provider, &tpm).unwrap();
}

#[test]
fn a_rotation_makes_it_stale_until_it_is_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let mut stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, payload, stanza) = at_work(dir.path());
    assert_eq!(provider.renew_tpm(&tpm, None).unwrap(), Change::Unchanged);
    provider.enroll_tpm(&tpm, &of("7")).unwrap();
    assert_eq!(provider.renew_tpm(&tpm, None).unwrap(), Change::Unchanged);
    assert_eq!(provider.rotate(&secret("sealing")).unwrap(), 2);
    assert!(provider.tpm_enrollment().unwrap().unwrap().stale);

    // The daemon died before it could renew it.
    let provider = reopened(provider, dir.path());
    assert!(matches!(unlock(&provider, &tpm), Err(NativeError::TpmStale)));
    assert!(
        provider
            .why_locked()
            .unwrap()
            .to_string()
            .contains("newer root key")
    );
    assert!(matches!(provider.renew_tpm(&tpm, None), Err(NativeError::Locked)));
    provider.unlock(&secret("sealing")).unwrap();
    // Not to PCRs that nobody has accepted.
    stand.extend(7).unwrap();
    assert!(matches!(
        provider.renew_tpm(&tpm, None),
        Err(NativeError::Tpm(TpmError::PcrsDiffer(_)))
    ));
    assert!(provider.tpm_enrollment().unwrap().unwrap().stale);
    stand.reboot().unwrap();
    assert_eq!(provider.renew_tpm(&tpm, None).unwrap(), Change::Changed);

    let provider = reopened(provider, dir.path());
    unlock(&provider, &tpm).unwrap();
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    assert!(unwraps(&provider, &stanza, &payload));
    provider.confirm_backup(2).unwrap();
    assert_eq!(provider.create_kek(&KekScope::Provider).unwrap().0, "v2:provider");
}

#[test]
fn a_rotation_commits_what_the_tpm_opens_with_its_root_key() {
    let dir = tempfile::tempdir().unwrap();
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, payload, stanza) = at_work(dir.path());
    let rotate = |provider: &NativeProvider, tpm: &Tpm| {
        let said = provider.rotate_with_tpm(&secret("sealing"), tpm, None).unwrap();
        provider.confirm_backup(provider.generation()).unwrap();
        said
    };
    assert_eq!(rotate(&provider, &tpm).unwrap(), Change::Unchanged);
    assert_eq!(provider.tpm_enrollment().unwrap(), None);
    provider.enroll_tpm(&tpm, &of("7")).unwrap();
    // No time between the two for the daemon to die in; also while the provider is locked.
    provider.lock();
    assert_eq!(rotate(&provider, &tpm).unwrap(), Change::Changed);
    let provider = reopened(provider, dir.path());
    unlock(&provider, &tpm).unwrap();
    assert_eq!(provider.generation(), 3);
    assert!(unwraps(&provider, &stanza, &payload));

    // Without it the rotation is done all the same, and the row says that it is stale.
    stand.extend(7).unwrap();
    assert!(matches!(
        rotate(&provider, &tpm),
        Err(NativeError::Tpm(TpmError::PcrsDiffer(_)))
    ));
    assert_eq!(provider.generation(), 4);
    assert!(provider.tpm_enrollment().unwrap().unwrap().stale);
}

#[test]
fn an_enrolment_that_was_removed_meanwhile_is_not_renewed() {
    let dir = tempfile::tempdir().unwrap();
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, ..) = at_work(dir.path());
    provider.enroll_tpm(&tpm, &of("7")).unwrap();
    let before = provider.rows.bound_roots().unwrap().unwrap();
    let renewal = provider
        .renewal(&tpm, before, &provider.roots().unwrap(), None)
        .unwrap();
    provider.remove_tpm().unwrap();
    let renewed = provider.rows.renew_bound_roots(&renewal).unwrap();
    assert_eq!(renewed, Change::Unchanged);
    assert_eq!(provider.tpm_enrollment().unwrap(), None);
}

#[test]
fn a_row_that_was_changed_opens_nothing() {
    let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, other) = (created(dir.path()), created(elsewhere.path()));
    for each in [&provider, &other] {
        each.enroll_tpm(&tpm, &of("7")).unwrap();
        each.lock();
    }
    let row = |of: &NativeProvider| of.rows.bound_roots().unwrap().unwrap();
    let (mine, foreign) = (row(&provider), row(&other));
    let changed = |change: fn(&mut BoundRoots, &BoundRoots)| {
        let mut row = mine.clone();
        change(&mut row, &foreign);
        provider.rows.put_bound_roots(&row).unwrap();
        unlock(&provider, &tpm).unwrap_err()
    };
    for (what, error) in [
        ("the other's row", changed(|row, other| *row = other.clone())),
        (
            "the other's key",
            changed(|row, other| row.bound_key = other.bound_key.clone()),
        ),
        (
            "the other's roots",
            changed(|row, other| row.roots = other.roots.clone()),
        ),
        ("a bit", changed(|row, _| row.roots[40] ^= 1)),
        (
            "the tag",
            changed(|row, _| row.roots.truncate(row.roots.len() - 1)),
        ),
        ("no roots", changed(|row, _| row.roots.clear())),
    ] {
        assert!(matches!(error, NativeError::TpmRecord), "{what}: {error:?}");
        assert_eq!(provider.status(), ProviderStatus::Locked);
    }
    let error = changed(|row, _| row.bound_key.truncate(9));
    assert!(matches!(error, NativeError::Tpm(TpmError::Damaged)), "{error:?}");
    assert_eq!(provider.tpm_enrollment().unwrap().unwrap().pcrs, None);
    provider.unlock(&secret("sealing")).unwrap();
    provider.rows.put_bound_roots(&mine).unwrap();
    provider.lock();
    unlock(&provider, &tpm).unwrap();
}

/// The library and the C code under it copy what the TPM seals and opens.
#[test]
fn neither_key_nor_roots_stay_in_ordinary_memory() {
    // As `process::harden` has it in the daemon.
    // SAFETY: it changes a setting of the allocator.
    unsafe { libc::mallopt(libc::M_PERTURB, 0x5a) };
    let dir = tempfile::tempdir().unwrap();
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, ..) = at_work(dir.path());
    provider.enroll_tpm(&tpm, &of("7")).unwrap();
    let row = provider.rows.bound_roots().unwrap().unwrap();
    let sealed = BoundToTpm::from_bytes(&row.bound_key).unwrap();
    let key = tpm.open(&sealed, None).unwrap();
    let root = SecretBytes::take(&mut provider.roots().unwrap().key(1).unwrap().expose().to_vec()).unwrap();
    let search = |step: &str| {
        for needle in [&key.expose()[4..28], &root.expose()[4..28]] {
            assert_eq!(find_in_memory(needle), Vec::<String>::new(), "after {step}");
        }
    };
    search("enroll");
    provider.lock();
    unlock(&provider, &tpm).unwrap();
    search("unlock");
    stand.extend(7).unwrap();
    provider.lock();
    unlock(&provider, &tpm).unwrap_err();
    search("refusal");

    // Nor a PIN, right or wrong.
    let pin = |length| Some(Arc::new(SecretBytes::random(length).unwrap()));
    let (right, wrong) = (pin(24), pin(24));
    provider.unlock(&secret("sealing")).unwrap();
    provider
        .enroll_tpm(&tpm, &of("7").with_pin(right.clone()))
        .unwrap();
    provider.lock();
    let unlock =
        |pin: &Option<Arc<SecretBytes>>| provider.unlock_by_tpm(&tpm, provider.locks(), pin.as_ref());
    unlock(&wrong).unwrap_err();
    unlock(&right).unwrap();
    for pin in [right, wrong] {
        let pin = pin.unwrap();
        assert_eq!(find_in_memory(&pin.expose()[..20]), Vec::<String>::new());
    }
    search("a PIN");
}

#[test]
fn with_a_pin_it_waits_for_somebody_to_type_it() {
    let dir = tempfile::tempdir().unwrap();
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand);
    let (provider, payload, stanza) = at_work(dir.path());
    provider.enroll_tpm(&tpm, &of("7").with_pin(pin("1234"))).unwrap();
    assert!(provider.tpm_enrollment().unwrap().unwrap().needs_pin);
    let provider = reopened(provider, dir.path());
    let waits = || {
        assert_eq!(provider.why_locked(), Some(WhyLocked::NeedsPin));
        let refused = provider.unwrap_many(&[&stanza]).unwrap_err();
        assert_eq!(refused.to_string(), "is locked: it needs its PIN for the TPM");
    };
    let unlock = |pin: Option<Arc<SecretBytes>>| provider.unlock_by_tpm(&tpm, provider.locks(), pin.as_ref());
    assert!(matches!(unlock(None), Err(NativeError::Tpm(TpmError::NeedsPin))));
    waits();
    assert!(matches!(
        unlock(pin("4321")),
        Err(NativeError::Tpm(TpmError::WrongPin { .. }))
    ));
    waits();
    unlock(pin("1234")).unwrap();
    assert!(unwraps(&provider, &stanza, &payload));

    // A rotation takes it along with the PIN, does nothing with a wrong one, and leaves it behind without.
    let rotate =
        |pin: Option<Arc<SecretBytes>>| provider.rotate_with_tpm(&secret("sealing"), &tpm, pin.as_ref());
    let refused = rotate(pin("4321")).unwrap_err();
    assert!(matches!(refused, NativeError::Tpm(TpmError::WrongPin { .. })));
    assert_eq!(provider.generation(), 1);
    assert_eq!(rotate(pin("1234")).unwrap().unwrap(), Change::Changed);
    provider.lock();
    unlock(pin("1234")).unwrap();
    provider.confirm_backup(2).unwrap();
    assert!(matches!(
        rotate(None).unwrap(),
        Err(NativeError::Tpm(TpmError::NeedsPin))
    ));
    assert!(provider.tpm_enrollment().unwrap().unwrap().stale);
    assert_eq!(
        provider.renew_tpm(&tpm, pin("1234").as_ref()).unwrap(),
        Change::Changed
    );
    provider.lock();
    unlock(pin("1234")).unwrap();
    assert_eq!(provider.generation(), 3);
}

#[test]
fn it_follows_the_kernels_that_a_key_signs_also_after_a_rotation() {
    let (dir, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let stand = Swtpm::start().unwrap();
    let tpm = Tpm::of(&stand).with_root(root.path());
    let (key, public) = SigningKey::pair();
    let (provider, payload, stanza) = at_work(dir.path());
    let policy = BindPolicy::new("7,11".parse().unwrap(), Some(public.clone())).unwrap();
    // Not before it has been seen to open.
    assert!(matches!(
        provider.enroll_tpm(&tpm, &policy),
        Err(NativeError::Tpm(TpmError::NotSigned { .. }))
    ));
    assert_eq!(provider.tpm_enrollment().unwrap(), None);
    stand.sign_kernel(root.path(), &key).unwrap();
    provider.enroll_tpm(&tpm, &policy).unwrap();
    let enrollment = provider.tpm_enrollment().unwrap().unwrap();
    assert_eq!(enrollment.signed_by, Some(public));
    assert_eq!(enrollment.unmeasured, Some(PcrList::default()));

    stand.extend(11).unwrap();
    let provider = reopened(provider, dir.path());
    unlock(&provider, &tpm).unwrap_err();
    assert!(matches!(provider.why_locked(), Some(WhyLocked::NotSigned(_))));
    stand.sign_kernel(root.path(), &key).unwrap();
    unlock(&provider, &tpm).unwrap();
    assert!(unwraps(&provider, &stanza, &payload));
    let rotated = provider.rotate_with_tpm(&secret("sealing"), &tpm, None).unwrap();
    assert_eq!(rotated.unwrap(), Change::Changed);
    stand.extend(11).unwrap();
    stand.sign_kernel(root.path(), &key).unwrap();
    let provider = reopened(provider, dir.path());
    unlock(&provider, &tpm).unwrap();
    assert_eq!(provider.generation(), 2);
}

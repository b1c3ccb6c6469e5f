use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::*;
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, VmId};
use crate::secret::Dek;
use crate::store::{StoreError, Stores};

pub(super) fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}

fn name(text: &str) -> ProviderName {
    text.parse().unwrap()
}

pub(super) fn created(dir: &Path) -> NativeProvider {
    created_in(&Stores::open(dir).unwrap())
}

fn created_in(stores: &Stores) -> NativeProvider {
    NativeProvider::create(&stores.providers(), &name("main"), &secret("sealing")).unwrap()
}

pub(super) fn payload() -> (Payload, Binding) {
    let binding = Binding {
        envelope: EnvelopeId::random(),
        vm: VmId::random(),
        kind: ObjectKind::Disk,
    };
    (Payload::bind(&Dek::random().unwrap(), &binding).unwrap(), binding)
}

#[test]
fn wraps_nothing_before_a_backup_is_confirmed() {
    let dir = tempfile::tempdir().unwrap();
    let provider = created(dir.path());
    let scope = KekScope::Vm(VmId::random());
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    assert!(matches!(
        provider.create_kek(&scope),
        Err(ProviderError::NotBackedUp)
    ));
    let (payload, _) = payload();
    let kek = KekId("v1:provider".to_owned());
    assert!(matches!(
        provider.wrap(&kek, &payload),
        Err(ProviderError::NotBackedUp)
    ));
    assert!(provider.unwrap_many(&[]).unwrap().is_empty());

    let backup = provider.backup(Some(&secret("backup"))).unwrap();
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    assert!(provider.confirm_backup(backup.generation + 1).is_err());
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    provider.confirm_backup(backup.generation).unwrap();
    assert_eq!(provider.status(), ProviderStatus::Ready);
    provider
        .wrap(&provider.create_kek(&scope).unwrap(), &payload)
        .unwrap();
}

#[test]
fn locked_is_what_it_is_whether_backed_up_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let provider = created(dir.path());
    provider.lock();
    assert_eq!(provider.status(), ProviderStatus::Locked);
    assert!(matches!(
        provider.create_kek(&KekScope::Provider),
        Err(ProviderError::Locked)
    ));
    assert!(matches!(provider.unwrap_many(&[]), Err(ProviderError::Locked)));
    assert!(matches!(provider.backup(None), Err(NativeError::Locked)));
    for wrong in ["wrong", "", "sealing\n", "a\0b"] {
        assert!(matches!(
            provider.unlock(&secret(wrong)),
            Err(ProviderError::WrongCredential)
        ));
        assert_eq!(provider.status(), ProviderStatus::Locked);
    }
    provider.unlock(&secret("sealing")).unwrap();
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    assert!(matches!(
        provider.unlock(&secret("wrong")),
        Err(ProviderError::WrongCredential)
    ));
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
}

#[test]
fn a_lock_wins_over_an_unlock_that_began_before_it() {
    let dir = tempfile::tempdir().unwrap();
    let provider = created(dir.path());
    let began = provider.locks();
    let sealed = provider.newest().encrypted;
    let roots = provider.decrypted(&sealed, &secret("sealing")).unwrap();
    provider.lock();
    assert!(matches!(provider.hold(roots, began), Err(ProviderError::Locked)));
    assert_eq!(provider.status(), ProviderStatus::Locked);
    provider.unlock(&secret("sealing")).unwrap();
}

#[test]
fn locking_ends_the_root_key_with_its_last_user() {
    let dir = tempfile::tempdir().unwrap();
    let provider = created(dir.path());
    let user = provider.roots().unwrap();
    let watch = Arc::downgrade(&user);
    provider.lock();
    assert!(watch.upgrade().is_some());
    drop(user);
    assert!(watch.upgrade().is_none());
}

#[test]
fn restored_elsewhere_it_opens_what_was_wrapped() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let provider = created(here.path());
    let sealed = provider.backup(Some(&secret("backup"))).unwrap();
    let bare = provider.backup(None).unwrap();
    provider.confirm_backup(sealed.generation).unwrap();
    let (payload, binding) = payload();
    let kek = provider.create_kek(&KekScope::Vm(binding.vm)).unwrap();
    let stanza = provider.wrap(&kek, &payload).unwrap();

    for (bytes, passphrase) in [(&sealed.bytes, Some(secret("backup"))), (&bare.bytes, None)] {
        let dir = there.path().join(passphrase.is_some().to_string());
        let restored = NativeProvider::restore(
            &Stores::open(&dir).unwrap().providers(),
            &name("moved"),
            bytes,
            passphrase.as_ref(),
            &secret("other"),
        )
        .unwrap();
        assert_eq!(
            (restored.id(), restored.status()),
            (provider.id(), ProviderStatus::Ready)
        );
        restored.lock();
        assert!(restored.unlock(&secret("sealing")).is_err());
        restored.unlock(&secret("other")).unwrap();
        let opened = restored.unwrap_many(&[&stanza]).unwrap();
        assert_eq!(opened[0].expose(), payload.expose());
    }
}

#[test]
fn restore_refuses_what_is_here_or_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let provider = created_in(&stores);
    let backup = provider.backup(Some(&secret("backup"))).unwrap().bytes;
    let restore = |as_name: &str, bytes: &[u8], passphrase: Option<&str>| {
        let passphrase = passphrase.map(secret);
        NativeProvider::restore(
            &stores.providers(),
            &name(as_name),
            bytes,
            passphrase.as_ref(),
            &secret("x"),
        )
        .err()
        .unwrap()
    };
    use NativeError::{Backup, BackupIsEncrypted, Document, Keystore};
    let error = restore("main", &backup, Some("backup"));
    assert!(
        matches!(error, Keystore(StoreError::ProviderNameTaken(_))),
        "{error:?}"
    );
    let error = restore("again", &backup, Some("backup"));
    assert!(
        matches!(error, Keystore(StoreError::ProviderExists { .. })),
        "{error:?}"
    );
    let error = restore("new", &backup, Some("wrong"));
    assert!(matches!(error, Backup(AgeError::WrongPassphrase)), "{error:?}");
    assert!(matches!(restore("new", &backup, None), BackupIsEncrypted));
    assert!(matches!(restore("new", b"{}", None), Document(_)));
    assert!(matches!(
        restore("new", &[b'x'; 70_000], None),
        Backup(AgeError::TooLong)
    ));
    assert_eq!(stores.keystore.providers().unwrap().whole().unwrap().len(), 1);
}

#[test]
fn rotated_it_wraps_nothing_until_backed_up_and_still_opens_everything() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let provider = created_in(&stores);
    assert_eq!(
        provider.rotate(&secret("sealing")).unwrap(),
        1,
        "nothing to retire before a backup"
    );
    let first = provider.backup(Some(&secret("backup"))).unwrap();
    provider.confirm_backup(first.generation).unwrap();
    let (payload, binding) = payload();
    let scope = KekScope::Vm(binding.vm);
    let old_kek = provider.create_kek(&scope).unwrap();
    let old = provider.wrap(&old_kek, &payload).unwrap();

    assert!(matches!(
        provider.rotate(&secret("wrong")),
        Err(NativeError::WrongPassphrase)
    ));
    assert_eq!(provider.status(), ProviderStatus::Ready);
    assert_eq!(provider.rotate(&secret("sealing")).unwrap(), 2);
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    assert!(matches!(
        provider.create_kek(&scope),
        Err(ProviderError::NotBackedUp)
    ));
    assert_eq!(
        provider.unwrap_many(&[&old]).unwrap()[0].expose(),
        payload.expose()
    );

    // The confirmation of an earlier backup says nothing of the new root key.
    provider.confirm_backup(first.generation).unwrap();
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    let second = provider.backup(Some(&secret("backup"))).unwrap();
    provider.confirm_backup(second.generation).unwrap();
    let kek = provider.create_kek(&scope).unwrap();
    assert_ne!(kek, old_kek);
    assert!(matches!(
        provider.wrap(&old_kek, &payload),
        Err(ProviderError::UnknownKek(_))
    ));
    let new = provider.wrap(&kek, &payload).unwrap();

    // After a restart, and on another host, both generations open.
    let record = stores.keystore.providers().unwrap().whole().unwrap().remove(0);
    let again = NativeProvider::open(&stores.providers(), &record).unwrap();
    again.unlock(&secret("sealing")).unwrap();
    assert_eq!(again.status(), ProviderStatus::Ready);
    let elsewhere = dir.path().join("elsewhere");
    let moved = NativeProvider::restore(
        &Stores::open(&elsewhere).unwrap().providers(),
        &name("moved"),
        &second.bytes,
        Some(&secret("backup")),
        &secret("other"),
    )
    .unwrap();
    for opener in [&provider, &again, &moved] {
        for payload_again in opener.unwrap_many(&[&old, &new]).unwrap() {
            assert_eq!(payload_again.expose(), payload.expose());
        }
        assert_eq!(opener.create_kek(&scope).unwrap(), kek);
    }
}

#[test]
fn rotating_while_locked_leaves_it_locked() {
    let dir = tempfile::tempdir().unwrap();
    let provider = created(dir.path());
    provider
        .confirm_backup(provider.backup(None).unwrap().generation)
        .unwrap();
    provider.lock();
    assert_eq!(provider.rotate(&secret("sealing")).unwrap(), 2);
    assert_eq!(provider.status(), ProviderStatus::Locked);
    provider.unlock(&secret("sealing")).unwrap();
    assert_eq!(provider.status(), ProviderStatus::NotBackedUp);
    assert_eq!(provider.backup(None).unwrap().generation, 2);
}

#[test]
fn empty_passphrases_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let stores = Stores::open(dir.path()).unwrap();
    let error = NativeProvider::create(&stores.providers(), &name("main"), &secret(""))
        .err()
        .unwrap();
    assert!(matches!(error, NativeError::Encrypt(AgeError::EmptyPassphrase)));
    assert!(stores.keystore.providers().unwrap().whole().unwrap().is_empty());
    let provider = NativeProvider::create(&stores.providers(), &name("main"), &secret("p")).unwrap();
    assert!(provider.backup(Some(&secret(""))).is_err());
}

#[test]
fn root_key_of_another_provider_is_noticed() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (mine, other) = (created(one.path()), created(two.path()));
    mine.newest.write().unwrap().encrypted = other.newest().encrypted;
    let error = mine.unlock(&secret("sealing")).unwrap_err();
    assert!(error.to_string().contains(&other.id().to_string()), "{error}");
}

/// Stock age, on a terminal of its own: it reads passphrases from nowhere else.
fn stock_age_decrypts(sealed: &Path, passphrase: &str) -> Vec<u8> {
    let plain = sealed.with_extension("plain");
    let command = format!("age --decrypt --output {} {}", plain.display(), sealed.display());
    let mut child = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program script is missing: apt install bsdutils");
    let mut terminal = child.stdin.take().unwrap();
    let mut screen = child.stdout.take().unwrap();
    // What is typed before it asks is thrown away.
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(b"assphrase") && screen.read(&mut byte).unwrap() == 1 {
        said.push(byte[0]);
    }
    writeln!(terminal, "{passphrase}").unwrap();
    screen.read_to_end(&mut said).unwrap();
    let status = child.wait().unwrap();
    drop(terminal);
    assert!(
        status.success(),
        "age --decrypt failed (missing? apt install age): {}",
        String::from_utf8_lossy(&said)
    );
    fs::read(plain).unwrap()
}

#[test]
fn stock_age_opens_a_backup_and_its_text_restores() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let provider = created(here.path());
    provider
        .confirm_backup(provider.backup(None).unwrap().generation)
        .unwrap();
    provider.rotate(&secret("sealing")).unwrap();
    let backup = provider.backup(Some(&secret("correct horse"))).unwrap();
    assert!(backup.bytes.starts_with(b"-----BEGIN AGE ENCRYPTED FILE-----\n"));
    let file = there.path().join("main.age");
    File::create(&file).unwrap().write_all(&backup.bytes).unwrap();
    let text = stock_age_decrypts(&file, "correct horse");
    let restored = NativeProvider::restore(
        &Stores::open(there.path()).unwrap().providers(),
        &name("main"),
        &text,
        None,
        &secret("x"),
    )
    .unwrap();
    assert!(restored.roots().unwrap().are(&provider.roots().unwrap()));
}

/// The sealed key in the keystore is an age file too: the way back when only the database is left.
#[test]
fn stock_age_opens_the_keystores_copy() {
    let dir = tempfile::tempdir().unwrap();
    let provider = created(dir.path());
    let file = dir.path().join("root.age");
    fs::write(&file, provider.newest().encrypted).unwrap();
    let roots = RootKeys::from_text(&stock_age_decrypts(&file, "sealing")).unwrap();
    assert!(roots.are(&provider.roots().unwrap()));
}

/// Where in this process' readable memory `needle` is, apart from where it was passed. Pages of
/// `memfd_secret` can't be read this way, which is their point.
pub(super) fn find_in_memory(needle: &[u8]) -> Vec<String> {
    let memory = File::open("/proc/self/mem").unwrap();
    let own_page = needle.as_ptr() as u64 & !4095;
    // Off the heap, so as not to overwrite what is looked for.
    let mut piece_bytes = SecretBytes::zeroed(4096 * 64 + 64).unwrap();
    let bytes = piece_bytes.expose_mut();
    let maps = SecretBytes::read_from(File::open("/proc/self/maps").unwrap(), 1 << 20).unwrap();
    let (mut found, mut searched) = (Vec::new(), 0);
    for line in std::str::from_utf8(maps.expose()).unwrap().lines() {
        let mut words = line.split(' ');
        let (start, end) = words.next().unwrap().split_once('-').unwrap();
        let (start, end) = (
            u64::from_str_radix(start, 16).unwrap(),
            u64::from_str_radix(end, 16).unwrap(),
        );
        if start == own_page || !words.next().unwrap().starts_with('r') {
            continue;
        }
        // Each piece with what a match across its end needs.
        for piece in (start..end).step_by(4096 * 64) {
            let wanted = usize::try_from(end - piece).unwrap().min(bytes.len());
            let Ok(read) = memory.read_at(&mut bytes[..wanted], piece) else {
                continue;
            };
            searched += read;
            // SAFETY: both ranges are borrowed for the call; a search of our own takes minutes in a debug build.
            let hit =
                unsafe { libc::memmem(bytes.as_ptr().cast(), read, needle.as_ptr().cast(), needle.len()) };
            if !hit.is_null() {
                found.push(format!("{piece:x} in {line}"));
            }
        }
    }
    assert!(searched > 1 << 20, "only {searched} bytes could be read");
    found
}

/// The root key itself is in pages that the search can't see, so it looks for copies, after each step that could
/// leave one.
#[test]
fn root_key_is_nowhere_in_ordinary_memory() {
    let dir = tempfile::tempdir().unwrap();
    let provider = created(dir.path());
    let root = |generation| {
        let roots = provider.roots().unwrap();
        Dek::from_bytes(roots.key(generation).unwrap().expose()).unwrap()
    };
    let search_for = |root: &Dek, step: &str| {
        let digits = root.passphrase().unwrap();
        for needle in [&root.expose()[4..28], &digits.expose()[8..56]] {
            assert_eq!(find_in_memory(needle), Vec::<String>::new(), "after {step}");
        }
    };
    let first = root(1);
    let search = |step: &str| search_for(&first, step);
    search("create");
    let backup = provider.backup(Some(&secret("backup"))).unwrap();
    search("backup");
    drop(provider.backup(None).unwrap());
    search("bare backup");
    provider.confirm_backup(backup.generation).unwrap();
    let (payload, _) = payload();
    let kek = provider.create_kek(&KekScope::Provider).unwrap();
    let stanza = provider.wrap(&kek, &payload).unwrap();
    provider.lock();
    provider.unlock(&secret("sealing")).unwrap();
    search("unlock");
    provider.unwrap_many(&[&stanza]).unwrap();
    search("unwrap");
    let elsewhere = Stores::open(&dir.path().join("elsewhere")).unwrap();
    let passphrase = Some(secret("backup"));
    NativeProvider::restore(
        &elsewhere.providers(),
        &name("moved"),
        &backup.bytes,
        passphrase.as_ref(),
        &secret("x"),
    )
    .unwrap();
    search("restore");
    provider.rotate(&secret("sealing")).unwrap();
    let second = root(2);
    search("rotate");
    search_for(&second, "rotate");
    drop(provider.backup(Some(&secret("backup"))).unwrap());
    search("backup of both");
    search_for(&second, "backup of both");
    provider.lock();
    search("lock");
}

#[test]
fn the_search_of_memory_finds_what_is_there() {
    let needle = Dek::random().unwrap();
    let copy = needle.expose().to_vec();
    assert!(!find_in_memory(needle.expose()).is_empty());
    drop(copy);
    assert_eq!(find_in_memory(needle.expose()), Vec::<String>::new());
}

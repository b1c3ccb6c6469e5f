use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::model::envelope::VmId;
use crate::model::envelope::fixture::envelope;
use crate::store::Stores;

fn secret(text: &str) -> SecretBytes {
    SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
}

/// A state directory in `parent`, with a file in a directory, a log and a VM.
fn state(parent: &Path) -> (Stores, VmId) {
    let stores = Stores::open(&parent.join("state")).unwrap();
    let vm = VmId::random();
    stores.keystore.remember_vm(vm, "web01").unwrap();
    let providers = stores.host_store.dir().join("providers/one");
    fs::create_dir_all(&providers).unwrap();
    fs::write(providers.join("identity.json"), "a private key").unwrap();
    let log = AuditLog::open(&stores.host_store.dir().join(AuditLog::FILE)).unwrap();
    log.record(crate::audit::Event::new("seal", crate::audit::Outcome::Ok))
        .unwrap();
    drop(log);
    (stores, vm)
}

fn backup_of(stores: &Stores, path: &Path) -> usize {
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .unwrap();
    write(&mut file, &stores.host_store, &secret("pass")).unwrap()
}

fn bring_back(backup: &Path, dir: &Path, replace: Replace<'_>) -> Result<Restored, StateError> {
    restore(File::open(backup).unwrap(), &secret("pass"), dir, replace)
}

#[test]
fn all_of_the_state_comes_back_on_another_host() {
    let parent = tempfile::tempdir().unwrap();
    let (stores, vm) = state(parent.path());
    // Inside of what it is a backup of, and not in itself.
    let backup = stores.host_store.dir().join("state.age");
    assert!(backup_of(&stores, &backup) >= 5);
    let sealed = fs::read(&backup).unwrap();
    let holds = |needle: &[u8]| sealed.windows(needle.len()).any(|window| window == needle);
    assert!(!holds(b"a private key") && !holds(b"web01"));

    let elsewhere = parent.path().join("restored");
    let restored = bring_back(&backup, &elsewhere, Replace::Nothing).unwrap();
    assert_eq!((restored.manifest.host, restored.before), (host_name(), None));
    let identity = elsewhere.join("providers/one/identity.json");
    assert_eq!(fs::read(&identity).unwrap(), b"a private key");
    assert_eq!(fs::metadata(&identity).unwrap().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(&elsewhere).unwrap().mode() & 0o777, 0o700);
    let again = Stores::open(&elsewhere).unwrap();
    assert_eq!(again.keystore.vm(vm).unwrap().unwrap().name, "web01");
    let verified = crate::audit::verify(&elsewhere.join(AuditLog::FILE), None).unwrap();
    assert_eq!(verified.records, 2, "the restoring is recorded");
    assert!(!elsewhere.join("state.age").exists());
    assert_eq!(
        fs::read_dir(parent.path()).unwrap().count(),
        2,
        "something is left"
    );
}

#[test]
fn what_is_there_is_replaced_by_its_name_only_and_kept() {
    let parent = tempfile::tempdir().unwrap();
    let (stores, _) = state(parent.path());
    let (dir, backup) = (
        stores.host_store.dir().to_owned(),
        parent.path().join("state.age"),
    );
    backup_of(&stores, &backup);
    let later = VmId::random();
    stores.keystore.remember_vm(later, "later").unwrap();
    let host = host_name();
    let refused = bring_back(&backup, &dir, Replace::TypedName(&host)).unwrap_err();
    assert!(
        matches!(refused, StateError::Keystore(StoreError::InUse { .. })),
        "{refused:?}"
    );
    drop(stores);
    for replace in [Replace::Nothing, Replace::TypedName("another")] {
        let refused = bring_back(&backup, &dir, replace).unwrap_err();
        assert!(matches!(refused, StateError::Occupied { .. }), "{refused:?}");
    }
    let restored = bring_back(&backup, &dir, Replace::TypedName(&host)).unwrap();
    let before = Stores::open(&restored.before.unwrap()).unwrap();
    assert!(before.keystore.vm(later).unwrap().is_some());
    assert!(Stores::open(&dir).unwrap().keystore.vm(later).unwrap().is_none());
}

/// A host on which VMs are sealed one after the other would never get one.
#[test]
fn seals_go_on_while_a_backup_is_made() {
    let parent = tempfile::tempdir().unwrap();
    let (stores, vm) = state(parent.path());
    let is_done = AtomicBool::new(false);
    let backup = parent.path().join("state.age");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::SeqCst) {
                let sealed = stores
                    .keystore
                    .insert_pending(&envelope(vm), "/images/web01.qcow2");
                sealed.unwrap();
            }
        });
        let mut file = File::options();
        let file = file.read(true).write(true).create_new(true).open(&backup);
        let made = file.map(|mut file| write(&mut file, &stores.host_store, &secret("pass")));
        is_done.store(true, Ordering::SeqCst);
        made.unwrap().unwrap();
    });
    let elsewhere = parent.path().join("restored");
    bring_back(&backup, &elsewhere, Replace::Nothing).unwrap();
    assert!(
        Stores::open(&elsewhere)
            .unwrap()
            .keystore
            .vm(vm)
            .unwrap()
            .is_some()
    );
}

#[test]
fn an_empty_directory_is_filled() {
    let parent = tempfile::tempdir().unwrap();
    let (stores, vm) = state(parent.path());
    let (dir, backup) = (parent.path().join("empty"), parent.path().join("state.age"));
    backup_of(&stores, &backup);
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join(HostStore::LOCK), "").unwrap();
    bring_back(&backup, &dir, Replace::Nothing).unwrap();
    assert!(Stores::open(&dir).unwrap().keystore.vm(vm).unwrap().is_some());
}

#[test]
fn a_backup_that_is_not_whole_changes_nothing() {
    let parent = tempfile::tempdir().unwrap();
    let (stores, _) = state(parent.path());
    let (dir, backup) = (parent.path().join("restored"), parent.path().join("state.age"));
    backup_of(&stores, &backup);
    let whole = fs::read(&backup).unwrap();
    for length in [0, 10, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&backup, &whole[..length]).unwrap();
        bring_back(&backup, &dir, Replace::Nothing).unwrap_err();
        assert!(!dir.exists(), "{length}");
    }
    let mut changed = whole.clone();
    let middle = whole.len() / 2;
    changed[middle] ^= 1;
    fs::write(&backup, changed).unwrap();
    bring_back(&backup, &dir, Replace::Nothing).unwrap_err();
    fs::write(&backup, &whole).unwrap();
    let wrong = restore(
        File::open(&backup).unwrap(),
        &secret("other"),
        &dir,
        Replace::Nothing,
    );
    assert!(matches!(wrong, Err(StateError::Age(AgeError::WrongPassphrase))));
    assert_eq!(
        fs::read_dir(parent.path()).unwrap().count(),
        2,
        "something is left"
    );
}

/// Whoever knows the passphrase may have made it.
#[test]
fn a_backup_writes_nowhere_else() {
    let parent = tempfile::tempdir().unwrap();
    let manifest = format!(r#"{{"format":"{FORMAT}","version":1,"host":"h","made":"m"}}"#);
    let make = |name: &str, kind: EntryType| {
        let mut builder = Builder::new(age_file::writer(Vec::new(), &secret("pass")).unwrap());
        append(
            &mut builder,
            Path::new(MANIFEST),
            manifest.len() as u64,
            manifest.as_bytes(),
        )
        .unwrap();
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        if kind == EntryType::Symlink {
            header.set_link_name("/etc").unwrap();
        }
        header.set_cksum();
        builder.append(&header, io::empty()).unwrap();
        let path = parent.path().join("hostile.age");
        fs::write(&path, builder.into_inner().unwrap().finish().unwrap()).unwrap();
        path
    };
    let dir = parent.path().join("state");
    for (name, kind) in [
        ("../escaped", EntryType::Regular),
        ("/tmp/virtseal-escaped", EntryType::Regular),
        ("a/../../escaped", EntryType::Regular),
        ("link", EntryType::Symlink),
        ("link", EntryType::Link),
        ("fifo", EntryType::Fifo),
        ("no-keystore", EntryType::Regular),
    ] {
        let refused = bring_back(&make(name, kind), &dir, Replace::Nothing).unwrap_err();
        assert!(
            matches!(refused, StateError::NotABackup(_)),
            "{name}: {refused:?}"
        );
        assert!(!dir.exists() && !parent.path().join("escaped").exists());
    }
}

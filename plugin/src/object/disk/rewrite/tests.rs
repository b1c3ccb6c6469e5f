use std::fs::{self, OpenOptions};
use std::path::Path;
use std::process::Command;

use nix::fcntl::{FcntlArg, fcntl};

use super::*;
use crate::domain::DeclaredFormat;
use crate::model::envelope::{
    Binding, EnvelopeId, KekId, ObjectKind, Precedence, ProviderId, Stanza, Verified, VmId,
};
use crate::object::disk::{self, Backing, Bytes, ClusterSize, CreateRequest};
use crate::object::nvram;
use crate::secret::{Dek, Passphrase};

fn stanza(body: u8) -> Stanza {
    Stanza {
        provider: ProviderId::random(),
        provider_name: "main".to_owned(),
        kek: KekId("v1:provider".to_owned()),
        mechanism: "A256GCM".to_owned(),
        body: vec![body; 92],
    }
}

struct Bench {
    dir: tempfile::TempDir,
    passphrase: Passphrase,
    envelope: Envelope,
}

impl Bench {
    fn new() -> Self {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Disk,
        };
        Self {
            dir: tempfile::tempdir().unwrap(),
            passphrase: Dek::random().unwrap().passphrase().unwrap(),
            envelope: Verified::new(&binding, vec![stanza(1)], &Dek::random().unwrap())
                .unwrap()
                .into_envelope(),
        }
    }

    fn create(&self, name: &str, cluster: u64, backing: Option<Backing>) -> std::path::PathBuf {
        let path = self.dir.path().join(name);
        let request = CreateRequest {
            cluster_size: ClusterSize::try_from(Bytes(cluster)).unwrap(),
            backing,
            ..CreateRequest::new(&path, Bytes(8 << 20))
        };
        disk::create(&request, &self.envelope, &self.passphrase).unwrap();
        path
    }

    /// With as many stanzas as the generation says.
    fn next(&self, generation: u64) -> Envelope {
        let mut next = self.envelope.clone();
        next.generation = Generation::of_test(generation);
        next.stanzas = (0..generation).map(|body| stanza(body as u8)).collect();
        next
    }

    fn assert_whole(&self, path: &Path) {
        disk::open(&by_root(path), &self.passphrase).unwrap();
        let key = self.dir.path().join("key");
        fs::write(&key, self.passphrase.expose()).unwrap();
        let checked = Command::new("qemu-img")
            .args(["check", "-q", "--object"])
            .arg(format!("secret,id=s,file={}", key.display()))
            .arg("--image-opts")
            .arg(format!(
                "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={}",
                path.display()
            ))
            .output()
            .expect("the program qemu-img is missing: apt install qemu-utils");
        assert!(
            checked.status.success(),
            "{}",
            String::from_utf8_lossy(&checked.stderr)
        );
    }
}

fn unjournaled(_: &[u8]) -> Result<(), VolumeError> {
    Ok(())
}

fn older_than(next: &Envelope) -> impl FnOnce(&Envelope) -> Result<bool, VolumeError> {
    |found| Ok(found.supersedes(next) == Precedence::Older)
}

#[test]
fn an_image_follows_its_envelope_and_nothing_else_changes() {
    let bench = Bench::new();
    let base = bench.dir.path().join("base");
    let created = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args([base.as_os_str(), "8M".as_ref()])
        .status();
    assert!(created.unwrap().success());
    for cluster in [512, 4096, 65536, 2 << 20] {
        for with_backing in [false, true] {
            let backing = with_backing.then(|| Backing {
                path: base.clone(),
                format: DeclaredFormat::Qcow2,
            });
            let name = format!("{cluster}-{with_backing}");
            let path = bench.create(&name, cluster, backing);
            let luks = disk::header_digest(&by_root(&path)).unwrap();
            let before = disk::inspect(&by_root(&path)).unwrap();
            for generation in [2, 3, 1, 16, 15] {
                let next = bench.next(generation);
                let carried = rewrite_envelope(&by_root(&path), &next, None, older_than(&next), unjournaled);
                let held = disk::inspect(&by_root(&path)).unwrap().envelope.unwrap();
                if cluster == 4096 && generation > 3 {
                    assert!(carried.unwrap_err().to_string().contains("no room"));
                    assert_eq!(held.generation, Generation::of_test(3));
                } else {
                    assert_eq!(carried.unwrap(), Carried::Generation(held.generation));
                    assert!(held == next || held.supersedes(&next) == Precedence::Newer);
                }
                bench.assert_whole(&path);
            }
            let after = disk::inspect(&by_root(&path)).unwrap();
            assert_eq!(
                (&after.backing, after.virtual_size),
                (&before.backing, before.virtual_size)
            );
            assert_eq!(disk::header_digest(&by_root(&path)).unwrap(), luks);
        }
    }
}

/// Whoever writes an image has written its copy: a bad one hides neither the image nor the keystore's copy.
#[test]
fn a_copy_that_cannot_be_read_is_written_over_once_the_image_has_opened() {
    let bench = Bench::new();
    for cluster in [512, 4096, 65536] {
        for (damage, bytes) in [
            ("garbage", &b"{]"[..]),
            ("not text", &[0xff, 0xfe]),
            ("another format", b"{\"version\":99,"),
        ] {
            let name = format!("{cluster}-{}", damage.replace(' ', "-"));
            let path = bench.create(&name, cluster, None);
            let whole = fs::read(&path).unwrap();
            let at = whole
                .windows(11)
                .position(|found| found == b"{\"version\":")
                .unwrap();
            damage_at(&path, at as u64, bytes);
            expect_mended(&bench, &path, damage);
            // Where the pointer to it is damaged: its format, its place, its length.
            let kind = whole.windows(4).position(|found| found == *b"vsea").unwrap() as u64;
            for (offset, bytes) in [
                (8, &[9][..]),
                (9, &[7]),
                (12, &[0xff, 0xff, 0xff, 0xff]),
                (12, &[0; 4]),
            ] {
                fs::write(&path, &whole).unwrap();
                damage_at(&path, kind + offset, bytes);
                expect_mended(&bench, &path, &format!("{damage}, {offset}"));
            }
        }
    }
}

fn damage_at(path: &Path, offset: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

fn expect_mended(bench: &Bench, path: &Path, what: &str) {
    let info = disk::inspect(&by_root(path)).unwrap();
    assert!(
        info.envelope.is_none() && info.unreadable_envelope.is_some(),
        "{what}"
    );
    let before = fs::read(path).unwrap();
    let next = bench.next(2);
    let wrong = Dek::random().unwrap().passphrase().unwrap();
    for passphrase in [None, Some(&wrong)] {
        let left = rewrite_envelope(&by_root(path), &next, passphrase, |_| Ok(true), unjournaled);
        assert_eq!(left.unwrap(), Carried::NotThere, "{what}");
        assert_eq!(fs::read(path).unwrap(), before, "{what}");
    }
    let never = |_: &Envelope| panic!("nobody can ask of what can't be read");
    let mended = rewrite_envelope(&by_root(path), &next, Some(&bench.passphrase), never, unjournaled);
    assert_eq!(mended.unwrap(), Carried::Generation(next.generation), "{what}");
    assert_eq!(
        disk::inspect(&by_root(path)).unwrap().envelope,
        Some(next),
        "{what}"
    );
    bench.assert_whole(path);
}

#[test]
fn an_open_image_and_a_foreign_one_are_left_alone() {
    let bench = Bench::new();
    let path = bench.create("disk", 65536, None);
    let before = fs::read(&path).unwrap();
    let mut other = bench.next(2);
    other.id = EnvelopeId::random();
    assert_eq!(
        rewrite_envelope(&by_root(&path), &other, None, |_| Ok(true), unjournaled).unwrap(),
        Carried::NotThere
    );
    // As a QEMU that only reads: it uses and does not share writing.
    let reader = File::open(&path).unwrap();
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&reader, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    for error in [
        rewrite_envelope(&by_root(&path), &bench.next(2), None, |_| Ok(true), unjournaled).unwrap_err(),
        shred(&by_root(&path), bench.next(1).id, Some(&bench.passphrase)).unwrap_err(),
        is_free(&by_root(&path)).unwrap_err(),
        finish_rewrite(&by_root(&path), b"").unwrap_err(),
    ] {
        assert!(matches!(error, VolumeError::InUse(_)), "{error}");
    }
    assert_eq!(fs::read(&path).unwrap(), before);
    drop(reader);
    rewrite_envelope(&by_root(&path), &bench.next(2), None, |_| Ok(true), unjournaled).unwrap();
}

#[test]
fn no_qemu_opens_an_image_that_is_being_written() {
    let bench = Bench::new();
    let path = bench.create("disk", 65536, None);
    let check = || {
        Command::new("qemu-img")
            .args(["info", "-f", "qcow2"])
            .arg(&path)
            .output()
            .unwrap()
    };
    assert!(check().status.success());
    let held = ImageLock::open(&by_root(&path)).unwrap();
    let said = String::from_utf8_lossy(&check().stderr).into_owned();
    assert!(said.contains("lock"), "{said}");
    drop(held);
    assert!(check().status.success());
}

#[test]
fn whatever_part_was_written_the_journal_completes_it() {
    let bench = Bench::new();
    for cluster in [512, 65536] {
        let path = bench.create(&format!("torn-{cluster}"), cluster, None);
        rewrite_envelope(&by_root(&path), &bench.next(9), None, |_| Ok(true), unjournaled).unwrap();
        let before = fs::read(&path).unwrap();
        let next = bench.next(14);
        let mut journal = Vec::new();
        let refused = rewrite_envelope(
            &by_root(&path),
            &next,
            None,
            |_| Ok(true),
            |bytes| {
                journal = bytes.to_vec();
                Err(VolumeError::Stopped(path.clone()))
            },
        );
        assert!(refused.is_err());
        assert_eq!(fs::read(&path).unwrap(), before, "written before the journal was");

        let patch = Patch::from_bytes(&journal).unwrap();
        assert_eq!(Patch::from_bytes(&journal[..journal.len() - 1]), None);
        let sectors: Vec<_> = patch
            .regions
            .iter()
            .flat_map(|region| {
                (0..region.new.len()).step_by(SECTOR).map(move |at| {
                    let end = region.new.len().min(at + SECTOR);
                    (region.offset + at as u64, &region.new[at..end])
                })
            })
            .collect();
        assert!(sectors.len() > 4, "{}", sectors.len());
        for subset in 0..1_u32 << sectors.len().min(6) {
            fs::write(&path, &before).unwrap();
            let file = OpenOptions::new().write(true).open(&path).unwrap();
            for (number, (offset, bytes)) in sectors.iter().enumerate() {
                if subset >> (number % 6) & 1 == 1 {
                    file.write_all_at(bytes, *offset).unwrap();
                }
            }
            finish_rewrite(&by_root(&path), &journal).unwrap();
            assert_eq!(disk::inspect(&by_root(&path)).unwrap().envelope.unwrap(), next);
            disk::open(&by_root(&path), &bench.passphrase).unwrap();
        }
        bench.assert_whole(&path);
        // Somebody else's change counts more.
        let mut theirs = fs::read(&path).unwrap();
        theirs[0x300] ^= 1;
        fs::write(&path, &theirs).unwrap();
        finish_rewrite(&by_root(&path), &journal).unwrap();
        assert_eq!(fs::read(&path).unwrap(), theirs);
    }
}

fn by_root(path: &Path) -> PermittedPath {
    PermittedPath::named_by_root(path).unwrap()
}

fn done(shredding: Shredding) -> Shredded {
    match shredding {
        Shredding::Done(done) => done,
        other => panic!("left alone: {other:?}"),
    }
}

#[test]
fn shredded_images_open_for_nobody() {
    let bench = Bench::new();
    for cluster in [512, 65536] {
        let path = bench.create(&format!("shred-{cluster}"), cluster, None);
        let before = fs::read(&path).unwrap();
        let info = disk::inspect(&by_root(&path)).unwrap();
        // Another VM's image may be at the path by now.
        let other = shred(&by_root(&path), EnvelopeId::random(), Some(&bench.passphrase)).unwrap();
        assert_eq!(other, Shredding::Carries(bench.next(1).id));
        assert_eq!(fs::read(&path).unwrap(), before);
        let id = bench.next(1).id;
        let shredded = done(shred(&by_root(&path), id, None).unwrap());
        assert_eq!((shredded.keyslots, shredded.envelope), (1, true));
        assert!(matches!(
            disk::open(&by_root(&path), &bench.passphrase),
            Err(VolumeError::NoKeyslotOpens(_))
        ));
        let after = disk::inspect(&by_root(&path)).unwrap();
        assert_eq!((after.envelope, after.virtual_size), (None, info.virtual_size));
        // The old header on the new material opens nothing either: none of the material is left.
        let image = Image::open(&by_root(&path)).unwrap();
        let (header, base) = image.encrypted().unwrap();
        let now = fs::read(&path).unwrap();
        for range in header.erasure().0 {
            let range = (base + range.start) as usize..(base + range.end) as usize;
            assert_ne!(now[range.clone()], before[range]);
        }
        let again = done(shred(&by_root(&path), id, None).unwrap());
        assert_eq!((again.keyslots, again.envelope), (0, false));
    }
    let plain = bench.dir.path().join("plain.raw");
    fs::write(&plain, vec![0; 1 << 20]).unwrap();
    assert!(matches!(
        shred(&by_root(&plain), bench.next(1).id, Some(&bench.passphrase)),
        Err(VolumeError::NotEncrypted(_))
    ));
    // A variable store carries no envelope: only its key tells whose it is.
    let store = bench.dir.path().join("store.fd");
    let template = bench.dir.path().join("template.fd");
    fs::write(&template, vec![7; 1 << 16]).unwrap();
    let made = nvram::create(&by_root(&template), &by_root(&store), None, &bench.passphrase);
    made.unwrap().publish().unwrap();
    let shred = |passphrase| shred(&by_root(&store), bench.next(1).id, passphrase).unwrap();
    let stranger = Dek::random().unwrap().passphrase().unwrap();
    assert_eq!(shred(None), Shredding::NotShown(1));
    assert_eq!(shred(Some(&stranger)), Shredding::NotShown(1));
    disk::open(&by_root(&store), &bench.passphrase).unwrap();
    assert_eq!(done(shred(Some(&bench.passphrase))).keyslots, 1);
    assert!(disk::open(&by_root(&store), &bench.passphrase).is_err());
}

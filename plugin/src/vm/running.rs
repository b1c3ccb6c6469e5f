//! What is done to VMs while they run, where no hook is asked: copies and backups, devices that are attached, memory that is
//! written to a file. It can't be prevented, so it is found, and what was found stays: plaintext once written stays written.
//!
//! Folds what was heard of a VM and how it is now into what was found; who listens and looks is the daemon (docs/adr/0019).

mod found;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::SystemTime;

use crate::domain::jobs::{self, JobTarget};
use crate::domain::{Domain, DomainError, objects};
use crate::host::libvirt::RunningVm;
use crate::host::libvirt::events::{Change, MemoryFile};
use crate::model::advice::Advice;
use crate::model::envelope::{ObjectKind, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::terminal::visible;
use found::Found;

/// VMs that the keystore does not know: anybody can run any number of them, and they take no room from the sealed ones.
const MAX_STRANGERS: usize = 1024;

/// What was heard of a VM since it was looked at last.
#[derive(Debug, Default)]
pub(crate) struct News {
    name: String,
    copies_ended: BTreeSet<String>,
    backup_ended: bool,
    memory: BTreeSet<MemoryFile>,
    pub started: bool,
}

impl News {
    /// Something more was heard of the VM that is called so now.
    pub(crate) fn add(&mut self, name: String, change: Change) {
        self.name = name;
        match change {
            Change::Any => {}
            Change::Started => self.started = true,
            Change::CopyEnded(disk) => drop(self.copies_ended.insert(disk)),
            Change::BackupEnded => self.backup_ended = true,
            Change::MemoryWritten(file) => drop(self.memory.insert(file)),
        }
    }
}

#[derive(Debug)]
pub(crate) struct Now {
    pub live: Domain,
    /// That of its next start, if libvirt keeps the VM.
    pub next: Option<Domain>,
    copies: Vec<JobTarget>,
    /// Where a backup writes that is being made.
    pub backup: Option<Vec<JobTarget>>,
}

impl Now {
    /// What libvirt tells of it.
    pub(crate) fn of(running: &RunningVm) -> Result<Self, DomainError> {
        Ok(Self {
            live: Domain::parse(&running.live)?,
            next: running.next.as_deref().map(Domain::parse).transpose()?,
            copies: jobs::copies(&running.live)?,
            backup: running.backup.as_deref().map(jobs::backup).transpose()?,
        })
    }

    fn disks(&self) -> BTreeMap<String, Option<PathBuf>> {
        let disks = objects(&self.live).into_iter();
        let disks = disks.filter(|object| object.kind == ObjectKind::Disk);
        disks
            .map(|disk| (disk.label.trim_start_matches("disk ").to_owned(), disk.path))
            .collect()
    }
}

/// Whose business a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Acquaintance {
    /// The keystore has it.
    Known,
    /// Its XML alone says that it is sealed.
    ByXml,
    /// Nothing of it is sealed. A volume alone may have been made for a VM that is still plain.
    Stranger,
}

impl Acquaintance {
    /// Of a VM that the keystore has a record of, or not.
    pub(crate) fn of<T>(record: Option<&T>, now: Option<&Now>) -> Self {
        match record {
            Some(_) => Self::Known,
            None if now.is_some_and(|now| now.live.metadata.is_some()) => Self::ByXml,
            None => Self::Stranger,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Look {
    pub vm: VmId,
    pub acquaintance: Acquaintance,
    /// What was heard since the last look.
    pub news: News,
    /// How it is, if it runs; or that this can't be told.
    pub now: Result<Option<Now>, String>,
    /// What is wrong with it now.
    pub found: Vec<Finding>,
}

/// Something new, for the log.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NewFinding {
    pub name: String,
    /// What was found, with what leads out.
    pub words: String,
}

#[derive(Debug, Default)]
pub(crate) struct Watched(BTreeMap<VmId, Seen>);

impl Watched {
    /// Takes in a look. Returns what is new.
    pub(crate) fn take_in(&mut self, look: Look, at: SystemTime) -> Vec<NewFinding> {
        let Look {
            vm,
            acquaintance,
            news,
            now,
            mut found,
        } = look;
        let (now, unreadable) = match now {
            Ok(now) => (now, None),
            Err(why) => (None, Some(format!("its current XML can't be read: {why}"))),
        };
        if !self.0.contains_key(&vm) {
            match acquaintance {
                Acquaintance::Stranger if found.is_empty() => return Vec::new(),
                Acquaintance::Stranger | Acquaintance::ByXml => self.make_room(),
                Acquaintance::Known => {}
            }
        }
        let seen = self.0.entry(vm).or_default();
        if unreadable.is_none() {
            seen.found.settle(&found);
        }
        seen.is_known = acquaintance == Acquaintance::Known;
        let name = now
            .as_ref()
            .map_or(news.name.as_str(), |now| now.live.name.as_str());
        if !name.is_empty() {
            name.clone_into(&mut seen.name);
        }
        if acquaintance != Acquaintance::Stranger {
            let ended = seen.take_in(&news, now.as_ref());
            let name = seen.name.clone();
            let unreadable = unreadable.map(|words| (words, Advice::ShowVm(name.clone())));
            let ended = ended
                .into_iter()
                .map(|told| (FindingCode::PlaintextWritten, told));
            let unreadable = unreadable.map(|told| (FindingCode::LiveUnknown, told));
            found.extend(ended.chain(unreadable).map(|(code, (words, advice))| {
                let what = format!("{}: {}", visible(&name), visible(&words));
                Finding::critical(code, Subject::Vm(name.clone()), what).next(advice)
            }));
        }
        let name = seen.name.clone();
        let new = seen.found.note(&name, found, at).into_iter();
        if now.is_none() && seen.found.is_empty() {
            self.0.remove(&vm);
        }
        new.map(|words| NewFinding {
            name: name.clone(),
            words,
        })
        .collect()
    }

    /// What was found of a VM since the daemon began.
    pub(crate) fn findings(&self, vm: VmId) -> Vec<Finding> {
        let seen = self.0.get(&vm).into_iter();
        seen.flat_map(|seen| seen.found.findings(&seen.name)).collect()
    }

    /// Every VM with findings, with its name.
    pub(crate) fn with_findings(&self) -> Vec<(VmId, String)> {
        let found = self.0.iter().filter(|(_, seen)| !seen.found.is_empty());
        found.map(|(vm, seen)| (*vm, seen.name.clone())).collect()
    }

    /// For one more VM that the keystore does not know. What was found of the one that goes is in the audit log.
    fn make_room(&mut self) {
        let strangers = || self.0.iter().filter(|(_, seen)| !seen.is_known);
        if strangers().count() < MAX_STRANGERS {
            return;
        }
        let oldest = strangers().min_by_key(|(_, seen)| seen.found.since());
        if let Some(vm) = oldest.map(|(vm, _)| *vm) {
            self.0.remove(&vm);
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    name: String,
    /// Disks of which it was seen where they are copied to.
    copies: BTreeSet<String>,
    backup: bool,
    /// Where each disk was when it was looked at last.
    disks: BTreeMap<String, Option<PathBuf>>,
    found: Found,
    is_known: bool,
}

impl Seen {
    /// Takes in how the VM is now, and what was heard meanwhile. Returns what has ended before it was seen where it wrote to, each with
    /// what to do about it.
    fn take_in(&mut self, news: &News, now: Option<&Now>) -> Vec<(String, Advice)> {
        let disks = now.map(Now::disks).unwrap_or_default();
        // A disk that is elsewhere now was copied to where it is.
        for (disk, path) in &disks {
            if self.disks.get(disk).is_some_and(|before| before != path) {
                self.copies.insert(disk.clone());
            }
        }
        let unseen = news.copies_ended.iter().filter(|disk| !self.copies.remove(*disk));
        let mut ended: Vec<_> = unseen
            .map(|disk| {
                let what = format!(
                    "disk {disk} was copied, and that had ended before it was seen where to: the copy may be plaintext"
                );
                (what, delete_unless_encrypted())
            })
            .collect();
        if news.backup_ended && !std::mem::take(&mut self.backup) {
            let what =
                "a backup of it was made, and had ended before it was seen where to: it may be plaintext";
            ended.push((what.to_owned(), delete_unless_encrypted()));
        }
        ended.extend(news.memory.iter().map(|file| memory_written(&self.name, *file)));
        self.disks = disks;
        match now {
            Some(now) => {
                self.copies
                    .extend(now.copies.iter().map(|copy| copy.disk.clone()));
                self.backup |= now.backup.is_some();
            }
            None => {
                self.copies.clear();
                self.backup = false;
            }
        }
        ended
    }
}

/// Of a sealed VM: libvirt has started it by an XML that nobody has judged.
pub(crate) fn not_asked(vm: &str, libvirtd: &'static str) -> Finding {
    let what = format!(
        "{vm} was started, and libvirt has not called virtseal's hook: what it writes may not be encrypted",
        vm = visible(vm)
    );
    let reload = Advice::ReloadLibvirtd(libvirtd).then(Advice::ShowVm(vm.to_owned()));
    Finding::critical(FindingCode::HookNotCalled, Subject::Vm(vm.to_owned()), what).next(reload)
}

/// Nobody but who made it knows where it is.
fn delete_unless_encrypted() -> Advice {
    "ask who made it where it is, and delete it unless qemu-img info says that it is encrypted".into()
}

fn memory_written(vm: &str, file: MemoryFile) -> (String, Advice) {
    let by = match file {
        MemoryFile::Save => "virsh save or managedsave",
        MemoryFile::Dump => "virsh dump",
        MemoryFile::Snapshot => "a snapshot with its memory",
    };
    let delete =
        Advice::from("delete that file once it is not needed: it has all that the guest had in its memory");
    let next = match file {
        MemoryFile::Save => Advice::StartVm(vm.to_owned())
            .note("which goes on from a managed save and deletes it")
            .or_else(delete),
        MemoryFile::Dump => delete,
        MemoryFile::Snapshot => Advice::ListSnapshots(vm.to_owned()).then(delete),
    };
    let what = format!("its memory was written to a file in plaintext, as by {by}");
    (what, next)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const AT: SystemTime = SystemTime::UNIX_EPOCH;

    fn now(path: &str, mirror: &str) -> Now {
        let luks = "<encryption format='luks' engine='qemu'><secret type='passphrase' uuid='00000000-0000-0000-0000-000000000001'/></encryption>";
        let live = format!(
            "<domain type='kvm'><name>a</name><uuid>00000000-0000-0000-0000-000000000002</uuid><devices><disk type='file'>\
             <source file='{path}'>{luks}</source><target dev='vda'/>{mirror}</disk></devices></domain>"
        );
        let running = RunningVm {
            live,
            next: None,
            backup: None,
        };
        Now::of(&running).unwrap()
    }

    fn copy_ended() -> News {
        News {
            copies_ended: BTreeSet::from(["vda".to_owned()]),
            ..News::default()
        }
    }

    #[test]
    fn a_copy_that_nobody_saw_is_told_and_one_that_was_seen_is_not_told_again() {
        let mirror = "<mirror type='file' job='copy'><format type='qcow2'/><source file='/c'/></mirror>";
        let mut seen = Seen::default();
        let none = seen.take_in(&News::default(), Some(&now("/d", "")));
        assert!(none.is_empty());
        let told = seen.take_in(&copy_ended(), Some(&now("/d", "")));
        assert!(
            matches!(&told[..], [(one, _)] if one.contains("disk vda")),
            "{told:?}"
        );
        let _ = seen.take_in(&News::default(), Some(&now("/d", mirror)));
        assert!(seen.take_in(&copy_ended(), Some(&now("/d", ""))).is_empty());
        // Each copy has to be seen.
        assert_eq!(seen.take_in(&copy_ended(), Some(&now("/d", ""))).len(), 1);
        // It pivoted, so where to is where the disk is; whether a look or the event came first.
        assert!(seen.take_in(&copy_ended(), Some(&now("/e", ""))).is_empty());
        let _ = seen.take_in(&News::default(), Some(&now("/f", "")));
        assert!(seen.take_in(&copy_ended(), Some(&now("/f", ""))).is_empty());
        // A VM that was switched off meanwhile.
        assert_eq!(seen.take_in(&copy_ended(), None).len(), 1);
    }

    #[test]
    fn a_backup_that_nobody_saw_is_told() {
        let ended = || News {
            backup_ended: true,
            memory: BTreeSet::from([MemoryFile::Dump]),
            ..News::default()
        };
        let mut seen = Seen::default();
        assert_eq!(seen.take_in(&ended(), Some(&now("/d", ""))).len(), 2);
        let going_on = Now {
            backup: Some(Vec::new()),
            ..now("/d", "")
        };
        assert!(seen.take_in(&News::default(), Some(&going_on)).is_empty());
        let told = seen.take_in(&ended(), Some(&now("/d", "")));
        assert!(
            matches!(&told[..], [(one, _)] if one.contains("virsh dump")),
            "{told:?}"
        );
    }

    fn look(vm: VmId, acquaintance: Acquaintance, found: &str) -> Look {
        Look {
            vm,
            acquaintance,
            news: News::default(),
            now: Ok(None),
            found: vec![Finding::warning(
                FindingCode::Plaintext,
                Subject::Vm("a".to_owned()),
                found,
            )],
        }
    }

    #[test]
    fn strangers_take_no_room_from_sealed_vms() {
        let mut all = Watched::default();
        let first = VmId::random();
        let _ = all.take_in(look(first, Acquaintance::Stranger, "a"), AT);
        let sealed = [0; 3].map(|_| VmId::random());
        for vm in sealed {
            assert_eq!(all.take_in(look(vm, Acquaintance::Known, "a"), AT).len(), 1);
        }
        let mut last = first;
        for _ in 0..MAX_STRANGERS {
            last = VmId::random();
            let _ = all.take_in(look(last, Acquaintance::ByXml, "a"), AT + Duration::from_secs(1));
        }
        assert_eq!(all.0.len(), MAX_STRANGERS + sealed.len());
        assert!(!all.0.contains_key(&first) && all.0.contains_key(&last));
        assert!(sealed.iter().all(|vm| !all.findings(*vm).is_empty()));
    }

    #[test]
    fn nothing_is_kept_of_a_vm_that_is_nobodys_business_or_has_ended_well() {
        let (mut all, vm) = (Watched::default(), VmId::random());
        for acquaintance in [Acquaintance::Stranger, Acquaintance::ByXml, Acquaintance::Known] {
            let look = Look {
                found: Vec::new(),
                ..look(vm, acquaintance, "")
            };
            assert!(all.take_in(look, AT).is_empty() && all.0.is_empty());
        }
        // An XML that can't be read is told of a sealed VM alone.
        let unreadable = |acquaintance| Look {
            now: Err("odd".into()),
            found: Vec::new(),
            ..look(vm, acquaintance, "")
        };
        assert!(all.take_in(unreadable(Acquaintance::Stranger), AT).is_empty());
        let told = all.take_in(unreadable(Acquaintance::Known), AT);
        assert!(
            matches!(&told[..], [one] if one.words.contains("can't be read: odd")),
            "{told:?}"
        );
        assert_eq!(all.with_findings().len(), 1);
    }
}

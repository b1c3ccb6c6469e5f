//! What is done to VMs while they run, where no hook is asked: copies and backups, devices that are attached, memory that is
//! written to a file. It can't be prevented, so it is found, and what was found stays: plaintext once written stays written.
//!
//! Folds what was heard of a VM and how it is now into what was found; who listens and looks is the daemon (docs/adr/0019).

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::SystemTime;

use openssl::sha::sha256;

use crate::domain::jobs::{self, JobTarget};
use crate::domain::{Domain, DomainError, objects};
use crate::host::libvirt::RunningVm;
use crate::host::libvirt::events::{Change, MemoryFile};
use crate::host::local_time::rfc3339;
use crate::model::envelope::{ObjectKind, VmId};
use crate::model::finding::{Finding, Subject};
use crate::terminal::visible;

/// More of one VM are in the audit log alone.
const MAX_FINDINGS: usize = 64;
/// Of one VM, in the audit log: who may change a VM can have it filled.
const MAX_NOTED: usize = 1024;
/// Of one finding as it is listed, in bytes.
const MAX_WORDS: usize = 1024;
/// VMs that the keystore does not know: anybody can run any number of them, and they take no room from the sealed ones.
const MAX_STRANGERS: usize = 1024;

/// What was heard of a VM since it was looked at last.
#[derive(Debug, Default)]
pub struct News {
    name: String,
    copies_ended: BTreeSet<String>,
    backup_ended: bool,
    memory: BTreeSet<MemoryFile>,
}

impl News {
    /// Something more was heard of the VM that is called so now.
    pub fn add(&mut self, name: String, change: Change) {
        self.name = name;
        match change {
            Change::Any => {}
            Change::CopyEnded(disk) => drop(self.copies_ended.insert(disk)),
            Change::BackupEnded => self.backup_ended = true,
            Change::MemoryWritten(file) => drop(self.memory.insert(file)),
        }
    }
}

/// A VM as it runs now.
#[derive(Debug)]
pub struct Now {
    /// Its XML of now.
    pub live: Domain,
    /// That of its next start, if libvirt keeps the VM.
    pub next: Option<Domain>,
    copies: Vec<JobTarget>,
    /// Where a backup writes that is being made.
    pub backup: Option<Vec<JobTarget>>,
}

impl Now {
    /// What libvirt tells of it.
    ///
    /// # Errors
    /// When its XML can't be read.
    pub fn of(running: &RunningVm) -> Result<Self, DomainError> {
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
pub enum Acquaintance {
    /// The keystore has it.
    Known,
    /// Its XML alone says that it is sealed.
    ByXml,
    /// Nothing of it is sealed. A volume alone may have been made for a VM that is still plain.
    Stranger,
}

impl Acquaintance {
    /// Of a VM that the keystore has a record of, or not.
    #[must_use]
    pub fn of<T>(record: Option<&T>, now: Option<&Now>) -> Self {
        match record {
            Some(_) => Self::Known,
            None if now.is_some_and(|now| now.live.metadata.is_some()) => Self::ByXml,
            None => Self::Stranger,
        }
    }
}

/// One look at a VM.
#[derive(Debug)]
pub struct Look {
    /// Which.
    pub vm: VmId,
    /// Whose business it is.
    pub acquaintance: Acquaintance,
    /// What was heard since the last look.
    pub news: News,
    /// How it is, if it runs; or that this can't be told.
    pub now: Result<Option<Now>, String>,
    /// What is wrong with it now.
    pub found: Vec<String>,
}

/// Something new, for the log.
#[derive(Debug, PartialEq, Eq)]
pub struct NewFinding {
    /// The VM.
    pub name: String,
    /// What was found.
    pub words: String,
}

/// What was seen of all VMs.
#[derive(Debug, Default)]
pub struct Watched(BTreeMap<VmId, Seen>);

impl Watched {
    /// Takes in a look. Returns what is new.
    pub fn take_in(&mut self, look: Look, at: SystemTime) -> Vec<NewFinding> {
        let Look {
            vm,
            acquaintance,
            news,
            now,
            mut found,
        } = look;
        let (now, unreadable) = match now {
            Ok(now) => (now, None),
            Err(why) => (None, Some(format!("its XML of now can't be read: {why}"))),
        };
        if !self.0.contains_key(&vm) {
            match acquaintance {
                Acquaintance::Stranger if found.is_empty() => return Vec::new(),
                Acquaintance::Stranger | Acquaintance::ByXml => self.make_room(),
                Acquaintance::Known => {}
            }
        }
        let seen = self.0.entry(vm).or_default();
        seen.is_known = acquaintance == Acquaintance::Known;
        let name = now
            .as_ref()
            .map_or(news.name.as_str(), |now| now.live.name.as_str());
        if !name.is_empty() {
            name.clone_into(&mut seen.name);
        }
        if acquaintance != Acquaintance::Stranger {
            let ended = seen.take_in(&news, now.as_ref());
            let name = visible(&seen.name).into_owned();
            let of_vm = ended.into_iter().chain(unreadable);
            found.extend(of_vm.map(|words| format!("{name}: {}", visible(&words))));
        }
        let new = seen.note(found, at).into_iter();
        let name = seen.name.clone();
        if now.is_none() && seen.found.is_empty() {
            self.0.remove(&vm);
        }
        let named = |words| NewFinding {
            name: name.clone(),
            words,
        };
        new.map(named).collect()
    }

    /// What was found of a VM since the daemon began.
    #[must_use]
    pub fn findings(&self, vm: VmId) -> Vec<Finding> {
        let seen = self.0.get(&vm).into_iter();
        let found = seen.flat_map(|seen| seen.found.iter().map(|listed| listed.finding(&seen.name)));
        found.collect()
    }

    /// Every VM with findings, with its name.
    #[must_use]
    pub fn with_findings(&self) -> Vec<(VmId, String)> {
        let found = self.0.iter().filter(|(_, seen)| !seen.found.is_empty());
        found.map(|(vm, seen)| (*vm, seen.name.clone())).collect()
    }

    /// For one more VM that the keystore does not know. What was found of the one that goes is in the audit log.
    fn make_room(&mut self) {
        let strangers = || self.0.iter().filter(|(_, seen)| !seen.is_known);
        if strangers().count() < MAX_STRANGERS {
            return;
        }
        let oldest = strangers().min_by_key(|(_, seen)| seen.found.first().map(|listed| listed.since));
        if let Some(vm) = oldest.map(|(vm, _)| *vm) {
            self.0.remove(&vm);
        }
    }
}

/// What was seen of a VM.
#[derive(Debug, Default)]
struct Seen {
    name: String,
    /// Disks of which it was seen where they are copied to.
    copies: BTreeSet<String>,
    backup: bool,
    /// Where each disk was when it was looked at last.
    disks: BTreeMap<String, Option<PathBuf>>,
    found: Vec<Listed>,
    /// The digests of all that was found.
    noted: BTreeSet<[u8; 32]>,
    /// Whether the keystore has the VM.
    is_known: bool,
}

#[derive(Debug)]
struct Listed {
    words: String,
    since: SystemTime,
}

impl Listed {
    fn finding(&self, name: &str) -> Finding {
        let what = format!(
            "{}; seen first at {}, and listed until virtseald restarts",
            self.words,
            rfc3339(self.since)
        );
        Finding::critical(Subject::Vm(name.to_owned()), what)
    }
}

impl Seen {
    /// Takes in how the VM is now, and what was heard meanwhile. Returns what has ended before it was seen where it wrote to.
    fn take_in(&mut self, news: &News, now: Option<&Now>) -> Vec<String> {
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
                format!("disk {disk} was copied, and that had ended before it was seen where to: the copy may be plaintext")
            })
            .collect();
        if news.backup_ended && !std::mem::take(&mut self.backup) {
            ended.push(
                "a backup of it was made, and had ended before it was seen where to: it may be plaintext"
                    .to_owned(),
            );
        }
        ended.extend(news.memory.iter().map(|file| memory_written(*file)));
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

    /// Those of `found` that are new.
    fn note(&mut self, found: Vec<String>, now: SystemTime) -> Vec<String> {
        let mut new = Vec::new();
        for words in found {
            let digest = sha256(words.as_bytes());
            if self.noted.len() > MAX_NOTED || !self.noted.insert(digest) {
                continue;
            }
            if self.noted.len() > MAX_NOTED {
                let words = format!(
                    "{}: more was found than {MAX_NOTED} things, and no more of it is noted until virtseald restarts",
                    visible(&self.name)
                );
                new.push(self.list(words, now));
            } else if self.found.len() < MAX_FINDINGS {
                new.push(self.list(words, now));
            } else {
                new.push(words);
            }
        }
        new
    }

    fn list(&mut self, words: String, now: SystemTime) -> String {
        self.found.push(Listed {
            words: shortened(&words),
            since: now,
        });
        words
    }
}

fn shortened(words: &str) -> String {
    if words.len() <= MAX_WORDS {
        return words.to_owned();
    }
    let end = (0..=MAX_WORDS).rfind(|at| words.is_char_boundary(*at));
    format!("{}… (the audit log has all of it)", &words[..end.unwrap_or(0)])
}

fn memory_written(file: MemoryFile) -> String {
    let by = match file {
        MemoryFile::Save => "virsh save or managedsave",
        MemoryFile::Dump => "virsh dump",
        MemoryFile::Snapshot => "a snapshot with its memory",
    };
    format!("its memory was written to a file in plaintext, as by {by}")
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
        assert!(matches!(&told[..], [one] if one.contains("disk vda")), "{told:?}");
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
            matches!(&told[..], [one] if one.contains("virsh dump")),
            "{told:?}"
        );
    }

    #[test]
    fn what_was_found_is_told_once_and_bounded() {
        let mut seen = Seen::default();
        assert_eq!(
            seen.note(vec!["a".into(), "a".into(), "b".into()], AT),
            ["a", "b"]
        );
        assert!(seen.note(vec!["a".into()], AT).is_empty());
        let new = seen.note((0..2 * MAX_FINDINGS).map(|n| n.to_string()).collect(), AT);
        assert_eq!(
            new.len(),
            2 * MAX_FINDINGS,
            "what is not listed is in the audit log"
        );
        assert_eq!(seen.found.len(), MAX_FINDINGS);
        // Whoever fills that up can't hide that he did.
        let new = seen.note((0..2 * MAX_NOTED).map(|n| format!("x{n}")).collect(), AT);
        assert!(
            new.len() < MAX_NOTED && new.last().unwrap().contains("no more"),
            "{new:?}"
        );
        assert!(
            seen.found
                .last()
                .is_some_and(|last| last.words.contains("no more"))
        );
        assert!(seen.note(vec!["y".into()], AT).is_empty());
        let long = "ä".repeat(MAX_WORDS);
        assert_eq!(
            Seen::default().note(vec![long.clone()], AT),
            std::slice::from_ref(&long)
        );
        assert!(shortened(&long).len() < MAX_WORDS + 64);
    }

    fn look(vm: VmId, acquaintance: Acquaintance, found: &str) -> Look {
        Look {
            vm,
            acquaintance,
            news: News::default(),
            now: Ok(None),
            found: vec![found.to_owned()],
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

//! What is done to VMs while they run, where no hook is asked: copies and backups, devices that are attached, memory that is
//! written to a file. It can't be prevented, so it is found, and what was found stays: plaintext once written stays written.
//!
//! libvirt's events say when to look, on a connection of their own; a round every now and then sees what has no event, such as
//! a plain overlay. What was found is in the audit log at once, and shown until this daemon ends (docs/adr/0019).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use openssl::sha::sha256;

use super::bell::Bell;
use super::glance;
use super::paths;
use super::{Daemon, lock, records};
use crate::domain::jobs::{self, JobTarget};
use crate::domain::{Domain, DomainError, objects};
use crate::host::libvirt::events::{self, Change, Heard, Listener, Listening, MemoryFile};
use crate::host::libvirt::{Libvirt, RunningVm};
use crate::host::local_time::rfc3339;
use crate::host::permitted::PermittedPath;
use crate::model::envelope::{ObjectKind, VmId};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, ImageCopy};
use crate::store::EnvelopeRecord;
use crate::terminal::visible;
use crate::vm::names;
use crate::vm::side_doors;

/// What has no event is seen after this.
const ROUND: Duration = Duration::from_secs(30);
/// A job that has just begun may not be in the XML yet.
const AGAIN: Duration = Duration::from_millis(300);
/// How often the connection is checked.
const CHECK: Duration = Duration::from_secs(5);
/// More of one VM are in the audit log alone.
const MAX_FINDINGS: usize = 64;
/// Of one VM, in the audit log: who may change a VM can have it filled.
const MAX_NOTED: usize = 1024;
/// Of one finding as it is listed, in bytes.
const MAX_WORDS: usize = 1024;
/// VMs that the keystore does not know: anybody can run any number of them, and they take no room from the sealed ones.
const MAX_STRANGERS: usize = 1024;

/// What was heard of VMs, and what was seen of them.
#[derive(Debug, Default)]
pub(super) struct Running {
    news: Mutex<BTreeMap<VmId, News>>,
    bell: Bell,
    seen: Mutex<BTreeMap<VmId, Seen>>,
}

/// What was heard of a VM since it was looked at last.
#[derive(Debug, Default)]
pub(super) struct News {
    name: String,
    copies_ended: BTreeSet<String>,
    backup_ended: bool,
    memory: BTreeSet<MemoryFile>,
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
    found: Vec<Finding>,
    /// The digests of all that was found.
    noted: BTreeSet<[u8; 32]>,
    /// Whether the keystore has the VM.
    is_known: bool,
}

#[derive(Debug)]
struct Finding {
    words: String,
    since: SystemTime,
}

impl Running {
    /// On libvirt's thread: waits for nobody.
    fn hear(&self, heard: Heard) {
        {
            let mut news = lock(&self.news);
            let of_vm = news.entry(heard.vm).or_default();
            of_vm.name = heard.name;
            match heard.change {
                Change::Any => {}
                Change::CopyEnded(disk) => {
                    of_vm.copies_ended.insert(disk);
                }
                Change::BackupEnded => of_vm.backup_ended = true,
                Change::MemoryWritten(file) => {
                    of_vm.memory.insert(file);
                }
            }
        }
        self.bell.ring();
    }

    fn look_at(&self, vms: impl IntoIterator<Item = VmId>) {
        let mut news = lock(&self.news);
        for vm in vms {
            news.entry(vm).or_default();
        }
    }

    /// What was found of a VM since the daemon began.
    pub(super) fn findings(&self, vm: VmId) -> Vec<String> {
        let seen = lock(&self.seen);
        let found = seen.get(&vm).into_iter().flat_map(|seen| &seen.found);
        found.map(ToString::to_string).collect()
    }

    /// Every VM with findings, with its name.
    pub(super) fn with_findings(&self) -> Vec<(VmId, String)> {
        let seen = lock(&self.seen);
        let found = seen.iter().filter(|(_, seen)| !seen.found.is_empty());
        found.map(|(vm, seen)| (*vm, seen.name.clone())).collect()
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}; seen first at {}, and listed until virtseald restarts",
            self.words,
            rfc3339(self.since)
        )
    }
}

/// A VM as it runs now.
struct Now {
    live: Domain,
    next: Option<Domain>,
    copies: Vec<JobTarget>,
    backup: Option<Vec<JobTarget>>,
}

impl Now {
    fn of(running: &RunningVm) -> Result<Self, DomainError> {
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
    fn note(&mut self, found: Vec<String>) -> Vec<String> {
        let mut new = Vec::new();
        for words in found {
            let digest = sha256(words.as_bytes());
            if self.noted.len() > MAX_NOTED || !self.noted.insert(digest) {
                continue;
            }
            if self.noted.len() > MAX_NOTED {
                new.push(self.list(format!(
                    "{}: more was found than {MAX_NOTED} things, and no more of it is noted until virtseald restarts",
                    visible(&self.name)
                )));
            } else if self.found.len() < MAX_FINDINGS {
                new.push(self.list(words));
            } else {
                new.push(words);
            }
        }
        new
    }

    fn list(&mut self, words: String) -> String {
        self.found.push(Finding {
            words: shortened(&words),
            since: SystemTime::now(),
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

/// Leaves room for one more VM that the keystore does not know. What was found of the one that goes is in the audit log.
fn make_room(all: &mut BTreeMap<VmId, Seen>) {
    let strangers = || all.iter().filter(|(_, seen)| !seen.is_known);
    if strangers().count() < MAX_STRANGERS {
        return;
    }
    let oldest = strangers().min_by_key(|(_, seen)| seen.found.first().map(|finding| finding.since));
    if let Some(vm) = oldest.map(|(vm, _)| *vm) {
        all.remove(&vm);
    }
}

fn memory_written(file: MemoryFile) -> String {
    let by = match file {
        MemoryFile::Save => "virsh save or managedsave",
        MemoryFile::Dump => "virsh dump",
        MemoryFile::Snapshot => "a snapshot with its memory",
    };
    format!("its memory was written to a file in plaintext, as by {by}")
}

impl Daemon {
    /// Looks at VMs whenever libvirt says that something was done to them, for ever. For a thread of its own.
    pub fn watch_running(&self) {
        let running = Arc::clone(&self.running);
        let listener: Listener = Arc::new(move |heard| running.hear(heard));
        while [&self.libvirt, &self.background]
            .iter()
            .any(|libvirt| libvirt.reach(CHECK).is_err())
        {
            self.running.bell.wait(CHECK);
        }
        if let Err(error) = events::start_loop() {
            tracing::error!("what is done to running VMs is not seen: libvirt's events: {error}");
            return;
        }
        let mut listening: Option<Listening> = None;
        let mut round = Instant::now();
        let mut again: BTreeMap<VmId, Instant> = BTreeMap::new();
        loop {
            if !listening.as_ref().is_some_and(Listening::is_alive) {
                drop(listening.take());
                listening = self.begin_to_listen(&listener);
            }
            if listening.is_some() && round <= Instant::now() {
                self.running.look_at(self.running_and_known());
                round = Instant::now() + ROUND;
            }
            let news = std::mem::take(&mut *lock(&self.running.news));
            for (vm, news) in news {
                again.insert(vm, Instant::now() + AGAIN);
                self.look_and_log(vm, news);
            }
            let now = Instant::now();
            let due: Vec<_> = again
                .iter()
                .filter(|(_, at)| **at <= now)
                .map(|(vm, _)| *vm)
                .collect();
            for vm in due {
                again.remove(&vm);
                self.look_and_log(vm, News::default());
            }
            let next = again
                .values()
                .min()
                .map(|at| at.saturating_duration_since(Instant::now()));
            self.running.bell.wait(next.map_or(CHECK, |next| next.min(CHECK)));
        }
    }

    fn begin_to_listen(&self, listener: &Listener) -> Option<Listening> {
        let listening = self
            .events
            .listen(listener)
            // Who keeps the connections says so too, and louder.
            .inspect_err(|error| tracing::debug!("libvirt's events are not heard: {}", chain(error)))
            .ok()?;
        if !listening.hears_beginnings() {
            tracing::warn!(
                "libvirt does not pass on QEMU's events: short copies and backups are seen only when they have ended"
            );
        }
        match self.events.running() {
            Ok(vms) => self.running.look_at(vms),
            Err(error) => tracing::warn!("what runs is not known: {}", chain(&error)),
        }
        Some(listening)
    }

    /// The VMs that are sealed here and run.
    fn running_and_known(&self) -> Vec<VmId> {
        let known: BTreeSet<_> = self
            .keystore
            .vms()
            .map(|vms| vms.sound)
            .unwrap_or_default()
            .into_iter()
            .map(|record| record.vm)
            .collect();
        let mut running = self.events.running().unwrap_or_default();
        running.retain(|vm| known.contains(vm));
        running
    }

    fn look_and_log(&self, vm: VmId, news: News) {
        if let Err(failure) = self.look_at_running(vm, &self.events, news) {
            tracing::warn!(%vm, "what is done to it while it runs can't be seen: {failure}");
        }
    }

    /// As [`Self::watch_running`] does, for who asks now.
    pub(super) fn look_now(&self, vm: VmId) -> Result<(), Problem> {
        self.look_at_running(vm, &self.background, News::default())
    }

    fn look_at_running(&self, vm: VmId, libvirt: &Libvirt, news: News) -> Result<(), Problem> {
        let running = libvirt
            .as_it_runs(vm)
            .map_err(|error| names::unreachable(&error))?;
        // A volume alone may have been made for a VM that is still plain.
        let is_known = self.keystore.vm(vm)?.is_some();
        let (now, unreadable) = match running.as_ref().map(Now::of).transpose() {
            Ok(now) => (now, None),
            Err(error) => (
                None,
                Some(format!("its XML of now can't be read: {}", chain(&error))),
            ),
        };
        let is_sealed = is_known || now.as_ref().is_some_and(|now| now.live.metadata.is_some());
        let name = now
            .as_ref()
            .map_or(news.name.as_str(), |now| now.live.name.as_str());
        let mut found = now
            .as_ref()
            .map(|now| self.sealed_as_raw(now))
            .unwrap_or_default();
        if let Some(now) = now.as_ref().filter(|_| is_sealed) {
            let policy = self.config().policy.of(&now.live);
            let backup = now.backup.as_deref().unwrap_or_default();
            found.extend(side_doors::while_it_runs(
                &now.live,
                now.next.as_ref(),
                backup,
                policy,
            ));
        }
        let new = {
            let mut all = lock(&self.running.seen);
            if !all.contains_key(&vm) {
                if !is_sealed && found.is_empty() {
                    return Ok(());
                }
                if !is_known {
                    make_room(&mut all);
                }
            }
            let seen = all.entry(vm).or_default();
            seen.is_known = is_known;
            if !name.is_empty() {
                name.clone_into(&mut seen.name);
            }
            if is_sealed {
                let ended = seen.take_in(&news, now.as_ref());
                let name = visible(&seen.name).into_owned();
                let of_vm = ended.into_iter().chain(unreadable);
                found.extend(of_vm.map(|words| format!("{name}: {}", visible(&words))));
            }
            let new = seen.note(found);
            let name = seen.name.clone();
            if now.is_none() && seen.found.is_empty() {
                all.remove(&vm);
            }
            new.into_iter()
                .map(|words| (name.clone(), words))
                .collect::<Vec<_>>()
        };
        for (name, words) in &new {
            tracing::warn!(domain = name, "{words}");
            records::note_finding(self, vm, name, words);
        }
        if !new.is_empty() {
            glance::expire(self);
        }
        Ok(())
    }

    /// Disks that are sealed images, of whomever, opened without a key.
    fn sealed_as_raw(&self, now: &Now) -> Vec<String> {
        let plain = side_doors::plain_disks(&now.live);
        if plain.is_empty() {
            return Vec::new();
        }
        let records = self
            .keystore
            .envelopes()
            .map_or_else(|_| Vec::new(), |rows| rows.sound);
        let rule = paths::rule(self);
        let found = plain.into_iter().filter_map(|disk| {
            let path = disk.path?;
            let kept = records.iter().find(|record| Path::new(&record.location) == path);
            let place = rule.permit_known(&path, kept.map(|record| &record.location).into_iter());
            let owner = sealed_image(&place.ok()?, kept)?;
            let known = self.keystore.vm(owner).ok().flatten();
            let owner = known.map_or_else(|| owner.to_string(), |record| record.name);
            Some(side_doors::sealed_as_raw(
                &now.live.name,
                &disk.label,
                &path,
                &owner,
            ))
        });
        found.collect()
    }
}

/// Whose it is, by what it carries or by what is kept for its place. A guest's own LUKS is nobody's here.
fn sealed_image(place: &PermittedPath, kept: Option<&EnvelopeRecord>) -> Option<VmId> {
    match disk::identify(place) {
        Ok((format, ImageCopy::Envelope(envelope))) if format.is_encrypted() => Some(envelope.vm),
        Ok((format, ImageCopy::None | ImageCopy::Unreadable(_))) if format.is_encrypted() => {
            kept.map(|record| record.envelope.vm)
        }
        Ok(_) | Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(seen.note(vec!["a".into(), "a".into(), "b".into()]), ["a", "b"]);
        assert!(seen.note(vec!["a".into()]).is_empty());
        let new = seen.note((0..2 * MAX_FINDINGS).map(|n| n.to_string()).collect());
        assert_eq!(
            new.len(),
            2 * MAX_FINDINGS,
            "what is not listed is in the audit log"
        );
        assert_eq!(seen.found.len(), MAX_FINDINGS);
        // Whoever fills that up can't hide that he did.
        let new = seen.note((0..2 * MAX_NOTED).map(|n| format!("x{n}")).collect());
        assert!(
            new.len() < MAX_NOTED && new.last().unwrap().contains("no more"),
            "{new:?}"
        );
        assert!(
            seen.found
                .last()
                .is_some_and(|last| last.words.contains("no more"))
        );
        assert!(seen.note(vec!["y".into()]).is_empty());
        let long = "ä".repeat(MAX_WORDS);
        assert_eq!(
            Seen::default().note(vec![long.clone()]),
            std::slice::from_ref(&long)
        );
        assert!(shortened(&long).len() < MAX_WORDS + 64);
    }

    #[test]
    fn strangers_take_no_room_from_sealed_vms() {
        let mut all = BTreeMap::new();
        let seen = |is_known| {
            let mut seen = Seen {
                is_known,
                ..Seen::default()
            };
            let _ = seen.note(vec!["a".into()]);
            seen
        };
        let first = VmId::random();
        all.insert(first, seen(false));
        let sealed = [0; 3].map(|_| VmId::random());
        for vm in sealed {
            all.insert(vm, seen(true));
        }
        let mut last = first;
        for _ in 0..MAX_STRANGERS {
            make_room(&mut all);
            last = VmId::random();
            all.insert(last, seen(false));
        }
        assert_eq!(all.len(), MAX_STRANGERS + sealed.len());
        assert!(!all.contains_key(&first) && all.contains_key(&last));
        assert!(sealed.iter().all(|vm| all.contains_key(vm)));
    }
}

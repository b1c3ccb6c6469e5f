//! `vm snapshot commit` and `vm snapshot delete`: a sealed VM without the plain overlays on its disks.
//!
//! `virsh snapshot-create-as --disk-only` lays a plain qcow2 file over each disk, and the VM starts no more, as whatever it writes would
//! land there in plaintext. libvirt's own ways to get rid of one (`snapshot-delete`, `blockcommit`) start the VM first, where it is off,
//! and that is refused like any other start: nobody could tell it from one that goes on writing. So virtseald does it.
//!
//! A **commit** writes what the overlays have down into the sealed image. Of a VM that runs QEMU does so, asked through libvirt, with
//! the keys that it has ([`running`]). Of one that is off `qemu-img` does, with the key by a pipe, while every image is held so that
//! nobody starts the VM ([`off`]). The base is written in place, which changes nothing for a guest as long as the overlay is above it:
//! so a commit can die anywhere and be repeated, and only it leads on from there. Both images are compared before the domain is
//! redefined, and the overlays go last.
//!
//! A **delete** drops what was written since: the domain gets the sealed image back, and the overlays go. It is refused once a commit has
//! begun, as the base is of neither time then.
//!
//! Before QEMU is **asked to go over** to the base of a VM that runs, the host's store notes it, until its XMLs are seen to say so. Where
//! libvirtd, virtseald and the VM all end in between, an XML may name an overlay that is older than the base: as long as that is noted, a
//! commit merges nothing that it has not read to be the same, and root decides which is newer where it is not. So it is with a VM that
//! is seen to run on the base alone while its next start would have the overlay, as after a merge by hand and an older XML.

mod found;
pub(crate) mod off;
pub(crate) mod running;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::api::{FindingView, LossPreview, SnapshotAct, StepView};
use crate::domain::edit::without_overlays;
use crate::domain::overlays::{ExternalSnapshot, external_snapshot};
use crate::domain::{Domain, Source};
use crate::host::libvirt::{DefinedDomain, KeptXml, Power};
use crate::model::act::{Act, StepCode, Tense, Verb};
use crate::model::advice::Advice;
use crate::model::deadlines::image::GOES_OVER;
use crate::model::envelope::VmId;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Problem, chain};
use crate::object::disk::Bytes;
use crate::store::{HostStore, Pivot, PivotBy, StoreError, UnixTime};
use crate::terminal::{visible, word};
use crate::vm::host::Host;

pub(crate) use found::{Overlaid, find};

/// A disk with its overlays, as a job has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OverlaidDisk {
    /// Its `<target dev=…>`.
    pub target: String,
    /// The sealed image.
    pub base: PathBuf,
    /// What is on it, the topmost first.
    pub overlays: Vec<PathBuf>,
}

/// What root has said with it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choices {
    /// Whether the files stay.
    pub keep: bool,
    /// Whether it is done where it is not known which image is newer.
    pub force: bool,
}

/// How a disk is by an XML.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Overlaid,
    /// It is the sealed image again.
    Bare,
    /// It is something else by now.
    Other,
}

impl OverlaidDisk {
    pub(crate) fn standing(&self, xml: &str) -> Result<Standing, Problem> {
        let domain = Domain::parse(xml).map_err(|error| Problem::failed(chain(&error)))?;
        let disk = domain.disk(&self.target);
        let path = disk.and_then(|disk| disk.source.path());
        Ok(match path {
            Some(path) if self.overlays.first().is_some_and(|top| top == path) => Standing::Overlaid,
            Some(path) if path == self.base && disk.is_some_and(|disk| disk.encryption.is_some()) => {
                Standing::Bare
            }
            _ => Standing::Other,
        })
    }

    /// Why it is not known whether the base is the newer one, if something of that is noted.
    ///
    /// # Errors
    /// When the store can't be read.
    pub(crate) fn pivot(&self, store: &HostStore, vm: VmId) -> Result<Option<Pivot>, StoreError> {
        let mut last = None;
        for overlay in &self.overlays {
            let noted = store.pivot(vm, &self.base, overlay)?;
            last = last.max(noted.filter(|pivot| may_be_of(overlay, pivot.at)));
        }
        Ok(last)
    }

    /// Whether the base was written to after that time, and not just then.
    pub(crate) fn was_written_after(&self, at: UnixTime) -> bool {
        modified(&self.base).is_some_and(|written| written > since_epoch(at) + GOES_OVER)
    }

    /// Notes that QEMU goes over to the base, or has.
    pub(crate) fn note_pivot(&self, store: &HostStore, vm: VmId, by: PivotBy) -> Result<(), Problem> {
        match self.overlays.first() {
            Some(top) => Ok(store.note_pivot(vm, &self.base, top, by)?),
            None => Ok(()),
        }
    }

    /// What is said of a VM that runs on the base alone, although its next start would have the overlay: what is in that may have been
    /// merged, or be missing in the base. Notes it.
    pub(crate) fn runs_without(&self, store: &HostStore, vm: VmId, name: &str) -> Problem {
        if let Err(failure) = self.note_pivot(store, vm, PivotBy::Others) {
            return failure.of(name);
        }
        let (base, top) = (&self.base, self.overlays.first().unwrap_or(&self.base));
        let what = format!(
            "{name} runs on {}, and its next start would have {} on that, which virtseal has not merged",
            base.display(),
            top.display()
        );
        let commit = Advice::CommitSnapshot(name.to_owned()).note("which compares both");
        Problem::busy(what).next(Advice::ShutDownVm(name.to_owned()).then(commit))
    }

    /// What a commit says that finds both different after that, or where the sealed image is the newer one.
    pub(crate) fn not_known(&self, name: &str, pivot: Option<Pivot>) -> Problem {
        let time =
            |time: Option<SystemTime>| time.map_or_else(|| "?".to_owned(), crate::host::local_time::rfc3339);
        let (base, target) = (self.base.display(), &self.target);
        let top = self.overlays.first().unwrap_or(&self.base);
        let why = match pivot {
            Some(Pivot {
                at,
                by: PivotBy::Virtseald,
            }) => format!(
                "QEMU was asked at {} to let disk {target} go over from {} to {base}, nobody has seen whether it did, and they differ",
                time(Some(since_epoch(at))),
                top.display()
            ),
            Some(Pivot {
                at,
                by: PivotBy::Others,
            }) => format!(
                "disk {target} has the overlay {} by its XML, it ran on {base} alone at {}, and they differ",
                top.display(),
                time(Some(since_epoch(at)))
            ),
            None => format!(
                "disk {target} has the overlay {} by its XML, {base} is newer, as after a blockcommit in which libvirtd died, and they \
                 differ",
                top.display()
            ),
        };
        let what = format!(
            "{name} stays as it is: {why}: {base} was last written to at {}, {} at {}",
            time(modified(&self.base)),
            top.display(),
            time(modified(top)),
        );
        let force = |act| Advice::ForceSnapshot {
            vm: name.to_owned(),
            act,
        };
        Problem::would_lose_key(what).next(
            force(SnapshotAct::Delete)
                .note(format!("if it ran on {} since", word(base)))
                .or(force(SnapshotAct::Commit).note("if it did not")),
        )
    }

    /// What a job says that finds another disk than it was begun for.
    pub(crate) fn changed(&self, name: &str) -> Problem {
        let what = format!("{name}: disk {} is not what it was when this began", self.target);
        Problem::failed(what).next(Advice::ShowVm(name.to_owned()))
    }
}

/// What is to be done to the overlays of a VM.
#[derive(Debug)]
pub(crate) struct OverlayPlan {
    pub vm: VmId,
    pub name: String,
    pub act: SnapshotAct,
    pub power: Power,
    pub disks: Vec<Overlaid>,
    /// What libvirt can't revert to any more.
    snapshots: Vec<ExternalSnapshot>,
}

/// Looks and decides; nothing is changed but what is noted of a VM that runs without its overlays.
pub(crate) fn plan(
    host: &Host<'_>,
    defined: &DefinedDomain,
    act: SnapshotAct,
) -> Result<OverlayPlan, Problem> {
    let name = &defined.name;
    let of_vm = |failure: Problem| failure.of(name);
    if defined.active && act == SnapshotAct::Delete {
        return Err(
            Problem::busy(format!("{name} is running, and would lose its disk"))
                .next(Advice::ShutDownVm(name.clone())),
        );
    }
    if !defined.active && defined.managed_save {
        return Err(Problem::busy(format!(
            "{name} has a saved state, made from its disks as they are"
        ))
        .next(Advice::DropSavedState(name.clone()).note("which loses what was in its memory")));
    }
    let xml = match defined.active {
        true => host
            .libvirt
            .as_it_runs(defined.vm)
            .map_err(|error| super::names::unreachable(&error))?
            .map(|running| running.live),
        false => None,
    };
    let xml = xml.as_deref().unwrap_or(&defined.xml);
    let domain = Domain::parse(xml).map_err(|error| of_vm(Problem::failed(chain(&error))))?;
    let disks = find(host, &domain).map_err(of_vm)?;
    if defined.active && disks.is_empty() {
        refuse_running_without(host, defined, xml)?;
    }
    let snapshots = snapshots_of(&host.kept, defined.vm).map_err(of_vm)?;
    if act == SnapshotAct::Commit {
        found::refuse_other_branches(host, defined.vm, &disks, &snapshots).map_err(of_vm)?;
    }
    let goes = |path: &PathBuf| {
        disks
            .iter()
            .any(|disk| disk.overlays.iter().any(|overlay| overlay.shown() == path))
    };
    Ok(OverlayPlan {
        vm: defined.vm,
        name: name.clone(),
        act,
        power: if defined.active { Power::On } else { Power::Off },
        snapshots: snapshots
            .into_iter()
            .filter(|snapshot| !snapshot.overlays.is_empty() && snapshot.overlays.iter().all(goes))
            .collect(),
        disks,
    })
}

fn refuse_running_without(host: &Host<'_>, defined: &DefinedDomain, live: &str) -> Result<(), Problem> {
    let name = &defined.name;
    let of_vm = |failure: Problem| failure.of(name);
    let next = Domain::parse(&defined.xml).map_err(|error| of_vm(Problem::failed(chain(&error))))?;
    for disk in find(host, &next).map_err(of_vm)? {
        let disk = disk.paths();
        if disk.standing(live)? == Standing::Bare {
            return Err(disk.runs_without(host.host_store, defined.vm, name));
        }
    }
    Ok(())
}

/// A saved state is one without overlays.
fn snapshots_of(kept: &[KeptXml], vm: VmId) -> Result<Vec<ExternalSnapshot>, Problem> {
    let of_vm = kept.iter().filter(|kept| kept.vm == vm);
    let snapshots = of_vm.filter_map(|kept| Some((kept.snapshot.as_ref()?, &kept.xml)));
    snapshots
        .map(|(name, xml)| external_snapshot(xml).map_err(|error| Problem::failed(chain(&error)).of(name)))
        .collect()
}

impl OverlayPlan {
    /// What was found, for a job.
    pub(crate) fn jobs_disks(&self) -> Vec<OverlaidDisk> {
        self.disks.iter().map(Overlaid::paths).collect()
    }

    pub(crate) fn snapshots(&self) -> Vec<String> {
        self.snapshots
            .iter()
            .map(|snapshot| snapshot.name.clone())
            .collect()
    }

    /// How much the overlays have.
    pub(crate) fn bytes(&self) -> Bytes {
        Bytes(self.disks.iter().map(Overlaid::bytes).sum())
    }

    /// What is asked before, with what is lost.
    pub(crate) fn preview(&self, choices: Choices) -> LossPreview {
        let acts = self.acts(choices);
        let steps = |tense| StepView::all(&acts, tense, &Subject::Vm(self.name.clone()));
        LossPreview {
            vm: self.vm.to_string(),
            name: self.name.clone(),
            steps: steps(Tense::Planned),
            done: steps(Tense::Done),
            lost: match self.act {
                SnapshotAct::Delete => FindingView::all(&self.lost()),
                SnapshotAct::Commit if choices.force => FindingView::all(&self.lost_by_force()),
                SnapshotAct::Commit => Vec::new(),
            },
        }
    }

    fn acts(&self, choices: Choices) -> Vec<Act> {
        let mut acts = Vec::new();
        for disk in &self.disks {
            let (object, base) = (format!("disk {}", disk.target), disk.base.shown().display());
            let paths: Vec<_> = disk
                .overlays
                .iter()
                .map(|overlay| overlay.shown().display().to_string())
                .collect();
            let overlays = paths.join(", ");
            let image = match self.act {
                SnapshotAct::Commit => Verb::Merge.act(
                    StepCode::MergeOverlays,
                    format!("{overlays} into {base}, and let {object} be that again"),
                ),
                SnapshotAct::Delete => Verb::Let.act(
                    StepCode::DropOverlays,
                    format!("{object} be {base} again, as it was before {overlays}"),
                ),
            };
            let files = match choices.keep {
                true => Verb::Leave.act(
                    StepCode::LeaveOverlayFiles,
                    format!("{overlays} there, in plaintext"),
                ),
                false => Verb::Remove.act(StepCode::RemoveOverlayFiles, overlays),
            };
            acts.push(image.on(&object).at(disk.base.shown()));
            acts.push(paths.iter().fold(files.on(&object), Act::at));
        }
        let names = self.snapshots();
        if !names.is_empty() {
            let what = format!(
                "libvirt forget what it can't revert to any more: {}",
                visible(&names.join(", "))
            );
            acts.push(Verb::Let.act(StepCode::ForgetSnapshots, what));
        }
        acts
    }

    fn lost_by_force(&self) -> Vec<Finding> {
        let of_disk = |disk: &Overlaid| {
            let base = disk.base.shown().display();
            let what = format!("what was written to {base} by itself, if the VM ran on it since");
            self.lost_of(disk, what)
        };
        self.disks.iter().map(of_disk).collect()
    }

    fn lost_of(&self, disk: &Overlaid, what: String) -> Finding {
        let object = Subject::object(&self.name, &format!("disk {}", disk.target));
        Finding::critical(FindingCode::DataLost, object, what)
    }

    fn lost(&self) -> Vec<Finding> {
        let of_disk = |disk: &Overlaid| {
            let since = disk
                .since()
                .map(|time| format!(" since {}", crate::host::local_time::rfc3339(time)));
            let what = format!(
                "what was written to disk {}{}",
                disk.target,
                since.unwrap_or_default()
            );
            let doubt = disk.was_written_since(Duration::ZERO).then(|| {
                let base = disk.base.shown().display();
                format!(
                    "; {base} was written to after that: if a blockcommit of it was begun, commit instead"
                )
            });
            self.lost_of(disk, what + &doubt.unwrap_or_default())
        };
        self.disks.iter().map(of_disk).collect()
    }

    /// What keeps a delete from being told to be without loss: the base may have got what the overlays have from somebody else.
    pub(crate) fn doubt(&self) -> Option<Problem> {
        let written = self.disks.iter().find(|disk| disk.was_written_since(GOES_OVER))?;
        let base = written.base.shown().display();
        let what = format!(
            "{} stays as it is: {base} was written to after its overlay was made. If that was a blockcommit, begun and aborted, it is \
             neither as it was nor as it is",
            self.name
        );
        let force = Advice::ForceSnapshot {
            vm: self.name.clone(),
            act: SnapshotAct::Delete,
        };
        let commit = Advice::CommitSnapshot(self.name.clone());
        Some(Problem::would_lose_key(what).next(commit.or(force.note("if it was none"))))
    }

    /// Whether the sealed images may be newer than what is to be merged into them.
    pub(crate) fn has_newer_base(&self) -> bool {
        self.power == Power::Off && self.disks.iter().any(Overlaid::has_newer_base)
    }

    /// What stays to be known.
    pub(crate) fn warnings(&self, choices: Choices) -> Vec<Finding> {
        let finding = |code, what: &str| Finding::warning(code, Subject::Vm(self.name.clone()), what);
        let files = match choices.keep {
            true => "what is left was written in plaintext, and fits the sealed images no more: remove it",
            false => {
                "what was written since the snapshot was in plaintext on the disk below: removing a file erases nothing there"
            }
        };
        let memory = self
            .snapshots
            .iter()
            .filter_map(|snapshot| snapshot.memory.as_ref());
        let memory = memory.map(|file| {
            let file = file.display().to_string();
            let what = format!("{} has the VM's memory in plaintext: remove it", visible(&file));
            finding(FindingCode::MemorySaved, &what)
        });
        std::iter::once(finding(FindingCode::PlaintextStays, files))
            .chain(memory)
            .collect()
    }
}

/// The XML with the sealed image of `disk` in its place.
pub(crate) fn bare(xml: &str, disk: &Overlaid) -> Result<String, Problem> {
    let path = disk.base.shown().to_owned();
    let base = match disk.is_on_device() {
        true => Source::Block(path),
        false => Source::File(path),
    };
    without_overlays(xml, &disk.target, &base, disk.record.envelope.id)
        .map_err(|error| Problem::failed(chain(&error)))
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

fn since_epoch(seconds: UnixTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs())
}

/// Whether the file may be the one that had this name at that time: another may have it by now, where the file system tells when it was
/// made.
pub(crate) fn may_be_of(file: &Path, at: UnixTime) -> bool {
    let made = file.symlink_metadata().and_then(|found| found.created());
    // A record knows whole seconds, and may be of any moment of its last.
    made.map_or(true, |made| made <= since_epoch(at.saturating_add(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_told_from_another_that_has_come_in_its_place() {
        let disk = OverlaidDisk {
            target: "vda".into(),
            base: "/b".into(),
            overlays: vec!["/o2".into(), "/o1".into()],
        };
        let standing = |path: &str, inside: &str| {
            let xml = format!(
                "<domain type='kvm'><name>a</name><uuid>{}</uuid><devices><disk type='file'><source file='{path}'>{inside}</source>\
                 <target dev='vda'/></disk></devices></domain>",
                uuid::Uuid::new_v4()
            );
            disk.standing(&xml).unwrap()
        };
        let encryption = format!(
            "<encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption>",
            uuid::Uuid::new_v4()
        );
        assert_eq!(standing("/o2", ""), Standing::Overlaid);
        assert_eq!(standing("/b", &encryption), Standing::Bare);
        for (path, inside) in [("/o1", ""), ("/b", ""), ("/c", encryption.as_str())] {
            assert_eq!(standing(path, inside), Standing::Other, "{path}");
        }
    }
}

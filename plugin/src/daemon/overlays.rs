//! Jobs that free VMs of the plain overlays on their disks.
//!
//! A job goes disk by disk, by the way that fits how the VM is then: it may be switched off or on between two tries. Whatever it finds
//! done it does not do again, so it is killed anywhere, and begins again from the beginning.

use std::ops::ControlFlow;

use super::job_records::{excluded, note_end, refuse_beside_another};
use super::locks::Doing;
use super::{Daemon, records};
use crate::audit::Actor;
use crate::domain::Domain;
use crate::host::libvirt::{DefinedDomain, Power};
use crate::host::process::machine_id;
use crate::job::live::{AtWork, Stint};
use crate::job::record::{self, Overlays, Work};
use crate::model::advice::Advice;
use crate::model::deadlines::image::SWITCHED_OFF;
use crate::model::envelope::VmId;
use crate::model::job::{JobState, SnapshotAct, Subject};
use crate::model::problem::{Code, Problem, chain};
use crate::store::{JobRecord, NewJob};
use crate::vm::host::Host;
use crate::vm::names::{not_redefined, unreachable};
use crate::vm::seal::NewObject;
use crate::vm::snapshot::off::{self, HeldDisk};
use crate::vm::snapshot::running::{self, Ended};
use crate::vm::snapshot::{self, Choices, Overlaid, OverlaidDisk, OverlayPlan, Standing};

/// Far more than are ever kept.
const ALL_JOBS: u32 = 100_000;

/// How far a try has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    Through,
    /// An admin has ended the job.
    Stopped,
    /// The VM was switched off under it.
    OnceMore,
}

/// Begins a job, once all that can be seen without it is in order.
pub(super) fn begin(
    daemon: &Daemon,
    by: Actor,
    host: &Host<'_>,
    plan: &OverlayPlan,
    Choices { keep, force }: Choices,
) -> Result<JobRecord, Problem> {
    if plan.power == Power::Off {
        // A provider that is locked says so now; QEMU has the keys of a VM that runs.
        for disk in &plan.disks {
            let opened = NewObject::open(host, &disk.record);
            opened.map_err(|failure| failure.of(format!("{}: disk {}", plan.name, disk.target)))?;
        }
    }
    let work = Work::Overlays(Overlays {
        vm: plan.vm,
        act: plan.act,
        keep,
        force,
        reads_only: !force && is_doubtful(daemon, plan)?,
        disks: plan.jobs_disks(),
        snapshots: plan.snapshots(),
        asked_by: by.uid(),
        host: machine_id(),
    });
    let subject = work.subject();
    refuse_beside_another(daemon, &subject)?;
    if plan.act == SnapshotAct::Delete {
        refuse_half_merged(daemon, plan.vm, &plan.name, &plan.jobs_disks(), force)?;
        if !force && let Some(problem) = plan.doubt() {
            return Err(problem);
        }
    }
    let new = NewJob {
        subject: &subject,
        task: &work.to_json(),
        total: plan.bytes().0,
        left: &[],
    };
    let inserted = daemon
        .keystore
        .insert_job(&new)
        .map_err(|error| excluded(error, &subject));
    let words = work.words(|id| daemon.recipients.name_of(id));
    records::note_command(daemon, by, "job-start", &words, &inserted);
    let job = inserted?;
    daemon.jobs.started(job.id);
    daemon.jobs.ring();
    Ok(job)
}

/// Whatever a commit has written so far is in the sealed image, and of neither time: only its end leads out. Where QEMU may have gone
/// over to that image, a commit finds out, or root says so by `force`.
fn refuse_half_merged(
    daemon: &Daemon,
    vm: VmId,
    name: &str,
    disks: &[OverlaidDisk],
    force: bool,
) -> Result<(), Problem> {
    let refused = |why: &str| {
        let what = format!("{name} stays as it is: {why}");
        Err(Problem::would_lose_key(what).next(Advice::CommitSnapshot(name.to_owned())))
    };
    let jobs = daemon.keystore.jobs(ALL_JOBS)?.whole()?;
    let mut half_merged = Vec::new();
    for disk in disks {
        match disk.asked(&daemon.host_store, vm)? {
            None => half_merged.push(disk.clone()),
            Some(_) if force => {
                let one = std::slice::from_ref(disk);
                let is_overwritten = jobs.iter().any(|job| is_forced(job) && has_begun(job, vm, one));
                half_merged.extend(is_overwritten.then(|| disk.clone()));
            }
            Some(_) => {
                let target = &disk.target;
                let why = format!(
                    "QEMU was asked to let disk {target} go over to its sealed image, and nobody has seen whether it did"
                );
                return refused(&why);
            }
        }
    }
    match jobs.iter().rfind(|job| has_begun(job, vm, &half_merged)) {
        None => Ok(()),
        Some(job) => refused(&format!(
            "job {} has begun to merge it, and its sealed image is neither as it was nor as it is",
            job.id.0
        )),
    }
}

/// Whether a commit may find newer data in the sealed image than in the overlay: no commit of ours has put it there.
fn is_doubtful(daemon: &Daemon, plan: &OverlayPlan) -> Result<bool, Problem> {
    if plan.act != SnapshotAct::Commit || !plan.has_newer_base() {
        return Ok(false);
    }
    let jobs = daemon.keystore.jobs(ALL_JOBS)?.whole()?;
    let disks = plan.jobs_disks();
    Ok(!jobs.iter().any(|job| has_begun(job, plan.vm, &disks)))
}

fn is_forced(job: &JobRecord) -> bool {
    matches!(Work::from_json(&job.task), Ok(Work::Overlays(overlays)) if overlays.force)
}

/// Whether a job may have written to a base, and one of the overlays that it was about is still there. So may one of another virtseald,
/// which can't be read.
fn has_begun(job: &JobRecord, vm: VmId, disks: &[OverlaidDisk]) -> bool {
    if job.state == JobState::Done || disks.is_empty() {
        return false;
    }
    let overlays = match Work::from_json(&job.task) {
        Ok(Work::Overlays(overlays)) => overlays,
        Ok(_) => return false,
        Err(_) => return matches!(&job.subject, Subject::Image { vm: of, .. } if *of == vm),
    };
    let is_met = |theirs: &OverlaidDisk| {
        let same_base = disks.iter().filter(|ours| ours.base == theirs.base);
        let mut common = same_base
            .flat_map(|ours| &ours.overlays)
            .filter(|path| theirs.overlays.contains(path));
        common.any(|overlay| snapshot::may_be_of(overlay, job.updated))
    };
    overlays.act == SnapshotAct::Commit && !overlays.reads_only && overlays.disks.iter().any(is_met)
}

/// What a job does, from the beginning.
pub(super) fn free(
    daemon: &Daemon,
    at_work: &AtWork<'_>,
    job: &JobRecord,
    overlays: &Overlays,
) -> Result<Stint, Problem> {
    daemon.keystore.job_waits(job.id, "")?;
    let came = match overlays.host == machine_id() {
        true => run(daemon, at_work, overlays),
        false => {
            Err(Problem::failed("it was begun on another host").next("begin it again, if the VM is here"))
        }
    };
    let ended = match &came {
        Ok(Came::Through) => daemon.keystore.end_job(job.id, None)?,
        Ok(Came::OnceMore) => return Ok(Stint::Rests(SWITCHED_OFF)),
        // Its row says so.
        Ok(Came::Stopped) => return Ok(Stint::Ended),
        Err(problem) if may_pass(problem) => {
            daemon.keystore.job_waits(job.id, &problem.to_string())?;
            return Ok(Stint::Waits(None));
        }
        Err(problem) => daemon
            .keystore
            .end_job(job.id, Some(&record::problem_to_json(problem)))?,
    };
    let by = overlays.asked_by.map_or(Actor::Virtseald, Actor::User);
    let op = match overlays.act {
        SnapshotAct::Commit => "snapshot-commit",
        SnapshotAct::Delete => "snapshot-delete",
    };
    records::note_vm(
        daemon,
        by,
        op,
        overlays.vm,
        &name_of(daemon, overlays),
        &came.map(drop),
    );
    daemon.glances.expire();
    note_end(&ended);
    Ok(Stint::Ended)
}

fn may_pass(problem: &Problem) -> bool {
    matches!(problem.code, Code::Locked | Code::Unreachable | Code::NotTrusted)
}

fn name_of(daemon: &Daemon, overlays: &Overlays) -> String {
    let known = daemon.keystore.vm(overlays.vm).ok().flatten();
    known.map_or_else(|| overlays.vm.to_string(), |vm| vm.name)
}

fn run(daemon: &Daemon, at_work: &AtWork<'_>, overlays: &Overlays) -> Result<Came, Problem> {
    if overlays.act == SnapshotAct::Delete {
        // It may have been begun before that, and be resumed now.
        let name = name_of(daemon, overlays);
        refuse_half_merged(daemon, overlays.vm, &name, &overlays.disks, overlays.force)?;
    }
    let mut done = 0;
    for disk in &overlays.disks {
        let defined = defined(daemon, overlays)?;
        let came = match (defined.active, overlays.act) {
            (true, SnapshotAct::Commit) => free_running(daemon, at_work, &defined, disk, overlays, done)?,
            (true, SnapshotAct::Delete) => {
                let why = format!("{} is running, and would lose its disk", defined.name);
                return Err(Problem::busy(why).next(Advice::ShutDownVm(defined.name)));
            }
            (false, _) => free_off(daemon, at_work, &defined, disk, overlays, done)?,
        };
        if came != Came::Through {
            return Ok(came);
        }
        done += bytes_of(disk);
    }
    for snapshot in &overlays.snapshots {
        daemon
            .background
            .forget_snapshot(overlays.vm, snapshot)
            .map_err(|error| unreachable(&error))?;
    }
    Ok(Came::Through)
}

fn defined(daemon: &Daemon, overlays: &Overlays) -> Result<DefinedDomain, Problem> {
    let found = daemon.background.domain(&overlays.vm.to_string());
    found.map_err(|error| unreachable(&error))?.ok_or_else(|| {
        Problem::not_found(format!("VM {} is not defined here", overlays.vm)).next(Advice::DefineXml)
    })
}

fn bytes_of(disk: &OverlaidDisk) -> u64 {
    let lengths = disk
        .overlays
        .iter()
        .filter_map(|path| path.symlink_metadata().ok());
    lengths.map(|found| found.len()).sum()
}

/// The disk as it is now, if it is what the job was begun for.
fn find(host: &Host<'_>, xml: &str, name: &str, disk: &OverlaidDisk) -> Result<Overlaid, Problem> {
    let domain = Domain::parse(xml).map_err(|error| Problem::failed(format!("{name}: {}", chain(&error))))?;
    let found = snapshot::find(host, &domain).map_err(|failure| failure.of(name))?;
    let found = found.into_iter().find(|found| found.paths() == *disk);
    found.ok_or_else(|| disk.changed(name))
}

fn free_off(
    daemon: &Daemon,
    at_work: &AtWork<'_>,
    defined: &DefinedDomain,
    disk: &OverlaidDisk,
    overlays: &Overlays,
    before: u64,
) -> Result<Came, Problem> {
    let name = &defined.name;
    match disk.standing(&defined.xml)? {
        Standing::Overlaid => {}
        Standing::Bare => return remove_left(daemon, disk, overlays),
        Standing::Other => return Err(disk.changed(name)),
    }
    let of_disk = |failure: Problem| failure.of(format!("{name}: disk {}", disk.target));
    let host = daemon.host_of_vms()?;
    let found = find(&host, &defined.xml, name, disk)?;
    let held = HeldDisk::take(&host, &found).map_err(of_disk)?;
    if overlays.act == SnapshotAct::Commit {
        let watch = |done| {
            at_work.note(before + done);
            go_on(at_work)
        };
        let asked = disk.asked(&daemon.host_store, overlays.vm)?;
        let is_known = overlays.force || asked.is_none() && !overlays.reads_only;
        let came = match is_known {
            true => held.merge(&host, &found, watch).map_err(of_disk)?,
            false => held.compare(&host, &found, watch).map_err(|failure| {
                tracing::warn!(domain = name, "disk {}: {failure}", disk.target);
                disk.not_known(name, asked)
            })?,
        };
        if came.is_break() {
            return Ok(Came::Stopped);
        }
    }
    redefine(daemon, disk, &found, name)?;
    daemon.host_store.forget_pivots(overlays.vm, &disk.base)?;
    if !overlays.keep {
        held.remove_overlays()?;
    }
    Ok(Came::Through)
}

fn go_on(at_work: &AtWork<'_>) -> ControlFlow<()> {
    match at_work.is_stopped() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// Gives the VM its sealed image in the XML of its next start.
fn redefine(daemon: &Daemon, disk: &OverlaidDisk, found: &Overlaid, name: &str) -> Result<(), Problem> {
    let vm = found.record.envelope.vm;
    let _claim = daemon.claims.vm(vm, name, Doing::Overlays)?;
    let now = daemon
        .background
        .domain(&vm.to_string())
        .map_err(|error| unreachable(&error))?;
    let now = now.ok_or_else(|| disk.changed(name))?;
    match disk.standing(&now.xml)? {
        Standing::Bare => return Ok(()),
        Standing::Other => return Err(disk.changed(name)),
        Standing::Overlaid => {}
    }
    let xml = snapshot::bare(&now.xml, found)?;
    daemon.background.define(&xml).map_err(|error| {
        not_redefined(name, &error)
            .next(Advice::CommitSnapshot(name.to_owned()).within("it goes on from here"))
    })
}

/// An earlier try has died after it had redefined the domain, or libvirt was asked directly. What the VM's sealed image does not need
/// any more is removed where nobody has it open and nothing else names it.
fn remove_left(daemon: &Daemon, disk: &OverlaidDisk, overlays: &Overlays) -> Result<Came, Problem> {
    daemon.host_store.forget_pivots(overlays.vm, &disk.base)?;
    if overlays.keep {
        return Ok(Came::Through);
    }
    let host = daemon.host_of_vms()?;
    let mut held = Vec::new();
    for path in &disk.overlays {
        if let Some(overlay) = off::hold_left(&host, overlays.vm, path, &disk.base)? {
            held.push(overlay);
        }
    }
    off::remove(held)?;
    Ok(Came::Through)
}

fn free_running(
    daemon: &Daemon,
    at_work: &AtWork<'_>,
    defined: &DefinedDomain,
    disk: &OverlaidDisk,
    overlays: &Overlays,
    before: u64,
) -> Result<Came, Problem> {
    let name = &defined.name;
    let seen = daemon
        .background
        .as_it_runs(defined.vm)
        .map_err(|error| unreachable(&error))?;
    let Some(seen) = seen else {
        return Ok(Came::OnceMore);
    };
    let host = daemon.host_of_vms()?;
    let found = match disk.standing(&seen.live)? {
        Standing::Overlaid => Some(find(&host, &seen.live, name, disk)?),
        Standing::Bare => None,
        Standing::Other => return Err(disk.changed(name)),
    };
    if let Some(found) = found.as_ref().filter(|found| off::has_base_alone(found)) {
        // libvirtd has died between its request and QEMU's answer. What was written since is in the sealed image, and the overlays
        // are as they were: they stay, and must never be merged again.
        tracing::warn!(
            domain = name,
            "QEMU has disk {} merged already, and libvirt does not know it",
            disk.target
        );
        redefine(daemon, disk, found, name)?;
        daemon.host_store.forget_pivots(overlays.vm, &disk.base)?;
        return Ok(Came::Through);
    }
    let whole = bytes_of(disk);
    let note = || -> Result<(), Problem> {
        let top = disk.overlays.first().ok_or_else(|| disk.changed(name))?;
        Ok(daemon.host_store.note_pivot(overlays.vm, &disk.base, top)?)
    };
    let asked = disk.asked(&daemon.host_store, overlays.vm)?;
    let ended = running::merge(&daemon.background, defined.vm, name, disk, note, |job| {
        if let Some(job) = job {
            let part = job.done as f64 / job.total.max(1) as f64;
            at_work.note(before + ((part * whole as f64) as u64).min(whole));
        }
        go_on(at_work)
    })?;
    match ended {
        Ended::Stopped => return Ok(Came::Stopped),
        Ended::PoweredOff => return Ok(Came::OnceMore),
        Ended::Merged => {}
    }
    // QEMU is believed about what it has open. An earlier try that had it merge has died before the next start knew that too; where none
    // had, the VM may run without what the overlays hold.
    let was_merged = asked.is_some();
    let next = seen.next.as_deref();
    let found = match (found, next.map(|next| disk.standing(next)).transpose()?) {
        (Some(found), _) => found,
        (None, None | Some(Standing::Bare)) => return remove_left(daemon, disk, overlays),
        (None, Some(Standing::Overlaid)) if was_merged => find(&host, next.unwrap_or_default(), name, disk)?,
        (None, Some(Standing::Overlaid | Standing::Other)) => return Err(disk.changed(name)),
    };
    let free = off::hold_overlays(&found).map_err(|failure| failure.of(name))?;
    if seen.next.is_some() {
        redefine(daemon, disk, &found, name)?;
    }
    daemon.host_store.forget_pivots(overlays.vm, &disk.base)?;
    if !overlays.keep {
        off::remove(free)?;
    }
    Ok(Came::Through)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{SystemTime, UNIX_EPOCH};

    use super::*;
    use crate::model::job::JobId;
    use crate::store::Pass;

    fn disk(base: &str, overlays: &[&PathBuf]) -> OverlaidDisk {
        OverlaidDisk {
            target: "vda".to_owned(),
            base: base.into(),
            overlays: overlays.iter().copied().cloned().collect(),
        }
    }

    fn job(act: SnapshotAct, state: JobState, disk: &OverlaidDisk, updated: i64) -> JobRecord {
        let work = Work::Overlays(Overlays {
            vm: VmId(uuid::Uuid::from_u128(1)),
            act,
            keep: false,
            force: false,
            reads_only: false,
            disks: vec![disk.clone()],
            snapshots: Vec::new(),
            asked_by: None,
            host: None,
        });
        JobRecord {
            id: JobId(1),
            subject: work.subject(),
            task: work.to_json(),
            state,
            pass: Pass::All,
            cursor: String::new(),
            total: 0,
            seen: 0,
            changed: 0,
            left: 0,
            waiting: String::new(),
            failure: String::new(),
            created: 0,
            updated,
        }
    }

    #[test]
    fn a_commit_that_was_begun_is_remembered_as_long_as_an_overlay_of_it_is_there() {
        use SnapshotAct::{Commit, Delete};
        let vm = VmId(uuid::Uuid::from_u128(1));
        let has_begun = |job: &JobRecord, disks: &[OverlaidDisk]| has_begun(job, vm, disks);
        let directory = tempfile::tempdir().unwrap();
        let [first, second] = ["s1", "s2"].map(|name| directory.path().join(name));
        std::fs::write(&first, "").unwrap();
        std::fs::write(&second, "").unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64 + 60;
        let begun = disk("/b", &[&first]);
        // Another snapshot was made on top since.
        let ours = [disk("/c", &[]), disk("/b", &[&second, &first])];
        for state in [
            JobState::Running,
            JobState::Aborted,
            JobState::Failed,
            JobState::Incomplete,
        ] {
            assert!(has_begun(&job(Commit, state, &begun, now), &ours), "{state:?}");
        }
        assert!(!has_begun(&job(Commit, JobState::Done, &begun, now), &ours));
        assert!(!has_begun(&job(Delete, JobState::Aborted, &begun, now), &ours));
        let aborted = |disk: &OverlaidDisk, updated| job(Commit, JobState::Aborted, disk, updated);
        assert!(!has_begun(&aborted(&disk("/other", &[&first]), now), &ours));
        assert!(!has_begun(&aborted(&begun, now), &[disk("/b", &[&second])]));
        // A later virtseald has written it.
        let mut later = job(Commit, JobState::Aborted, &begun, now);
        later.task = r#"{"kind":"overlays","later":1}"#.to_owned();
        assert!(has_begun(&later, &ours));
        assert!(!super::has_begun(&later, VmId::random(), &ours));
        // Another file has the name by now.
        if first.metadata().unwrap().created().is_ok() {
            assert!(!has_begun(&aborted(&begun, 1000), &ours));
        }
    }
}

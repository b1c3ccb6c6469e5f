//! Jobs that free VMs of the plain overlays on their disks.
//!
//! A job goes disk by disk, by the way that fits how the VM is then: it may be switched off or on between two tries. Whatever it finds
//! done it does not do again, so it is killed anywhere, and begins again from the beginning.

mod earlier;

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
use crate::model::job::SnapshotAct;
use crate::model::problem::{Code, Problem, chain};
use crate::store::{JobRecord, NewJob, PivotBy};
use crate::vm::host::Host;
use crate::vm::names::{not_redefined, unreachable};
use crate::vm::seal::NewObject;
use crate::vm::snapshot::off::{self, HeldDisk};
use crate::vm::snapshot::running::{self, Ended};
use crate::vm::snapshot::{self, Choices, Overlaid, OverlaidDisk, OverlayPlan, Standing};
use earlier::{is_doubtful, refuse_half_merged};

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
        let pivot = disk.pivot(&daemon.host_store, overlays.vm)?;
        let is_known = overlays.force || pivot.is_none() && !overlays.reads_only;
        let came = match is_known {
            true => held.merge(&host, &found, watch).map_err(of_disk)?,
            false => held.compare(&host, &found, watch).map_err(|failure| {
                tracing::warn!(domain = name, "disk {}: {failure}", disk.target);
                disk.not_known(name, pivot)
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
    let note = || disk.note_pivot(&daemon.host_store, overlays.vm, PivotBy::Virtseald);
    let pivot = disk.pivot(&daemon.host_store, overlays.vm)?;
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
    let was_merged = pivot.is_some_and(|pivot| pivot.by == PivotBy::Virtseald);
    let next = seen.next.as_deref();
    let found = match (found, next.map(|next| disk.standing(next)).transpose()?) {
        (Some(found), _) => found,
        (None, None | Some(Standing::Bare)) => return remove_left(daemon, disk, overlays),
        (None, Some(Standing::Overlaid)) if was_merged => find(&host, next.unwrap_or_default(), name, disk)?,
        (None, Some(Standing::Overlaid)) => {
            return Err(disk.runs_without(&daemon.host_store, overlays.vm, name));
        }
        (None, Some(Standing::Other)) => return Err(disk.changed(name)),
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

//! The making of images, at once or by a job.
//!
//! The envelope is in the keystore, as pending, before the image is begun, and is found there again by the VM and the path: so a
//! job that begins again after a restart goes on with the one that it had. An image gets its name last, complete and opened with
//! its key: one at that path that carries this envelope, and opens, is what the job was to make.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::job_records::{note_end, refuse_beside_another};
use super::locks::Doing;
use super::{Daemon, lock, records};
use crate::audit::Actor;
use crate::host::permitted::PermittedPath;
use crate::host::process::machine_id;
use crate::job::live::{AtWork, Stint};
use crate::job::record::{self, NewVolume};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ObjectKind, VmId};
use crate::model::job::{JobState, Subject};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, Bytes, ClusterSize, CreateRequest, Heard, VolumeError};
use crate::store::{EnvelopeState, JobRecord};
use crate::vm::forget::{self, Dropped};
use crate::vm::forgotten::Said;
use crate::vm::seal::{Leftover, NewObject};

/// Whether it could be made now, as far as that can be seen without a key. Returns how much there is to be copied.
pub(super) fn check_again(volume: &NewVolume) -> Result<Bytes, Problem> {
    let create = request_of(volume)?;
    // Nobody should get an envelope for an image that can't be made.
    refuse_existing(&create.path)?;
    refuse_without_directory(&create.path)?;
    Ok(disk::source_size(&create, Path::new(&volume.from))?)
}

/// What a job does, from the beginning: what an earlier try had begun has no name, and is gone.
pub(super) fn make(
    daemon: &Daemon,
    at_work: &AtWork<'_>,
    job: &JobRecord,
    volume: &NewVolume,
) -> Result<Stint, Problem> {
    let wait = |problem: &Problem| -> Result<Stint, Problem> {
        daemon.keystore.job_waits(job.id, &problem.to_string())?;
        Ok(Stint::Waits(None))
    };
    let claim = match claim(daemon, &volume.path) {
        Ok(claim) => claim,
        Err(busy) => return wait(&busy),
    };
    // Whoever aborts a job that is not at work takes back what it had, so none may begin after that.
    let now = daemon.keystore.job(job.id)?;
    if now.as_ref().map(|job| job.state) != Some(JobState::Running) {
        drop(claim);
        now.iter().for_each(|job| take_back_aborted(daemon, job));
        return Ok(Stint::Ended);
    }
    if volume.host != machine_id() {
        // Its envelope stays: the other host may have the image.
        let problem = Problem::failed(format!("{} was to be made on another host", volume.path))
            .next("create the volume again, with the same options, if it is to be made here");
        let why = record::problem_to_json(&problem);
        note_end(&daemon.keystore.end_job(job.id, Some(&why))?);
        return Ok(Stint::Ended);
    }
    daemon.keystore.job_waits(job.id, "")?;
    let provider = volume.provider.map(|id| id.to_string());
    let object = match envelope(daemon, volume.vm, &volume.path, provider.as_deref()) {
        Ok(object) => object,
        // It goes on when that is mended.
        Err(problem) => return wait(&problem),
    };
    let is_first = at_work.begins_first() || object.is_new;
    let made = fill(at_work, job, volume, &object);
    let by = volume.asked_by.map_or(Actor::Virtseald, Actor::User);
    records::note_command(daemon, by, "volume-create", &volume.path, &made);
    let ended = match made {
        Ok(()) => {
            daemon.keystore.activate(object.envelope.id)?;
            // A sweep may have changed it meanwhile.
            daemon.copies_bell.ring();
            daemon.keystore.end_job(job.id, None)?
        }
        Err(problem) => {
            let path = Path::new(&volume.path);
            take_back(daemon, &object.envelope, path, left_by(is_first));
            let why = record::problem_to_json(&problem);
            daemon.keystore.end_job(job.id, Some(&why))?
        }
    };
    daemon.glances.expire();
    note_end(&ended);
    Ok(Stint::Ended)
}

fn fill(
    at_work: &AtWork<'_>,
    job: &JobRecord,
    volume: &NewVolume,
    object: &NewObject,
) -> Result<(), Problem> {
    let create = request_of(volume)?;
    let passphrase = object.passphrase()?;
    let place = PermittedPath::named_by_root(&create.path)
        .map_err(|error| VolumeError::unreachable(&create.path, error))?;
    if place.exists() {
        let carries_it = disk::inspect(&place)?
            .envelope
            .is_some_and(|found| found.id == object.envelope.id);
        if carries_it && disk::open(&place, &passphrase).is_ok() {
            return Ok(());
        }
        return Err(VolumeError::Exists(create.path).into());
    }
    // Where a file can't be without a name, one that a killed virtseald has left is in the way of its space.
    if let Err(error) = disk::sweep_temporaries(&place) {
        tracing::warn!("{}", chain(&error));
    }
    let mut noted = None;
    disk::create_from(
        &create,
        Path::new(&volume.from),
        &object.envelope,
        &passphrase,
        |heard| {
            match heard {
                Heard::Done(percent) => {
                    let done = (f64::from(percent.0) / 100.0 * job.total as f64) as u64;
                    if noted.replace(done) != Some(done) {
                        at_work.note(done);
                    }
                }
                Heard::Stuck(pid) => {
                    at_work.note_stuck(&format!("qemu-img (process {pid}), which is stuck in storage"));
                }
            }
            match at_work.is_stopped() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        },
    )?;
    Ok(())
}

/// The pending envelope for an image: that of an earlier try, or a new one. Filling takes minutes, this does not: only this
/// excludes others.
pub(super) fn envelope(
    daemon: &Daemon,
    vm: VmId,
    path: &str,
    provider: Option<&str>,
) -> Result<NewObject, Problem> {
    let _claim = daemon.claims.vm(vm, &format!("VM {vm}"), Doing::Volume)?;
    NewObject::find_or_make(
        &daemon.host(),
        vm,
        ObjectKind::Disk,
        path,
        provider,
        Leftover::Any,
    )
}

/// Who has made the envelope of an image that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeftBy {
    /// This very try, so nothing can be encrypted with it.
    This,
    /// An earlier one, which may have died. Whether that one had made the image nobody knows, and that nothing is there now
    /// proves nothing.
    Another,
}

pub(super) fn left_by(is_new: bool) -> LeftBy {
    if is_new { LeftBy::This } else { LeftBy::Another }
}

/// Takes an envelope back whose image was not made, so that no job and no provider has to count with it; where an earlier try
/// has left it, it is kept aside first. What can't be known for sure leaves it: a key too many is better than one too few.
pub(super) fn take_back(daemon: &Daemon, envelope: &Envelope, path: &Path, left_by: LeftBy) {
    let (id, vm) = (envelope.id, envelope.vm);
    let name = vm.to_string();
    // Before the VM is claimed, because storage may not answer; nobody else makes an image there meanwhile.
    let is_absent = path
        .symlink_metadata()
        .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    let _claim = match daemon.claims.vm(vm, &name, Doing::Volume) {
        Ok(claim) => claim,
        Err(busy) => return tracing::warn!(path = %path.display(), "its envelope stays pending: {busy}"),
    };
    let Ok(Some(record)) = daemon.keystore.envelope(id) else {
        return;
    };
    if !is_absent || record.state != EnvelopeState::Pending {
        return;
    }
    let taken = match left_by {
        LeftBy::This => daemon.keystore.withdraw(id).map(drop).map_err(Problem::from),
        LeftBy::Another => {
            let dropped = Dropped {
                said: Said::Elsewhere,
                records: std::slice::from_ref(&record),
                damaged: Vec::new(),
            };
            forget::keep_aside(daemon.keystore.as_ref(), &daemon.host_store, vm, &name, dropped)
                .and_then(|_kept| Ok(daemon.keystore.forget_envelope(&record).map(drop)?))
        }
    };
    if let Err(problem) = taken {
        tracing::warn!(path = %path.display(), "its envelope stays pending: {problem}");
    }
}

/// Takes back what a job has begun that was aborted while it waited, unless somebody makes that image meanwhile.
pub(super) fn take_back_unmade(daemon: &Daemon, subject: &Subject) {
    let Subject::Image { vm, path } = subject else {
        return;
    };
    let Ok(_claim) = claim(daemon, path) else { return };
    if refuse_beside_another(daemon, subject).is_err() {
        return;
    }
    let known = daemon.keystore.envelopes_of(*vm).map(|rows| rows.sound);
    let pending = known.unwrap_or_default().into_iter().rfind(|record| {
        record.envelope.kind == ObjectKind::Disk
            && record.location == *path
            && record.state == EnvelopeState::Pending
    });
    if let Some(record) = pending {
        take_back(daemon, &record.envelope, Path::new(path), LeftBy::Another);
    }
}

/// The same where it was about to go to work: who aborted it saw it there, and left this to it.
pub(super) fn take_back_aborted(daemon: &Daemon, job: &JobRecord) {
    if job.state == JobState::Aborted {
        take_back_unmade(daemon, &job.subject);
    }
}

/// An image that is being made here, or taken back, until this is dropped.
pub(super) struct Claim<'a> {
    making: &'a Mutex<BTreeSet<String>>,
    path: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(self.making).remove(&self.path);
    }
}

/// Two that make one image would share its envelope, and the one that fails would withdraw it.
pub(super) fn claim<'a>(daemon: &'a Daemon, path: &str) -> Result<Claim<'a>, Problem> {
    if !lock(&daemon.making).insert(path.to_owned()) {
        return Err(Problem::busy(format!("{path} is being made"))
            .next(Advice::ShowVolume(path.into()).note("when that is done")));
    }
    Ok(Claim {
        making: &daemon.making,
        path: path.to_owned(),
    })
}

/// Unless a job makes it, also one that is not at work now.
pub(super) fn claim_alone<'a>(
    daemon: &'a Daemon,
    subject: &Subject,
    path: &str,
) -> Result<Claim<'a>, Problem> {
    let claim = claim(daemon, path);
    refuse_beside_another(daemon, subject)?;
    claim
}

pub(super) fn refuse_existing(path: &Path) -> Result<(), Problem> {
    match path.symlink_metadata() {
        Ok(_) => Err(VolumeError::Exists(path.to_owned()).into()),
        Err(_) => Ok(()),
    }
}

/// A job that could only fail would be the first to say so, and would say it of the image.
fn refuse_without_directory(path: &Path) -> Result<(), Problem> {
    let directory = path.parent().unwrap_or(path);
    match directory.metadata().map(|found| found.is_dir()) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Problem::failed(format!(
            "{} is not a directory",
            directory.display()
        ))),
        Err(error) => Err(VolumeError::unreachable(directory, error).into()),
    }
}

fn request_of(volume: &NewVolume) -> Result<CreateRequest, Problem> {
    Ok(CreateRequest {
        source_format: volume.from_format,
        source_digest: volume.digest.clone(),
        ..create_request(&volume.path, volume.size, volume.cluster_size)?
    })
}

pub(super) fn create_request(
    path: &str,
    size: Option<u64>,
    cluster_size: Option<u64>,
) -> Result<CreateRequest, Problem> {
    let cluster_size = cluster_size.map(|bytes| ClusterSize::try_from(Bytes(bytes)));
    Ok(CreateRequest {
        path: PathBuf::from(path),
        size: size.map(Bytes),
        cluster_size: cluster_size
            .transpose()
            .map_err(|error| Problem::usage(chain(&error)))?
            .unwrap_or_default(),
        backing: None,
        source_format: None,
        source_digest: None,
    })
}

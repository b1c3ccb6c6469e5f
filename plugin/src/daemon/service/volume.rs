//! What `virtseal volume create` asks for: an empty volume at once, one with the data of another image by a job.
//!
//! The envelope is in the keystore, as pending, before the image is begun, and is found there again by the VM and the path: so a
//! job that begins again after a restart goes on with the one that it had. An image gets its name last, complete and opened with
//! its key: one at that path that carries this envelope, and opens, is what the job was to make.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::job;
use crate::api::{JobState, Outcome, VolumeCreated, VolumeRequest};
use crate::audit::Actor;
use crate::daemon::{Daemon, jobs, lock, records};
use crate::domain::{DeclaredFormat, Disk, Domain};
use crate::host::permitted::PermittedPath;
use crate::host::process::machine_id;
use crate::job::live::{AtWork, Stint};
use crate::job::record::{self, NewVolume, Work};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::job::Subject;
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{
    self, Backing, BackingFormat, Bytes, ClusterSize, CreateRequest, Declaration, VolumeError,
};
use crate::store::{EnvelopeState, JobRecord, NewJob};
use crate::vm::seal::NewObject;
use crate::vm::share::{self, Sharing};
use crate::vm::{forget, names};

/// Makes an encrypted volume; with `from`, starts the job that does.
pub(super) fn create(daemon: &Daemon, by: Actor, request: &VolumeRequest) -> Result<VolumeCreated, Problem> {
    let created = match &request.from {
        Some(from) => start(daemon, by, request, from),
        None => create_empty(daemon, by, request),
    };
    if let (Err(_), Some(_)) = (&created, &request.from) {
        records::note_command(daemon, by, "volume-create", &request.path, &created);
    }
    created
}

/// Lets a VM have the volume at `path`, or no longer. It needs not be defined.
pub(super) fn share(
    daemon: &Daemon,
    by: Actor,
    path: &str,
    vm: &str,
    sharing: Sharing,
) -> Result<Outcome, Problem> {
    let sealing = lock(&daemon.sealing);
    let shared = share::share(&daemon.host(), Path::new(path), vm, sharing);
    drop(sealing);
    let op = match sharing {
        Sharing::With => "volume-share",
        Sharing::Without => "volume-unshare",
    };
    records::note_command(daemon, by, op, &format!("{path} {vm}"), &shared);
    daemon.copies_bell.ring();
    shared
}

fn create_empty(daemon: &Daemon, by: Actor, request: &VolumeRequest) -> Result<VolumeCreated, Problem> {
    let made = make_empty(daemon, request);
    // Each is a sync of its own: made side by side, they cost one.
    let activated = std::thread::scope(|scope| {
        let id = made.as_ref().ok().map(|(id, _)| *id);
        let activating = id.map(|id| scope.spawn(move || daemon.keystore.activate(id)));
        records::note_command(daemon, by, "volume-create", &request.path, &made);
        activating.map(std::thread::ScopedJoinHandle::join)
    });
    let (id, size) = made?;
    match activated {
        Some(Ok(activated)) => activated.map(drop)?,
        // The envelope stays pending, which opens the image all the same; the first start activates it.
        Some(Err(_)) | None => {
            tracing::error!(path = request.path, "the envelope could not be activated");
        }
    }
    // A job may have changed it meanwhile.
    daemon.copies_bell.ring();
    Ok(VolumeCreated {
        job: None,
        envelope: Some(id.to_string()),
        size: Some(size.0),
    })
}

/// Leaves the envelope pending.
fn make_empty(daemon: &Daemon, request: &VolumeRequest) -> Result<(EnvelopeId, Bytes), Problem> {
    let vm = names::vm_id(&daemon.background, &request.vm)?;
    let create = CreateRequest {
        backing: request
            .backing
            .as_ref()
            .map(|path| backing(path, request.backing_format.as_deref()))
            .transpose()?,
        ..create_request(&request.path, request.size, request.cluster_size, None)?
    };
    refuse_existing(&create.path)?;
    let path = request.path.clone();
    let _claim = claim_alone(daemon, &Subject::Image { vm, path }, &request.path)?;
    let provider = request.provider.as_deref();
    let object = envelope(daemon, vm, &request.path, provider)?;
    let made = object
        .passphrase()
        .and_then(|passphrase| Ok(disk::create(&create, &object.envelope, &passphrase)?));
    if made.is_err() {
        take_back(daemon, &object.envelope, &create.path, left_by(object.is_new));
    }
    Ok((object.envelope.id, made?.size))
}

/// What can be refused is refused here, before there is a job.
fn start(daemon: &Daemon, by: Actor, request: &VolumeRequest, from: &str) -> Result<VolumeCreated, Problem> {
    let vm = names::vm_id(&daemon.background, &request.vm)?;
    let stated = request.from_format.as_deref().map(source_format).transpose()?;
    let from_format = match stated {
        Some(format) => Some(format),
        None => declared_format(daemon, Path::new(from))?,
    };
    let provider = request.provider.as_deref();
    let volume = NewVolume {
        vm,
        path: request.path.clone(),
        from: from.to_owned(),
        from_format,
        size: request.size,
        cluster_size: request.cluster_size,
        provider: provider
            .map(|name| daemon.recipients.find(name))
            .transpose()?
            .map(|provider| provider.provider().id()),
        asked_by: match by {
            Actor::User(uid) => Some(uid),
            Actor::Virtseald => None,
        },
        host: machine_id(),
    };
    let total = check_again(&volume)?;
    let work = Work::CreateVolume(volume);
    let subject = work.subject();
    let _claim = claim_alone(daemon, &subject, &request.path)?;
    let object = envelope(daemon, vm, &request.path, provider)?;
    let new = NewJob {
        subject: &subject,
        task: &work.to_json(),
        total: total.0,
        left: &[],
    };
    let inserted = daemon
        .keystore
        .insert_job(&new)
        .map_err(|error| job::excluded(error, &subject));
    if inserted.is_err() {
        let path = Path::new(&request.path);
        take_back(daemon, &object.envelope, path, left_by(object.is_new));
    }
    records::note_command(
        daemon,
        by,
        "job-start",
        &work.words(|id| daemon.recipients.name_of(id)),
        &inserted,
    );
    let job = inserted?;
    if object.is_new {
        daemon.jobs.started(job.id);
    }
    daemon.jobs.ring();
    Ok(VolumeCreated {
        job: Some(jobs::view(daemon, &job)?),
        envelope: None,
        size: None,
    })
}

/// Whether it could be made now, as far as that can be seen without a key. Returns how much there is to be copied.
pub(super) fn check_again(volume: &NewVolume) -> Result<Bytes, Problem> {
    let create = request_of(volume)?;
    // Nobody should get an envelope for an image that can't be made.
    refuse_existing(&create.path)?;
    Ok(disk::source_size(&create, Path::new(&volume.from))?)
}

/// What a job does, from the beginning: what an earlier try had begun has no name, and is gone.
pub(in crate::daemon) fn make(
    daemon: &Daemon,
    at_work: &AtWork<'_>,
    job: &JobRecord,
    volume: &NewVolume,
) -> Result<Stint, Problem> {
    let wait = |problem: &Problem| -> Result<Stint, Problem> {
        daemon.keystore.job_waits(job.id, &problem.to_string())?;
        Ok(Stint::Waits(None))
    };
    let _claim = match claim(daemon, &volume.path) {
        Ok(claim) => claim,
        Err(busy) => return wait(&busy),
    };
    // Whoever aborts a job that is not at work takes back what it had, so none may begin after that.
    let state = daemon.keystore.job(job.id)?.map(|job| job.state);
    if state != Some(JobState::Running) {
        return Ok(Stint::Ended);
    }
    if volume.host != machine_id() {
        // Its envelope stays: the other host may have the image.
        let problem = Problem::new(
            Code::Failed,
            format!("{} was to be made on another host", volume.path),
        )
        .next("create the volume again, with the same options, if it is to be made here");
        let why = record::problem_to_json(&problem);
        jobs::note_end(&daemon.keystore.end_job(job.id, Some(&why))?);
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
    jobs::note_end(&ended);
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
        if carries_it && disk::verify(&place, &passphrase).is_ok() {
            return Ok(());
        }
        return Err(VolumeError::Exists(create.path).into());
    }
    // Where a file can't be without a name, one that a killed virtseald has left is in the way of its space.
    if let Err(error) = disk::sweep_temporaries(&place) {
        tracing::warn!("{}", chain(&error));
    }
    disk::create_from(
        &create,
        Path::new(&volume.from),
        &object.envelope,
        &passphrase,
        |percent| {
            at_work.note((f64::from(percent.0) / 100.0 * job.total as f64) as u64);
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
fn envelope(daemon: &Daemon, vm: VmId, path: &str, provider: Option<&str>) -> Result<NewObject, Problem> {
    let _sealing = daemon.sealing.of(vm);
    NewObject::find_or_make(&daemon.host(), vm, ObjectKind::Disk, path, provider)
}

/// Who has made the envelope of an image that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LeftBy {
    /// This very try, so nothing can be encrypted with it.
    This,
    /// An earlier one, which may have died. Whether that one had made the image nobody knows, and that nothing is there now
    /// proves nothing.
    Another,
}

fn left_by(is_new: bool) -> LeftBy {
    if is_new { LeftBy::This } else { LeftBy::Another }
}

/// Takes an envelope back whose image was not made, so that no job and no provider has to count with it; where an earlier try
/// has left it, it is kept aside first. What can't be known for sure leaves it: a key too many is better than one too few.
fn take_back(daemon: &Daemon, envelope: &Envelope, path: &Path, left_by: LeftBy) {
    let (id, vm) = (envelope.id, envelope.vm);
    let _sealing = daemon.sealing.of(vm);
    let is_absent = path
        .symlink_metadata()
        .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    let Ok(Some(record)) = daemon.keystore.envelope(id) else {
        return;
    };
    if !is_absent || record.state != EnvelopeState::Pending {
        return;
    }
    let taken = match left_by {
        LeftBy::This => daemon.keystore.withdraw(id).map(drop).map_err(Problem::from),
        LeftBy::Another => {
            let (name, records) = (vm.to_string(), std::slice::from_ref(&record));
            forget::keep_aside(daemon.keystore.as_ref(), &daemon.host_store, vm, &name, records)
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
    if job::refuse_beside_another(daemon, subject).is_err() {
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

/// The format that a VM declares for this image. A guest may have written another one's header into a raw disk.
fn declared_format(daemon: &Daemon, image: &Path) -> Result<Option<DeclaredFormat>, Problem> {
    // Without libvirt nobody has declared anything.
    let domains = daemon.background.domains().unwrap_or_default();
    let is_it = |disk: &&Disk| disk.source.path().is_some_and(|path| is_same_file(path, image));
    let declared = domains.iter().find_map(|defined| {
        let domain = Domain::parse(&defined.xml).ok()?;
        let format = domain.disks.iter().find(is_it)?.declared_format().ok()?;
        Some((defined.name.clone(), format))
    });
    let Some((vm, format)) = declared else {
        return Ok(None);
    };
    let place =
        PermittedPath::named_by_root(image).map_err(|source| VolumeError::unreachable(image, source))?;
    disk::inspect_declared(&place, Declaration::Stated(format)).map_err(|error| match error {
        contradiction @ VolumeError::Contradiction { .. } => Problem::new(
            Code::Failed,
            format!("{contradiction}: VM {vm} has it as {format}"),
        )
        .next(Advice::ShowVolume(image.to_owned()).also(format!(
            "if {vm} is right, repeat this with --from-format {format}"
        ))),
        error => error.into(),
    })?;
    Ok(Some(format))
}

/// An image that is being made here, or taken back, until this is dropped.
struct Claim<'a> {
    making: &'a Mutex<BTreeSet<String>>,
    path: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(self.making).remove(&self.path);
    }
}

/// Two that make one image would share its envelope, and the one that fails would withdraw it.
fn claim<'a>(daemon: &'a Daemon, path: &str) -> Result<Claim<'a>, Problem> {
    if !lock(&daemon.making).insert(path.to_owned()) {
        return Err(Problem::new(Code::Busy, format!("{path} is being made"))
            .next(Advice::ShowVolume(path.into()).note("when that is done")));
    }
    Ok(Claim {
        making: &daemon.making,
        path: path.to_owned(),
    })
}

/// Unless a job makes it, also one that is not at work now.
fn claim_alone<'a>(daemon: &'a Daemon, subject: &Subject, path: &str) -> Result<Claim<'a>, Problem> {
    let claim = claim(daemon, path);
    job::refuse_beside_another(daemon, subject)?;
    claim
}

fn refuse_existing(path: &Path) -> Result<(), Problem> {
    match path.symlink_metadata() {
        Ok(_) => Err(VolumeError::Exists(path.to_owned()).into()),
        Err(_) => Ok(()),
    }
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn source_format(format: &str) -> Result<DeclaredFormat, Problem> {
    format.parse().map_err(|()| {
        Problem::new(
            Code::Usage,
            format!("'{format}' is not a format that can be read"),
        )
        .next("give --from-format raw or --from-format qcow2")
    })
}

fn request_of(volume: &NewVolume) -> Result<CreateRequest, Problem> {
    create_request(&volume.path, volume.size, volume.cluster_size, volume.from_format)
}

fn create_request(
    path: &str,
    size: Option<u64>,
    cluster_size: Option<u64>,
    source_format: Option<DeclaredFormat>,
) -> Result<CreateRequest, Problem> {
    let cluster_size = cluster_size.map(|bytes| ClusterSize::try_from(Bytes(bytes)));
    Ok(CreateRequest {
        path: PathBuf::from(path),
        size: size.map(Bytes),
        cluster_size: cluster_size
            .transpose()
            .map_err(|error| Problem::new(Code::Usage, chain(&error)))?
            .unwrap_or_default(),
        backing: None,
        source_format,
    })
}

fn backing(path: &str, format: Option<&str>) -> Result<Backing, Problem> {
    let format = match format {
        Some("qcow2") => BackingFormat::Qcow2,
        Some("raw") => BackingFormat::Raw,
        _ => {
            return Err(Problem::new(
                Code::Usage,
                format!("the format of the backing image {path} must be said"),
            )
            .next("add --backing-format qcow2 or --backing-format raw"));
        }
    };
    Ok(Backing {
        path: path.into(),
        format,
    })
}

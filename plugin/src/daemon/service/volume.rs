//! What `virtseal volume create` asks for: an empty volume at once, one with the data of another image by a job.

use std::path::Path;

use crate::api::{Outcome, VolumeChecked, VolumeCreated, VolumeRequest};
use crate::audit::Actor;
use crate::daemon::locks::Doing;
use crate::daemon::volumes::{
    check_again, claim_alone, create_request, envelope, left_by, refuse_existing, take_back,
};
use crate::daemon::{Daemon, job_records, records};
use crate::domain::{DeclaredFormat, Disk, Domain, names_path};
use crate::host::permitted::PermittedPath;
use crate::host::process::machine_id;
use crate::job::record::{NewVolume, Work};
use crate::model::advice::Advice;
use crate::model::digest::{Digest, NoDigest};
use crate::model::envelope::{EnvelopeId, VmId};
use crate::model::job::Subject;
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, Backing, Bytes, CreateRequest, Declaration, VolumeError};
use crate::store::NewJob;
use crate::vm::headers::Writing;
use crate::vm::share::{self, Sharing};
use crate::vm::{adopt_volume, check_volume, forget_volume, names, resize_volume};

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
    let host = daemon.host();
    let shared = share::owner_of(&host, Path::new(path)).and_then(|owner| {
        let _claim = daemon.claims.vm(owner, &format!("VM {owner}"), Doing::Share)?;
        share::share(&host, Path::new(path), vm, sharing)
    });
    let op = match sharing {
        Sharing::With => "volume-share",
        Sharing::Without => "volume-unshare",
    };
    records::note_command(daemon, by, op, &format!("{path} {vm}"), &shared);
    daemon.copies_bell.ring();
    shared
}

pub(super) fn forget(
    daemon: &Daemon,
    by: Actor,
    asked: &str,
    typed: Option<&str>,
) -> Result<Outcome, Problem> {
    let forgotten = forget_alone(daemon, asked, typed);
    records::note_command(daemon, by, "volume-forget", asked, &forgotten);
    forgotten
}

fn forget_alone(daemon: &Daemon, asked: &str, typed: Option<&str>) -> Result<Outcome, Problem> {
    let found = forget_volume::find(&daemon.host(), asked)?;
    let (id, vm) = (found.envelope.id, found.envelope.vm);
    let _claim = daemon.claims.vm(vm, &format!("VM {vm}"), Doing::Volume)?;
    let path = found.location.clone();
    // Whoever makes the image has an envelope that is in nobody's XML yet.
    let _making = claim_alone(daemon, &Subject::Image { vm, path }, &found.location)?;
    let _writing = keep_starts_off(daemon, id, vm, asked)?;
    // As it is now that nothing else is done to it.
    let record = forget_volume::find(&daemon.host(), &id.to_string())?;
    forget_volume::forget(&daemon.host_of_vms()?, &record, typed)
}

/// Until what comes back is dropped. `volume` is what it was called.
fn keep_starts_off<'a>(
    daemon: &'a Daemon,
    id: EnvelopeId,
    vm: VmId,
    volume: &str,
) -> Result<Writing<'a>, Problem> {
    let starting =
        || Problem::busy(format!("VM {vm} is starting with {volume}")).next(Advice::ShowVm(vm.to_string()));
    let writing = daemon.headers.write(id).ok_or_else(starting)?;
    match daemon.armed.needs(id) {
        true => Err(starting()),
        false => Ok(writing),
    }
}

pub(super) fn check(daemon: &Daemon, path: &str) -> Result<VolumeChecked, Problem> {
    check_volume::check(&daemon.host(), Path::new(path))
}

pub(super) fn resize(
    daemon: &Daemon,
    by: Actor,
    path: &str,
    size: u64,
    typed: Option<&str>,
) -> Result<Outcome, Problem> {
    let resized = resize_alone(daemon, path, Bytes(size), typed);
    records::note_command(daemon, by, "volume-resize", &format!("{path} {size}"), &resized);
    resized
}

fn resize_alone(daemon: &Daemon, path: &str, size: Bytes, typed: Option<&str>) -> Result<Outcome, Problem> {
    let image = Path::new(path);
    let record = share::volume_record(&daemon.host(), image)?;
    let (id, vm) = (record.envelope.id, record.envelope.vm);
    let _claim = daemon.claims.vm(vm, &format!("VM {vm}"), Doing::Volume)?;
    // A start waits until it has its size.
    let _writing = keep_starts_off(daemon, id, vm, path)?;
    resize_volume::resize(&daemon.host_of_vms()?, image, &record, size, typed)
}

pub(super) fn adopt(daemon: &Daemon, by: Actor, path: &str) -> Result<Outcome, Problem> {
    let image = Path::new(path);
    let adopted = adopt_volume::find(&daemon.host(), image).and_then(|found| {
        let vm = found.vm();
        let _claim = daemon.claims.vm(vm, &format!("VM {vm}"), Doing::Adopt)?;
        adopt_volume::adopt(&daemon.host(), image, &found)
    });
    records::note_command(daemon, by, "volume-adopt", path, &adopted);
    daemon.copies_bell.ring();
    daemon.jobs.ring();
    adopted
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
            .map(|path| backing(path, request.backing_format))
            .transpose()?,
        ..create_request(&request.path, request.size, request.cluster_size)?
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
    Ok((object.envelope.id, made?))
}

/// What can be refused is refused here, before there is a job.
fn start(daemon: &Daemon, by: Actor, request: &VolumeRequest, from: &str) -> Result<VolumeCreated, Problem> {
    let vm = names::vm_id(&daemon.background, &request.vm)?;
    let from_format = match request.from_format {
        Some(format) => Some(format),
        None => declared_format(daemon, Path::new(from))?,
    };
    let provider = request.provider.as_deref();
    let volume = NewVolume {
        vm,
        path: request.path.clone(),
        from: from.to_owned(),
        from_format,
        digest: request.digest.as_deref().map(digest).transpose()?,
        size: request.size,
        cluster_size: request.cluster_size,
        provider: provider
            .map(|name| daemon.recipients.find(name))
            .transpose()?
            .map(|provider| provider.provider().id()),
        asked_by: by.uid(),
        host: machine_id(),
    };
    let total = check_again(&volume)?;
    let work = Work::CreateVolume(volume);
    let subject = work.subject();
    let claim = claim_alone(daemon, &subject, &request.path)?;
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
        .map_err(|error| job_records::excluded(error, &subject));
    if inserted.is_err() {
        let path = Path::new(&request.path);
        take_back(daemon, &object.envelope, path, left_by(object.is_new));
    }
    // Before the job is told: it would wait for it.
    drop(claim);
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
        job: Some(job_records::view(daemon, &job)?),
        envelope: None,
        size: None,
    })
}

/// The format that a VM declares for this image. A guest may have written another one's header into a raw disk.
fn declared_format(daemon: &Daemon, image: &Path) -> Result<Option<DeclaredFormat>, Problem> {
    let not_told = |problem: Problem| {
        problem
            .of(format!(
                "which format a VM declares for {} can't be told",
                image.display()
            ))
            .next("say it with --from-format")
    };
    let domains = daemon.background.domains();
    let domains = domains.map_err(|error| not_told(names::unreachable(&error)))?;
    let is_it = |disk: &&Disk| disk.source.path().is_some_and(|path| is_same_file(path, image));
    let mut declared = None;
    for defined in domains {
        let domain = match Domain::parse(&defined.xml) {
            Ok(domain) => domain,
            Err(_) if !names_path(&defined.xml, image) => continue,
            Err(error) => return Err(not_told(Problem::failed(chain(&error)).of(&defined.name))),
        };
        if let Some(disk) = domain.disks.iter().find(is_it) {
            let format = disk.declared_format();
            let format = format
                .map_err(|other| not_told(Problem::failed(format!("{} has it as {other}", defined.name))))?;
            declared = Some((defined.name, format));
            break;
        }
    }
    let Some((vm, format)) = declared else {
        return Ok(None);
    };
    let place =
        PermittedPath::named_by_root(image).map_err(|source| VolumeError::unreachable(image, source))?;
    disk::inspect_declared(&place, Declaration::Stated(format)).map_err(|error| match error {
        contradiction @ VolumeError::Contradiction { .. } => Problem::failed(format!(
            "{contradiction}: VM {vm} has it as {format}"
        ))
        .next(Advice::ShowVolume(image.to_owned()).also(format!(
            "if {vm} is right, repeat this with --from-format {format}"
        ))),
        error => error.into(),
    })?;
    Ok(Some(format))
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    a == b || matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

fn digest(text: &str) -> Result<Digest, Problem> {
    text.parse()
        .map_err(|error: NoDigest| Problem::usage(error.to_string()))
}

fn backing(path: &str, format: Option<DeclaredFormat>) -> Result<Backing, Problem> {
    let format = format.ok_or_else(|| {
        let reason = format!("the format of the backing image {path} must be said");
        Problem::usage(reason).next("add --backing-format qcow2 or --backing-format raw")
    })?;
    Ok(Backing {
        path: path.into(),
        format,
    })
}

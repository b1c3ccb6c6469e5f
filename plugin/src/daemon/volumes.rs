//! What `virtseal volume create` asks for.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::{Daemon, lock, records};
use crate::api::{VolumeProgress, VolumeRequest};
use crate::audit::Actor;
use crate::domain::{DeclaredFormat, Disk, Domain};
use crate::host::permitted::PermittedPath;
use crate::model::envelope::ObjectKind;
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{self, Backing, BackingFormat, Bytes, ClusterSize, CreateRequest, Declaration};
use crate::store::EnvelopeState;
use crate::terminal::word;
use crate::vm::names;
use crate::vm::seal::NewObject;

impl Daemon {
    /// Makes an encrypted volume and, with `from`, fills it. `report` says whether anybody still listens.
    pub fn create_volume(
        &self,
        by: Actor,
        request: &VolumeRequest,
        report: impl Fn(VolumeProgress) -> bool,
    ) -> Result<(), Problem> {
        let made = self.make_volume(request, &report);
        let envelope = made
            .as_ref()
            .ok()
            .and_then(|step| step.envelope.as_ref()?.parse().ok());
        // Each is a sync of its own: made side by side, they cost one.
        let activated = std::thread::scope(|scope| {
            let activating = envelope.map(|id| scope.spawn(move || self.keystore.activate(id)));
            records::note_command(self, by, "volume-create", &request.path, &made);
            activating.map(std::thread::ScopedJoinHandle::join)
        });
        let step = made?;
        match activated {
            Some(Ok(activated)) => activated.map(drop)?,
            // The envelope stays pending, which opens the image all the same; the first start activates it.
            Some(Err(_)) | None => {
                tracing::error!(path = request.path, "the envelope could not be activated");
            }
        }
        // A job may have changed it meanwhile.
        self.copies_bell.ring();
        report(step);
        Ok(())
    }

    /// Leaves the envelope pending.
    fn make_volume(
        &self,
        request: &VolumeRequest,
        report: &impl Fn(VolumeProgress) -> bool,
    ) -> Result<VolumeProgress, Problem> {
        let vm = names::vm_id(&self.background, &request.vm)?;
        let mut create = create_request(request)?;
        if let (Some(from), None) = (&request.from, create.source_format) {
            create.source_format = self.declared_format(Path::new(from))?;
        }
        // Nobody should get an envelope for an image that can't be made.
        if create.path.symlink_metadata().is_ok() {
            return Err(disk::VolumeError::Exists(create.path).into());
        }
        let _claim = self.claim(&request.path)?;
        // Filling takes minutes, making an envelope does not: only the latter excludes others.
        let object = {
            let _sealing = lock(&self.sealing);
            NewObject::find_or_make(
                &self.host(),
                vm,
                ObjectKind::Disk,
                &request.path,
                request.provider.as_deref(),
            )?
        };
        let made = Self::fill_volume(request, &create, &object, report);
        match (&made, object.is_new) {
            (Err(_), true) => self.withdraw(&object, &create.path),
            (Err(_), false) => self.withdraw_left_over(&object, &create.path),
            (Ok(_), _) => {}
        }
        made
    }

    /// An envelope that an earlier try has left, which died before it could take it back. Whether that one had made the image
    /// nobody knows, and that nothing is there now proves nothing: it is kept aside first.
    fn withdraw_left_over(&self, object: &NewObject, path: &Path) {
        let _sealing = lock(&self.sealing);
        let is_absent = path
            .symlink_metadata()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        let left = self.keystore.envelope(object.envelope.id);
        let Ok(Some(record)) = left else { return };
        if !is_absent || record.state != EnvelopeState::Pending {
            return;
        }
        let (vm, name) = (record.envelope.vm, record.envelope.vm.to_string());
        let dropped = self
            .keep_aside(vm, &name, std::slice::from_ref(&record))
            .and_then(|_kept| Ok(self.keystore.forget_envelope(&record)?));
        if let Err(failure) = dropped {
            tracing::warn!(path = %path.display(), "its envelope stays pending: {failure}");
        }
    }

    /// The format that a VM declares for this image. A guest may have written another one's header into a raw disk.
    fn declared_format(&self, image: &Path) -> Result<Option<DeclaredFormat>, Problem> {
        // Without libvirt nobody has declared anything.
        let domains = self.background.domains().unwrap_or_default();
        let is_it = |disk: &&Disk| disk.source.path().is_some_and(|path| is_same_file(path, image));
        let declared = domains.iter().find_map(|defined| {
            let domain = Domain::parse(&defined.xml).ok()?;
            let format = domain.disks.iter().find(is_it)?.declared_format().ok()?;
            Some((defined.name.clone(), format))
        });
        let Some((vm, format)) = declared else {
            return Ok(None);
        };
        let place = PermittedPath::named_by_root(image)
            .map_err(|source| disk::VolumeError::unreachable(image, source))?;
        disk::inspect_declared(&place, Declaration::Stated(format)).map_err(|error| match error {
            contradiction @ disk::VolumeError::Contradiction { .. } => Problem::new(
                Code::Failed,
                format!("{contradiction}: VM {vm} has it as {format}"),
            )
            .next(format!(
                "virtseal volume info {}; if {vm} is right, repeat this with --from-format {format}",
                word(image.display())
            )),
            error => error.into(),
        })?;
        Ok(Some(format))
    }

    /// Two that make one image would share its envelope, and the one that fails would withdraw it.
    fn claim(&self, path: &str) -> Result<Claim<'_>, Problem> {
        if !lock(&self.making).insert(path.to_owned()) {
            return Err(Problem::new(Code::Busy, format!("{path} is being made"))
                .next(format!("virtseal volume info {}, when that is done", word(path))));
        }
        Ok(Claim {
            making: &self.making,
            path: path.to_owned(),
        })
    }

    /// Takes an envelope back whose image was not made, so that no job and no provider has to count with it. What can't be
    /// known for sure leaves it: a key too many is better than one too few.
    fn withdraw(&self, object: &NewObject, path: &Path) {
        let _sealing = lock(&self.sealing);
        let is_absent = path
            .symlink_metadata()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        if is_absent && let Err(error) = self.keystore.withdraw(object.envelope.id) {
            tracing::warn!(path = %path.display(), "its envelope stays pending: {}", chain(&error));
        }
    }

    fn fill_volume(
        request: &VolumeRequest,
        create: &CreateRequest,
        object: &NewObject,
        report: &impl Fn(VolumeProgress) -> bool,
    ) -> Result<VolumeProgress, Problem> {
        let passphrase = object.passphrase()?;
        let created = match &request.from {
            None => disk::create(create, &object.envelope, &passphrase),
            Some(image) => disk::create_from(
                create,
                Path::new(image),
                &object.envelope,
                &passphrase,
                |percent| {
                    let step = VolumeProgress {
                        percent: percent.0.into(),
                        envelope: None,
                        size: None,
                    };
                    if report(step) {
                        ControlFlow::Continue(())
                    } else {
                        ControlFlow::Break(())
                    }
                },
            ),
        }?;
        Ok(VolumeProgress {
            percent: 100.0,
            envelope: Some(object.envelope.id.to_string()),
            size: Some(created.size.0),
        })
    }
}

/// An image that is being made here, until this is dropped.
struct Claim<'a> {
    making: &'a Mutex<BTreeSet<String>>,
    path: String,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        lock(self.making).remove(&self.path);
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

fn create_request(request: &VolumeRequest) -> Result<CreateRequest, Problem> {
    let cluster_size = match request.cluster_size {
        None => ClusterSize::default(),
        Some(bytes) => {
            ClusterSize::try_from(Bytes(bytes)).map_err(|error| Problem::new(Code::Usage, chain(&error)))?
        }
    };
    Ok(CreateRequest {
        path: PathBuf::from(&request.path),
        size: request.size.map(Bytes),
        cluster_size,
        backing: request
            .backing
            .as_ref()
            .map(|path| backing(path, request.backing_format.as_deref()))
            .transpose()?,
        source_format: request.from_format.as_deref().map(source_format).transpose()?,
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

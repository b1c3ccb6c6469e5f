//! `vm seal` and `vm unseal`: from a defined, stopped domain to a sealed one, and back while nothing is lost.
//!
//! [`plan()`] looks and decides, [`seal()`] acts, and every act can be killed and repeated: an envelope is in the
//! keystore before its object exists, an object is opened with its key before its envelope becomes active, and the
//! domain is redefined last. A second run finds what the first one made and goes on from there.

mod declared;
mod firmware;
mod object;
mod plan;
mod take_back;
mod unseal;

use std::path::{Path, PathBuf};

use crate::config::Policies;
use crate::domain::edit::{self, DiskEdit, NvramEdit, SealEdit};
use crate::envelope::{Envelope, ObjectKind};
use crate::failure::{Code, Failure, chain};
use crate::keystore::Keystore;
use crate::libvirt::DefinedDomain;
use crate::provider::registry::Registry;
use crate::volume::{self, CreateRequest, Held};

pub use declared::ConfirmedFormats;
pub use object::NewObject;
use plan::{DiskStep, DiskWork, NvramStep, VtpmStep, same_content};
pub use plan::{Plan, plan};
pub use unseal::{UnsealPlan, plan_unseal, unseal};

/// What sealing works with.
pub struct Host<'a> {
    /// Where envelopes go.
    pub keystore: &'a Keystore,
    /// What wraps them.
    pub registry: &'a Registry,
    /// Where libvirt keeps vTPM state.
    pub swtpm_dir: PathBuf,
    /// Where libvirt keeps variable stores.
    pub nvram_dir: PathBuf,
    /// What an admin says of the formats of the disks.
    pub confirmed: ConfirmedFormats,
    /// What the host lets VMs do beside their sealed objects.
    pub policies: Policies,
}

/// A domain whose objects are made, to be defined.
#[derive(Debug)]
pub struct Made {
    /// Its XML.
    pub xml: String,
    /// The files that were replaced: until the domain is defined, a start may still be opening them.
    pub replaced: Vec<Held>,
}

/// Makes and adopts what the plan says. The caller defines the domain.
///
/// # Errors
/// With what went wrong and with which object. Run it again to go on.
pub fn seal(
    host: &Host<'_>,
    defined: &DefinedDomain,
    plan: &Plan,
    provider: Option<&str>,
) -> Result<Made, Failure> {
    let mut changes = SealEdit::default();
    let mut envelopes = Vec::new();
    let mut replaced = Vec::new();
    for step in &plan.disks {
        let envelope = seal_disk(host, defined, step, provider, &mut replaced)
            .map_err(|failure| failure.of(format!("{} disk {}", defined.name, step.target)))?;
        changes.disks.push(DiskEdit {
            target: step.target.clone(),
            envelope: envelope.id,
            format: Some("qcow2".into()),
            source: None,
        });
        envelopes.push(envelope);
    }
    match &plan.nvram {
        NvramStep::Sealed(envelope) => envelopes.push(envelope.clone()),
        NvramStep::None => {}
        NvramStep::TakeBack {
            path,
            loader,
            envelopes: known,
        } => {
            let envelope = take_back::open_store(host, defined, path, known)
                .map_err(|failure| failure.of(format!("{} nvram", defined.name)))?;
            changes.nvram = Some(NvramEdit {
                path: path.clone(),
                template: None,
                format: None,
                envelope: envelope.id,
                loader: loader.clone(),
            });
            envelopes.push(envelope);
        }
        NvramStep::Create {
            path,
            template,
            loader,
        } => {
            let envelope = seal_nvram(host, defined, path, template, provider, &mut replaced)
                .map_err(|failure| failure.of(format!("{} nvram", defined.name)))?;
            changes.nvram = Some(NvramEdit {
                path: path.clone(),
                template: Some(template.clone()),
                format: None,
                envelope: envelope.id,
                loader: loader.clone(),
            });
            envelopes.push(envelope);
        }
    }
    match &plan.vtpm {
        VtpmStep::Sealed(envelope) => envelopes.push(envelope.clone()),
        VtpmStep::Passthrough => {}
        VtpmStep::Keep(envelope) => {
            changes.vtpm = Some(envelope.id);
            envelopes.push(envelope.clone());
        }
        VtpmStep::TakeBack(known) => {
            let envelope = take_back::open_vtpm(host, defined, known)
                .map_err(|failure| failure.of(format!("{} vtpm", defined.name)))?;
            changes.vtpm = Some(envelope.id);
            envelopes.push(envelope);
        }
        VtpmStep::Add | VtpmStep::Encrypt => {
            let object = NewObject::find_or_make(host, defined.vm, ObjectKind::Vtpm, "", provider)
                .map_err(|failure| failure.of(format!("{} vtpm", defined.name)))?;
            // There is no state yet to open; the envelope itself was opened again when it was made.
            host.keystore.activate(object.envelope.id)?;
            changes.vtpm = Some(object.envelope.id);
            envelopes.push(object.envelope.into_envelope());
        }
    }
    changes.envelopes = &envelopes;
    let xml = edit::seal(&defined.xml, &changes)
        .map_err(|error| Failure::new(Code::Failed, format!("{}: {}", defined.name, chain(&error))))?;
    Ok(Made { xml, replaced })
}

fn seal_disk(
    host: &Host<'_>,
    defined: &DefinedDomain,
    step: &DiskStep,
    provider: Option<&str>,
    replaced: &mut Vec<Held>,
) -> Result<Envelope, Failure> {
    match &step.work {
        DiskWork::Sealed(envelope) => Ok(envelope.clone()),
        DiskWork::Adopt(carried) => adopt_disk(host, defined, &step.path, carried),
        DiskWork::Replace(info) => {
            let location = step.path.display().to_string();
            let object = NewObject::find_or_make(host, defined.vm, ObjectKind::Disk, &location, provider)?;
            let request = CreateRequest {
                cluster_size: info.cluster_size.unwrap_or_default(),
                ..CreateRequest::new(&step.path, info.virtual_size)
            };
            let held = Held::unchanged(&step.path, info.file_id)?;
            volume::create_over(&held, &request, &object.envelope, &object.passphrase()?)?;
            replaced.push(held);
            host.keystore.activate(object.envelope.id)?;
            Ok(object.envelope.into_envelope())
        }
    }
}

/// Takes a volume over whose image carries `carried`, once that is verified by the key that opens the image.
fn adopt_disk(
    host: &Host<'_>,
    defined: &DefinedDomain,
    path: &Path,
    carried: &Envelope,
) -> Result<Envelope, Failure> {
    let location = path.display().to_string();
    take_back::adopt(host, &defined.name, carried, &location, |passphrase| {
        Ok(volume::verify(path, passphrase)?)
    })
}

fn seal_nvram(
    host: &Host<'_>,
    defined: &DefinedDomain,
    path: &Path,
    template: &Path,
    provider: Option<&str>,
    replaced: &mut Vec<Held>,
) -> Result<Envelope, Failure> {
    let object = NewObject::find_or_make(
        host,
        defined.vm,
        ObjectKind::Nvram,
        &path.display().to_string(),
        provider,
    )?;
    let passphrase = object.passphrase()?;
    if path.exists() && volume::inspect(path)?.format.is_encrypted() {
        volume::verify(path, &passphrase)?;
    } else {
        if path.exists() {
            let held = Held::open(path)?;
            if !same_content(path, template)? {
                return Err(volume::VolumeError::Changed(path.to_owned()).into());
            }
            replaced.push(held);
            std::fs::remove_file(path).map_err(|error| {
                Failure::from_error(Code::Failed, format!("can't remove {}", path.display()), &error)
            })?;
        }
        volume::create_nvram(template, path, &passphrase)?;
    }
    host.keystore.activate(object.envelope.id)?;
    Ok(object.envelope.into_envelope())
}

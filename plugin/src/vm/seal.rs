//! `vm seal` and `vm unseal`: from a defined, stopped domain to a sealed one, and back while nothing is lost.
//!
//! [`plan()`] looks and decides, [`seal()`] acts, and every act can be killed and repeated: an envelope is in the
//! keystore before its object exists, an object is opened with its key before its envelope becomes active. What can
//! fail comes first and leaves every file as it is: the variable store, the vTPM, then the disks are made ready beside
//! what is there. Then they get their names, the disks last, and the domain is redefined. A second run finds what the
//! first one made and goes on from there.

mod declared;
mod firmware;
mod known;
mod object;
mod others;
mod plan;
mod replaced;
mod room;
mod store;
mod take_back;
mod unseal;
mod vtpm;

use std::path::Path;

use crate::domain::Metadata;
use crate::domain::edit::{self, SealEdit};
use crate::host::libvirt::DefinedDomain;
use crate::host::permitted::PermittedPath;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ObjectKind, Precedence};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{self, CreateRequest, ImageLock, VolumeInfo};
use crate::object::nvram;
use crate::vm::host::Host;

pub use firmware::firmware_of;
pub use object::NewObject;
use plan::{DiskStep, DiskWork};
pub use plan::{Plan, plan};
use replaced::Ready;
pub use replaced::Replaced;
use store::{NewStore, NvramStep, Present};
pub use unseal::{UnsealPlan, plan_unseal, unseal};

/// A domain whose objects are made, to be defined.
#[derive(Debug)]
pub struct Made {
    /// Its XML.
    pub xml: String,
    /// The files that were replaced: until the domain is defined, a start may still be opening them.
    pub replaced: Replaced,
}

/// Makes and adopts what the plan says. The caller defines the domain.
///
/// # Errors
/// With what went wrong and with which object, and what was done before. Run it again to go on.
pub fn seal(
    host: &Host<'_>,
    defined: &DefinedDomain,
    plan: &Plan,
    provider: Option<&str>,
) -> Result<Made, Problem> {
    let of = |what: &str| format!("{} {what}", defined.name);
    let mut ready = Vec::new();
    let store = match &plan.nvram {
        NvramStep::None => None,
        NvramStep::Sealed(envelope) | NvramStep::Reformat(envelope, _) => Some(envelope.clone()),
        NvramStep::TakeBack(sealed) => {
            let opened = take_back::open_store(host, defined, &sealed.path, &sealed.envelopes);
            Some(opened.map_err(|failure| failure.of(of("nvram")))?)
        }
        NvramStep::Create(store) => {
            let made = make_store(host, defined, store, provider, &mut ready);
            Some(made.map_err(|failure| failure.of(of("nvram")))?)
        }
    };
    let vtpm = plan.vtpm.envelope(host, defined, provider);
    let vtpm = vtpm.map_err(|failure| failure.of(of("vtpm")))?;
    let mut disks = Vec::new();
    for step in &plan.disks {
        let made = make_disk(host, defined, step, provider, &mut ready);
        disks.push(made.map_err(|failure| failure.of(of(&format!("disk {}", step.target))))?);
    }
    let changes = SealEdit {
        disks: plan
            .disks
            .iter()
            .zip(&disks)
            .map(|(step, envelope)| step.edit(envelope.id))
            .collect(),
        nvram: store.as_ref().and_then(|envelope| plan.nvram.edit(envelope.id)),
        vtpm: vtpm
            .as_ref()
            .filter(|_| plan.vtpm.changes_xml())
            .map(|envelope| envelope.id),
        envelopes: &disks
            .iter()
            .chain(&store)
            .chain(&vtpm)
            .map(|envelope| or_rival(&defined.xml, envelope))
            .collect::<Vec<_>>(),
    };
    let xml = edit::seal(&defined.xml, &changes)
        .map_err(|error| Problem::new(Code::Failed, format!("{}: {}", defined.name, chain(&error))))?;
    let again = Advice::SealVm(defined.name.clone());
    let replaced = Replaced::publish(host, ready, &again).map_err(|failure| failure.of(&defined.name))?;
    if let Some(envelope) = vtpm.filter(|_| plan.vtpm.changes_xml()) {
        // There is no state yet to open; the envelope itself was opened again when it was made.
        let activated = host.keystore.activate(envelope.id).map_err(Problem::from);
        activated.map_err(|failure| replaced.after(failure))?;
    }
    Ok(Made { xml, replaced })
}

/// Which of two versions of one generation counts is root's to decide: until then that of the XML stays where `vm status` sees it.
fn or_rival(xml: &str, envelope: &Envelope) -> Envelope {
    let copies = Metadata::envelopes_in(xml).map_or_else(|_| Vec::new(), |(copies, _)| copies);
    let rival = copies
        .into_iter()
        .find(|copy| copy.id == envelope.id && copy.supersedes(envelope) == Precedence::Conflict);
    rival.unwrap_or_else(|| envelope.clone())
}

fn make_disk(
    host: &Host<'_>,
    defined: &DefinedDomain,
    step: &DiskStep,
    provider: Option<&str>,
    ready: &mut Vec<Ready>,
) -> Result<Envelope, Problem> {
    let location = step.place.shown().display().to_string();
    match &step.work {
        DiskWork::Sealed(envelope) => Ok(envelope.clone()),
        DiskWork::Adopt(carried) => adopt_disk(host, defined, &step.place, carried),
        DiskWork::Replace(info) => {
            let object = NewObject::find_or_make(host, defined.vm, ObjectKind::Disk, &location, provider)?;
            let held = ImageLock::unchanged(&step.place, info.file_id)?;
            ready.push(Ready {
                words: step.words().unwrap_or_default(),
                file: disk::prepare_over(
                    held,
                    &like(step.place.shown(), info),
                    &object.envelope,
                    &object.passphrase()?,
                )?,
                envelope: Some(object.envelope.id),
            });
            Ok(object.envelope.into_envelope())
        }
    }
}

/// Takes a volume over whose image carries `carried`, once that is verified by the key that opens the image.
fn adopt_disk(
    host: &Host<'_>,
    defined: &DefinedDomain,
    place: &PermittedPath,
    carried: &Envelope,
) -> Result<Envelope, Problem> {
    let location = place.shown().display().to_string();
    take_back::adopt(host, defined, carried, &location, |passphrase| {
        Ok(disk::verify(place, passphrase)?)
    })
}

/// An image in the place of an empty one.
fn like(path: &Path, info: &VolumeInfo) -> CreateRequest {
    CreateRequest {
        cluster_size: info.cluster_size.unwrap_or_default(),
        ..CreateRequest::new(path, info.virtual_size)
    }
}

fn make_store(
    host: &Host<'_>,
    defined: &DefinedDomain,
    store: &NewStore,
    provider: Option<&str>,
    ready: &mut Vec<Ready>,
) -> Result<Envelope, Problem> {
    let location = store.place.shown().display().to_string();
    let object = NewObject::find_or_make(host, defined.vm, ObjectKind::Nvram, &location, provider)?;
    let passphrase = object.passphrase()?;
    let replaced = match store.present {
        Present::Nothing => None,
        Present::Pristine(inspected) => Some(ImageLock::unchanged(&store.place, inspected)?),
    };
    ready.push(Ready {
        words: store.words(),
        file: nvram::prepare(&store.template, &store.place, replaced, &passphrase)?,
        envelope: Some(object.envelope.id),
    });
    Ok(object.envelope.into_envelope())
}

//! `vm seal` and `vm unseal`: from a defined, stopped domain to a sealed one, and back while nothing is lost.
//!
//! [`survey()`] looks and decides, [`seal()`] acts, and every act can be killed and repeated: an envelope is in the
//! keystore before its object exists, an object is opened with its key before its envelope becomes active. What can
//! fail comes first and leaves every file as it is: the variable store, the vTPM, then the disks are made ready beside
//! what is there. Then they get their names, the disks last, and the domain is redefined. A second run finds what the
//! first one made and goes on from there.

mod declared;
mod disks;
mod dropped;
mod firmware;
mod keys;
mod known;
mod loss;
mod object;
mod others;
mod plan;
mod pool_volumes;
mod replaced;
mod reset;
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
use crate::model::finding::Finding;
use crate::model::problem::{Problem, chain};
use crate::model::subject::Subject;
use crate::object::disk::{self, CreateRequest, ImageLock, VolumeInfo};
use crate::object::nvram;
use crate::vm::host::Host;

use disks::{DiskStep, DiskWork};
pub(crate) use firmware::firmware_of;
pub(crate) use known::given_up;
pub(crate) use object::{Leftover, NewObject};
pub(crate) use others::OtherUses;
pub(crate) use plan::{Plan, survey};
pub(crate) use pool_volumes::{WithFiles, with_files};
use replaced::Ready;
pub(crate) use replaced::Replaced;
pub(crate) use reset::{plan_reset, reset};
use store::{NewStore, NvramStep, Present};
pub(crate) use unseal::{plan_unseal, unseal};

/// A domain whose objects are made, to be defined.
#[derive(Debug)]
pub(crate) struct Made {
    pub xml: String,
    /// The files that were replaced: until the domain is defined, a start may still be opening them.
    pub replaced: Replaced,
    /// Whether the keystore has learnt of another place of an image.
    pub moved: bool,
    /// Where what only the XML had is now.
    pub kept: Vec<Finding>,
}

/// Makes and adopts what the plan says. The caller defines the domain.
///
/// # Errors
/// With what went wrong and with which object, and what was done before. Run it again to go on.
pub(crate) fn seal(
    host: &Host<'_>,
    defined: &DefinedDomain,
    plan: &Plan,
    provider: Option<&str>,
) -> Result<Made, Problem> {
    let of = |failure: Problem, object: &str| {
        let failure = failure.about(Subject::object(&defined.name, object));
        failure.of(format!("{} {object}", defined.name))
    };
    let mut ready = Vec::new();
    let store = match &plan.nvram {
        NvramStep::None => None,
        NvramStep::Sealed(envelope) | NvramStep::Reformat(envelope, _) => Some(envelope.clone()),
        NvramStep::TakeBack(sealed) => {
            let opened = take_back::open_store(host, defined, &sealed.path, &sealed.envelopes);
            Some(opened.map_err(|failure| of(failure, "nvram"))?)
        }
        NvramStep::Create(store) => {
            let made = make_store(host, defined, store, provider, &mut ready);
            Some(made.map_err(|failure| of(failure, "nvram"))?)
        }
    };
    let vtpm = plan.vtpm.envelope(host, defined, provider);
    let vtpm = vtpm.map_err(|failure| of(failure, "vtpm"))?;
    let mut disks = Vec::new();
    for step in &plan.disks {
        let made = make_disk(host, defined, step, provider, &mut ready);
        disks.push(made.map_err(|failure| of(failure, &format!("disk {}", step.target)))?);
    }
    let changes = SealEdit {
        disks: plan
            .disks
            .iter()
            .zip(&disks)
            .map(|(step, envelope)| step.edit(envelope.id))
            .collect(),
        nvram: store.as_ref().and_then(|envelope| plan.nvram.edit(envelope.id)),
        vtpm: vtpm.as_ref().and_then(|envelope| plan.vtpm.edit(envelope.id)),
        envelopes: &disks
            .iter()
            .chain(&store)
            .chain(&vtpm)
            .map(|envelope| or_rival(&defined.xml, envelope))
            .collect::<Vec<_>>(),
    };
    let xml = edit::seal(&defined.xml, &changes)
        .map_err(|error| Problem::failed(format!("{}: {}", defined.name, chain(&error))))?;
    let kept = dropped::keep(host, defined, &xml)?;
    let again = Advice::SealVm(defined.name.clone());
    let replaced = Replaced::publish(host, ready, &again).map_err(|failure| failure.of(&defined.name))?;
    if let Some(envelope) = vtpm.filter(|_| plan.vtpm.act().is_some()) {
        let aside = plan.vtpm.set_lost_aside(host, defined, envelope.id);
        // There is no state yet to open; the envelope itself was opened again when it was made.
        let activated = aside.and_then(|()| Ok(host.keystore.activate(envelope.id)?));
        activated.map_err(|failure| replaced.after(failure))?;
    }
    let mut moved = false;
    for image in &plan.moved {
        moved |= image
            .open_and_settle(host)
            .map_err(|failure| failure.of(&defined.name))?;
    }
    Ok(Made {
        xml,
        replaced,
        moved,
        kept,
    })
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
            let object = find_or_make(host, defined, ObjectKind::Disk, &location, provider)?;
            let held = ImageLock::unchanged(&step.place, info.file_id)?;
            ready.push(Ready {
                act: step.replacement(info),
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
        Ok(disk::open(place, passphrase)?)
    })
}

/// An image in the place of an empty one.
fn like(path: &Path, info: &VolumeInfo) -> CreateRequest {
    CreateRequest {
        cluster_size: info.cluster_size.unwrap_or_default(),
        ..CreateRequest::new(path, info.virtual_size)
    }
}

fn find_or_make(
    host: &Host<'_>,
    defined: &DefinedDomain,
    kind: ObjectKind,
    location: &str,
    provider: Option<&str>,
) -> Result<NewObject, Problem> {
    NewObject::find_or_make(
        host,
        defined.vm,
        kind,
        location,
        provider,
        Leftover::SameProviders,
    )
}

fn make_store(
    host: &Host<'_>,
    defined: &DefinedDomain,
    store: &NewStore,
    provider: Option<&str>,
    ready: &mut Vec<Ready>,
) -> Result<Envelope, Problem> {
    let location = store.place.shown().display().to_string();
    let object = find_or_make(host, defined, ObjectKind::Nvram, &location, provider)?;
    let passphrase = object.passphrase()?;
    let held = |inspected| ImageLock::unchanged(&store.place, inspected);
    let create = |held| nvram::create(&store.template, &store.place, held, &passphrase);
    ready.push(Ready {
        act: store.act(),
        file: match store.present {
            Present::Nothing => create(None)?,
            Present::Pristine(inspected) => create(Some(held(inspected)?))?,
            Present::Written(inspected) => nvram::encrypt(held(inspected)?, &passphrase)?,
        },
        envelope: Some(object.envelope.id),
    });
    Ok(object.envelope.into_envelope())
}

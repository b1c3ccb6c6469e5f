//! Copies of envelopes as they are, not as the keystore has noted: what a deletion and a shredding must know, and a job should
//! begin with.
//!
//! An admin may define a VM from an older dump, put an image back from a backup, revert to a snapshot, or bring a VM from
//! another host: nobody tells the keystore. Here they are only read; what to believe of them is for [`super::foreign`] to say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use super::host::Host;
use crate::domain::{Domain, DomainError, Metadata, encrypted_layers};
use crate::host::libvirt::{DefinedDomain, KeptXml};
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, ImageCopy};
use crate::store::{CopyPlace, EnvelopeStore};

/// A copy that this host can see.
#[derive(Clone, Debug)]
pub struct VisibleCopy {
    /// What it says.
    pub envelope: Envelope,
    /// The file of its object, if the place tells.
    pub location: Option<PathBuf>,
    /// Where it is.
    pub place: Place,
}

/// Those of all VMs and images.
#[derive(Debug, Default)]
pub struct Visible {
    /// What can be read.
    pub copies: Vec<VisibleCopy>,
    /// What could not be read, and where: nobody knows what is in there.
    pub unreadable: Vec<String>,
    /// Images whose copy can't be read, or is of another envelope than the keystore has for them.
    pub bad_images: Vec<PathBuf>,
}

/// Where a copy is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the XML of this VM.
    Xml(String),
    /// In the XML of a snapshot or a managed save of this VM, which nobody can change.
    Snapshot(String, String),
    /// In this image.
    Image(PathBuf),
    /// In a row of the keystore that is damaged.
    Keystore,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xml(vm) => write!(f, "the XML of {vm}"),
            Self::Snapshot(vm, kept_in) => write!(f, "{kept_in} of {vm}"),
            Self::Image(path) => write!(f, "{}", path.display()),
            Self::Keystore => f.write_str("the keystore's damaged record"),
        }
    }
}

impl Place {
    /// As the keystore has it, if it can be brought up to date.
    #[must_use]
    pub fn kept(&self) -> Option<CopyPlace> {
        match self {
            Self::Xml(_) => Some(CopyPlace::Xml),
            Self::Snapshot(..) | Self::Keystore => None,
            Self::Image(_) => Some(CopyPlace::Image),
        }
    }
}

impl Visible {
    /// Every copy in the XML of a domain or of a snapshot, and in every image that these or the keystore name. One that can't
    /// be read does not hide the others. An image that is not there now is left out.
    ///
    /// # Errors
    /// When the keystore can't be read.
    pub fn of_host(host: &Host<'_>) -> Result<Self, Problem> {
        let (mut visible, mut known) = (Self::default(), BTreeMap::<_, Vec<EnvelopeId>>::new());
        host.keystore.each_envelope(|record| {
            if record.envelope.kind == ObjectKind::Disk && !record.location.is_empty() {
                let place = PathBuf::from(record.location);
                known.entry(place).or_default().push(record.envelope.id);
            }
        })?;
        let mut images: BTreeSet<PathBuf> = known.keys().cloned().collect();
        let permit = |path: &Path| {
            let known = known.get_key_value(path).map(|(place, _)| place);
            host.paths.permit_known(path, known.into_iter())
        };
        for kept in &host.kept {
            let found = visible
                .add_those_in(kept)
                .and_then(|()| Metadata::sources_in(&kept.xml));
            match found {
                Ok(sources) => {
                    visible.add_those_out_of_sight(kept, permit);
                    images.extend(sources);
                }
                Err(error) => visible
                    .unreadable
                    .push(format!("{}: {}", kept.name, chain(&error))),
            }
        }
        let with_those_below = |image: &PathBuf| match permit(image) {
            Ok(place) => disk::known_layers(&place, |path| Ok(permit(path)?)).0,
            Err(_) => Vec::new(),
        };
        let layers = images.iter().flat_map(with_those_below).map(|layer| layer.path);
        for image in layers.chain(images.iter().cloned()).collect::<BTreeSet<_>>() {
            let Ok(place) = permit(&image) else { continue };
            match disk::identify(&place).map(|(_, copy)| copy) {
                Ok(ImageCopy::Unreadable(_)) => visible.bad_images.push(image),
                Ok(ImageCopy::Envelope(found)) => {
                    let is_known = known.get(&image).is_none_or(|ids| ids.contains(&found.id));
                    visible.bad_images.extend((!is_known).then_some(image));
                    visible.copies.extend(carried(place));
                }
                _ => {}
            }
        }
        Ok(visible)
    }

    /// What came with this VM. Its images are looked at only where the keystore's rows of it are damaged: else its first start does.
    #[must_use]
    pub fn of_domain(host: &Host<'_>, defined: &DefinedDomain) -> Self {
        let kept = KeptXml {
            vm: defined.vm,
            name: defined.name.clone(),
            snapshot: None,
            xml: defined.xml.clone(),
        };
        let mut visible = Self::default();
        if visible.add_those_in(&kept).is_err() {
            return visible;
        }
        let known = host.keystore.envelopes_of(defined.vm);
        if known.is_ok_and(|known| !known.damaged.is_empty()) {
            let images = Metadata::sources_in(&defined.xml).unwrap_or_default();
            let places = images
                .iter()
                .filter_map(|image| host.permit_known(defined.vm, image).ok());
            visible.copies.extend(places.filter_map(carried));
            visible
                .copies
                .extend(held_copies(host.keystore, Some(defined.vm)));
        }
        visible
    }

    /// Images that a sealed VM has, where root does not look: nobody knows which version is in there.
    fn add_those_out_of_sight(
        &mut self,
        kept: &KeptXml,
        permit: impl Fn(&Path) -> Result<PermittedPath, PathError>,
    ) {
        let Ok(domain) = Domain::parse(&kept.xml) else {
            return;
        };
        if domain.metadata.is_none() {
            return;
        }
        let named = encrypted_layers(&domain)
            .into_iter()
            .filter_map(|(_, path)| permit(&path).err());
        let unseen = named.filter(|error| !error.is_missing());
        self.unreadable
            .extend(unseen.map(|error| Problem::from(error).of(&kept.name).to_string()));
    }

    fn add_those_in(&mut self, kept: &KeptXml) -> Result<(), DomainError> {
        let layers = Domain::parse(&kept.xml).map_or_else(|_| Vec::new(), |domain| encrypted_layers(&domain));
        let place = match &kept.snapshot {
            Some(snapshot) => Place::Snapshot(kept.name.clone(), snapshot.clone()),
            None => Place::Xml(kept.name.clone()),
        };
        let (envelopes, unreadable) = Metadata::envelopes_in(&kept.xml)?;
        self.unreadable
            .extend(unreadable.iter().map(|copy| format!("{place}: {}", copy.reason)));
        self.copies.extend(envelopes.into_iter().map(|envelope| {
            VisibleCopy {
                location: layers
                    .iter()
                    .find(|(id, _)| *id == envelope.id)
                    .map(|(_, path)| path.clone()),
                envelope,
                place: place.clone(),
            }
        }));
        Ok(())
    }
}

/// The envelopes that damaged rows still hold: they count as copies, as those of the XML and the images do.
pub(super) fn held_copies(keystore: &dyn EnvelopeStore, vm: Option<VmId>) -> Vec<VisibleCopy> {
    let rows = match vm {
        Some(vm) => keystore.envelopes_of(vm),
        None => keystore.envelopes(),
    };
    let damaged = rows.map(|rows| rows.damaged).unwrap_or_default();
    let held = damaged.into_iter().filter_map(|row| row.holds);
    held.map(|held| VisibleCopy {
        location: (!held.location.is_empty()).then(|| held.location.clone().into()),
        envelope: held.envelope,
        place: Place::Keystore,
    })
    .collect()
}

fn carried(place: PermittedPath) -> Option<VisibleCopy> {
    let image = place.shown().to_owned();
    Some(VisibleCopy {
        envelope: disk::inspect(&place).ok()?.envelope?,
        place: Place::Image(image.clone()),
        location: Some(image),
    })
}

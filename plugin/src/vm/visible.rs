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
use crate::host::permitted::{PathRule, PermittedPath};
use crate::host::storage;
use crate::model::deadlines::image::SEEN;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::disk::{self, ImageCopy, VolumeError};
use crate::store::{CopyPlace, EnvelopeStore, StoreError};

/// A copy that this host can see.
#[derive(Clone, Debug)]
pub(crate) struct VisibleCopy {
    pub envelope: Envelope,
    /// The file of its object, if the place tells.
    pub location: Option<PathBuf>,
    pub place: Place,
}

/// Those of all VMs and images.
#[derive(Debug, Default)]
pub(crate) struct Visible {
    /// What can be read.
    pub copies: Vec<VisibleCopy>,
    /// What could not be read, and where: nobody knows what is in there.
    pub unreadable: Vec<Problem>,
    /// Images whose copy can't be read, or is of another envelope than the keystore has for them.
    pub bad_images: Vec<PathBuf>,
}

/// Where a copy is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// In the XML of this VM.
    Xml(String),
    /// In the XML of a snapshot or a managed save of this VM, which nobody can change.
    Snapshot(String, String),
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
    pub(crate) fn kept(&self) -> Option<CopyPlace> {
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
    pub(crate) fn of_host(host: &Host<'_>) -> Result<Self, Problem> {
        let (mut visible, mut known) = (Self::default(), BTreeMap::<_, Vec<EnvelopeId>>::new());
        host.keystore.each_envelope(|record| {
            if record.envelope.kind == ObjectKind::Disk && !record.location.is_empty() {
                let place = PathBuf::from(record.location);
                known.entry(place).or_default().push(record.envelope.id);
            }
        })?;
        let mut images: BTreeSet<PathBuf> = known.keys().cloned().collect();
        // What a sealed VM has, by the VM's name.
        let mut of_vms = Vec::new();
        for kept in &host.kept {
            let found = visible
                .add_those_in(kept)
                .and_then(|()| Metadata::sources_in(&kept.xml));
            match found {
                Ok(sources) => {
                    let own = layers_of_sealed(kept);
                    images.extend(own.iter().cloned());
                    of_vms.extend(own.into_iter().map(|path| (&kept.name, path)));
                    images.extend(sources);
                }
                Err(error) => visible
                    .unreadable
                    .push(Problem::failed(chain(&error)).of(&kept.name)),
            }
        }
        let paths = host.paths.clone();
        let look = move |image: &Path| Seen::with_those_below(image, &known, &paths);
        let (mut files, mut out_of_sight) = (BTreeMap::new(), BTreeMap::new());
        for (image, seen) in storage::in_time(images, SEEN, look) {
            match seen {
                Some(seen) => {
                    files.extend(seen.files);
                    out_of_sight.extend(seen.out_of_sight.map(|problem| (image, problem)));
                }
                None => visible
                    .unreadable
                    .push(Problem::failed("its storage does not answer").of(image.display())),
            }
        }
        let unseen = of_vms.into_iter().filter_map(|(name, path)| {
            let problem = out_of_sight.get(&path)?.clone();
            Some(Problem {
                code: Code::Failed,
                ..problem.of(name)
            })
        });
        visible.unreadable.extend(unseen);
        for (image, file) in files {
            visible.bad_images.extend(file.is_bad.then_some(image));
            visible.copies.extend(file.copy);
        }
        Ok(visible)
    }

    /// What came with this VM. Its images are looked at only where the keystore's rows of it are damaged: else its first start does.
    pub(crate) fn of_domain(host: &Host<'_>, defined: &DefinedDomain) -> Result<Self, StoreError> {
        let kept = KeptXml {
            vm: defined.vm,
            name: defined.name.clone(),
            snapshot: None,
            xml: defined.xml.clone(),
        };
        let mut visible = Self::default();
        if visible.add_those_in(&kept).is_err() {
            return Ok(visible);
        }
        if !host.keystore.envelopes_of(defined.vm)?.damaged.is_empty() {
            let images = Metadata::sources_in(&defined.xml).unwrap_or_default();
            let places = images
                .iter()
                .filter_map(|image| host.permit_known(defined.vm, image).ok());
            visible.copies.extend(places.filter_map(carried));
            visible
                .copies
                .extend(held_copies(host.keystore, Some(defined.vm))?);
        }
        Ok(visible)
    }

    fn add_those_in(&mut self, kept: &KeptXml) -> Result<(), DomainError> {
        let layers = Domain::parse(&kept.xml).map_or_else(|_| Vec::new(), |domain| encrypted_layers(&domain));
        let place = match &kept.snapshot {
            Some(snapshot) => Place::Snapshot(kept.name.clone(), snapshot.clone()),
            None => Place::Xml(kept.name.clone()),
        };
        let (envelopes, unreadable) = Metadata::envelopes_in(&kept.xml)?;
        let unreadable = unreadable.iter();
        self.unreadable
            .extend(unreadable.map(|copy| Problem::failed(copy.reason.clone()).of(&place)));
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

/// Images that a sealed VM has: of those where root does not look, nobody knows which version is in there.
fn layers_of_sealed(kept: &KeptXml) -> Vec<PathBuf> {
    match Domain::parse(&kept.xml) {
        Ok(domain) if domain.metadata.is_some() => encrypted_layers(&domain)
            .into_iter()
            .map(|(_, path)| path)
            .collect(),
        _ => Vec::new(),
    }
}

/// What is seen of an image.
#[derive(Default)]
struct Seen {
    /// Why root does not look at it, or can't.
    out_of_sight: Option<Problem>,
    /// It, and those below.
    files: Vec<(PathBuf, SeenFile)>,
}

struct SeenFile {
    /// Its copy can't be read, or is of another envelope than the keystore has for it.
    is_bad: bool,
    copy: Option<VisibleCopy>,
}

impl Seen {
    fn with_those_below(image: &Path, known: &BTreeMap<PathBuf, Vec<EnvelopeId>>, paths: &PathRule) -> Self {
        let permit = |path: &Path| {
            let known = known.get_key_value(path).map(|(place, _)| place);
            paths.permit_known(path, known.into_iter())
        };
        let top = match permit(image) {
            Ok(top) => top,
            Err(error) => {
                return Self {
                    out_of_sight: (!error.is_missing()).then(|| error.into()),
                    files: Vec::new(),
                };
            }
        };
        let (layers, end) = disk::known_layers(&top, |path| Ok(permit(path)?));
        let layers = layers.into_iter().map(|layer| layer.path);
        let all: BTreeSet<_> = layers.chain([image.to_owned()]).collect();
        let see = |image: PathBuf| {
            let place = permit(&image).ok()?;
            let file = match disk::identify(&place).map(|(_, copy)| copy) {
                Ok(ImageCopy::Unreadable(_)) => SeenFile {
                    is_bad: true,
                    copy: None,
                },
                Ok(ImageCopy::Envelope(envelope)) => SeenFile {
                    is_bad: known.get(&image).is_some_and(|ids| !ids.contains(&envelope.id)),
                    copy: Some(VisibleCopy {
                        envelope: *envelope,
                        location: Some(image.clone()),
                        place: Place::Image(image.clone()),
                    }),
                },
                _ => return None,
            };
            Some((image, file))
        };
        Self {
            out_of_sight: end
                .filter(|error| matches!(error, VolumeError::File(_)))
                .map(Problem::from),
            files: all.into_iter().filter_map(see).collect(),
        }
    }
}

/// The envelopes that damaged rows still hold: they count as copies, as those of the XML and the images do.
pub(super) fn held_copies(
    keystore: &dyn EnvelopeStore,
    vm: Option<VmId>,
) -> Result<Vec<VisibleCopy>, StoreError> {
    let rows = match vm {
        Some(vm) => keystore.envelopes_of(vm)?,
        None => keystore.envelopes()?,
    };
    let held = rows.damaged.into_iter().filter_map(|row| row.holds);
    let copies = held.map(|held| VisibleCopy {
        location: (!held.location.is_empty()).then(|| held.location.clone().into()),
        envelope: held.envelope,
        place: Place::Keystore,
    });
    Ok(copies.collect())
}

fn carried(place: PermittedPath) -> Option<VisibleCopy> {
    let image = place.shown().to_owned();
    Some(VisibleCopy {
        envelope: disk::inspect(&place).ok()?.envelope?,
        place: Place::Image(image.clone()),
        location: Some(image),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_not_taken_for_empty() {
        // Nothing can be read at its beginning.
        let image = PathBuf::from(format!("/proc/{}/mem", std::process::id()));
        let directory = image.parent().unwrap().to_owned();
        let rule = PathRule::new(&[], std::slice::from_ref(&directory), Path::new(""));
        let seen = |image: &Path| Seen::with_those_below(image, &BTreeMap::new(), &rule);
        let found = seen(&image);
        assert!(found.files.is_empty() && found.out_of_sight.is_some());
        assert!(seen(&directory.join("none")).out_of_sight.is_none());
    }
}

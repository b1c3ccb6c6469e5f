//! What is at the places that domain XML names: headers of images and the state of vTPMs, opened without a key.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::known::Known;
use super::standing::Found;
use crate::domain::{self, Domain, Object};
use crate::host::permitted::PathError;
use crate::host::storage;
use crate::model::deadlines::status::STORAGE;
use crate::model::envelope::{ObjectKind, VmId};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{ImageCopy, VolumeError};
use crate::object::{Located, ObjectError, Present, path_in};
use crate::vm::start;

/// An object, and what is at its place.
#[derive(Debug)]
pub(crate) struct SeenObject {
    pub(super) object: Object,
    pub(super) path: Option<PathBuf>,
    pub(super) found: Found,
    /// Why it would not open with any key, as far as that shows.
    pub(super) obstacle: Option<Problem>,
    /// The copy of an envelope in its image.
    pub(super) copy: ImageCopy,
}

/// What is at the places of objects: looked at for many VMs at once, so that what hangs is waited for once.
#[derive(Debug)]
pub(crate) struct Places(HashMap<PathBuf, Vec<(Naming, Place)>>);

/// Who names a path: a VM, and as what.
type Naming = (VmId, ObjectKind);

impl Places {
    /// Looks at what these VMs name. Storage that does not answer keeps back what is on it alone.
    pub(crate) fn of<'d>(domains: impl Iterator<Item = &'d Domain>, known: &Arc<Known>) -> Self {
        let mut wanted: HashMap<PathBuf, Vec<Naming>> = HashMap::new();
        for domain in domains {
            for object in domain::objects(domain) {
                if let Some(path) = path_in(domain, &object, &known.swtpm_dir) {
                    wanted.entry(path).or_default().push((domain.uuid, object.kind));
                }
            }
        }
        let paths = wanted.keys().cloned().collect();
        let wanted = Arc::new(wanted);
        let (theirs, known) = (Arc::clone(&wanted), Arc::clone(known));
        let look = move |path: &Path| -> Vec<Place> {
            let named = theirs.get(path).into_iter().flatten();
            named.map(|(vm, kind)| at(*vm, *kind, path, &known)).collect()
        };
        let found = storage::in_time(paths, STORAGE, look)
            .into_iter()
            .map(|(path, seen)| {
                let mut seen = seen.into_iter().flatten();
                let named = wanted.get(&path).into_iter().flatten();
                let places =
                    named.map(|naming| (*naming, seen.next().unwrap_or_else(|| Place::silent(&path))));
                let places = places.collect();
                (path, places)
            });
        Self(found.collect())
    }

    fn at(&self, path: &Path, naming: Naming) -> Option<&Place> {
        let named = self.0.get(path)?;
        named
            .iter()
            .find(|(named, _)| *named == naming)
            .map(|(_, place)| place)
    }
}

/// The objects that the XML names, with what is there. Of a VM that has nothing to do with virtseal nothing was looked at: its files are
/// its own.
pub(crate) fn at_objects(domain: &Domain, places: &Places, known: &Known) -> Vec<SeenObject> {
    let objects = domain::objects(domain).into_iter();
    let seen = objects.map(|object| {
        let path = path_in(domain, &object, &known.swtpm_dir);
        let place = path
            .as_deref()
            .and_then(|path| places.at(path, (domain.uuid, object.kind)));
        let place = place.cloned().unwrap_or_else(Place::out_of_sight);
        let is_gone = matches!(place.found, Found::Nothing | Found::Plain);
        let obstacle = place.obstacle.map(|problem| match is_gone {
            true => start::gone(&domain.name, object.kind, problem),
            false => problem,
        });
        SeenObject {
            object,
            path,
            found: place.found,
            obstacle,
            copy: place.copy,
        }
    });
    seen.collect()
}

#[derive(Clone, Debug)]
struct Place {
    found: Found,
    obstacle: Option<Problem>,
    copy: ImageCopy,
}

impl Place {
    fn out_of_sight() -> Self {
        Self {
            found: Found::OutOfSight,
            obstacle: None,
            copy: ImageCopy::None,
        }
    }

    fn silent(path: &Path) -> Self {
        let what = format!("{} is on storage that does not answer", path.display());
        let obstacle = Problem::unreachable(what.clone()).next("see why it does not answer");
        Self::without_copy(Found::Unreadable(what), obstacle)
    }

    fn without_copy(found: Found, obstacle: impl Into<Problem>) -> Self {
        Self {
            found,
            obstacle: Some(obstacle.into()),
            copy: ImageCopy::None,
        }
    }
}

fn at(vm: VmId, kind: ObjectKind, path: &Path, known: &Known) -> Place {
    let permit = |path: &Path| known.permit(vm, path);
    let located = match Located::of(kind, vm, Some(path), &known.swtpm_dir, permit) {
        Ok(None) => return Place::out_of_sight(),
        Ok(Some(located)) => located,
        Err(error) if error.is_missing() => {
            let missing = ObjectError::from(VolumeError::NotFound(path.to_owned()));
            return Place::without_copy(Found::Nothing, missing);
        }
        Err(error @ PathError::Io { .. }) => {
            return Place::without_copy(Found::Unreadable(chain(&error)), error);
        }
        Err(error) => return Place::without_copy(Found::NotPermitted(chain(&error)), error),
    };
    let present = match known.inspected.inspect(&located) {
        Ok(present) => present,
        Err(error) => return Place::without_copy(Found::Unreadable(chain(&error)), error),
    };
    let obstacle = located.objection(&present).map(Problem::from);
    let (found, copy) = match present {
        Present::Encrypted(copy) => {
            let ids = match &copy {
                ImageCopy::Envelope(envelope) => Some((envelope.id, envelope.vm)),
                ImageCopy::None | ImageCopy::Unreadable(_) => None,
            };
            (Found::Encrypted(ids), copy)
        }
        Present::Plain => (Found::Plain, ImageCopy::None),
        Present::Absent => (Found::Nothing, ImageCopy::None),
    };
    Place {
        found,
        obstacle,
        copy,
    }
}

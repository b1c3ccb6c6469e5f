//! What is at the places that domain XML names: headers of images and the state of vTPMs, opened without a key.

use std::path::{Path, PathBuf};

use super::known::Known;
use super::standing::Found;
use crate::domain::{self, Domain, Object};
use crate::host::permitted::PathError;
use crate::model::problem::{Problem, chain};
use crate::object::disk::{ImageCopy, VolumeError};
use crate::object::{Located, ObjectError, Present, path_in};

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// At files and state too.
    Closely,
    /// The VM has nothing to do with virtseal: its files are its own.
    AtXml,
}

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

/// The objects that the XML names, with what is there.
pub(crate) fn at_objects(domain: &Domain, look: Look, known: &Known) -> Vec<SeenObject> {
    let objects = domain::objects(domain).into_iter();
    let seen = objects.map(|object| {
        let path = path_in(domain, &object, &known.swtpm_dir);
        let place = match (look, &path) {
            (Look::AtXml, _) | (Look::Closely, None) => Place::out_of_sight(),
            (Look::Closely, Some(path)) => at(domain, &object, path, known),
        };
        SeenObject {
            object,
            path,
            found: place.found,
            obstacle: place.obstacle,
            copy: place.copy,
        }
    });
    seen.collect()
}

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

    fn without_copy(found: Found, obstacle: impl Into<Problem>) -> Self {
        Self {
            found,
            obstacle: Some(obstacle.into()),
            copy: ImageCopy::None,
        }
    }
}

fn at(domain: &Domain, object: &Object, path: &Path, known: &Known) -> Place {
    let permit = |path: &Path| known.permit(domain.uuid, path);
    let located = match Located::of(object.kind, domain.uuid, Some(path), &known.swtpm_dir, permit) {
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

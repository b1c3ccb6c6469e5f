//! What is at the places that domain XML names: headers of images and the state of vTPMs, opened without a key.

use std::path::{Path, PathBuf};

use super::known::Known;
use super::standing::Found;
use crate::domain::{self, Domain, Object};
use crate::model::problem::chain;
use crate::object::disk::ImageCopy;
use crate::object::{Located, Present, path_in};

/// How far to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// At files and state too.
    Closely,
    /// The VM has nothing to do with virtseal: its files are its own.
    AtXml,
}

/// An object, and what is at its place.
#[derive(Debug)]
pub struct SeenObject {
    pub(super) object: Object,
    pub(super) path: Option<PathBuf>,
    pub(super) found: Found,
    /// The copy of an envelope in its image.
    pub(super) copy: ImageCopy,
}

/// The objects that the XML names, with what is there.
#[must_use]
pub fn at_objects(domain: &Domain, look: Look, known: &Known) -> Vec<SeenObject> {
    let objects = domain::objects(domain).into_iter();
    let seen = objects.map(|object| {
        let path = path_in(domain, &object, &known.swtpm_dir);
        let (found, copy) = match (look, &path) {
            (Look::AtXml, _) | (Look::Closely, None) => (Found::OutOfSight, ImageCopy::None),
            (Look::Closely, Some(path)) => at(domain, &object, path, known),
        };
        SeenObject {
            object,
            path,
            found,
            copy,
        }
    });
    seen.collect()
}

fn at(domain: &Domain, object: &Object, path: &Path, known: &Known) -> (Found, ImageCopy) {
    let permit = |path: &Path| known.permit(domain.uuid, path);
    let located = Located::of(object.kind, domain.uuid, Some(path), &known.swtpm_dir, permit);
    let present = match located {
        Ok(None) => return (Found::OutOfSight, ImageCopy::None),
        Ok(Some(located)) => located.inspect().map_err(|error| chain(&error)),
        Err(error) if error.is_missing() => Ok(Present::Absent),
        Err(error) => Err(chain(&error)),
    };
    let found = match present {
        Ok(Present::Encrypted(copy)) => {
            let ids = match &copy {
                ImageCopy::Envelope(envelope) => Some((envelope.id, envelope.vm)),
                ImageCopy::None | ImageCopy::Unreadable(_) => None,
            };
            return (Found::Encrypted(ids), copy);
        }
        Ok(Present::Plain) => Found::Plain,
        Ok(Present::Absent) => Found::Nothing,
        Err(why) => Found::Unreadable(why),
    };
    (found, ImageCopy::None)
}

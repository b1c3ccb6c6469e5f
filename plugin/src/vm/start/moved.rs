//! Where an object is, once a start has opened it elsewhere than the keystore knows. ADR 0030.
//!
//! Domain XML alone moves nothing: the key has opened the object there. What is at the old place is looked at afterwards, when
//! nobody waits. As long as the object is there too, as with a copy that was made of it, the keystore goes on knowing that place:
//! who shreds the VM's keys must find it.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::envelope::EnvelopeId;
use crate::object::disk::{self, VolumeError};
use crate::store::{EnvelopeStore, StoreError};

/// An image that a start has opened with its key at another path than the keystore has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// Its envelope.
    pub envelope: EnvelopeId,
    /// Where the keystore has it; empty for nowhere.
    pub from: String,
    /// Where it was opened.
    pub to: PathBuf,
}

/// What is at the old place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OldPlace {
    Nothing,
    /// What is not this object.
    Another,
    /// The object, or a copy of it.
    Same,
    /// It can't be read.
    NotKnown,
}

impl Moved {
    /// Has the keystore learn of it, unless the object is at its old place too, or may be. Says whether it did.
    ///
    /// # Errors
    /// Those of the store.
    pub fn settle(&self, keystore: &dyn EnvelopeStore, rule: &PathRule) -> Result<bool, StoreError> {
        let permit = |path: &Path| rule.permit_known(path, [&self.from].into_iter());
        let has_left = match self.old_place(permit) {
            OldPlace::Nothing | OldPlace::Another => true,
            OldPlace::Same | OldPlace::NotKnown => false,
        };
        let record = keystore.readable_envelope(self.envelope)?;
        let is_as_it_was = record.is_some_and(|record| record.location == self.from);
        if has_left && is_as_it_was {
            keystore.set_location(self.envelope, &self.to.display().to_string())?;
        }
        Ok(has_left && is_as_it_was)
    }

    fn old_place(&self, permit: impl Fn(&Path) -> Result<PermittedPath, PathError>) -> OldPlace {
        if self.from.is_empty() {
            return OldPlace::Nothing;
        }
        // Its UUID goes with every copy of a LUKS header, whatever became of the keyslots since.
        let Ok(Some(Some(uuid))) = luks_at(&self.to, &permit) else {
            return OldPlace::NotKnown;
        };
        match luks_at(Path::new(&self.from), &permit) {
            Ok(None) => OldPlace::Nothing,
            Ok(Some(found)) if found == Some(uuid) => OldPlace::Same,
            Ok(Some(_)) => OldPlace::Another,
            Err(_) => OldPlace::NotKnown,
        }
    }
}

/// The UUID of the LUKS header at `path`, if it is an image with one, if there is an image.
fn luks_at(
    path: &Path,
    permit: impl Fn(&Path) -> Result<PermittedPath, PathError>,
) -> Result<Option<Option<Uuid>>, VolumeError> {
    let place = match permit(path) {
        Ok(place) => place,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match disk::inspect(&place) {
        Ok(info) => Ok(Some(info.luks.map(|luks| luks.uuid))),
        Err(VolumeError::NotFound(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::object::nvram;
    use crate::secret::Dek;

    fn by_root(path: &Path) -> Result<PermittedPath, PathError> {
        PermittedPath::named_by_root(path).map_err(|source| PathError::Io {
            at: path.to_owned(),
            source,
        })
    }

    #[test]
    fn an_object_has_left_only_a_place_where_nothing_of_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("template"), [7; 1024]).unwrap();
        for name in ["new", "other"] {
            let passphrase = Dek::random().unwrap().passphrase().unwrap();
            let place = |name| by_root(&path(name)).unwrap();
            let made = nvram::prepare(&place("template"), &place(name), None, &passphrase).unwrap();
            made.publish().unwrap();
        }
        fs::copy(path("new"), path("copy")).unwrap();
        std::os::unix::fs::symlink(path("new"), path("link")).unwrap();
        fs::write(path("damaged"), b"LUKS\xba\xbe\0\x01").unwrap();
        let look = |from: &str, to: &str| {
            let moved = Moved {
                envelope: EnvelopeId::random(),
                from: from.to_owned(),
                to: path(to),
            };
            moved.old_place(by_root)
        };
        let old = |name: &str| look(&path(name).display().to_string(), "new");
        assert_eq!(old("gone"), OldPlace::Nothing);
        assert_eq!(old("no/directory"), OldPlace::Nothing);
        assert_eq!(look("", "new"), OldPlace::Nothing);
        assert_eq!(old("copy"), OldPlace::Same);
        assert_eq!(old("link"), OldPlace::Same);
        assert_eq!(old("other"), OldPlace::Another);
        assert_eq!(old("template"), OldPlace::Another);
        assert_eq!(old("damaged"), OldPlace::NotKnown);
        // What was opened is not there any more: nobody knows what moved where.
        let copy = path("copy").display().to_string();
        assert_eq!(look(&copy, "gone"), OldPlace::NotKnown);
    }
}

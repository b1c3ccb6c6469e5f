//! Where an object is, once a start, `vm seal` or `vm adopt` has opened it elsewhere than the keystore knows. ADR 0030.
//!
//! Domain XML alone moves nothing: the key has opened the object there. What is at the old place is looked at when no start
//! waits. As long as the object is there too, as with a copy that was made of it, the keystore goes on knowing that place:
//! who shreds the VM's keys must find it. A header's UUID shows that it is there, and never that it is not: whoever has made the copy
//! can have changed that.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::host::Host;
use crate::domain::{Domain, encrypted_layers};
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::act::{Act, StepCode, Verb};
use crate::model::envelope::{EnvelopeId, VmId};
use crate::model::problem::Problem;
use crate::object::disk::{self, VolumeError};
use crate::secret::Passphrase;
use crate::store::{EnvelopeRecord, StoreError};

/// An image that its VM has at another path than the keystore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Moved {
    pub envelope: EnvelopeId,
    /// Where the keystore has it; empty for nowhere.
    pub from: String,
    /// Where the VM has it.
    pub to: PathBuf,
}

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
    /// If `vm` has the image of `record` at `path`. That of another VM, which is shared, is where that one's XML says.
    pub(crate) fn of(record: &EnvelopeRecord, vm: VmId, path: &Path) -> Option<Self> {
        let is_elsewhere = record.envelope.vm == vm && record.location != path.display().to_string();
        is_elsewhere.then(|| Self {
            envelope: record.envelope.id,
            from: record.location.clone(),
            to: path.to_owned(),
        })
    }

    /// The images that the XML names elsewhere than the keystore has them, by the records of its VM.
    pub(crate) fn among(domain: &Domain, records: &[EnvelopeRecord]) -> Vec<Self> {
        let layers = encrypted_layers(domain).into_iter();
        let moved = layers.filter_map(|(id, path)| {
            let record = records.iter().find(|record| record.envelope.id == id)?;
            Self::of(record, domain.uuid, &path)
        });
        moved.collect()
    }

    pub(crate) fn act(&self) -> Act {
        let (id, to) = (self.envelope, self.to.display());
        let what = match &self.from[..] {
            "" => format!("that the object of envelope {id} is {to}"),
            from => format!("that {from} is {to} now"),
        };
        Verb::Note.act(StepCode::NotePath, what).with(id).at(&self.to)
    }

    /// [`Moved::settle`] once its key has opened the image where it is now.
    pub(crate) fn open_and_settle(&self, host: &Host<'_>) -> Result<bool, Problem> {
        let Some(record) = host.keystore.readable_envelope(self.envelope)? else {
            return Ok(false);
        };
        let dek = host.recipients.open_envelope(&record.envelope)?;
        host.open_object(&record.envelope, &self.to, &dek)?;
        Ok(self.settle(host)?)
    }

    /// Has the keystore learn of it, unless the object is at its old place too, or may be. Says whether it did. For who has
    /// opened the image where it is now.
    pub(crate) fn settle(&self, host: &Host<'_>) -> Result<bool, StoreError> {
        let record = host.keystore.readable_envelope(self.envelope)?;
        let is_as_it_was = record.is_some_and(|record| record.location == self.from);
        let follows = is_as_it_was && self.has_left(host);
        if follows {
            host.keystore
                .set_location(self.envelope, &self.to.display().to_string())?;
        }
        Ok(follows)
    }

    /// Whether the image is not at its old place any more, by what is there.
    pub(crate) fn has_left(&self, host: &Host<'_>) -> bool {
        let permit = |path: &Path| host.paths.permit_known(path, [&self.from].into_iter());
        let passphrase = || {
            let record = host.keystore.readable_envelope(self.envelope).ok()??;
            host.passphrase_of(&record).ok()
        };
        match self.old_place(permit, passphrase) {
            OldPlace::Nothing | OldPlace::Another => true,
            OldPlace::Same | OldPlace::NotKnown => false,
        }
    }

    /// `passphrase` is that of the object, if it can be had now.
    fn old_place(
        &self,
        permit: impl Fn(&Path) -> Result<PermittedPath, PathError>,
        passphrase: impl FnOnce() -> Option<Passphrase>,
    ) -> OldPlace {
        if self.from.is_empty() {
            return OldPlace::Nothing;
        }
        // Its UUID goes with every copy of a LUKS header, whatever became of the keyslots since.
        let Ok(Some((_, Some(uuid)))) = luks_at(&self.to, &permit) else {
            return OldPlace::NotKnown;
        };
        match luks_at(Path::new(&self.from), &permit) {
            Ok(None) => OldPlace::Nothing,
            Ok(Some((_, None))) => OldPlace::Another,
            Ok(Some((_, Some(found)))) if found == uuid => OldPlace::Same,
            Ok(Some((place, Some(_)))) => {
                match passphrase().map(|passphrase| disk::open(&place, &passphrase)) {
                    Some(Ok(_)) => OldPlace::Same,
                    Some(Err(VolumeError::NoKeyslotOpens(_))) => OldPlace::Another,
                    Some(Err(_)) | None => OldPlace::NotKnown,
                }
            }
            Err(_) => OldPlace::NotKnown,
        }
    }
}

/// What is at `path`, if anything is, with the UUID of its LUKS header, if it has one.
fn luks_at(
    path: &Path,
    permit: impl Fn(&Path) -> Result<PermittedPath, PathError>,
) -> Result<Option<(PermittedPath, Option<Uuid>)>, VolumeError> {
    let place = match permit(path) {
        Ok(place) => place,
        Err(error) if error.is_missing() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match disk::inspect(&place) {
        Ok(info) => Ok(Some((place, info.luks.map(|luks| luks.uuid)))),
        Err(VolumeError::NotFound(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::model::envelope::{Envelope, fixture};
    use crate::object::nvram;
    use crate::secret::Dek;
    use crate::store::EnvelopeState;

    fn by_root(path: &Path) -> Result<PermittedPath, PathError> {
        PermittedPath::named_by_root(path).map_err(|source| PathError::Io {
            at: path.to_owned(),
            source,
        })
    }

    #[test]
    fn only_the_own_images_of_a_vm_that_are_elsewhere_have_moved() {
        let (vm, other) = (VmId::random(), VmId::random());
        let record = |envelope: Envelope, location: &str| EnvelopeRecord {
            envelope,
            state: EnvelopeState::Active,
            location: location.to_owned(),
            created: 0,
            updated: 0,
        };
        let records = [
            record(fixture::envelope(vm).into_envelope(), "/old"),
            record(fixture::envelope(vm).into_envelope(), "/stays"),
            record(fixture::envelope(other).into_envelope(), "/shared"),
            record(fixture::envelope(vm).into_envelope(), "/not/named"),
        ];
        let disks = records[..3]
            .iter()
            .zip(["/new", "/stays", "/elsewhere"])
            .zip(["vda", "vdb", "vdc"]);
        let disks: String = disks
            .map(|((record, path), target)| {
                format!(
                    "<disk type='file'><source file='{path}'><encryption format='luks'><secret type='passphrase' uuid='{}'/>\
                     </encryption></source><target dev='{target}'/></disk>",
                    record.envelope.id
                )
            })
            .collect();
        let xml =
            format!("<domain type='kvm'><name>a</name><uuid>{vm}</uuid><devices>{disks}</devices></domain>");
        let moved = Moved::among(&Domain::parse(&xml).unwrap(), &records);
        let expected = Moved {
            envelope: records[0].envelope.id,
            from: "/old".to_owned(),
            to: "/new".into(),
        };
        assert_eq!(moved, [expected]);
        assert_eq!(moved[0].act().to_string(), "note that /old is /new now");
    }

    #[test]
    fn an_object_has_left_only_a_place_where_nothing_of_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("template"), [7; 1024]).unwrap();
        let (dek, other) = (Dek::random().unwrap(), Dek::random().unwrap());
        for (name, dek) in [("new", &dek), ("other", &other)] {
            let place = |name| by_root(&path(name)).unwrap();
            let passphrase = dek.passphrase().unwrap();
            let made = nvram::create(&place("template"), &place(name), None, &passphrase).unwrap();
            made.publish().unwrap();
        }
        fs::copy(path("new"), path("copy")).unwrap();
        std::os::unix::fs::symlink(path("new"), path("link")).unwrap();
        fs::write(path("damaged"), b"LUKS\xba\xbe\0\x01").unwrap();
        // A copy to which its maker has given another UUID: where that is in a header is said in LUKS1, and no key is needed.
        let mut disguised = fs::read(path("new")).unwrap();
        disguised[168..204].copy_from_slice(Uuid::from_u128(7).to_string().as_bytes());
        fs::write(path("disguised"), disguised).unwrap();
        let look = |from: &str, to: &str, passphrase: Option<Passphrase>| {
            let moved = Moved {
                envelope: EnvelopeId::random(),
                from: from.to_owned(),
                to: path(to),
            };
            moved.old_place(by_root, || passphrase)
        };
        let key = || dek.passphrase().ok();
        let shown = |name: &str| path(name).display().to_string();
        let old = |name: &str| look(&shown(name), "new", key());
        assert_eq!(old("gone"), OldPlace::Nothing);
        assert_eq!(old("no/directory"), OldPlace::Nothing);
        assert_eq!(look("", "new", key()), OldPlace::Nothing);
        assert_eq!(old("copy"), OldPlace::Same);
        assert_eq!(old("link"), OldPlace::Same);
        assert_eq!(old("other"), OldPlace::Another);
        assert_eq!(old("template"), OldPlace::Another);
        assert_eq!(old("damaged"), OldPlace::NotKnown);
        assert_eq!(look(&shown("new"), "disguised", key()), OldPlace::Same);
        assert_eq!(look(&shown("new"), "disguised", None), OldPlace::NotKnown);
        assert_eq!(look(&shown("other"), "new", None), OldPlace::NotKnown);
        // What was opened is not there any more: nobody knows what moved where.
        assert_eq!(look(&shown("copy"), "gone", key()), OldPlace::NotKnown);
    }
}

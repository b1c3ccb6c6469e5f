//! Taking a VM back whose XML no longer says that it is sealed: an older XML was defined again, or the metadata was lost.
//!
//! The keystore knows by the VM's UUID what was sealed. Every object is opened with its envelope before the XML names that
//! again; what is missing is never made anew in its place.

use std::path::{Path, PathBuf};

use super::Host;
use super::known::{known, of_another};
use crate::domain::Domain;
use crate::host::libvirt::DefinedDomain;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ObjectKind, VmId};
use crate::model::problem::Problem;
use crate::object::disk::{self, VolumeError};
use crate::secret::Passphrase;
use crate::store::EnvelopeState;
use crate::terminal::word;
use crate::vm::has_run::HasRun;
use crate::vm::host::passphrase;
use crate::vm::start::adoption::{believe, not_believed};

/// What is at the path of a variable store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreFile {
    Missing,
    Plain,
    Encrypted,
}

impl StoreFile {
    /// At a path that the XML of `vm` names, or the keystore.
    pub(super) fn at(host: &Host<'_>, vm: VmId, path: &Path) -> Result<Self, Problem> {
        let place = match host.place_of(vm, path)? {
            Ok(place) => place,
            Err(error) if error.is_missing() => return Ok(Self::Missing),
            Err(error) => return Err(error.into()),
        };
        match disk::inspect(&place) {
            Ok(info) if info.format.is_encrypted() => Ok(Self::Encrypted),
            Ok(_) => Ok(Self::Plain),
            Err(VolumeError::NotFound(_)) => Ok(Self::Missing),
            Err(error) => Err(error.into()),
        }
    }
}

/// A variable store that the keystore knows for the VM.
#[derive(Clone, Debug)]
pub(super) struct KnownStore {
    pub(super) path: PathBuf,
    pub(super) file: StoreFile,
    pub(super) state: EnvelopeState,
}

/// What becomes of the variable store of a VM whose XML names none that is encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum StoreDecision {
    /// There was none: one is made from the template.
    Make,
    /// It is here.
    TakeBack(PathBuf),
    /// The XML names a plain file, and this is the store that was sealed.
    Elsewhere(PathBuf),
    /// The guest has written to this one, and it is missing or was replaced by a plain one.
    Lost(PathBuf),
    /// It is encrypted, and nothing is known here that could open it.
    NotKnown,
}

/// Decides by the file that the XML names, those that the keystore or the XML knows, and whether the VM has run under seal.
pub(super) fn decide_store(
    named: &Path,
    file: StoreFile,
    known: &[KnownStore],
    has_run: HasRun,
) -> StoreDecision {
    if file == StoreFile::Encrypted {
        return if known.is_empty() {
            StoreDecision::NotKnown
        } else {
            StoreDecision::TakeBack(named.to_owned())
        };
    }
    let active = || known.iter().filter(|store| store.state == EnvelopeState::Active);
    if let Some(elsewhere) = active().find(|store| store.path != named && store.file == StoreFile::Encrypted)
    {
        return match file {
            StoreFile::Missing => StoreDecision::TakeBack(elsewhere.path.clone()),
            StoreFile::Plain | StoreFile::Encrypted => StoreDecision::Elsewhere(elsewhere.path.clone()),
        };
    }
    match (has_run, active().next()) {
        (HasRun::No, _) | (_, None) => StoreDecision::Make,
        (HasRun::Yes | HasRun::NotKnown, Some(lost)) => StoreDecision::Lost(lost.path.clone()),
    }
}

pub(super) fn known_stores(host: &Host<'_>, vm: VmId) -> Result<(Vec<KnownStore>, Vec<Envelope>), Problem> {
    let records = known(host, vm, ObjectKind::Nvram)?;
    let mut stores = Vec::with_capacity(records.len());
    for record in &records {
        let path = PathBuf::from(&record.location);
        stores.push(KnownStore {
            file: StoreFile::at(host, vm, &path)?,
            path,
            state: record.state,
        });
    }
    Ok((
        stores,
        records.into_iter().map(|record| record.envelope).collect(),
    ))
}

/// A store that was sealed, where `file` is now.
pub(super) fn store_lost(path: &Path, file: StoreFile) -> Problem {
    let shown = path.display();
    Problem::would_lose_key(match file {
        StoreFile::Plain => {
            format!("the UEFI variable store {shown} was sealed, and a plain one is in its place")
        }
        StoreFile::Missing | StoreFile::Encrypted => {
            format!("the UEFI variable store {shown} was sealed, and is not there any more")
        }
    })
    .next(format!("restore {} from a backup", word(shown)))
}

pub(super) fn store_elsewhere(name: &str, named: &Path, sealed: &Path) -> Problem {
    Problem::would_lose_key(format!(
        "the XML names the plain {} as its UEFI variable store, and the one that was sealed is {}",
        named.display(),
        sealed.display()
    ))
    .next(
        Advice::EditXml(name.to_owned())
            .within(format!("name {} in <nvram>", word(sealed.display())))
            .then(Advice::SealVm(name.to_owned())),
    )
}

/// An encrypted store that no envelope of the VM is for.
pub(super) fn store_not_known(host: &Host<'_>, domain: &Domain, path: &Path) -> Result<Problem, Problem> {
    let (shown, again) = (path.display(), Advice::SealVm(domain.name.clone()));
    let location = shown.to_string();
    let records = host.keystore.envelopes()?.sound;
    if let Some(other) = records
        .iter()
        .find(|record| record.envelope.kind == ObjectKind::Nvram && record.location == location)
    {
        let what = format!(
            "its UEFI variable store {shown} was made for VM {}",
            other.envelope.vm
        );
        return Ok(Problem::failed(what).next(of_another(host, domain, other.envelope.vm)));
    }
    let what =
        format!("its UEFI variable store {shown} is encrypted, and no envelope here is known to open it");
    let file = word(shown);
    let anew = Advice::from("only if its boot entries and enrolled keys may be lost, set it aside")
        .within(format!("mv {file} {file}.sealed"));
    Ok(Problem::not_found(what).next(
        Advice::DefineSealedXml(None)
            .then(again.clone())
            .or_else(anew.then(again)),
    ))
}

/// Opens the variable store with one of `envelopes`.
pub(super) fn open_store(
    host: &Host<'_>,
    defined: &DefinedDomain,
    path: &Path,
    envelopes: &[Envelope],
) -> Result<Envelope, Problem> {
    let place = host.permit_known(defined.vm, path)?;
    if !disk::inspect(&place)?.format.is_bare_luks() {
        return Err(VolumeError::NotEncrypted(path.to_owned()).into());
    }
    let location = path.display().to_string();
    first_that_opens(envelopes, |envelope| {
        adopt(host, defined, envelope, &location, |passphrase| {
            Ok(disk::open(&place, passphrase)?)
        })
    })
}

/// The first of them with which `open` succeeds; if none does, why the first one failed.
pub(super) fn first_that_opens(
    envelopes: &[Envelope],
    open: impl Fn(&Envelope) -> Result<Envelope, Problem>,
) -> Result<Envelope, Problem> {
    let mut failed = None;
    for envelope in envelopes {
        match open(envelope) {
            Ok(opened) => return Ok(opened),
            Err(failure) => failed = failed.or(Some(failure)),
        }
    }
    Err(failed.unwrap_or_else(|| Problem::not_found("no envelope of it is known here")))
}

/// Takes the object at `location` over, once `carried`, or what the keystore has of it, is verified by the key that opens it.
pub(super) fn adopt(
    host: &Host<'_>,
    defined: &DefinedDomain,
    carried: &Envelope,
    location: &str,
    open: impl FnOnce(&Passphrase) -> Result<(), Problem>,
) -> Result<Envelope, Problem> {
    let record = host.keystore.readable_envelope(carried.id)?;
    let first = record.as_ref().map_or(carried, |record| &record.envelope);
    let dek = host.recipients.open_envelope(first)?;
    let believed = believe(host.recipients, record.as_ref(), Some(carried), &dek)
        .map_err(|error| not_believed(&defined.name, &error))?;
    open(&passphrase(&dek)?)?;
    if !believed.envelope.serves(defined.vm) {
        return Err(Problem::failed(format!(
            "it belongs to VM {}, which does not share it",
            believed.envelope.vm
        ))
        .next(Advice::ShowVm(defined.name.clone())));
    }
    if believed.is_news {
        host.keystore.put(&believed.envelope, location)?;
    }
    if believed.envelope.vm == defined.vm {
        host.keystore.set_location(believed.envelope.id, location)?;
    }
    host.keystore.activate(believed.envelope.id)?;
    Ok(believed.envelope.into_envelope())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(path: &str, file: StoreFile, state: EnvelopeState) -> KnownStore {
        KnownStore {
            path: path.into(),
            file,
            state,
        }
    }

    #[test]
    fn a_variable_store_is_taken_back_where_it_is_and_never_made_anew_in_its_place() {
        use EnvelopeState::{Active, Pending};
        use StoreFile::{Encrypted, Missing, Plain};
        let named = Path::new("/nvram/a");
        let decide = |file, known: &[KnownStore], has_run| decide_store(named, file, known, has_run);
        let back = |path: &str| StoreDecision::TakeBack(path.into());
        let lost = |path: &str| StoreDecision::Lost(path.into());

        assert_eq!(decide(Encrypted, &[], HasRun::NotKnown), StoreDecision::NotKnown);
        for state in [Active, Pending] {
            let here = [store("/nvram/a", Encrypted, state)];
            assert_eq!(decide(Encrypted, &here, HasRun::Yes), back("/nvram/a"));
            // It was moved, and the XML with it.
            let moved = [store("/nvram/old", Missing, state)];
            assert_eq!(decide(Encrypted, &moved, HasRun::Yes), back("/nvram/a"));
        }

        let elsewhere = [store("/nvram/b", Encrypted, Active)];
        assert_eq!(decide(Missing, &elsewhere, HasRun::Yes), back("/nvram/b"));
        assert_eq!(
            decide(Plain, &elsewhere, HasRun::NotKnown),
            StoreDecision::Elsewhere("/nvram/b".into())
        );

        for (file, path) in [(Missing, "/nvram/a"), (Plain, "/nvram/a"), (Missing, "/nvram/b")] {
            let gone = [store(path, file, Active)];
            for has_run in [HasRun::Yes, HasRun::NotKnown] {
                assert_eq!(decide(file, &gone, has_run), lost(path), "{file:?} {path}");
            }
            // Unsealed before it ever ran, or a seal that was killed.
            assert_eq!(decide(file, &gone, HasRun::No), StoreDecision::Make);
        }
        assert_eq!(decide(Missing, &[], HasRun::Yes), StoreDecision::Make);
        assert_eq!(
            decide(Missing, &[store("/nvram/a", Missing, Pending)], HasRun::Yes),
            StoreDecision::Make
        );
    }
}

//! Copies of envelopes as they are, not as the keystore has noted: what a deletion must know and a job should begin with.
//!
//! An admin may define a VM from an older dump, put an image back from a backup, revert to a snapshot, or bring a VM from
//! another host: nobody tells the keystore.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use super::Daemon;
use super::paths;
use crate::domain::{Domain, DomainError, Metadata, encrypted_layers};
use crate::host::libvirt::{DefinedDomain, KeptXml};
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind, Precedence, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::object::Located;
use crate::object::disk::{self, ImageCopy};
use crate::secret::Dek;
use crate::store::{CopyPlace, EnvelopeRecord, EnvelopeStore, LeftBehind};
use crate::vm::names::unreachable;
use crate::vm::start::adoption::{Doubt, Weighed, believe, weigh};

/// A copy that this host can see.
#[derive(Debug)]
pub(super) struct VisibleCopy {
    pub(super) envelope: Envelope,
    /// The file of its object, if the place tells.
    pub(super) location: Option<PathBuf>,
    pub(super) place: Place,
}

/// Those of all VMs and images.
#[derive(Debug, Default)]
pub(super) struct Visible {
    pub(super) copies: Vec<VisibleCopy>,
    /// What could not be read, and where: nobody knows what is in there.
    pub(super) unreadable: Vec<String>,
    /// Images whose copy can't be read, or is of another envelope than the keystore has for them.
    bad_images: Vec<PathBuf>,
}

/// What came to this host with VMs and images, and is not taken in.
pub(super) struct Travelling {
    /// What could not be read, and where.
    pub(super) unreadable: Vec<String>,
    /// What a job leaves as it is, and why.
    pub(super) rivals: Vec<LeftBehind>,
}

/// Whether somebody who had the key wrote a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    Authentic,
    Forged,
    /// The key is out of reach now, or it has no MAC.
    Unknown,
}

/// Where it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Place {
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
    fn kept(&self) -> Option<CopyPlace> {
        match self {
            Self::Xml(_) => Some(CopyPlace::Xml),
            Self::Snapshot(..) | Self::Keystore => None,
            Self::Image(_) => Some(CopyPlace::Image),
        }
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

impl Daemon {
    /// Every copy in the XML of a domain or of a snapshot, and in every image that these or the keystore name. One that can't
    /// be read does not hide the others. An image that is not there now is left out.
    ///
    /// # Errors
    /// When libvirt does not answer.
    pub(super) fn visible_copies(&self) -> Result<Visible, Problem> {
        let kept = self.background.every_xml().map_err(|error| unreachable(&error))?;
        let (mut visible, mut known) = (Visible::default(), BTreeMap::<_, Vec<EnvelopeId>>::new());
        let rule = paths::rule(self);
        self.keystore.each_envelope(|record| {
            if record.envelope.kind == ObjectKind::Disk && !record.location.is_empty() {
                let place = PathBuf::from(record.location);
                known.entry(place).or_default().push(record.envelope.id);
            }
        })?;
        let mut images: BTreeSet<PathBuf> = known.keys().cloned().collect();
        let permit = |path: &Path| {
            let known = known.get_key_value(path).map(|(place, _)| place);
            rule.permit_known(path, known.into_iter())
        };
        for kept in &kept {
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

    /// Envelopes of which somebody who had the key made another version of the same generation: which of them counts is root's to
    /// decide, and a job would hide the other. One that was forged follows the keystore.
    fn rivals(&self, copies: &[VisibleCopy]) -> Vec<LeftBehind> {
        let mut claims: BTreeMap<EnvelopeId, Vec<&VisibleCopy>> = BTreeMap::new();
        for copy in copies.iter().filter(|copy| copy.place.kept().is_some()) {
            claims.entry(copy.envelope.id).or_default().push(copy);
        }
        // Anybody can write any number of copies: each envelope is opened once.
        let of_one = |(id, copies)| self.rivals_of(id, copies).unwrap_or_default();
        claims.into_iter().flat_map(of_one).collect()
    }

    fn rivals_of(&self, id: EnvelopeId, mut copies: Vec<&VisibleCopy>) -> Option<Vec<LeftBehind>> {
        let record = self.keystore.readable_envelope(id).ok()??;
        copies.retain(|copy| copy.envelope.supersedes(&record.envelope) == Precedence::Conflict);
        copies.first()?;
        let left = |copy: &VisibleCopy, why: &str| LeftBehind {
            envelope: id,
            reason: format!(
                "{} has another version of generation {}; {why}: {}",
                copy.place,
                copy.envelope.generation,
                Advice::ShowVm(record.envelope.vm.to_string())
            ),
            again: false,
        };
        let opened = self.recipients.open_envelope(&record.envelope);
        let dek = match opened {
            Ok(dek) => dek,
            // The job would write over it without having seen whether it is true.
            Err(error) => {
                let why = format!("whether it is true can't be told now ({})", error.reasons());
                return Some(copies.into_iter().map(|copy| left(copy, &why)).collect());
            }
        };
        let own = record.verify(&dek).ok()?;
        copies.retain(|copy| match weigh(&own, &copy.envelope, &dek) {
            Weighed::Doubtful(Doubt::Conflict) => true,
            Weighed::Doubtful(Doubt::Unverified(_)) => {
                // Where that fails it is tried at the next job.
                let _ = self.note_behind(copy, &record, Proof::Forged);
                false
            }
            _ => false,
        });
        let is_open = |copy: &VisibleCopy| left(copy, "which one counts is to be decided");
        Some(copies.into_iter().map(is_open).collect())
    }

    /// The keystore's copy is written over one that can't be read or is of another object, once that has opened the image.
    fn note_bad_images(&self, images: &[PathBuf]) -> Result<(), Problem> {
        if images.is_empty() {
            return Ok(());
        }
        let records = self.keystore.envelopes()?.sound.into_iter();
        for record in
            records.filter(|record| images.iter().any(|image| *image == Path::new(&record.location)))
        {
            self.host_store
                .copy_is_behind(&record.envelope, CopyPlace::Image)?;
        }
        self.copies_bell.ring();
        Ok(())
    }

    /// The same for the images of one VM, by what its XML names now.
    pub(super) fn note_bad_images_of(&self, xml: &str) -> Result<(), Problem> {
        let Ok(domain) = Domain::parse(xml) else {
            return Ok(());
        };
        let (rule, known) = (
            paths::rule(self),
            paths::locations_of(self.keystore.as_ref(), domain.uuid)?,
        );
        for (id, path) in encrypted_layers(&domain) {
            let place = rule.permit_known(&path, known.iter());
            let copy = place.map(|place| disk::identify(&place).map(|(_, copy)| copy));
            let is_bad = match copy {
                Ok(Ok(ImageCopy::Unreadable(_))) => true,
                Ok(Ok(ImageCopy::Envelope(found))) => found.id != id,
                _ => false,
            };
            if let (true, Some(record)) = (is_bad, self.keystore.readable_envelope(id)?) {
                self.host_store
                    .copy_is_behind(&record.envelope, CopyPlace::Image)?;
                self.copies_bell.ring();
            }
        }
        Ok(())
    }

    /// Notes that a copy which differs from what the keystore has is behind. Says whether it can follow. The KEKs that it names are
    /// kept for it if it was verified.
    pub(super) fn note_behind(
        &self,
        copy: &VisibleCopy,
        kept: &EnvelopeRecord,
        proof: Proof,
    ) -> Result<bool, Problem> {
        let Some(place) = copy.place.kept() else {
            return Ok(false);
        };
        let needs = match proof {
            Proof::Authentic => &copy.envelope,
            Proof::Forged | Proof::Unknown => &kept.envelope,
        };
        self.host_store.copy_is_behind(needs, place)?;
        self.copies_bell.ring();
        Ok(true)
    }

    /// The keystore learns of envelopes that travelled here, as it would at the start of their VM: those that it does not
    /// know, or in an earlier generation, that verify and open. A job that did not know them would leave them behind. What
    /// can't be believed is passed over; what can't be read is named.
    pub(super) fn adopt_foreign_envelopes(&self) -> Result<Travelling, Problem> {
        let visible = self.visible_copies()?;
        self.note_bad_images(&visible.bad_images)?;
        let rivals = self.rivals(&visible.copies);
        self.take_in_all(
            visible
                .copies
                .into_iter()
                .chain(held_copies(self.keystore.as_ref(), None)),
        )?;
        Ok(Travelling {
            unreadable: visible.unreadable,
            rivals,
        })
    }

    fn take_in_all(&self, copies: impl IntoIterator<Item = VisibleCopy>) -> Result<(), Problem> {
        let mut candidates = Vec::new();
        for copy in copies {
            let record = self.keystore.readable_envelope(copy.envelope.id)?;
            if let Some(location) = to_take_in(&copy, record.as_ref()) {
                candidates.push((copy, record, location));
            }
        }
        let first: Vec<_> = candidates
            .iter()
            .map(|(copy, record, _)| record.as_ref().map_or(&copy.envelope, |record| &record.envelope))
            .collect();
        let opened = self.recipients.open_each(&first);
        for ((copy, record, location), dek) in candidates.iter().zip(opened) {
            let Ok(dek) = dek else { continue };
            match self.take_in(copy, record.as_ref(), location, &dek) {
                Ok(()) => {}
                Err(failure) => {
                    tracing::warn!(envelope = %copy.envelope.id, place = %copy.place, "not taken in: {failure}");
                }
            }
        }
        Ok(())
    }

    /// Whether a copy may say the truth, as far as this host can tell: what its keystore knows shows whether it was forged.
    pub(super) fn may_be_true(&self, copy: &VisibleCopy) -> bool {
        let Ok(Some(record)) = self.keystore.readable_envelope(copy.envelope.id) else {
            return true;
        };
        match self.recipients.open_envelope(&record.envelope) {
            Ok(dek) => copy.envelope.verify(&dek).is_ok(),
            Err(_) => true,
        }
    }

    /// What the key of the keystore's version says of a copy.
    pub(super) fn proof_of(&self, copy: &VisibleCopy, kept: &EnvelopeRecord) -> Proof {
        if copy.envelope.format() != Envelope::FORMAT {
            return Proof::Unknown;
        }
        match self.recipients.open_envelope(&kept.envelope) {
            Ok(dek) if copy.envelope.verify(&dek).is_ok() => Proof::Authentic,
            Ok(_) => Proof::Forged,
            Err(_) => Proof::Unknown,
        }
    }

    /// What came with this VM, as far as it can be believed now.
    pub(super) fn take_in_copies_of(&self, defined: &DefinedDomain) {
        let kept = KeptXml {
            vm: defined.vm,
            name: defined.name.clone(),
            snapshot: None,
            xml: defined.xml.clone(),
        };
        let mut visible = Visible::default();
        let Ok(()) = visible.add_those_in(&kept) else {
            return;
        };
        if self.has_damaged(defined.vm) {
            let images = Metadata::sources_in(&defined.xml).unwrap_or_default();
            let (rule, known) = (
                paths::rule(self),
                paths::locations_of(self.keystore.as_ref(), defined.vm).unwrap_or_default(),
            );
            let places = images
                .iter()
                .filter_map(|image| rule.permit_known(image, known.iter()).ok());
            visible.copies.extend(places.filter_map(carried));
            visible
                .copies
                .extend(held_copies(self.keystore.as_ref(), Some(defined.vm)));
        }
        if let Err(failure) = self.take_in_all(visible.copies) {
            tracing::warn!(domain = defined.name, "{failure}");
        }
    }

    /// Whether rows of its envelopes are damaged.
    fn has_damaged(&self, vm: VmId) -> bool {
        let known = self.keystore.envelopes_of(vm);
        known.is_ok_and(|known| !known.damaged.is_empty())
    }

    pub(super) fn take_in(
        &self,
        copy: &VisibleCopy,
        record: Option<&EnvelopeRecord>,
        location: &str,
        dek: &Dek,
    ) -> Result<(), Problem> {
        let refused = |error| Problem::new(Code::Failed, chain(&error));
        let believed = believe(&self.recipients, record, Some(&copy.envelope), dek).map_err(refused)?;
        if let Some(doubt) = &believed.doubt {
            tracing::warn!("{}", doubt.words(&copy.envelope, &copy.place.to_string()));
        }
        if record.is_none() {
            self.open_its_object(&believed.envelope, location, dek)?;
        }
        if believed.is_news {
            self.keystore.put(&believed.envelope, location)?;
            tracing::info!(envelope = %copy.envelope.id, place = %copy.place, "taken in");
        }
        Ok(())
    }

    /// Really opens what is at `location`, or a vTPM's state if there is any.
    pub(super) fn open_its_object(
        &self,
        envelope: &Envelope,
        location: &str,
        dek: &Dek,
    ) -> Result<(), Problem> {
        let passphrase = dek
            .passphrase()
            .map_err(|error| Problem::from_error(Code::Failed, "no memory for a key", &error))?;
        let known = paths::locations_of(self.keystore.as_ref(), envelope.vm)?;
        let permit = |path: &Path| paths::rule(self).permit_known(path, known.iter());
        let swtpm_dir = self.config().swtpm_dir;
        let object = Located::of(
            envelope.kind,
            envelope.vm,
            Some(Path::new(location)),
            &swtpm_dir,
            permit,
        )?;
        if let Some(object) = object {
            self.opened_headers.open(&object, envelope, &passphrase)?;
        }
        Ok(())
    }
}

/// The location to keep it with, if the keystore should learn of it. A snapshot is the past, and who wrote a format 1 can't
/// be told.
fn to_take_in(copy: &VisibleCopy, known: Option<&EnvelopeRecord>) -> Option<String> {
    if matches!(copy.place, Place::Snapshot(..)) || copy.envelope.format() != Envelope::FORMAT {
        return None;
    }
    match known {
        Some(known) => {
            let is_newer = copy.envelope.supersedes(&known.envelope) == Precedence::Newer;
            is_newer.then(|| known.location.clone())
        }
        None if !copy.envelope.kind.is_kept_by_path() => Some(String::new()),
        None => Some(copy.location.as_ref()?.display().to_string()),
    }
}

impl Visible {
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

fn carried(place: PermittedPath) -> Option<VisibleCopy> {
    let image = place.shown().to_owned();
    Some(VisibleCopy {
        envelope: disk::inspect(&place).ok()?.envelope?,
        place: Place::Image(image.clone()),
        location: Some(image),
    })
}

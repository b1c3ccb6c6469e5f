//! Copies of envelopes that travel follow the keystore: the domain's XML at once, an image when nobody has it open.
//!
//! The keystore has the list of what is behind, with the KEKs that these copies still need; a copy leaves it once it was
//! brought up to date, or is known not to exist. Woken by a job, by the end of a VM, and by the clock.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::first_runs;
use super::headers::Writing;
use super::moved;
use super::paths;
use super::saved;
use super::{Daemon, lock};
use crate::domain::{Domain, Metadata, edit, encrypted_layers};
use crate::host::libvirt::KeptXml;
use crate::host::permitted::{PathError, PathRule, PermittedPath};
use crate::model::envelope::{Envelope, EnvelopeId, Precedence, VmId};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, Carried, ImageCopy, VolumeError};
use crate::secret::Passphrase;
use crate::store::{CopyNews, CopyPlace, EnvelopeRecord, EnvelopeState, StaleCopy, StoreError};
use crate::vm::start::adoption::{Doubt, Weighed, weigh};

/// How many stale copies are in memory at a time.
const PAGE: u32 = 100;
/// Between two looks at the copies: a job that is under way rings after each of its batches.
const PAUSE: Duration = Duration::from_millis(500);
/// After this time a copy that could not follow is tried again, whatever has happened.
const AGAIN: Duration = Duration::from_secs(60);
/// Whoever makes an object writes the copies that it began with.
const MADE_NOW: &str = "its object is being made; if that was interrupted, repeat it, or shred the VM";

impl Daemon {
    /// Brings copies up to date for ever. For a thread of its own.
    pub fn run_copies(&self) {
        loop {
            saved::note_all(self);
            first_runs::write(self);
            moved::settle(self);
            if let Err(failure) = self.update_copies() {
                tracing::warn!("copies of envelopes: {failure}");
            }
            std::thread::sleep(PAUSE);
            self.copies_bell.wait(AGAIN);
        }
    }

    /// Brings up to date what can be.
    fn update_copies(&self) -> Result<(), Problem> {
        let _copying = lock(&self.copying);
        for envelope in self.host_store.journaled_headers()?.sound {
            go_on(envelope, self.finish_header(envelope));
        }
        // Before what is stale: a rewrite writes a journal of its own.
        let moved = self.host_store.journaled_headers()?.sound;
        if moved.is_empty() && self.host_store.count_stale_copies()? == 0 {
            return Ok(());
        }
        let holders = match self.background.every_xml() {
            Ok(kept) => Holders::among(&kept),
            Err(error) => return self.all_stay(&chain(&error)),
        };
        let rule = paths::rule(self);
        for envelope in moved {
            go_on(envelope, self.finish_moved_header(envelope, &holders, &rule));
        }
        self.for_each_page(CopyPlace::Xml, |page| self.update_xml(page, &holders))?;
        self.for_each_page(CopyPlace::Image, |page| {
            let news = page.iter().filter_map(|copy| {
                let updated = self.update_image(copy.envelope, &holders, &rule);
                // What fails with one image says nothing of the others.
                let news = updated.unwrap_or_else(|failure| Some(CopyNews::Stays(failure.message)));
                news.map(|news| (copy.envelope, news))
            });
            Ok(self
                .host_store
                .note_copies(CopyPlace::Image, &news.collect::<Vec<_>>())?)
        })
    }

    /// Without libvirt nobody knows which VM has them.
    fn all_stay(&self, reason: &str) -> Result<(), Problem> {
        let stays = |copy: &StaleCopy| (copy.envelope, CopyNews::Stays(reason.to_owned()));
        for place in [CopyPlace::Xml, CopyPlace::Image] {
            self.for_each_page(place, |page| {
                let news: Vec<_> = page.iter().map(stays).collect();
                Ok(self.host_store.note_copies(place, &news)?)
            })?;
        }
        Ok(())
    }

    fn for_each_page(
        &self,
        place: CopyPlace,
        work: impl Fn(&[StaleCopy]) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let mut after = None;
        loop {
            let page = self.host_store.stale_copies(place, after, PAGE)?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            after = Some(last.envelope);
            work(&page)?;
        }
    }

    /// A copy that no domain has is not behind.
    fn update_xml(&self, page: &[StaleCopy], holders: &Holders) -> Result<(), Problem> {
        let mut newest = BTreeMap::new();
        let mut vms: BTreeMap<VmId, Vec<EnvelopeId>> = BTreeMap::new();
        let mut failed: BTreeMap<EnvelopeId, String> = BTreeMap::new();
        for copy in page {
            match self.keystore.envelope(copy.envelope) {
                Ok(Some(record)) if record.state == EnvelopeState::Pending => {
                    failed.insert(copy.envelope, MADE_NOW.to_owned());
                }
                Ok(Some(record)) => {
                    for vm in holders.vms_of(&record.envelope) {
                        vms.entry(vm).or_default().push(copy.envelope);
                    }
                    newest.insert(copy.envelope, record);
                }
                Ok(None) => {}
                Err(error) => {
                    failed.insert(copy.envelope, chain(&error));
                }
            }
        }
        for (vm, envelopes) in vms {
            match self.edit_xml(vm, &newest) {
                Ok(undecided) => failed.extend(undecided),
                Err(reason) => failed.extend(envelopes.into_iter().map(|id| (id, reason.clone()))),
            }
        }
        let news: Vec<_> = page
            .iter()
            .filter_map(|copy| {
                let id = copy.envelope;
                let news = match (failed.remove(&id), newest.get(&id)) {
                    (Some(reason), _) => CopyNews::Stays(reason),
                    (None, record) => CopyNews::Has(Box::new(record?.envelope.clone())),
                };
                Some((id, news))
            })
            .collect();
        Ok(self.host_store.note_copies(CopyPlace::Xml, &news)?)
    }

    /// Says of which envelopes nobody knows now whether the copy in the XML or the keystore's counts.
    fn edit_xml(
        &self,
        vm: VmId,
        newest: &BTreeMap<EnvelopeId, EnvelopeRecord>,
    ) -> Result<BTreeMap<EnvelopeId, String>, String> {
        let (unreadable, undecided) = (RefCell::new(None), RefCell::new(BTreeMap::new()));
        // All that the VM has, also those of other pages: so it is changed once.
        let current = |id: EnvelopeId, found: Option<&Envelope>| {
            let known = || self.keystore.envelope(id).ok().flatten();
            let record = newest.get(&id).cloned().or_else(known)?;
            if !record.envelope.serves(vm) {
                return None;
            }
            let stays = match found.map(|found| self.standing(&record, found)) {
                None | Some(Standing::GivesWay) => record.state != EnvelopeState::Active,
                Some(Standing::Stays) => true,
                Some(Standing::Undecided(reason)) => {
                    undecided.borrow_mut().insert(id, reason);
                    true
                }
            };
            (!stays).then_some(record.envelope)
        };
        let namespace = (Metadata::PREFIX, Metadata::NAMESPACE);
        let edited = self.background.edit_metadata(vm, namespace, |element| {
            edit::refresh_element(element, current).unwrap_or_else(|error| {
                *unreadable.borrow_mut() = Some(chain(&error));
                None
            })
        });
        match (edited, unreadable.into_inner()) {
            (Err(error), _) => Err(chain(&error)),
            (Ok(_), Some(error)) => Err(format!("its metadata stays as it is: {error}")),
            (Ok(_), None) => Ok(undecided.into_inner()),
        }
    }

    /// Whether the keystore's version takes the place of a copy. One that claims to be newer is asked for its MAC, by the key
    /// that the keystore's opens to.
    fn standing(&self, record: &EnvelopeRecord, found: &Envelope) -> Standing {
        let claims = found.supersedes(&record.envelope);
        if claims == Precedence::Same {
            return Standing::Stays;
        }
        // Who wrote a format 1 can't be told; the keystore's row is root's.
        if claims == Precedence::Older || found.format() != Envelope::FORMAT {
            return Standing::GivesWay;
        }
        let undecided = |reason: String| {
            Standing::Undecided(format!(
                "the copy claims generation {}, which can't be verified now: {reason}",
                found.generation
            ))
        };
        let dek = match self.recipients.open_envelope(&record.envelope) {
            Ok(dek) => dek,
            Err(error) => return undecided(error.reasons()),
        };
        match record.verify(&dek).map(|own| weigh(&own, found, &dek)) {
            Ok(Weighed::Counts(_) | Weighed::Doubtful(Doubt::Conflict | Doubt::DoesNotOpen)) => {
                Standing::Stays
            }
            Ok(Weighed::IsBehind | Weighed::Doubtful(Doubt::Unverified(_))) => Standing::GivesWay,
            Err(error) => undecided(chain(&error)),
        }
    }

    /// In the image that the keystore knows, and in those that a VM has for this envelope: it may have been moved, or be
    /// below an overlay.
    fn update_image(
        &self,
        id: EnvelopeId,
        holders: &Holders,
        rule: &PathRule,
    ) -> Result<Option<CopyNews>, Problem> {
        let Some(record) = self.keystore.envelope(id)? else {
            return Ok(None);
        };
        let stays = |reason: &str| Ok(Some(CopyNews::Stays(reason.to_owned())));
        if record.state == EnvelopeState::Pending {
            return stays(MADE_NOW);
        }
        if let Some((path, _)) = self.host_store.journaled_header(id)? {
            return stays(&format!(
                "its header may be half written in {path}, which can't be completed now"
            ));
        }
        let mut paths = holders.paths_of(&record.envelope);
        paths.insert(PathBuf::from(&record.location));
        // Before the header is taken: a start waits for that, and a provider may be slow.
        let (mut giving_way, mut passphrase) = (BTreeSet::new(), None);
        for path in &paths {
            let Ok(place) = rule.permit_known(path, std::iter::once(&record.location)) else {
                continue;
            };
            let found = match disk::identify(&place).map(|(_, copy)| copy) {
                Ok(ImageCopy::Envelope(found)) if found.id == id => *found,
                // Whose it was is shown by the key that opens the image.
                Ok(ImageCopy::Unreadable(why)) => {
                    match self.passphrase_of(&record) {
                        Ok(opened) => passphrase = Some(opened),
                        Err(reason) => {
                            return stays(&format!(
                                "the copy in {} can't be read ({why}), and its image can't be opened now: {reason}",
                                path.display()
                            ));
                        }
                    }
                    continue;
                }
                // Another image is there now, or somebody has written that into this one.
                Ok(ImageCopy::Envelope(_)) => {
                    passphrase = passphrase.or_else(|| self.passphrase_of(&record).ok());
                    continue;
                }
                _ => continue,
            };
            match self.standing(&record, &found) {
                Standing::GivesWay => drop(giving_way.insert(found.to_json())),
                Standing::Stays => {}
                Standing::Undecided(reason) => return stays(&reason),
            }
        }
        let Some(writing) = self.headers.write(id) else {
            return stays("its VM is starting");
        };
        // Held by a start until it is armed, armed until QEMU runs, locked by QEMU from then on.
        if lock(&self.armed).needs(id) {
            return stays("its VM is starting");
        }
        let (mut found, mut missing) = (false, None);
        for path in &paths {
            let place = rule.permit_known(path, std::iter::once(&record.location));
            let rewritten = place
                .map_err(RewriteError::Path)
                .and_then(|place| self.rewrite(&place, &record.envelope, passphrase.as_ref(), &giving_way));
            match rewritten {
                Ok(carried) => found |= carried,
                Err(error) if error.is_missing() => missing = Some(chain(&error)),
                // With what permits it.
                Err(RewriteError::Path(error)) => return stays(&Problem::from(error).to_string()),
                Err(error) => {
                    if self.host_store.journaled_header(id)?.is_some() {
                        writing.keep();
                    }
                    return stays(&chain(&error));
                }
            }
        }
        match missing {
            Some(reason) if !found => stays(&reason),
            _ => Ok(Some(CopyNews::Has(Box::new(record.envelope)))),
        }
    }

    /// Says whether the image carries the envelope. Another image may be at its path, or one that never carried any: then
    /// there is no copy that could be behind.
    fn rewrite(
        &self,
        place: &PermittedPath,
        envelope: &Envelope,
        passphrase: Option<&Passphrase>,
        giving_way: &BTreeSet<String>,
    ) -> Result<bool, RewriteError> {
        let shown = place.shown().display().to_string();
        let gives_way = |found: &Envelope| Ok(giving_way.contains(&found.to_json()));
        let rewritten = disk::rewrite_envelope(place, envelope, passphrase, gives_way, |bytes| {
            self.host_store
                .journal_header(envelope.id, &shown, bytes)
                .map_err(RewriteError::Journal)
        })?;
        self.host_store
            .forget_header(envelope.id)
            .map_err(RewriteError::Journal)?;
        Ok(match rewritten {
            Carried::Generation(_) => true,
            Carried::NotThere => false,
        })
    }

    /// Completes a header that was being rewritten when the daemon died, or a write failed.
    fn finish_header(&self, id: EnvelopeId) -> Result<(), Problem> {
        let Some((path, patch)) = self.host_store.journaled_header(id)? else {
            return Ok(());
        };
        let writing = self.headers.take_over(id);
        match paths::known_place(self, Path::new(&path)) {
            Ok(place) => self.finish_header_in(id, &place, &patch, writing),
            // Moved, or somebody has put a link there: tried again later.
            Err(_) => Ok(()),
        }
    }

    /// An image that was moved before its header was whole is where its VM has it now.
    fn finish_moved_header(&self, id: EnvelopeId, holders: &Holders, rule: &PathRule) -> Result<(), Problem> {
        let Some(record) = self.keystore.envelope(id)? else {
            return Ok(());
        };
        for path in &holders.paths_of(&record.envelope) {
            let Some((journaled, patch)) = self.host_store.journaled_header(id)? else {
                return Ok(());
            };
            if *path == Path::new(&journaled) || Path::new(&journaled).exists() {
                continue;
            }
            let Some(writing) = self.headers.write(id) else {
                return Ok(());
            };
            if let Ok(place) = rule.permit(path) {
                self.finish_header_in(id, &place, &patch, writing)?;
            }
        }
        Ok(())
    }

    fn finish_header_in(
        &self,
        id: EnvelopeId,
        place: &PermittedPath,
        patch: &[u8],
        writing: Writing<'_>,
    ) -> Result<(), Problem> {
        let path = place.shown();
        match disk::finish_rewrite(place, patch) {
            Ok(()) => {
                tracing::info!(path = %path.display(), "completed its header");
                Ok(self.host_store.forget_header(id)?)
            }
            // Tried again later; a start may see for itself.
            Err(VolumeError::InUse(_) | VolumeError::NotFound(_)) => Ok(()),
            Err(error) => {
                tracing::error!(path = %path.display(), "its header may be half written: {}", chain(&error));
                writing.keep();
                Ok(())
            }
        }
    }
}

/// What fails with one header says nothing of the others.
fn go_on(envelope: EnvelopeId, done: Result<(), Problem>) {
    if let Err(failure) = done {
        tracing::warn!(%envelope, "its image's header is not completed: {failure}");
    }
}

/// How a copy stands to the keystore's version.
enum Standing {
    /// It is equal; or it is authentic, and a start or an admin decides between the two.
    Stays,
    /// It is behind, or not authentic.
    GivesWay,
    /// Nobody has the key now, and why.
    Undecided(String),
}

/// Who has a copy of which envelope, by what libvirt has.
///
/// Anybody who defines a domain can name any envelope in it. Only those count that the envelope serves: what another VM claims
/// would keep the copies of this one behind for good, by an XML or a file that nobody can bring up to date.
#[derive(Debug, Default)]
struct Holders {
    /// The VMs with it in their XML: of a disk that several share, all of them.
    vms: BTreeMap<EnvelopeId, BTreeSet<VmId>>,
    /// The files that it opens, as each VM has it.
    paths: BTreeMap<EnvelopeId, BTreeSet<(VmId, PathBuf)>>,
}

impl Holders {
    fn among(kept: &[KeptXml]) -> Self {
        let mut holders = Self::default();
        for kept in kept.iter().filter(|kept| kept.snapshot.is_none()) {
            // One envelope that can't be read must not hide the others: whether the element can be changed shows then.
            for id in Metadata::ids_in(&kept.xml) {
                holders.vms.entry(id).or_default().insert(kept.vm);
            }
            if let Ok(domain) = Domain::parse(&kept.xml) {
                for (id, path) in encrypted_layers(&domain) {
                    holders.paths.entry(id).or_default().insert((kept.vm, path));
                }
            }
        }
        holders
    }

    fn vms_of(&self, envelope: &Envelope) -> impl Iterator<Item = VmId> {
        let vms = self.vms.get(&envelope.id).into_iter().flatten();
        vms.copied().filter(|vm| envelope.serves(*vm))
    }

    fn paths_of(&self, envelope: &Envelope) -> BTreeSet<PathBuf> {
        let paths = self.paths.get(&envelope.id).into_iter().flatten();
        let of_its_vms = paths.filter(|(vm, _)| envelope.serves(*vm));
        of_its_vms.map(|(_, path)| path.clone()).collect()
    }
}

/// Why an image does not follow.
#[derive(Debug, thiserror::Error)]
enum RewriteError {
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error(transparent)]
    Path(PathError),
    #[error("its header can't be journaled")]
    Journal(#[source] StoreError),
}

impl RewriteError {
    /// There is no such file.
    fn is_missing(&self) -> bool {
        match self {
            Self::Volume(error) => matches!(error, VolumeError::NotFound(_)),
            Self::Path(error) => error.is_missing(),
            Self::Journal(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::{Binding, KekId, ObjectKind, ProviderId, Stanza, Verified};
    use crate::secret::Dek;

    fn kept(vm: VmId, path: &str, envelope: &Envelope) -> KeptXml {
        let xml = format!(
            "<domain type='kvm'><name>a</name><uuid>{vm}</uuid><metadata><virtseal:vm xmlns:virtseal='{}'>\
             <virtseal:envelope>{}</virtseal:envelope></virtseal:vm></metadata><devices><disk type='file'><driver type='qcow2'/>\
             <source file='{path}'><encryption format='luks'><secret type='passphrase' uuid='{}'/></encryption></source>\
             <target dev='vda'/></disk></devices></domain>",
            Metadata::NAMESPACE,
            envelope.to_json(),
            envelope.id
        );
        KeptXml {
            vm,
            name: "a".to_owned(),
            snapshot: None,
            xml,
        }
    }

    #[test]
    fn what_a_stranger_claims_to_have_keeps_no_copy_behind() {
        let [owner, sharer, stranger] = [0; 3].map(|_| VmId::random());
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: owner,
            kind: ObjectKind::Disk,
        };
        let stanza = Stanza {
            provider: ProviderId::random(),
            provider_name: "main".to_owned(),
            kek: KekId("v1:provider".to_owned()),
            mechanism: "A256GCM".to_owned(),
            body: vec![7; 92],
        };
        let mut envelope = Verified::new(&binding, vec![stanza], &Dek::random().unwrap())
            .unwrap()
            .into_envelope();
        envelope.shared_with = vec![sharer];
        let holders = Holders::among(&[
            kept(stranger, "/elsewhere/unreadable", &envelope),
            kept(owner, "/images/own", &envelope),
            kept(sharer, "/images/shared", &envelope),
        ]);
        assert_eq!(
            holders.vms_of(&envelope).collect::<BTreeSet<_>>(),
            BTreeSet::from([owner, sharer])
        );
        assert_eq!(
            holders.paths_of(&envelope),
            BTreeSet::from(["/images/own".into(), "/images/shared".into()])
        );
    }
}

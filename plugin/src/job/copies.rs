//! Copies of envelopes that travel follow the keystore: the domain's XML at once, an image when nobody has it open.
//!
//! The keystore has the list of what is behind, with the KEKs that these copies still need; a copy leaves it once it was
//! brought up to date, or is known not to exist. Which of two versions counts is decided in `crate::vm::copies`.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::domain::{Metadata, edit};
use crate::host::permitted::{PathError, PermittedPath};
use crate::model::envelope::{Envelope, EnvelopeId, VmId};
use crate::model::problem::{Problem, chain};
use crate::object::disk::{self, Carried, ImageCopy, VolumeError};
use crate::secret::Passphrase;
use crate::store::{CopyNews, CopyPlace, EnvelopeRecord, EnvelopeState, StaleCopy, StoreError};
use crate::vm::copies::{Holders, Standing};
use crate::vm::headers::{Headers, Writing};
use crate::vm::host::Host;

/// How many stale copies are in memory at a time.
const PAGE: u32 = 100;
/// Whoever makes an object writes the copies that it began with.
const MADE_NOW: &str = "its object is being made; if that was interrupted, repeat it, or shred the VM";

/// What keeps rewrites and starts out of each other's way.
#[derive(Clone, Copy)]
pub(crate) struct Guards<'a> {
    /// Which headers are being rewritten, and which must not be.
    pub(crate) headers: &'a Headers,
    /// Whether a start is armed with this envelope: the header is its own until QEMU has it.
    pub(crate) is_armed: &'a dyn Fn(EnvelopeId) -> bool,
}

/// Brings up to date what can be. Headers that a killed daemon left half written are completed by `host`, which need not know of
/// other VMs; `look` gathers that where anything else is behind. Nothing may take all of a VM away meanwhile.
///
/// # Errors
/// When the keystore fails.
pub(crate) fn update<'a>(
    host: &Host<'a>,
    guards: Guards<'_>,
    look: impl FnOnce() -> Result<Host<'a>, Problem>,
) -> Result<(), Problem> {
    for envelope in host.host_store.journaled_headers()?.sound {
        go_on(envelope, finish_header(host, guards, envelope));
    }
    // Before what is stale: a rewrite writes a journal of its own.
    let moved = host.host_store.journaled_headers()?.sound;
    if moved.is_empty() && host.host_store.count_stale_copies()? == 0 {
        return Ok(());
    }
    let host = match look() {
        Ok(host) => host,
        Err(problem) => return all_stay(host, &problem.message),
    };
    let copies = Copies {
        holders: Holders::among(&host.kept),
        host: &host,
        guards,
    };
    for envelope in moved {
        go_on(envelope, copies.finish_moved_header(envelope));
    }
    for_each_page(&host, CopyPlace::Xml, |page| copies.update_xml(page))?;
    for_each_page(&host, CopyPlace::Image, |page| {
        let news = page.iter().filter_map(|copy| {
            let updated = copies.update_image(copy.envelope);
            // What fails with one image says nothing of the others.
            let news = updated.unwrap_or_else(|problem| Some(CopyNews::Stays(problem.message)));
            news.map(|news| (copy.envelope, news))
        });
        Ok(host
            .host_store
            .note_copies(CopyPlace::Image, &news.collect::<Vec<_>>())?)
    })
}

/// Without libvirt nobody knows which VM has them.
fn all_stay(host: &Host<'_>, reason: &str) -> Result<(), Problem> {
    let stays = |copy: &StaleCopy| (copy.envelope, CopyNews::Stays(reason.to_owned()));
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        for_each_page(host, place, |page| {
            let news: Vec<_> = page.iter().map(stays).collect();
            Ok(host.host_store.note_copies(place, &news)?)
        })?;
    }
    Ok(())
}

fn for_each_page(
    host: &Host<'_>,
    place: CopyPlace,
    work: impl Fn(&[StaleCopy]) -> Result<(), Problem>,
) -> Result<(), Problem> {
    let mut after = None;
    loop {
        let page = host.host_store.stale_copies(place, after, PAGE)?;
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = Some(last.envelope);
        work(&page)?;
    }
}

/// Completes a header that was being rewritten when the daemon died, or a write failed.
fn finish_header(host: &Host<'_>, guards: Guards<'_>, id: EnvelopeId) -> Result<(), Problem> {
    let Some((path, patch)) = host.host_store.journaled_header(id)? else {
        return Ok(());
    };
    let writing = guards.headers.take_over(id);
    match host.known_place(Path::new(&path)) {
        Ok(place) => finish_header_in(host, id, &place, &patch, writing),
        // Moved, or somebody has put a link there: tried again later.
        Err(_) => Ok(()),
    }
}

fn finish_header_in(
    host: &Host<'_>,
    id: EnvelopeId,
    place: &PermittedPath,
    patch: &[u8],
    writing: Writing<'_>,
) -> Result<(), Problem> {
    let path = place.shown();
    match disk::finish_rewrite(place, patch) {
        Ok(()) => {
            tracing::info!(path = %path.display(), "completed its header");
            Ok(host.host_store.forget_header(id)?)
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

/// What fails with one header says nothing of the others.
fn go_on(envelope: EnvelopeId, done: Result<(), Problem>) {
    if let Err(problem) = done {
        tracing::warn!(%envelope, "its image's header is not completed: {problem}");
    }
}

/// What is behind, and who has it.
struct Copies<'a> {
    host: &'a Host<'a>,
    guards: Guards<'a>,
    holders: Holders,
}

/// What to write over in the images of one envelope.
#[derive(Default)]
struct GivingWay {
    /// The versions that give way, as they are.
    versions: BTreeSet<String>,
    /// What opens an image, where a copy does not show whose it is.
    passphrase: Option<Passphrase>,
}

impl Copies<'_> {
    /// A copy that no domain has is not behind.
    fn update_xml(&self, page: &[StaleCopy]) -> Result<(), Problem> {
        let mut newest = BTreeMap::new();
        let mut vms: BTreeMap<VmId, Vec<EnvelopeId>> = BTreeMap::new();
        let mut failed: BTreeMap<EnvelopeId, String> = BTreeMap::new();
        for copy in page {
            match self.host.keystore.envelope(copy.envelope) {
                Ok(Some(record)) if record.state == EnvelopeState::Pending => {
                    failed.insert(copy.envelope, MADE_NOW.to_owned());
                }
                Ok(Some(record)) => {
                    for vm in self.holders.vms_of(&record.envelope) {
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
        Ok(self.host.host_store.note_copies(CopyPlace::Xml, &news)?)
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
            let known = || self.host.keystore.envelope(id).ok().flatten();
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
        let edited = self.host.libvirt.edit_metadata(vm, namespace, |element| {
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

    fn standing(&self, record: &EnvelopeRecord, found: &Envelope) -> Standing {
        Standing::of(found, record, || {
            let opened = self.host.recipients.open_envelope(&record.envelope);
            opened.map_err(|error| error.reasons())
        })
    }

    /// In the image that the keystore knows, and in those that a VM has for this envelope: it may have been moved, or be
    /// below an overlay.
    fn update_image(&self, id: EnvelopeId) -> Result<Option<CopyNews>, Problem> {
        let Some(record) = self.host.keystore.envelope(id)? else {
            return Ok(None);
        };
        let stays = |reason: &str| Ok(Some(CopyNews::Stays(reason.to_owned())));
        if record.state == EnvelopeState::Pending {
            return stays(MADE_NOW);
        }
        if let Some((path, _)) = self.host.host_store.journaled_header(id)? {
            return stays(&format!(
                "its header may be half written in {path}, which can't be completed now"
            ));
        }
        let mut paths = self.holders.paths_of(&record.envelope);
        paths.insert(PathBuf::from(&record.location));
        // Before the header is taken: a start waits for that, and a provider may be slow.
        let giving_way = match self.giving_way(&record, &paths) {
            Ok(giving_way) => giving_way,
            Err(reason) => return stays(&reason),
        };
        let Some(writing) = self.guards.headers.write(id) else {
            return stays("its VM is starting");
        };
        // Held by a start until it is armed, armed until QEMU runs, locked by QEMU from then on.
        if (self.guards.is_armed)(id) {
            return stays("its VM is starting");
        }
        let (mut found, mut missing) = (false, None);
        for path in &paths {
            let place = self.place_of(&record, path).map_err(RewriteError::Path);
            match place.and_then(|place| self.rewrite(&place, &record.envelope, &giving_way)) {
                Ok(carried) => found |= carried,
                Err(error) if error.is_missing() => missing = Some(chain(&error)),
                // With what permits it.
                Err(RewriteError::Path(error)) => return stays(&Problem::from(error).to_string()),
                Err(error) => {
                    if self.host.host_store.journaled_header(id)?.is_some() {
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

    fn place_of(&self, record: &EnvelopeRecord, path: &Path) -> Result<PermittedPath, PathError> {
        self.host
            .paths
            .permit_known(path, std::iter::once(&record.location))
    }

    /// What in these images is to be written over, or why that can't be told now.
    fn giving_way(&self, record: &EnvelopeRecord, paths: &BTreeSet<PathBuf>) -> Result<GivingWay, String> {
        let mut giving_way = GivingWay::default();
        for path in paths {
            let Ok(place) = self.place_of(record, path) else {
                continue;
            };
            match disk::identify(&place).map(|(_, copy)| copy) {
                Ok(ImageCopy::Envelope(found)) if found.id == record.envelope.id => {
                    match self.standing(record, &found) {
                        Standing::GivesWay => drop(giving_way.versions.insert(found.to_json())),
                        Standing::Stays => {}
                        Standing::Undecided(reason) => return Err(reason),
                    }
                }
                // Whose it was is shown by the key that opens the image.
                Ok(ImageCopy::Unreadable(why)) => {
                    let opened = self.host.passphrase_of(record).map_err(|reason| {
                        format!(
                            "the copy in {} can't be read ({why}), and its image can't be opened now: {reason}",
                            path.display()
                        )
                    });
                    giving_way.passphrase = Some(opened?);
                }
                // Another image is there now, or somebody has written that into this one.
                Ok(ImageCopy::Envelope(_)) => {
                    let known = giving_way.passphrase.take();
                    giving_way.passphrase = known.or_else(|| self.host.passphrase_of(record).ok());
                }
                _ => {}
            }
        }
        Ok(giving_way)
    }

    /// Says whether the image carries the envelope. Another image may be at its path, or one that never carried any: then
    /// there is no copy that could be behind.
    fn rewrite(
        &self,
        place: &PermittedPath,
        envelope: &Envelope,
        giving_way: &GivingWay,
    ) -> Result<bool, RewriteError> {
        let shown = place.shown().display().to_string();
        let gives_way = |found: &Envelope| Ok(giving_way.versions.contains(&found.to_json()));
        let passphrase = giving_way.passphrase.as_ref();
        let rewritten = disk::rewrite_envelope(place, envelope, passphrase, gives_way, |bytes| {
            self.host
                .host_store
                .journal_header(envelope.id, &shown, bytes)
                .map_err(RewriteError::Journal)
        })?;
        self.host
            .host_store
            .forget_header(envelope.id)
            .map_err(RewriteError::Journal)?;
        Ok(match rewritten {
            Carried::Generation(_) => true,
            Carried::NotThere => false,
        })
    }

    /// An image that was moved before its header was whole is where its VM has it now.
    fn finish_moved_header(&self, id: EnvelopeId) -> Result<(), Problem> {
        let Some(record) = self.host.keystore.envelope(id)? else {
            return Ok(());
        };
        for path in &self.holders.paths_of(&record.envelope) {
            let Some((journaled, patch)) = self.host.host_store.journaled_header(id)? else {
                return Ok(());
            };
            if *path == Path::new(&journaled) || Path::new(&journaled).exists() {
                continue;
            }
            let Some(writing) = self.guards.headers.write(id) else {
                return Ok(());
            };
            if let Ok(place) = self.host.paths.permit(path) {
                finish_header_in(self.host, id, &place, &patch, writing)?;
            }
        }
        Ok(())
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

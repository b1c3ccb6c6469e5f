//! Copies of envelopes that travel follow the keystore: the domain's XML at once, an image when nobody has it open.
//!
//! The keystore has the list of what is behind, with the KEKs that these copies still need; a copy leaves it once it was
//! brought up to date, or is known not to exist. Which of two versions counts is decided in `crate::vm::copies`.
//!
//! Storage may not answer, nor libvirt for one VM: what goes to either is an [`Errand`], which others need not wait for.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

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
#[derive(Clone)]
pub(crate) struct Guards<'a> {
    /// Which headers are being rewritten, and which must not be.
    pub(crate) headers: &'a Headers,
    /// Whether a start is armed with this envelope: the header is its own until QEMU has it.
    pub(crate) is_armed: Arc<dyn Fn(EnvelopeId) -> bool + Send + Sync + 'a>,
    /// Does this while nothing else is done to the VM that an envelope is of; or says what is.
    pub(crate) claimed: Arc<Claimed<'a>>,
}

/// Has what it is given done with a VM, unless somebody else has the VM.
pub(crate) type Claimed<'a> = dyn Fn(VmId, &mut dyn FnMut()) -> Result<(), String> + Send + Sync + 'a;

/// What became of copies in one place.
pub(crate) type News = Vec<(StaleCopy, CopyNews)>;

/// Work that may not come to an end.
pub(crate) struct Errand<'a> {
    pub(crate) about: EnvelopeId,
    /// The files that it goes to; none where it is libvirt's to answer.
    pub(crate) paths: BTreeSet<PathBuf>,
    pub(crate) place: CopyPlace,
    pub(crate) work: Box<dyn FnOnce() -> News + Send + 'a>,
}

/// Has it done, or says why nobody waits for it any more. What it brings then is noted by whoever has it done.
pub(crate) type Run<'r, 'a> = &'r dyn Fn(Errand<'a>) -> Result<News, String>;

/// Brings up to date what can be. Headers that a killed daemon left half written are completed by `host`, which need not know of
/// other VMs; `look` gathers that where anything else is behind.
pub(crate) fn update<'a>(
    host: Host<'a>,
    guards: &Guards<'a>,
    look: impl FnOnce() -> Result<Host<'a>, Problem>,
    run: Run<'_, 'a>,
) -> Result<(), Problem> {
    let host = Arc::new(host);
    for envelope in host.host_store.journaled_headers()?.sound {
        let Some((path, _)) = host.host_store.journaled_header(envelope)? else {
            continue;
        };
        let (host, guards) = (Arc::clone(&host), guards.clone());
        go_on(run, envelope, [path.into()].into(), move || {
            finish_header(&host, &guards, envelope)
        });
    }
    // Before what is stale: a rewrite writes a journal of its own.
    let moved = host.host_store.journaled_headers()?.sound;
    if moved.is_empty() && host.host_store.count_stale_copies()? == 0 {
        return Ok(());
    }
    let host = match look() {
        Ok(host) => host,
        Err(problem) => return all_stay(&host, &problem.message),
    };
    let copies = Arc::new(Copies {
        holders: Holders::among(&host.kept),
        host,
        guards: guards.clone(),
    });
    for envelope in moved {
        let paths = copies.paths_of([envelope]);
        let copies = Arc::clone(&copies);
        go_on(run, envelope, paths, move || copies.finish_moved_header(envelope));
    }
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        for_each_page(&copies.host, place, |page| copies.by_vm(page, place, run))?;
    }
    Ok(())
}

/// Without libvirt nobody knows which VM has them.
fn all_stay(host: &Host<'_>, reason: &str) -> Result<(), Problem> {
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        for_each_page(host, place, |page| {
            let stays = |copy| (copy, CopyNews::Stays(reason.to_owned()));
            page.into_iter().map(stays).collect()
        })?;
    }
    Ok(())
}

/// Notes what `work` says of them.
fn for_each_page(
    host: &Host<'_>,
    place: CopyPlace,
    work: impl Fn(Vec<StaleCopy>) -> News,
) -> Result<(), Problem> {
    let mut after = None;
    loop {
        let page = host.host_store.stale_copies(place, after, PAGE)?;
        let Some(last) = page.last() else {
            return Ok(());
        };
        after = Some(last.envelope);
        host.host_store.note_copies(place, &work(page))?;
    }
}

/// Completes a header that was being rewritten when the daemon died, or a write failed.
fn finish_header(host: &Host<'_>, guards: &Guards<'_>, id: EnvelopeId) -> Result<(), Problem> {
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
fn go_on<'a>(
    run: Run<'_, 'a>,
    about: EnvelopeId,
    paths: BTreeSet<PathBuf>,
    complete: impl FnOnce() -> Result<(), Problem> + Send + 'a,
) {
    let work = move || {
        if let Err(problem) = complete() {
            tracing::warn!(envelope = %about, "its image's header is not completed: {problem}");
        }
        News::new()
    };
    let errand = Errand {
        about,
        paths,
        place: CopyPlace::Image,
        work: Box::new(work),
    };
    if let Err(silent) = run(errand) {
        tracing::warn!(envelope = %about, "its image's header is not completed: {silent}");
    }
}

/// What is behind, and who has it.
struct Copies<'a> {
    host: Host<'a>,
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

impl<'a> Copies<'a> {
    /// Brings those of one VM after the other up to date.
    fn by_vm(self: &Arc<Self>, page: Vec<StaleCopy>, place: CopyPlace, run: Run<'_, 'a>) -> News {
        let mut vms: BTreeMap<VmId, Vec<StaleCopy>> = BTreeMap::new();
        let mut all = News::new();
        for copy in page {
            match self.host.keystore.envelope(copy.envelope) {
                Ok(Some(record)) => vms.entry(record.envelope.vm).or_default().push(copy),
                // Of an envelope that is gone there is none.
                Ok(None) => all.push((copy, CopyNews::Follows)),
                Err(error) => all.push((copy, CopyNews::Stays(chain(&error)))),
            }
        }
        for (vm, copies) in vms {
            let paths = match place {
                CopyPlace::Xml => BTreeSet::new(),
                CopyPlace::Image => self.paths_of(copies.iter().map(|copy| copy.envelope)),
            };
            let (this, theirs) = (Arc::clone(self), copies.clone());
            let errand = Errand {
                about: copies[0].envelope,
                paths,
                place,
                work: Box::new(move || this.update_vm(vm, place, theirs)),
            };
            match run(errand) {
                Ok(news) => all.extend(news),
                Err(silent) => {
                    let stays = |copy| (copy, CopyNews::Stays(silent.clone()));
                    all.extend(copies.into_iter().map(stays));
                }
            }
        }
        all
    }

    /// While nothing else is done to the VM: one that was read before must not be put back after it was shredded.
    fn update_vm(&self, vm: VmId, place: CopyPlace, copies: Vec<StaleCopy>) -> News {
        let mut news = Vec::new();
        let claimed = (self.guards.claimed)(vm, &mut || {
            news = match place {
                CopyPlace::Xml => self.update_xml(&copies),
                CopyPlace::Image => copies.iter().map(|copy| self.update_image(copy)).collect(),
            }
        });
        if let Err(busy) = claimed {
            news = vec![CopyNews::Stays(busy); copies.len()];
        }
        copies.into_iter().zip(news).collect()
    }

    /// The images of these envelopes, as the keystore and their VMs have them.
    fn paths_of(&self, envelopes: impl IntoIterator<Item = EnvelopeId>) -> BTreeSet<PathBuf> {
        let records = envelopes
            .into_iter()
            .filter_map(|id| self.host.keystore.envelope(id).ok().flatten());
        records.flat_map(|record| self.images_of(&record)).collect()
    }

    fn images_of(&self, record: &EnvelopeRecord) -> BTreeSet<PathBuf> {
        let mut paths = self.holders.paths_of(&record.envelope);
        paths.insert(PathBuf::from(&record.location));
        paths
    }

    /// A copy that no domain has is not behind.
    fn update_xml(&self, page: &[StaleCopy]) -> Vec<CopyNews> {
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
        page.iter()
            .map(|copy| match failed.remove(&copy.envelope) {
                Some(reason) => CopyNews::Stays(reason),
                None => CopyNews::Follows,
            })
            .collect()
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
    fn update_image(&self, copy: &StaleCopy) -> CopyNews {
        let updated = self.try_image(copy.envelope);
        // What fails with one image says nothing of the others.
        updated.unwrap_or_else(|problem| CopyNews::Stays(problem.message))
    }

    fn try_image(&self, id: EnvelopeId) -> Result<CopyNews, Problem> {
        let Some(record) = self.host.keystore.envelope(id)? else {
            return Ok(CopyNews::Follows);
        };
        let stays = |reason: &str| Ok(CopyNews::Stays(reason.to_owned()));
        if record.state == EnvelopeState::Pending {
            return stays(MADE_NOW);
        }
        if let Some((path, _)) = self.host.host_store.journaled_header(id)? {
            return stays(&format!(
                "its header may be half written in {path}, which can't be completed now"
            ));
        }
        let paths = self.images_of(&record);
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
            _ => Ok(CopyNews::Follows),
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
                finish_header_in(&self.host, id, &place, &patch, writing)?;
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

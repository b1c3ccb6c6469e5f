//! Copies of envelopes that travel follow the keystore: the domain's XML at once, an image when nobody has it open.
//!
//! The keystore has the list of what is behind, with the KEKs that these copies still need; a copy leaves it once it was
//! brought up to date, or is known not to exist. Woken by a job, by the end of a VM, and by the clock.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use super::{Daemon, lock};
use crate::domain::{Metadata, edit};
use crate::envelope::{Envelope, EnvelopeId, Generation, VmId};
use crate::failure::{Failure, chain};
use crate::keystore::{CopyPlace, KeystoreError, StaleCopy};
use crate::volume::{self, Carried, VolumeError};

/// How many stale copies are in memory at a time.
const PAGE: u32 = 100;
/// After this time a copy that could not follow is tried again, whatever has happened.
const AGAIN: Duration = Duration::from_secs(60);

impl Daemon {
    /// Brings copies up to date for ever. For a thread of its own.
    pub fn run_copies(&self) {
        loop {
            if let Err(failure) = self.update_copies() {
                tracing::warn!("copies of envelopes: {failure}");
            }
            self.copies_bell.wait(AGAIN);
        }
    }

    /// Brings up to date what can be.
    fn update_copies(&self) -> Result<(), Failure> {
        for envelope in self.keystore.journaled_headers()? {
            self.finish_header(envelope)?;
        }
        self.for_each_page(CopyPlace::Xml, |page| {
            let mut vms: BTreeMap<VmId, Vec<StaleCopy>> = BTreeMap::new();
            for copy in page {
                vms.entry(copy.vm).or_default().push(copy);
            }
            vms.iter()
                .try_for_each(|(vm, copies)| self.update_xml(*vm, copies))
        })?;
        self.for_each_page(CopyPlace::Image, |page| {
            page.iter().try_for_each(|copy| self.update_image(copy.envelope))
        })
    }

    fn for_each_page(
        &self,
        place: CopyPlace,
        mut work: impl FnMut(Vec<StaleCopy>) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let mut after = None;
        loop {
            let page = self.keystore.stale_copies(place, after, PAGE)?;
            let Some(last) = page.last() else {
                return Ok(());
            };
            after = Some((last.vm, last.envelope));
            work(page)?;
        }
    }

    /// A VM that is not defined has no XML here that could be behind.
    fn update_xml(&self, vm: VmId, copies: &[StaleCopy]) -> Result<(), Failure> {
        let newest: BTreeMap<EnvelopeId, Envelope> = self
            .keystore
            .envelopes_of(vm)?
            .into_iter()
            .map(|record| (record.envelope.id, record.envelope))
            .collect();
        let edited =
            self.background
                .edit_metadata(vm, (Metadata::PREFIX, Metadata::NAMESPACE), |element| {
                    match edit::refresh_element(element, |id| newest.get(&id).cloned()) {
                        Ok(edited) => edited,
                        Err(error) => {
                            tracing::warn!(%vm, "its metadata stays as it is: {}", chain(&error));
                            None
                        }
                    }
                });
        for copy in copies {
            match (&edited, newest.get(&copy.envelope)) {
                (Ok(_), Some(envelope)) => {
                    self.keystore
                        .copy_has(copy.envelope, CopyPlace::Xml, envelope.generation)?;
                }
                (Ok(_), None) => {}
                (Err(error), _) => {
                    self.keystore
                        .copy_stays(copy.envelope, CopyPlace::Xml, &chain(error))?;
                }
            }
        }
        Ok(())
    }

    fn update_image(&self, id: EnvelopeId) -> Result<(), Failure> {
        let Some(record) = self.keystore.envelope(id)? else {
            return Ok(());
        };
        let stays = |reason: &str| Ok(self.keystore.copy_stays(id, CopyPlace::Image, reason)?);
        let Some(writing) = self.headers.write(id) else {
            return stays("its VM is starting");
        };
        // Held by a start until it is armed, armed until QEMU runs, locked by QEMU from then on.
        if lock(&self.arms).needs(id) {
            return stays("its VM is starting");
        }
        let (path, location) = (Path::new(&record.location), record.location.as_str());
        let rewritten = volume::rewrite_envelope(path, &record.envelope, |bytes| {
            self.keystore
                .journal_header(id, location, bytes)
                .map_err(RewriteError::Journal)
        });
        match rewritten {
            Ok(carried) => {
                self.keystore.forget_header(id)?;
                let generation = match carried {
                    Carried::Generation(generation) => generation,
                    // Another image is there now, or none of ours: no copy that could be behind.
                    Carried::NotThere => Generation(u64::MAX),
                };
                Ok(self.keystore.copy_has(id, CopyPlace::Image, generation)?)
            }
            Err(error) => {
                if self.keystore.journaled_header(id)?.is_some() {
                    writing.keep();
                }
                stays(&chain(&error))
            }
        }
    }

    /// Completes a header that was being rewritten when the daemon died, or a write failed.
    fn finish_header(&self, id: EnvelopeId) -> Result<(), Failure> {
        let Some((path, patch)) = self.keystore.journaled_header(id)? else {
            return Ok(());
        };
        let writing = self.headers.take_over(id);
        match volume::finish_rewrite(Path::new(&path), &patch) {
            Ok(()) => {
                tracing::info!(path, "completed its header");
                Ok(self.keystore.forget_header(id)?)
            }
            // Tried again later; a start may see for itself.
            Err(VolumeError::InUse(_) | VolumeError::NotFound(_)) => Ok(()),
            Err(error) => {
                tracing::error!(path, "its header may be half written: {}", chain(&error));
                writing.keep();
                Ok(())
            }
        }
    }
}

/// Why an image does not follow.
#[derive(Debug, thiserror::Error)]
enum RewriteError {
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("its header can't be journaled")]
    Journal(#[source] KeystoreError),
}

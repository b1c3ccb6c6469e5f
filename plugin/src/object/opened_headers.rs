//! Which image headers were opened with which envelope, so that a start does not pay for PBKDF2 again.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Located, ObjectError, Opening, disk};
use crate::model::envelope::{Envelope, EnvelopeId, Generation};
use crate::secret::Passphrase;

/// Holds digests of LUKS headers, no keys. A header that changes in any byte is opened anew.
#[derive(Debug, Default)]
pub(crate) struct OpenedHeaders(Mutex<HashMap<EnvelopeId, (Generation, [u8; 32])>>);

impl OpenedHeaders {
    /// Opens an object with its passphrase, unless this very header was opened before.
    pub(crate) fn open(
        &self,
        object: &Located,
        envelope: &Envelope,
        passphrase: &Passphrase,
    ) -> Result<Opening, ObjectError> {
        let Located::Image(place) = object else {
            return object.open(passphrase);
        };
        let opened = (envelope.generation, disk::header_digest(place)?);
        if self.lock().get(&envelope.id) == Some(&opened) {
            return Ok(Opening::Opened);
        }
        let opening = object.open(passphrase)?;
        self.lock().insert(envelope.id, opened);
        Ok(opening)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<EnvelopeId, (Generation, [u8; 32])>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

//! An envelope with its key, on the way to becoming an object.

use super::Host;
use super::keys::{are_of, open, wrapping};
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, Verified, VmId};
use crate::model::problem::{Problem, chain};
use crate::secret::{Dek, Passphrase};
use crate::store::{EnvelopeRecord, EnvelopeState};
use crate::vm::host::passphrase;

/// Which envelope of an earlier run is used again for an object at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leftover {
    /// Any: a job goes on with what it has begun.
    Any,
    /// One that is opened by those alone for whom a new one would be.
    SameProviders,
    /// The same, and nothing was ever encrypted with it.
    Unused,
}

#[derive(Debug)]
pub(crate) struct NewObject {
    pub envelope: Verified,
    /// Whether it was made just now: then nothing can be encrypted with it yet.
    pub is_new: bool,
    dek: Dek,
}

impl NewObject {
    /// The envelope for the object of `vm` at `location`: the one that an earlier run has left, or a new one that
    /// is in the keystore, as pending, before anything can be encrypted with it.
    pub(crate) fn find_or_make(
        host: &Host<'_>,
        vm: VmId,
        kind: ObjectKind,
        location: &str,
        provider: Option<&str>,
        leftover: Leftover,
    ) -> Result<Self, Problem> {
        let wanted = match (leftover, provider) {
            // Whoever it was made for.
            (Leftover::Any, None) => None,
            _ => Some(wrapping(host, provider)?),
        };
        // One that can't be read may be that of this object, which must not get a second.
        let known = host.keystore.envelopes_of(vm)?.whole()?;
        let left = known.into_iter().rfind(|record| {
            let envelope = &record.envelope;
            envelope.kind == kind
                && record.location == location
                && (leftover != Leftover::Unused || record.state == EnvelopeState::Pending)
                && match (&wanted, leftover) {
                    (None, _) => true,
                    (Some(wanted), Leftover::Any) => open(wanted, envelope),
                    (Some(wanted), Leftover::SameProviders | Leftover::Unused) => are_of(wanted, envelope),
                }
        });
        if let Some(record) = left {
            return Self::open(host, &record);
        }
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm,
            kind,
        };
        let (envelope, dek) = host.recipients.seal_new(provider, &binding)?;
        host.keystore.insert_pending(&envelope, location)?;
        Ok(Self {
            envelope,
            is_new: true,
            dek,
        })
    }

    /// Unwraps an envelope that the keystore has.
    pub(crate) fn open(host: &Host<'_>, record: &EnvelopeRecord) -> Result<Self, Problem> {
        let dek = host.recipients.open_envelope(&record.envelope)?;
        let envelope = record
            .verify(&dek)
            .map_err(|error| Problem::failed(chain(&error)))?;
        Ok(Self {
            envelope,
            is_new: false,
            dek,
        })
    }

    /// What QEMU and swtpm get.
    pub(crate) fn passphrase(&self) -> Result<Passphrase, Problem> {
        passphrase(&self.dek)
    }
}

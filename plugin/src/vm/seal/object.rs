//! An envelope with its key, on the way to becoming an object.

use super::Host;
use crate::model::envelope::{Binding, EnvelopeId, ObjectKind, Verified, VmId};
use crate::model::problem::{Code, Problem, chain};
use crate::secret::{Dek, Passphrase};
use crate::store::EnvelopeRecord;

/// An envelope and the DEK in it.
#[derive(Debug)]
pub struct NewObject {
    /// In the keystore, perhaps still pending.
    pub envelope: Verified,
    /// Whether it was made just now: then nothing can be encrypted with it yet.
    pub is_new: bool,
    dek: Dek,
}

impl NewObject {
    /// The envelope for the object of `vm` at `location`: the one that an earlier run has left, or a new one that
    /// is in the keystore, as pending, before anything can be encrypted with it.
    pub fn find_or_make(
        host: &Host<'_>,
        vm: VmId,
        kind: ObjectKind,
        location: &str,
        provider: Option<&str>,
    ) -> Result<Self, Problem> {
        let wanted = provider
            .map(|name| host.recipients.find(name))
            .transpose()?
            .map(|known| known.provider().id());
        // One that can't be read may be that of this object, which must not get a second.
        let known = host.keystore.envelopes_of(vm)?.whole()?;
        let left = known.into_iter().rfind(|record| {
            let envelope = &record.envelope;
            envelope.kind == kind
                && record.location == location
                && wanted.is_none_or(|id| envelope.stanzas.iter().any(|stanza| stanza.provider == id))
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
    pub fn open(host: &Host<'_>, record: &EnvelopeRecord) -> Result<Self, Problem> {
        let dek = host.recipients.open_envelope(&record.envelope)?;
        let envelope = record
            .verify(&dek)
            .map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
        Ok(Self {
            envelope,
            is_new: false,
            dek,
        })
    }

    /// What QEMU and swtpm get.
    pub fn passphrase(&self) -> Result<Passphrase, Problem> {
        self.dek
            .passphrase()
            .map_err(|error| Problem::from_error(Code::Failed, "no memory for a key", &error))
    }
}

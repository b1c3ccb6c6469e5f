//! Envelopes whose MAC has verified under their DEK, and what can be made of them.
//!
//! There is no other way to a [`Verified`] than a DEK: [`Verified::new`], [`Envelope::verify`], and [`Envelope::upgrade`] for
//! a format 1 that somebody answers for. Each change gives the next generation with a MAC of its own.

use std::ops::Deref;

use super::{Binding, Envelope, EnvelopeError, Generation, Mac, Stanza, VmId};
use crate::secret::Dek;

/// An envelope that only one who has its DEK can have made.
///
/// That the DEK opens the object too is for the caller to see: a MAC tells nothing of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verified(Envelope);

/// Who answers for an envelope of format 1, whose writer nobody can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format1 {
    /// It is a row of this host's keystore, which root alone can write.
    OfKeystore,
    /// Root said so (`vm adopt --format-1`), and its DEK has opened the object.
    AdoptedByRoot,
}

impl Envelope {
    /// Itself, if its MAC is one by `dek`, its own DEK.
    ///
    /// # Errors
    /// [`EnvelopeError::Mac`] when it was changed by someone without the DEK, or `dek` is another; [`EnvelopeError::Format1`]
    /// when it has no MAC.
    pub(crate) fn verify(&self, dek: &Dek) -> Result<Verified, EnvelopeError> {
        let mac = self.mac.as_ref().ok_or(EnvelopeError::Format1)?;
        if !Mac::of(self, dek)?.is(mac) {
            return Err(EnvelopeError::Mac {
                generation: self.generation,
            });
        }
        Ok(Verified(self.clone()))
    }

    /// A format 1 as format 2, by `dek`, its own DEK, which the caller has from one of its stanzas; a format 2 as
    /// [`Envelope::verify`] says. Two hosts that upgrade the same envelope get the same.
    pub(crate) fn upgrade(&self, dek: &Dek, _answers: Format1) -> Result<Verified, EnvelopeError> {
        if self.mac.is_some() {
            return self.verify(dek);
        }
        let mut next = self.clone();
        next.generation = self.generation.after_format_1();
        Verified::sign(next, dek)
    }
}

impl Verified {
    /// A first-generation envelope for the payload of `dek` bound to `binding`, which each of `stanzas` has.
    ///
    /// # Errors
    /// [`EnvelopeError::StanzaCount`] for none or more than [`Envelope::MAX_STANZAS`].
    pub(crate) fn new(binding: &Binding, stanzas: Vec<Stanza>, dek: &Dek) -> Result<Self, EnvelopeError> {
        let envelope = Envelope {
            id: binding.envelope,
            vm: binding.vm,
            kind: binding.kind,
            generation: Generation::FIRST,
            shared_with: Vec::new(),
            seen: false,
            stanzas,
            mac: None,
        };
        Self::sign(envelope, dek)
    }

    /// The next generation with these stanzas; itself if it has them. That each of them opens to `dek` is for the caller
    /// to see.
    ///
    /// # Errors
    /// [`EnvelopeError::Mac`] when `dek` is not its DEK; when one of the limits would be passed.
    pub(crate) fn with_stanzas(&self, stanzas: Vec<Stanza>, dek: &Dek) -> Result<Self, EnvelopeError> {
        self.changed(dek, |next| next.stanzas = stanzas)
    }

    /// The next generation, which `vm` may have too; itself if that may already.
    ///
    /// # Errors
    /// As [`Verified::with_stanzas`]; [`EnvelopeError::SharedWith`] beyond [`Envelope::MAX_SHARED`].
    pub(crate) fn share_with(&self, vm: VmId, dek: &Dek) -> Result<Self, EnvelopeError> {
        self.changed(dek, |next| {
            let own = next.vm == vm;
            if let (false, Err(place)) = (own, next.shared_with.binary_search(&vm)) {
                next.shared_with.insert(place, vm);
            }
        })
    }

    /// The next generation, which `vm` may have no more; itself if that may not.
    pub(crate) fn unshare(&self, vm: VmId, dek: &Dek) -> Result<Self, EnvelopeError> {
        self.changed(dek, |next| next.shared_with.retain(|other| *other != vm))
    }

    /// The next generation, which knows that a VM has run with the object; itself if it knows.
    pub(crate) fn mark_seen(&self, dek: &Dek) -> Result<Self, EnvelopeError> {
        self.changed(dek, |next| next.seen = true)
    }

    pub(crate) fn into_envelope(self) -> Envelope {
        self.0
    }

    fn changed(&self, dek: &Dek, change: impl FnOnce(&mut Envelope)) -> Result<Self, EnvelopeError> {
        // By another key, nobody would believe it any more.
        self.0.verify(dek)?;
        let mut next = self.0.clone();
        change(&mut next);
        if next == self.0 {
            return Ok(self.clone());
        }
        next.generation = self.0.generation.next();
        Self::sign(next, dek)
    }

    /// One of any generation, as if it had been changed that often.
    #[cfg(test)]
    pub(crate) fn of_test(envelope: Envelope, dek: &Dek) -> Self {
        Self::sign(envelope, dek).unwrap()
    }

    /// As anyone else will read it: within all limits.
    fn sign(mut envelope: Envelope, dek: &Dek) -> Result<Self, EnvelopeError> {
        envelope.mac = Some(Mac::of(&envelope, dek)?);
        Envelope::from_json(&envelope.to_json()).map(Self)
    }
}

impl Deref for Verified {
    type Target = Envelope;

    fn deref(&self) -> &Envelope {
        &self.0
    }
}

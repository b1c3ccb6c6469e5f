//! A second way into a native provider: the host's TPM, so that it unlocks by itself after a reboot.
//!
//! The root keys' text is encrypted (AES-256-GCM) under a key of its own, which is bound to the TPM. The passphrase stays:
//! what it opens is another row, which nothing here touches, so the TPM is never the only way in.
//!
//! ```text
//!   enroll: lock taken off ─► text ─► a new key is bound to the TPM, which opens it ─► encrypt under that, read again and
//!           compare ─► one transaction replaces the row
//! ```
//!
//! A kill at any point leaves the old row or the new one. A rotation commits the new row with the new root key. Where the TPM
//! does not do its part, the row is stale, says so and opens nothing until it is [renewed](NativeProvider::renew_tpm).

use std::sync::Arc;

use super::document::RootKeys;
use super::{NativeError, NativeProvider, WhyLocked};
use crate::crypto::aead::{self, Parts};
use crate::host::tpm::{BindPolicy, BoundToTpm, Tpm, TpmError};
use crate::model::envelope::ProviderId;
use crate::model::problem::chain;
use crate::provider::toolbox::bound_credential::TpmEnrollment;
use crate::provider::toolbox::locks::LocksNoted;
use crate::provider::toolbox::tpm_key;
use crate::secret::{SecretBytes, Transient};
use crate::store::{BoundRoots, Change, TpmRenewal};

impl NativeProvider {
    /// Lets `tpm` open the provider by `policy`, in place of what it could before. The provider must be unlocked. What was
    /// bound is opened again before anything changes.
    ///
    /// # Errors
    /// [`NativeError::Locked`], [`NativeError::Tpm`], or when the keystore can't be written.
    pub(crate) fn enroll_tpm(&self, tpm: &Tpm, policy: &BindPolicy) -> Result<(), NativeError> {
        let roots = self.roots().map_err(|_| NativeError::Locked)?;
        let record = self.bound_to(tpm, policy, &roots)?;
        Ok(self.rows.put_bound_roots(&record)?)
    }

    /// `roots`, for `tpm` to open; it has done so once.
    fn bound_to(&self, tpm: &Tpm, policy: &BindPolicy, roots: &RootKeys) -> Result<BoundRoots, NativeError> {
        let text = roots.to_text(&self.name)?;
        let (key, bound_key) = tpm_key::bind(tpm, policy).map_err(NativeError::Tpm)?;
        let data = additional_data(self.id, roots.newest());
        let record = BoundRoots {
            generation: roots.newest(),
            bound_key,
            roots: aead::encrypt(&key, &data, &text).map_err(NativeError::Cipher)?,
            enrolled: 0,
        };
        match self.read(&key, &record)?.are(roots) {
            true => Ok(record),
            false => Err(NativeError::TpmRecord),
        }
    }

    /// After a rotation that could not do it: binds the new root keys as the earlier ones were, if `tpm` still opens those;
    /// else their PCRs have changed, and what they are now is for the admin to accept. Without `pin` one that needs it stays
    /// stale.
    ///
    /// # Errors
    /// As [`NativeProvider::enroll_tpm`]; the row stays stale then.
    pub(crate) fn renew_tpm(&self, tpm: &Tpm, pin: Option<&Arc<SecretBytes>>) -> Result<Change, NativeError> {
        let Some(record) = self.rows.bound_roots()? else {
            return Ok(Change::Unchanged);
        };
        if record.generation == self.generation() {
            return Ok(Change::Unchanged);
        }
        let roots = self.roots().map_err(|_| NativeError::Locked)?;
        let renewal = self.renewal(tpm, record, &roots, pin)?;
        Ok(self.rows.renew_bound_roots(&renewal)?)
    }

    /// What is to be in the place of `before`, if `tpm` still opens that.
    pub(super) fn renewal(
        &self,
        tpm: &Tpm,
        before: BoundRoots,
        roots: &RootKeys,
        pin: Option<&Arc<SecretBytes>>,
    ) -> Result<TpmRenewal, NativeError> {
        self.opened_by(tpm, &before, pin)?;
        let bound = BoundToTpm::from_bytes(&before.bound_key).map_err(NativeError::Tpm)?;
        let after = self.bound_to(tpm, &bound.policy(pin), roots)?;
        Ok(TpmRenewal { before, after })
    }

    /// Takes this way in away again.
    pub(crate) fn remove_tpm(&self) -> Result<Change, NativeError> {
        self.explain_lock(None);
        Ok(self.rows.delete_bound_roots()?)
    }

    /// Whether there is this way in.
    pub(crate) fn tpm_enrollment(&self) -> Result<Option<TpmEnrollment>, NativeError> {
        let record = self.rows.bound_roots()?;
        Ok(record.map(|record| TpmEnrollment {
            stale: record.generation != self.generation(),
            ..TpmEnrollment::of(&record.bound_key, record.enrolled)
        }))
    }

    /// Unlocks by `tpm`, with `pin` where it needs one, unless the provider was locked since `locks` was noted. A failure is
    /// what a locked provider gives for its reason from now on; that of a PIN changes nothing of it.
    ///
    /// # Errors
    /// [`NativeError::NotEnrolled`], [`NativeError::TpmStale`], or why the TPM does not open it.
    pub(crate) fn unlock_by_tpm(
        &self,
        tpm: &Tpm,
        locks: LocksNoted,
        pin: Option<&Arc<SecretBytes>>,
    ) -> Result<(), NativeError> {
        let record = self.rows.bound_roots()?.ok_or(NativeError::NotEnrolled)?;
        let opened = match record.generation == self.generation() {
            true => self.opened_by(tpm, &record, pin),
            false => Err(NativeError::TpmStale),
        };
        match opened {
            Ok(roots) => self.hold(roots, locks).map_err(|_| NativeError::Locked),
            Err(error) => {
                let said = || format!("it {}", chain(&error));
                let why = match &error {
                    NativeError::Tpm(TpmError::NeedsPin | TpmError::WrongPin { .. }) => WhyLocked::NeedsPin,
                    NativeError::Tpm(TpmError::LockedOut { .. }) if pin.is_some() => WhyLocked::NeedsPin,
                    NativeError::Tpm(TpmError::NotSigned { .. }) => WhyLocked::NotSigned(said()),
                    _ => WhyLocked::NotOpened(said()),
                };
                self.explain_lock(Some((locks, why)));
                Err(error)
            }
        }
    }

    fn opened_by(
        &self,
        tpm: &Tpm,
        record: &BoundRoots,
        pin: Option<&Arc<SecretBytes>>,
    ) -> Result<RootKeys, NativeError> {
        let key = tpm_key::open(tpm, &record.bound_key, pin).map_err(NativeError::Tpm)?;
        self.read(&key, record)
    }

    fn read(&self, key: &SecretBytes, record: &BoundRoots) -> Result<RootKeys, NativeError> {
        let length = Parts::of(&record.roots).map_or(0, |parts| parts.ciphertext.len());
        let mut text = Transient::new(vec![0; length]);
        let data = additional_data(self.id, record.generation);
        aead::decrypt(key, &data, &record.roots, &mut text).map_err(|_| NativeError::TpmRecord)?;
        let roots = RootKeys::from_text(&text)?;
        if roots.provider == self.id && roots.newest() == record.generation {
            Ok(roots)
        } else {
            Err(NativeError::TpmRecord)
        }
    }
}

/// Label ‖ provider (16 bytes) ‖ generation (4 bytes, big-endian): a row can't stand in for another.
fn additional_data(provider: ProviderId, generation: u32) -> Vec<u8> {
    let mut data = b"virtseal native roots by TPM v1".to_vec();
    data.extend_from_slice(provider.0.as_bytes());
    data.extend_from_slice(&generation.to_be_bytes());
    data
}

#[cfg(test)]
mod tests;

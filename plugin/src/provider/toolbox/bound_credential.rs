//! What unlocks a provider, for this host's TPM to open: a host with it comes up by itself, whatever the kind of provider.
//!
//! The credential (a PIN, a secret id, a client's key, a passphrase) is encrypted (AES-256-GCM) under a key that is bound to the TPM, in
//! `providers/ID/unlock.json`. What it unlocks is what it was: nothing else changes with it, and where the TPM does not open it, the
//! credential itself does.
//!
//! One that was made here, and that nobody else has, is in a file of its own beside that, `unlock-UUID.json`, from before anything is
//! encrypted by it until after nothing is: what is encrypted names it, so both change at once, and a kill leaves the old pair or the new.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use super::files::{Files, FilesError};
use super::tpm_key;
use crate::crypto::aead::{self, Parts};
use crate::host::tpm::{BindPolicy, BoundToTpm, PcrList, SigningKey, Tpm, TpmError};
use crate::model::envelope::ProviderId;
use crate::secret::{SecretBytes, Transient};
use crate::store::{Change, UnixTime};

/// How the TPM opens what unlocks a provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TpmEnrollment {
    /// The PCRs that must be what they were; none can be told of a damaged record.
    pub pcrs: Option<PcrList>,
    /// Since when.
    pub enrolled: UnixTime,
    /// Whether it was made before the newest root key.
    pub stale: bool,
    /// Who signs what PCR 11 may be.
    pub signed_by: Option<SigningKey>,
    /// Whether somebody must type a PIN.
    pub needs_pin: bool,
    /// Those of `pcrs` that nothing was measured into.
    pub unmeasured: Option<PcrList>,
}

impl TpmEnrollment {
    /// Of what is kept as `bound_key`.
    pub(crate) fn of(bound_key: &[u8], enrolled: UnixTime) -> Self {
        let bound = BoundToTpm::from_bytes(bound_key).ok();
        let bound = bound.as_ref();
        Self {
            pcrs: bound.map(BoundToTpm::pcrs),
            enrolled,
            stale: false,
            signed_by: bound.and_then(BoundToTpm::signed_by),
            needs_pin: bound.is_some_and(BoundToTpm::needs_pin),
            unmeasured: bound.and_then(BoundToTpm::unmeasured),
        }
    }
}

/// The credential of one provider, if the TPM has it.
pub(crate) struct BoundCredential {
    provider: ProviderId,
    files: Files,
    file: String,
}

/// As it is on disk.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    #[serde(with = "hex::serde")]
    bound_key: Vec<u8>,
    #[serde(with = "hex::serde")]
    credential: Vec<u8>,
    enrolled: UnixTime,
    /// Nobody knows it: it was made here.
    #[serde(default)]
    made_here: bool,
}

impl BoundCredential {
    const STEM: &str = "unlock";

    /// The one that was `made` for what is encrypted by it now, or the one that was given.
    pub(crate) fn of(state_dir: &Path, provider: ProviderId, made: Option<Uuid>) -> Self {
        Self {
            provider,
            files: Files::of(state_dir, provider),
            file: match made {
                Some(made) => format!("{}-{made}.json", Self::STEM),
                None => format!("{}.json", Self::STEM),
            },
        }
    }

    /// Has `tpm` open `credential` by `policy`, in the place of what it could before. It has done so once.
    ///
    /// # Errors
    /// Why it does not; then what was before stays.
    pub(crate) fn bind(
        &self,
        tpm: &Tpm,
        policy: &BindPolicy,
        credential: &SecretBytes,
        origin: Origin,
    ) -> Result<(), BoundError> {
        let (key, bound_key) = tpm_key::bind(tpm, policy)?;
        let stored = Stored {
            credential: aead::encrypt(&key, &self.additional_data(), credential.expose())
                .map_err(BoundError::Cipher)?,
            bound_key,
            enrolled: seconds(SystemTime::now()),
            made_here: origin == Origin::MadeHere,
        };
        let read = self.read(&key, &stored)?;
        if !openssl::memcmp::eq(read.expose(), credential.expose()) {
            return Err(BoundError::Damaged);
        }
        Ok(self.files.write(&self.file, &stored)?)
    }

    /// The credential, by `tpm`, with `pin` where it needs one.
    ///
    /// # Errors
    /// [`BoundError::NotEnrolled`], or why the TPM does not open it.
    pub(crate) fn open(&self, tpm: &Tpm, pin: Option<&Arc<SecretBytes>>) -> Result<SecretBytes, BoundError> {
        let stored = self.stored()?.ok_or(BoundError::NotEnrolled)?;
        let key = tpm_key::open(tpm, &stored.bound_key, pin)?;
        self.read(&key, &stored)
    }

    /// Takes that away.
    pub(crate) fn remove(&self) -> Result<Change, BoundError> {
        Ok(self.files.remove_file(&self.file)?)
    }

    /// Removes the others of its provider: what was made for a change that did not come about, or is of before one that did.
    pub(crate) fn remove_others(&self) -> Result<(), BoundError> {
        for other in self.files.named(Self::STEM)? {
            if other != self.file {
                self.files.remove_file(&other)?;
            }
        }
        Ok(())
    }

    /// How the TPM opens it, if it does, or did before the record was damaged.
    pub(crate) fn enrollment(&self) -> Result<Option<TpmEnrollment>, BoundError> {
        match self.stored() {
            Err(FilesError::Damaged { .. }) => {
                let written = self.files.written(&self.file).unwrap_or(UNIX_EPOCH);
                Ok(Some(TpmEnrollment::of(&[], seconds(written))))
            }
            stored => Ok(stored?.map(|stored| TpmEnrollment::of(&stored.bound_key, stored.enrolled))),
        }
    }

    /// Whether the TPM has any credential of its provider.
    pub(crate) fn is_any(&self) -> Result<bool, BoundError> {
        Ok(!self.files.named(Self::STEM)?.is_empty())
    }

    /// Whether the TPM alone has it.
    pub(crate) fn is_made_here(&self) -> bool {
        matches!(self.stored(), Ok(Some(stored)) if stored.made_here)
    }

    fn stored(&self) -> Result<Option<Stored>, FilesError> {
        self.files.read(&self.file)
    }

    fn read(&self, key: &SecretBytes, stored: &Stored) -> Result<SecretBytes, BoundError> {
        let length = Parts::of(&stored.credential).map_or(0, |parts| parts.ciphertext.len());
        let mut text = Transient::new(vec![0; length]);
        aead::decrypt(key, &self.additional_data(), &stored.credential, &mut text)
            .map_err(|_| BoundError::Damaged)?;
        SecretBytes::copy_of(&text).map_err(BoundError::Memory)
    }

    /// Label ‖ provider (16 bytes): a file can't stand in for another's.
    fn additional_data(&self) -> Vec<u8> {
        let mut data = b"virtseal credential by TPM v1".to_vec();
        data.extend_from_slice(self.provider.0.as_bytes());
        data
    }
}

/// Who knows the credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Given,
    /// Nobody: it was made for this.
    MadeHere,
}

fn seconds(time: SystemTime) -> UnixTime {
    let since = time.duration_since(UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// Why the TPM does not open what unlocks a provider.
#[derive(Debug, Error)]
pub(crate) enum BoundError {
    #[error("is not enrolled with the TPM of this host")]
    NotEnrolled,
    #[error("is not opened by the TPM")]
    Tpm(#[from] TpmError),
    /// The TPM opens its part, and the rest is not what was written.
    #[error("has a damaged record of what the TPM opens")]
    Damaged,
    #[error("can't encrypt what unlocks it")]
    Cipher(#[source] openssl::error::ErrorStack),
    #[error("no memory for a secret (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
    #[error(transparent)]
    Files(#[from] FilesError),
}

#[cfg(test)]
mod tests {
    use virtseal_testkit::Swtpm;

    use super::*;

    fn secret(text: &str) -> SecretBytes {
        SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn opens_by_its_own_tpm_as_the_host_was_for_its_own_provider() {
        let (stand, other) = (Swtpm::start().unwrap(), Swtpm::start().unwrap());
        let (tpm, dir) = (Tpm::of(&stand), tempfile::tempdir().unwrap());
        let policy = BindPolicy::exactly("7".parse().unwrap());
        let bound = BoundCredential::of(dir.path(), ProviderId::random(), None);
        assert!(matches!(bound.open(&tpm, None), Err(BoundError::NotEnrolled)));
        assert_eq!(bound.enrollment().unwrap(), None);
        bound
            .bind(&tpm, &policy, &secret("in no random text"), Origin::Given)
            .unwrap();
        assert_eq!(bound.open(&tpm, None).unwrap().expose(), b"in no random text");
        let enrollment = bound.enrollment().unwrap().unwrap();
        assert_eq!(enrollment.pcrs, Some("7".parse().unwrap()));
        assert!(!bound.is_made_here() && !enrollment.needs_pin);

        let of_provider = |id: ProviderId| dir.path().join("providers").join(id.to_string());
        let file = of_provider(bound.provider).join("unlock.json");
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(!text.contains("in no random text") && !text.contains(&hex::encode("in no random text")));
        let elsewhere = BoundCredential::of(dir.path(), ProviderId::random(), None);
        std::fs::create_dir(of_provider(elsewhere.provider)).unwrap();
        std::fs::copy(&file, of_provider(elsewhere.provider).join("unlock.json")).unwrap();
        assert!(matches!(elsewhere.open(&tpm, None), Err(BoundError::Damaged)));
        assert!(matches!(
            bound.open(&Tpm::of(&other), None),
            Err(BoundError::Tpm(TpmError::AnotherTpm))
        ));

        std::fs::write(&file, &text[..text.len() / 2]).unwrap();
        let damaged = bound.enrollment().unwrap().unwrap();
        assert!(damaged.pcrs.is_none() && damaged.enrolled >= enrollment.enrolled);
        std::fs::write(&file, &text).unwrap();

        // As a boot with another Secure Boot configuration does.
        stand.extend(7).unwrap();
        assert!(matches!(
            bound.open(&tpm, None),
            Err(BoundError::Tpm(TpmError::PcrsDiffer(_)))
        ));
        let made = BoundCredential::of(dir.path(), bound.provider, Some(Uuid::new_v4()));
        made.bind(&tpm, &policy, &secret("made"), Origin::MadeHere)
            .unwrap();
        assert!(made.is_made_here() && !bound.is_made_here());
        assert_eq!(made.open(&tpm, None).unwrap().expose(), b"made");
        std::fs::write(file.with_file_name("unlock-x.new"), "half").unwrap();
        std::fs::write(file.with_file_name("trust.json"), "").unwrap();
        bound.remove_others().unwrap();
        assert!(!made.is_made_here() && file.exists());
        let left = std::fs::read_dir(of_provider(bound.provider)).unwrap().count();
        assert_eq!(left, 2, "what is of another kind stays");
        elsewhere.remove_others().unwrap();
        assert_eq!(bound.remove().unwrap(), Change::Changed);
        assert_eq!(bound.remove().unwrap(), Change::Unchanged);
        assert!(!file.exists());
    }

    #[test]
    fn a_pin_is_asked_for_where_it_was_set() {
        let stand = Swtpm::start().unwrap();
        let (tpm, dir) = (Tpm::of(&stand), tempfile::tempdir().unwrap());
        let pin = Arc::new(secret("0000"));
        let policy = BindPolicy::exactly("7".parse().unwrap()).with_pin(Some(Arc::clone(&pin)));
        let bound = BoundCredential::of(dir.path(), ProviderId::random(), None);
        bound.bind(&tpm, &policy, &secret("1234"), Origin::Given).unwrap();
        assert!(bound.enrollment().unwrap().unwrap().needs_pin);
        assert!(matches!(
            bound.open(&tpm, None),
            Err(BoundError::Tpm(TpmError::NeedsPin))
        ));
        assert_eq!(bound.open(&tpm, Some(&pin)).unwrap().expose(), b"1234");
    }
}

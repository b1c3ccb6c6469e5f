//! What the rows of this host say.

use super::records::UnixTime;
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ProviderId, VmId};

/// Where a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CopyPlace {
    /// In the domain's metadata.
    Xml,
    /// In the header of the image.
    Image,
}

impl CopyPlace {
    /// The word in the keystore and in messages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Xml => "xml",
            Self::Image => "image",
        }
    }
}

/// A copy with an earlier generation than the keystore's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaleCopy {
    /// The envelope.
    pub envelope: EnvelopeId,
    /// Its VM.
    pub vm: VmId,
    /// Where the copy is.
    pub place: CopyPlace,
    /// Since when.
    pub since: UnixTime,
    /// Why it could not be brought up to date; empty if nobody has tried.
    pub reason: String,
}

/// A KEK that a stale copy needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NeededKek {
    /// The envelope whose copy it is.
    pub envelope: EnvelopeId,
    /// Where the copy is.
    pub place: CopyPlace,
    /// The KEK's provider.
    pub provider: ProviderId,
    /// The KEK.
    pub kek: KekId,
}

/// What became of a copy that was stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyNews {
    /// It is as this version, or counts more than that: it is stale no more, unless the envelope has changed since.
    Has(Box<Envelope>),
    /// It could not be brought up to date, and why.
    Stays(String),
}

/// A native provider's root key, sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NativeRoot {
    /// Counts the root keys of one provider, from 1.
    pub generation: u32,
    /// The age file that holds it.
    pub sealed: Vec<u8>,
    /// When a backup was confirmed; never, if `None`.
    pub backed_up_at: Option<UnixTime>,
}

/// The root keys of a native provider, encrypted under a key that the TPM has sealed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TpmSeal {
    /// The newest root key in it.
    pub generation: u32,
    /// What the TPM opens.
    pub sealed_key: Vec<u8>,
    /// What the key in it opens.
    pub roots: Vec<u8>,
    /// When it was made; writing it sets it.
    pub enrolled: UnixTime,
}

/// What takes the place of one row, and of no other.
pub struct TpmRenewal {
    /// The row that was read.
    pub before: TpmSeal,
    /// What it is to be.
    pub after: TpmSeal,
}

/// That a provider's KEKs are kept across a reboot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekPersistence {
    /// What the TPM opens.
    pub sealed: Vec<u8>,
    /// The other half of what the rows' key is derived from.
    pub salt: Vec<u8>,
    /// For how long each, from when it was last fetched.
    pub seconds: u64,
    /// Since when.
    pub enrolled: UnixTime,
}

/// A KEK, encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PersistedKek {
    /// Which one.
    pub kek: KekId,
    /// When the provider's server gave it out.
    pub fetched: UnixTime,
    /// When it ends.
    pub expires: UnixTime,
    /// The ciphertext, which is bound to all of these.
    pub body: Vec<u8>,
}

/// The name of a KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KekNameRecord {
    /// The name, which no other KEK of the provider ever had.
    pub name: String,
    /// The KEK; `None` while its server has not said so.
    pub kek: Option<KekId>,
}

/// How long the audit log is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditAnchor {
    /// Number of the last record that was on disk.
    pub seq: u64,
    /// SHA-256 of its line.
    pub hash: [u8; 32],
}

/// A VM that was saved to a file, as `virsh save` does: where that is, nobody has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    /// The VM.
    pub vm: VmId,
    /// When that was noticed.
    pub since: UnixTime,
    /// The envelopes that the file has copies of.
    pub envelopes: Vec<Envelope>,
}

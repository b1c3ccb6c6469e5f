//! What the rows of this host say.

use super::records::UnixTime;
use crate::host::boot::BootId;
use crate::model::envelope::{Envelope, EnvelopeId, KekId, ProviderId, VmId};

pub(crate) use crate::model::envelope::CopyPlace;

/// A copy with an earlier generation than the keystore's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StaleCopy {
    pub envelope: EnvelopeId,
    /// When that was noted last, among all such notes.
    pub(super) noted: i64,
    /// Why it could not be brought up to date; empty if nobody has tried.
    pub reason: String,
}

/// A KEK that a stale copy needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NeededKek {
    /// The envelope whose copy it is.
    pub envelope: EnvelopeId,
    pub place: CopyPlace,
    pub provider: ProviderId,
    pub kek: KekId,
}

/// What became of a copy that was stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CopyNews {
    /// It is as the keystore was after the note was read, or counts more: it is stale no more, unless it was noted again since.
    Follows,
    /// It could not be brought up to date, and why.
    Stays(String),
}

/// A native provider's root key, encrypted by its passphrase.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NativeRoot {
    /// Counts the root keys of one provider, from 1.
    pub generation: u32,
    /// The age file that holds it.
    pub encrypted: Vec<u8>,
    /// When a backup was confirmed; never, if `None`.
    pub backed_up_at: Option<UnixTime>,
}

/// The root keys of a native provider, encrypted under a key that is bound to the TPM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BoundRoots {
    /// The newest root key in it.
    pub generation: u32,
    /// What the TPM opens.
    pub bound_key: Vec<u8>,
    /// What the key in it opens.
    pub roots: Vec<u8>,
    /// When it was made; writing it sets it.
    pub enrolled: UnixTime,
}

/// What takes the place of one row, and of no other.
pub(crate) struct TpmRenewal {
    /// The row that was read.
    pub before: BoundRoots,
    /// What it is to be.
    pub after: BoundRoots,
}

/// That a provider's KEKs are kept across a reboot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KekEnrollment {
    /// What the TPM opens.
    pub bound: Vec<u8>,
    /// The other half of what the rows' key is derived from.
    pub salt: Vec<u8>,
    /// For how long each, from when it was last fetched.
    pub seconds: u64,
    /// Since when.
    pub enrolled: UnixTime,
}

/// A KEK, encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CachedKek {
    pub kek: KekId,
    /// When the provider's server gave it out.
    pub fetched: UnixTime,
    pub expires: UnixTime,
    /// The ciphertext, which is bound to all of these.
    pub body: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KekNameRecord {
    /// The name, which no other KEK of the provider ever had.
    pub name: String,
    /// The KEK; `None` while its server has not said so.
    pub kek: Option<KekId>,
}

/// How long the audit log is known to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AuditAnchor {
    /// Number of the last record that was on disk.
    pub seq: u64,
    /// SHA-256 of its line.
    pub hash: [u8; 32],
}

/// A VM that virtseald starts with this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Autostart {
    pub vm: VmId,
    /// The boot in which nothing more is to be done: it was started in it, by whomever, or it was not to be yet.
    pub settled: BootId,
}

/// A VM that was saved to a file, as `virsh save` does: where that is, nobody has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SavedState {
    pub vm: VmId,
    /// When that was noticed.
    pub since: UnixTime,
    /// The envelopes that the file has copies of.
    pub envelopes: Vec<Envelope>,
}

/// When QEMU may have gone over, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pivot {
    pub at: UnixTime,
    pub by: PivotBy,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum PivotBy {
    /// It was asked to by virtseald, and nobody has seen that it has.
    Virtseald,
    /// It was seen to have the image below alone, and virtseald had not asked.
    Others,
}

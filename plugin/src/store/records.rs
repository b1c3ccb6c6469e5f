//! What the rows of the store say, whichever backend keeps them.

use super::error::StoreError;
use crate::model::envelope::{
    Envelope, EnvelopeError, Format1, KekId, Precedence, ProviderId, Stanza, Verified, VmId,
};
use crate::secret::Dek;

/// Seconds since 1970, UTC.
pub(crate) type UnixTime = i64;

/// Whether a call had anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The row is different now.
    Changed,
    /// The row was like that before.
    Unchanged,
}

impl Change {
    pub(super) fn of_rows(rows: usize) -> Self {
        if rows == 0 { Self::Unchanged } else { Self::Changed }
    }
}

/// What becomes of a provider that an envelope needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfNeeded {
    Stays,
    /// Somebody knows what that costs.
    Goes,
}

/// Whether an envelope's object is known to open with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum EnvelopeState {
    /// Written before its object was; the object may not exist yet.
    Pending,
    /// Its object was opened with it.
    Active,
}

impl EnvelopeState {
    /// The word in the keystore and in messages.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
        }
    }
}

/// An envelope as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EnvelopeRecord {
    pub envelope: Envelope,
    /// Whether its object is known to open.
    pub state: EnvelopeState,
    /// The object's path as text; empty where the VM's UUID says it all (a vTPM).
    pub location: String,
    pub created: UnixTime,
    pub updated: UnixTime,
}

impl EnvelopeRecord {
    /// Its envelope, once a stanza of it has opened to `dek`. A format 1 is upgraded: root alone writes the keystore.
    ///
    /// # Errors
    /// When its MAC is not one by `dek`.
    pub(crate) fn verify(&self, dek: &Dek) -> Result<Verified, EnvelopeError> {
        self.envelope.upgrade(dek, Format1::OfKeystore)
    }
}

/// What became of an envelope that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Put {
    /// It was unknown here.
    Adopted,
    /// It replaced a lower generation.
    Updated,
    /// It is what the keystore has.
    Unchanged,
    /// The keystore has a higher generation, which stays.
    Stale,
}

impl Put {
    /// What becomes of `offered` beside what is known under its id.
    pub(super) fn of(known: Option<&Envelope>, offered: &Envelope) -> Result<Self, StoreError> {
        let Some(known) = known else {
            return Ok(Self::Adopted);
        };
        if (known.vm, known.kind) != (offered.vm, offered.kind) {
            return Err(StoreError::OtherObject {
                id: known.id,
                known: format!("{} of VM {}", known.kind, known.vm),
                offered: format!("{} of VM {}", offered.kind, offered.vm),
            });
        }
        match offered.supersedes(known) {
            Precedence::Older => Ok(Self::Stale),
            Precedence::Newer => Ok(Self::Updated),
            Precedence::Same => Ok(Self::Unchanged),
            Precedence::Conflict => Err(StoreError::Conflict {
                id: known.id,
                generation: known.generation,
            }),
        }
    }
}

/// A VM that has, or had, sealed objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VmRecord {
    pub vm: VmId,
    /// Its name when it was last seen.
    pub name: String,
    /// When the first of its objects was sealed here.
    pub sealed_at: UnixTime,
    /// Whether its encrypted vTPM state was ever seen. From then on a missing state file is a loss: swtpm
    /// would answer it with a new, empty TPM.
    pub vtpm_seen: bool,
}

/// What a VM that is known counts as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    /// Sealed: the hook lets it start by its metadata alone.
    Sealed,
    /// Plain again.
    Plain,
}

/// A key provider as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProviderRecord {
    /// Who it is, on every host.
    pub id: ProviderId,
    /// What the admin calls it; unique on this host.
    pub name: String,
    /// Its kind, `native` for one; kept as text, for a later virtseal may have written it.
    pub kind: String,
    /// Whether new envelopes are wrapped by it unless told otherwise.
    pub is_default: bool,
    pub created: UnixTime,
    /// What its kind needs to know; an empty object for `native`.
    pub settings: serde_json::Value,
}

/// What is remembered of a provider that was deleted here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeletedProvider {
    pub id: ProviderId,
    pub name: String,
    pub kind: String,
    pub deleted: UnixTime,
}

/// A KEK that a job has taken out of use; its provider may still have it, and a backup may still need it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RetiredKek {
    /// The VM that it wrapped something of.
    pub vm: VmId,
    pub provider: ProviderId,
    pub kek: KekId,
}

impl RetiredKek {
    /// The KEKs of `old` that `new`, which takes its place, has no stanza of any more.
    pub(super) fn between(old: &Envelope, new: &Envelope) -> Vec<Self> {
        let stays = |gone: &Stanza| {
            let mut stanzas = new.stanzas.iter();
            stanzas.any(|stanza| (stanza.provider, &stanza.kek) == (gone.provider, &gone.kek))
        };
        let gone = old.stanzas.iter().filter(|stanza| !stays(stanza));
        gone.map(|gone| Self {
            vm: old.vm,
            provider: gone.provider,
            kek: gone.kek.clone(),
        })
        .collect()
    }
}

/// A KEK that was made for a VM here, whether or not anything was wrapped with it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct MadeKek {
    /// Whom it was made for.
    pub vm: VmId,
    pub provider: ProviderId,
    pub kek: KekId,
}

/// What the destruction of a VM's rows has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShreddedRows {
    pub envelopes: usize,
    /// Whether anything of them may still be read from the disk.
    pub traces: Traces,
}

/// Whether something that was deleted may still be read from the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Traces {
    /// It was overwritten.
    None,
    /// In a log that another program keeps from being emptied; the next start of virtseald empties it.
    Left,
}

/// Where a page of envelopes ends: only the store that gave it out knows what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageEnd(pub(super) String);

//! The native provider: a root key on this host, encrypted by a passphrase.
//!
//! ```text
//!   create ──► NotBackedUp ──backup, confirm_backup──► Ready ◄── restore
//!                 │  ▲                                 │  ▲
//!               lock unlock                          lock unlock
//!                 ▼  │                                 ▼  │
//!                Locked ◄────────── open ──────────► Locked
//! ```
//!
//! [`rotate_with_tpm`](NativeProvider::rotate_with_tpm) adds a root key and leads back to NotBackedUp: the new one wraps once it is backed
//! up, all of them unwrap for ever, and the newest encrypted text and every backup from then on hold them all.
//!
//! KEKs are derived from the root key, so one backup covers every VM to come; until it exists nothing is
//! wrapped. The root key is in memory only while unlocked: [`lock`](KeyProvider::lock) takes it away at once, a
//! call that runs at that moment ends with the copy it holds, and no later one starts.

mod backup;
mod by_tpm;
mod document;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod kek;
mod problem;
mod rotation;
mod settings;

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use self::document::RootKeys;
use self::kek::{Kek, KekName};
use super::toolbox::gcm::MECHANISM;
use super::toolbox::locks::Locks;
use super::{
    ChangeError, DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName, ProviderStatus,
    SettingsChange,
};
use crate::api::CredentialKind;
use crate::crypto::age_file::{self, AgeError, Form};
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::secret::SecretBytes;
use crate::store::{NativeRoot, NativeRows, ProviderRecord, ProviderTable};

pub(crate) use super::toolbox::locks::LocksNoted;
pub(crate) use error::NativeError;
pub(super) use settings::SETTINGS;

/// A provider whose root key is on this host.
pub(crate) struct NativeProvider {
    id: ProviderId,
    name: String,
    rows: NativeRows,
    newest: RwLock<Newest>,
    held: RwLock<Held>,
}

/// The newest root key, as the keystore has it.
#[derive(Clone)]
struct Newest {
    generation: u32,
    encrypted: Arc<[u8]>,
    backed_up: bool,
}

impl From<NativeRoot> for Newest {
    fn from(row: NativeRoot) -> Self {
        Self {
            generation: row.generation,
            encrypted: row.encrypted.into(),
            backed_up: row.backed_up_at.is_some(),
        }
    }
}

#[derive(Default)]
struct Held {
    roots: Option<Arc<RootKeys>>,
    locks: Locks,
    /// Why it did not unlock by itself.
    why: Option<WhyLocked>,
}

/// Why a provider that the TPM could open is locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum WhyLocked {
    /// Somebody must type the PIN.
    NeedsPin,
    /// The kernel that has booted is not signed by the enrolled key.
    NotSigned(String),
    /// Anything else that the TPM says, or that is said of its row.
    NotOpened(String),
}

impl fmt::Display for WhyLocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NeedsPin => f.write_str("it needs its PIN for the TPM"),
            Self::NotSigned(why) | Self::NotOpened(why) => f.write_str(why),
        }
    }
}

impl NativeProvider {
    pub(crate) const KIND: &'static str = "native";

    /// Makes a root key, encrypts it by `passphrase` and records it. The new provider is `NotBackedUp`.
    pub(crate) fn create(
        table: &ProviderTable,
        name: &ProviderName,
        passphrase: &SecretBytes,
    ) -> Result<Self, NativeError> {
        table.refuse_taken(name.as_str(), None)?;
        let roots = RootKeys::random(ProviderId::random()).map_err(NativeError::Memory)?;
        Self::record(table, name, roots, passphrase, None)
    }

    fn record(
        table: &ProviderTable,
        name: &ProviderName,
        roots: RootKeys,
        passphrase: &SecretBytes,
        backed_up_at: Option<i64>,
    ) -> Result<Self, NativeError> {
        let row = encrypted_row(&roots, name.as_str(), passphrase, backed_up_at)?;
        let record = table.insert_native(roots.provider, name.as_str(), &row)?;
        let provider = Self::from_rows(table.native(record.id), &record, row);
        provider
            .hold(roots, provider.locks())
            .map_err(|_| NativeError::Locked)?;
        Ok(provider)
    }

    /// The recorded provider, locked.
    ///
    /// # Errors
    /// [`NativeError::NoRoot`] when the keystore has no root key for it.
    pub(crate) fn open(table: &ProviderTable, record: &ProviderRecord) -> Result<Self, NativeError> {
        let rows = table.native(record.id);
        let row = rows.root()?.ok_or(NativeError::NoRoot)?;
        Ok(Self::from_rows(rows, record, row))
    }

    fn from_rows(rows: NativeRows, record: &ProviderRecord, row: NativeRoot) -> Self {
        Self {
            id: record.id,
            name: record.name.clone(),
            rows,
            newest: RwLock::new(row.into()),
            held: RwLock::default(),
        }
    }

    /// The newest root key's generation.
    pub(crate) fn generation(&self) -> u32 {
        self.newest().generation
    }

    /// Whether a later root key than it has made this KEK: it was restored from an old backup, or its keystore was.
    pub(crate) fn lacks(&self, kek: &KekId) -> bool {
        KekName::parse(kek).is_ok_and(|name| name.generation > self.generation())
    }

    fn newest(&self) -> Newest {
        self.newest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn roots(&self) -> Result<Arc<RootKeys>, ProviderError> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.roots.clone().ok_or_else(|| match &held.why {
            Some(WhyLocked::NeedsPin) => ProviderError::LockedByPin,
            Some(why) => ProviderError::LockedBecause(why.to_string()),
            None => ProviderError::Locked,
        })
    }

    /// Why it is locked, where somebody expected that it is not.
    pub(crate) fn why_locked(&self) -> Option<WhyLocked> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.why.clone().filter(|_| held.roots.is_none())
    }

    /// Remembers the reason of an attempt that began then, unless there was a lock since.
    fn explain_lock(&self, why: Option<(LocksNoted, WhyLocked)>) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        let why = why.filter(|(since, _)| held.locks.are(*since));
        held.why = why.map(|(_, why)| why);
    }

    /// Keeps the root keys, unless the provider was locked since.
    fn hold(&self, roots: RootKeys, since: LocksNoted) -> Result<(), ProviderError> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if !held.locks.are(since) {
            return Err(ProviderError::Locked);
        }
        // An unlock that began before a rotation ended knows less than what is held.
        if held
            .roots
            .as_ref()
            .is_none_or(|known| known.newest() <= roots.newest())
        {
            held.roots = Some(Arc::new(roots));
            held.why = None;
        }
        Ok(())
    }

    /// The root keys, if the provider may wrap, and the generation to wrap with.
    fn roots_for_wrapping(&self) -> Result<(Arc<RootKeys>, u32), ProviderError> {
        let roots = self.roots()?;
        let newest = self.newest();
        if newest.backed_up {
            Ok((roots, newest.generation))
        } else {
            Err(ProviderError::NotBackedUp)
        }
    }

    fn kek(&self, roots: &RootKeys, id: &KekId) -> Result<Kek, ProviderError> {
        let name = KekName::parse(id)?;
        let root = roots
            .key(name.generation)
            .ok_or_else(|| ProviderError::UnknownKek(id.clone()))?;
        Kek::derive(root, self.id, name)
    }

    /// Whether this provider can have made the stanza.
    fn check(&self, stanza: &Stanza) -> Result<(), ProviderError> {
        if stanza.provider != self.id {
            return Err(ProviderError::Tampered);
        }
        if stanza.mechanism != MECHANISM {
            return Err(ProviderError::UnknownMechanism(stanza.mechanism.clone()));
        }
        Ok(())
    }

    fn decrypted(&self, file: &[u8], passphrase: &SecretBytes) -> Result<RootKeys, ProviderError> {
        let text = age_file::decrypt(file, passphrase).map_err(|error| match error {
            AgeError::WrongPassphrase | AgeError::EmptyPassphrase | AgeError::PassphraseText => {
                ProviderError::WrongCredential
            }
            error => ProviderError::internal("opening the encrypted root key")(error),
        })?;
        let roots = RootKeys::from_text(&text).map_err(ProviderError::internal("reading the root key"))?;
        if roots.provider == self.id {
            Ok(roots)
        } else {
            Err(ProviderError::Unusable(format!(
                "the keystore holds the root key of provider {} in its place",
                roots.provider
            )))
        }
    }
}

impl KeyProvider for NativeProvider {
    fn kind(&self) -> &str {
        Self::KIND
    }

    fn id(&self) -> ProviderId {
        self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn status(&self) -> ProviderStatus {
        match self.roots_for_wrapping() {
            Ok(_) => ProviderStatus::Ready,
            Err(ProviderError::NotBackedUp) => ProviderStatus::NotBackedUp,
            Err(_) => ProviderStatus::Locked,
        }
    }

    fn may_hang(&self) -> bool {
        false
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let (_, generation) = self.roots_for_wrapping()?;
        let name = KekName {
            generation,
            scope: *scope,
        };
        Ok(name.id())
    }

    /// [`NativeProvider::rotate_with_tpm`] has retired the earlier ones.
    fn rotate_kek(&self, scope: &KekScope, _: &KekId) -> Result<KekId, ProviderError> {
        self.create_kek(scope)
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        let (roots, generation) = self.roots_for_wrapping()?;
        if KekName::parse(kek)?.generation != generation {
            return Err(ProviderError::UnknownKek(kek.clone()));
        }
        Ok(Stanza {
            provider: self.id,
            provider_name: self.name.clone(),
            kek: kek.clone(),
            mechanism: MECHANISM.to_owned(),
            body: self.kek(&roots, kek)?.wrap(payload)?,
        })
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        let roots = self.roots()?;
        // The objects of one VM have one KEK.
        let mut last: Option<(&KekId, Kek)> = None;
        stanzas
            .iter()
            .map(|stanza| {
                self.check(stanza)?;
                let kek = match last.take() {
                    Some((id, kek)) if *id == stanza.kek => kek,
                    _ => self.kek(&roots, &stanza.kek)?,
                };
                let payload = kek.unwrap(&stanza.body);
                last = Some((&stanza.kek, kek));
                payload
            })
            .collect()
    }

    /// Destroys nothing: the root key and its backups derive every KEK again, as the receipt says.
    fn destroy_kek(&self, kek: &KekId, _: VmId) -> Result<DestroyReceipt, ProviderError> {
        // Nothing of it is anywhere, so nothing has to be unlocked.
        if KekName::parse(kek)?.generation > self.newest().generation {
            return Err(ProviderError::UnknownKek(kek.clone()));
        }
        Ok(DestroyReceipt {
            kek: kek.clone(),
            destroyed: false,
            observed:
                "the KEK is derived from the root key and was never stored: it can be derived again for as \
                       long as the root key or one of its backups exists"
                    .to_owned(),
        })
    }

    fn lock(&self) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        held.locks.count();
        held.roots = None;
        held.why = None;
    }

    /// Nothing but words can be changed.
    fn change(&self, change: &SettingsChange<'_>) -> Result<(), ChangeError> {
        Ok((change.record)()?)
    }

    fn asks_for(&self) -> Option<CredentialKind> {
        Some(CredentialKind::Passphrase)
    }

    /// Also tells a wrong passphrase while unlocked. A lock during the second that this takes wins.
    fn unlock_since(&self, locks: LocksNoted, credential: &SecretBytes) -> Result<(), ProviderError> {
        let file = self.newest().encrypted;
        self.hold(self.decrypted(&file, credential)?, locks)
    }

    fn locks(&self) -> LocksNoted {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.locks.noted()
    }
}

fn encrypted_row(
    roots: &RootKeys,
    name: &str,
    passphrase: &SecretBytes,
    backed_up_at: Option<i64>,
) -> Result<NativeRoot, NativeError> {
    let text = roots.to_text(name)?;
    Ok(NativeRoot {
        generation: roots.newest(),
        encrypted: age_file::encrypt(&text, passphrase, Form::Binary).map_err(NativeError::Encrypt)?,
        backed_up_at,
    })
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;

//! The native provider: a root key on this host, sealed by a passphrase.
//!
//! ```text
//!   create ──► NotBackedUp ──backup, confirm_backup──► Ready ◄── restore
//!                 │  ▲                                 │  ▲
//!               lock unlock                          lock unlock
//!                 ▼  │                                 ▼  │
//!                Locked ◄────────── open ──────────► Locked
//! ```
//!
//! KEKs are derived from the root key, so one backup covers every VM to come; until it exists nothing is
//! wrapped. The root key is in memory only while unlocked: [`lock`](KeyProvider::lock) takes it away at once, a
//! call that runs at that moment ends with the copy it holds, and no later one starts.

mod document;
mod kek;
pub(super) mod sealing;

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

use self::document::RootKey;
use self::kek::{Kek, KekName};
use self::sealing::Form;
use super::aes_gcm::MECHANISM;
use super::{DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName, ProviderStatus};
use crate::envelope::{KekId, Payload, ProviderId, Stanza};
use crate::keystore::{Keystore, KeystoreError, NativeRoot, ProviderRecord};
use crate::secret::{SecretBytes, Transient};

pub use document::DocumentError;
pub use sealing::SealingError;

/// A provider whose root key is on this host.
pub struct NativeProvider {
    id: ProviderId,
    name: String,
    keystore: Arc<Keystore>,
    generation: u32,
    sealed: Vec<u8>,
    backed_up: AtomicBool,
    held: RwLock<Held>,
}

#[derive(Default)]
struct Held {
    root: Option<Arc<SecretBytes>>,
    /// How often it was locked: an unlock that took its second meanwhile must not undo that.
    locks: u64,
}

/// A backup, ready to be written.
pub struct Backup {
    /// The root key that it holds, for [`NativeProvider::confirm_backup`].
    pub generation: u32,
    /// An armored age file, or the bare text if there was no passphrase.
    pub bytes: Transient,
}

impl fmt::Debug for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Backup(generation {}; {} bytes)",
            self.generation,
            self.bytes.len()
        )
    }
}

impl NativeProvider {
    /// The kind in the keystore.
    pub const KIND: &'static str = "native";

    /// The most bytes that a backup can have.
    pub const MOST_BACKUP_BYTES: usize = sealing::MOST_BYTES;

    /// Makes a root key, seals it by `passphrase` and records it. The new provider is `NotBackedUp`.
    ///
    /// # Errors
    /// When the name is taken, the passphrase is empty, or the keystore can't be written.
    pub fn create(
        keystore: Arc<Keystore>,
        name: &ProviderName,
        passphrase: &SecretBytes,
    ) -> Result<Self, NativeError> {
        refuse_taken(&keystore, None, name)?;
        let root = RootKey::random(ProviderId::random()).map_err(NativeError::Memory)?;
        Self::record(keystore, name, root, passphrase, None)
    }

    /// Brings a backed-up provider to this host, sealed by `passphrase`. It counts as backed up.
    ///
    /// # Errors
    /// When the name or the provider is on this host already, or `backup` does not open.
    pub fn restore(
        keystore: Arc<Keystore>,
        name: &ProviderName,
        backup: &[u8],
        backup_passphrase: Option<&SecretBytes>,
        passphrase: &SecretBytes,
    ) -> Result<Self, NativeError> {
        refuse_taken(&keystore, None, name)?;
        let root = read_backup(backup, backup_passphrase)?;
        refuse_taken(&keystore, Some(root.provider), name)?;
        Self::record(keystore, name, root, passphrase, Some(now()))
    }

    fn record(
        keystore: Arc<Keystore>,
        name: &ProviderName,
        root: RootKey,
        passphrase: &SecretBytes,
        backed_up_at: Option<i64>,
    ) -> Result<Self, NativeError> {
        let text = root.to_text(name.as_str())?;
        let row = NativeRoot {
            generation: root.generation,
            sealed: sealing::seal(&text, passphrase, Form::Binary).map_err(NativeError::Seal)?,
            backed_up_at,
        };
        let record = keystore.insert_native_root(root.provider, name.as_str(), &row)?;
        let provider = Self::from_rows(keystore, &record, row);
        provider.hold(root.key, 0).map_err(|_| NativeError::Locked)?;
        Ok(provider)
    }

    /// The recorded provider, locked.
    ///
    /// # Errors
    /// [`NativeError::NoRoot`] when the keystore has no root key for it.
    pub fn open(keystore: Arc<Keystore>, record: &ProviderRecord) -> Result<Self, NativeError> {
        let row = keystore.native_root(record.id)?.ok_or(NativeError::NoRoot)?;
        Ok(Self::from_rows(keystore, record, row))
    }

    fn from_rows(keystore: Arc<Keystore>, record: &ProviderRecord, row: NativeRoot) -> Self {
        Self {
            id: record.id,
            name: record.name.clone(),
            keystore,
            generation: row.generation,
            sealed: row.sealed,
            backed_up: AtomicBool::new(row.backed_up_at.is_some()),
            held: RwLock::default(),
        }
    }

    /// Whether a backup was ever confirmed.
    #[must_use]
    pub fn is_backed_up(&self) -> bool {
        self.backed_up.load(Ordering::SeqCst)
    }

    /// A backup of the root key: an age file that stock `age -d` opens with `passphrase`, or the bare text,
    /// about which the caller warns. It was opened again before it is returned. Once it is written and synced,
    /// the caller says so with [`NativeProvider::confirm_backup`].
    ///
    /// # Errors
    /// [`NativeError::Locked`], or when the passphrase is empty.
    pub fn backup(&self, passphrase: Option<&SecretBytes>) -> Result<Backup, NativeError> {
        let root = self.root().map_err(|_| NativeError::Locked)?;
        let mut key = SecretBytes::zeroed(root.expose().len()).map_err(NativeError::Memory)?;
        key.expose_mut().copy_from_slice(root.expose());
        let document = RootKey {
            provider: self.id,
            generation: self.generation,
            key,
        };
        let text = document.to_text(&self.name)?;
        let bytes = match passphrase {
            None => text,
            Some(passphrase) => {
                Transient::new(sealing::seal(&text, passphrase, Form::Armored).map_err(NativeError::Seal)?)
            }
        };
        let read = read_backup(&bytes, passphrase)?;
        if !openssl::memcmp::eq(read.key.expose(), root.expose()) {
            return Err(NativeError::Seal(SealingError::NotVerified));
        }
        Ok(Backup {
            generation: self.generation,
            bytes,
        })
    }

    /// Notes that a [`Backup`] was written and synced: from now on the provider wraps.
    pub fn confirm_backup(&self, generation: u32) -> Result<(), NativeError> {
        self.keystore.mark_backed_up(self.id, generation)?;
        self.backed_up.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn root(&self) -> Result<Arc<SecretBytes>, ProviderError> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.root.clone().ok_or(ProviderError::Locked)
    }

    fn locks(&self) -> u64 {
        self.held.read().unwrap_or_else(PoisonError::into_inner).locks
    }

    /// Keeps the root key, unless the provider was locked since that many locks were counted.
    fn hold(&self, root: SecretBytes, since: u64) -> Result<(), ProviderError> {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if held.locks != since {
            return Err(ProviderError::Locked);
        }
        held.root = Some(Arc::new(root));
        Ok(())
    }

    /// The root key, if the provider may wrap.
    fn root_for_wrapping(&self) -> Result<Arc<SecretBytes>, ProviderError> {
        let root = self.root()?;
        if self.is_backed_up() {
            Ok(root)
        } else {
            Err(ProviderError::NotBackedUp)
        }
    }

    fn kek(&self, root: &SecretBytes, id: &KekId) -> Result<Kek, ProviderError> {
        let name = KekName::parse(id)?;
        if name.generation != self.generation {
            return Err(ProviderError::UnknownKek(id.clone()));
        }
        Kek::derive(root, self.id, name)
    }

    fn unwrap_one(&self, root: &SecretBytes, stanza: &Stanza) -> Result<Payload, ProviderError> {
        if stanza.provider != self.id {
            return Err(ProviderError::Tampered);
        }
        if stanza.mechanism != MECHANISM {
            return Err(ProviderError::UnknownMechanism(stanza.mechanism.clone()));
        }
        self.kek(root, &stanza.kek)?.unwrap(&stanza.body)
    }

    fn unseal(&self, passphrase: &SecretBytes) -> Result<SecretBytes, ProviderError> {
        let text = sealing::open(&self.sealed, passphrase).map_err(|error| match error {
            SealingError::WrongPassphrase | SealingError::EmptyPassphrase | SealingError::PassphraseText => {
                ProviderError::WrongCredential
            }
            error => ProviderError::internal("opening the sealed root key")(error),
        })?;
        let root = RootKey::from_text(&text).map_err(ProviderError::internal("reading the root key"))?;
        if (root.provider, root.generation) == (self.id, self.generation) {
            Ok(root.key)
        } else {
            Err(ProviderError::Unusable(format!(
                "the keystore holds the root key of provider {} in its place",
                root.provider
            )))
        }
    }
}

impl KeyProvider for NativeProvider {
    fn id(&self) -> ProviderId {
        self.id
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn status(&self) -> ProviderStatus {
        match self.root_for_wrapping() {
            Ok(_) => ProviderStatus::Ready,
            Err(ProviderError::NotBackedUp) => ProviderStatus::NotBackedUp,
            Err(_) => ProviderStatus::Locked,
        }
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        self.root_for_wrapping()?;
        let name = KekName {
            generation: self.generation,
            scope: *scope,
        };
        Ok(name.id())
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        let root = self.root_for_wrapping()?;
        Ok(Stanza {
            provider: self.id,
            provider_name: self.name.clone(),
            kek: kek.clone(),
            mechanism: MECHANISM.to_owned(),
            body: self.kek(&root, kek)?.wrap(payload)?,
        })
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        let root = self.root()?;
        stanzas
            .iter()
            .map(|stanza| self.unwrap_one(&root, stanza))
            .collect()
    }

    /// Destroys nothing: the root key and its backups derive every KEK again, as the receipt says.
    fn destroy_kek(&self, kek: &KekId) -> Result<DestroyReceipt, ProviderError> {
        let root = self.root()?;
        self.kek(&root, kek)?;
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
        held.locks += 1;
        held.root = None;
    }

    /// Also tells a wrong passphrase while unlocked. A lock during the second that this takes wins.
    fn unlock(&self, credential: &SecretBytes) -> Result<(), ProviderError> {
        let locks = self.locks();
        self.hold(self.unseal(credential)?, locks)
    }
}

fn refuse_taken(
    keystore: &Keystore,
    id: Option<ProviderId>,
    name: &ProviderName,
) -> Result<(), KeystoreError> {
    for known in keystore.providers()? {
        if known.name == name.as_str() {
            return Err(KeystoreError::ProviderNameTaken(known.name));
        }
        if Some(known.id) == id {
            return Err(KeystoreError::ProviderExists {
                id: known.id,
                name: known.name,
            });
        }
    }
    Ok(())
}

fn read_backup(backup: &[u8], passphrase: Option<&SecretBytes>) -> Result<RootKey, NativeError> {
    if backup.len() > sealing::MOST_BYTES {
        return Err(NativeError::Backup(SealingError::TooLong));
    }
    if !sealing::is_sealed(backup) {
        return Ok(RootKey::from_text(backup)?);
    }
    let passphrase = passphrase.ok_or(NativeError::BackupIsSealed)?;
    let text = sealing::open(backup, passphrase).map_err(NativeError::Backup)?;
    Ok(RootKey::from_text(&text)?)
}

fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// Why a native provider can't be made, backed up or restored.
#[derive(Debug, Error)]
pub enum NativeError {
    /// The keystore refuses.
    #[error(transparent)]
    Keystore(#[from] KeystoreError),
    /// It must be unlocked first.
    #[error("is locked")]
    Locked,
    /// No secret memory.
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
    /// Sealing a root key failed.
    #[error("can't seal the root key")]
    Seal(#[source] SealingError),
    /// The backup does not open.
    #[error("can't open the backup")]
    Backup(#[source] SealingError),
    /// The backup needs its passphrase.
    #[error("the backup is sealed: give the passphrase that it was made with")]
    BackupIsSealed,
    /// What was opened is no root key.
    #[error("can't read the root key")]
    Document(#[from] DocumentError),
    /// A row without its root key.
    #[error("its root key is missing from the keystore")]
    NoRoot,
}

#[cfg(test)]
mod tests;

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
//! [`rotate`](NativeProvider::rotate) adds a root key and leads back to NotBackedUp: the new one wraps once it is backed
//! up, all of them unwrap for ever, and the newest encrypted text and every backup from then on hold them all.
//!
//! KEKs are derived from the root key, so one backup covers every VM to come; until it exists nothing is
//! wrapped. The root key is in memory only while unlocked: [`lock`](KeyProvider::lock) takes it away at once, a
//! call that runs at that moment ends with the copy it holds, and no later one starts.

mod by_tpm;
mod document;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod kek;
mod problem;

use std::fmt;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

use self::document::RootKeys;
use self::kek::{Kek, KekName};
use super::toolbox::gcm::MECHANISM;
use super::toolbox::locks::Locks;
use super::{DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName, ProviderStatus};
use crate::crypto::age_file::{self, AgeError, Form};
use crate::host::tpm::{Tpm, TpmError};
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::secret::{SecretBytes, Transient};
use crate::store::{Change, NativeRoot, NativeRows, ProviderRecord, ProviderTable, StoreError};

pub use super::toolbox::locks::LocksNoted;
pub use by_tpm::TpmEnrollment;
pub use document::DocumentError;

/// A provider whose root key is on this host.
pub struct NativeProvider {
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
            encrypted: row.sealed.into(),
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
pub enum WhyLocked {
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
    pub const MAX_BACKUP_BYTES: usize = age_file::MAX_BYTES;

    /// Makes a root key, encrypts it by `passphrase` and records it. The new provider is `NotBackedUp`.
    ///
    /// # Errors
    /// When the name is taken, the passphrase is empty, or the keystore can't be written.
    pub fn create(
        table: &ProviderTable,
        name: &ProviderName,
        passphrase: &SecretBytes,
    ) -> Result<Self, NativeError> {
        table.refuse_taken(name.as_str(), None)?;
        let roots = RootKeys::random(ProviderId::random()).map_err(NativeError::Memory)?;
        Self::record(table, name, roots, passphrase, None)
    }

    /// Brings a backed-up provider to this host, encrypted by `passphrase`. It counts as backed up.
    ///
    /// # Errors
    /// When the name or the provider is on this host already, or `backup` does not open.
    pub fn restore(
        table: &ProviderTable,
        name: &ProviderName,
        backup: &[u8],
        backup_passphrase: Option<&SecretBytes>,
        passphrase: &SecretBytes,
    ) -> Result<Self, NativeError> {
        table.refuse_taken(name.as_str(), None)?;
        let roots = read_backup(backup, backup_passphrase)?;
        table.refuse_taken(name.as_str(), Some(roots.provider))?;
        Self::record(table, name, roots, passphrase, Some(now()))
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
    pub fn open(table: &ProviderTable, record: &ProviderRecord) -> Result<Self, NativeError> {
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
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.newest().generation
    }

    /// Whether a later root key than it has made this KEK: it was restored from an old backup, or its keystore was.
    #[must_use]
    pub fn lacks(&self, kek: &KekId) -> bool {
        KekName::parse(kek).is_ok_and(|name| name.generation > self.generation())
    }

    /// Whether a backup of the newest root key was ever confirmed.
    #[must_use]
    pub fn is_backed_up(&self) -> bool {
        self.newest().backed_up
    }

    fn newest(&self) -> Newest {
        self.newest.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds a root key, encrypted together with all earlier ones by the same `passphrase`. From then on nothing is wrapped
    /// until a backup of it is confirmed; what was wrapped before still opens. Returns the new generation; where the
    /// newest one was never backed up there is nothing to retire, and it stays.
    ///
    /// # Errors
    /// When the passphrase is wrong, or the keystore can't be written.
    pub fn rotate(&self, passphrase: &SecretBytes) -> Result<u32, NativeError> {
        self.rotate_and(passphrase, |row, _| {
            self.rows.add_root(row, None)?;
            Ok(())
        })?;
        Ok(self.generation())
    }

    /// The same, and `tpm` opens the new root keys from the same commit on, if it opened the earlier ones; with `pin` where
    /// it needs one. What it says of that comes back; its refusal is no reason not to rotate, but for that of a PIN which
    /// somebody has typed for this.
    ///
    /// # Errors
    /// As [`NativeProvider::rotate`].
    pub fn rotate_with_tpm(
        &self,
        passphrase: &SecretBytes,
        tpm: &Tpm,
        pin: Option<&Arc<SecretBytes>>,
    ) -> Result<Result<Change, NativeError>, NativeError> {
        let rotated = self.rotate_and(passphrase, |row, roots| {
            let renewal = match self.rows.tpm_seal()? {
                None => Ok(None),
                Some(seal) => self.renewal(tpm, seal, roots, pin).map(Some),
            };
            if let Err(NativeError::Tpm(TpmError::WrongPin { .. })) = &renewal {
                return Err(renewal.err().expect("it was just seen"));
            }
            let renewed = self
                .rows
                .add_root(row, renewal.as_ref().ok().and_then(Option::as_ref))?;
            Ok(renewal.map(|_| renewed))
        })?;
        Ok(rotated.unwrap_or_else(|| self.renew_tpm(tpm, pin)))
    }

    /// What `commit` says that puts the new row into the keystore; `None` where there is nothing to retire.
    fn rotate_and<T>(
        &self,
        passphrase: &SecretBytes,
        commit: impl FnOnce(&NativeRoot, &RootKeys) -> Result<T, NativeError>,
    ) -> Result<Option<T>, NativeError> {
        let began = self.newest();
        let locks = self.locks();
        let mut roots = self
            .decrypted(&began.encrypted, passphrase)
            .map_err(|error| match error {
                ProviderError::WrongCredential => NativeError::WrongPassphrase,
                error => NativeError::Decrypt(error),
            })?;
        if !began.backed_up {
            return Ok(None);
        }
        if roots.len() >= RootKeys::MOST {
            return Err(NativeError::TooManyGenerations);
        }
        roots.grow().map_err(NativeError::Memory)?;
        let row = encrypted_row(&roots, &self.name, passphrase, None)?;
        // Two at once: the second finds its row taken, and nothing has changed.
        let committed = commit(&row, &roots)?;
        *self.newest.write().unwrap_or_else(PoisonError::into_inner) = row.into();
        if self.roots().is_ok() {
            // A lock meanwhile wins.
            let _ = self.hold(roots, locks);
        }
        Ok(Some(committed))
    }

    /// A backup of all root keys: an age file that stock `age -d` opens with `passphrase`, or the bare text,
    /// about which the caller warns. It was opened again before it is returned. Once it is written and synced,
    /// the caller says so with [`NativeProvider::confirm_backup`].
    ///
    /// # Errors
    /// [`NativeError::Locked`], or when the passphrase is empty.
    pub fn backup(&self, passphrase: Option<&SecretBytes>) -> Result<Backup, NativeError> {
        let roots = self.roots().map_err(|_| NativeError::Locked)?;
        let text = roots.to_text(&self.name)?;
        let bytes = match passphrase {
            None => text,
            Some(passphrase) => Transient::new(
                age_file::encrypt(&text, passphrase, Form::Armored).map_err(NativeError::Encrypt)?,
            ),
        };
        if !read_backup(&bytes, passphrase)?.are(&roots) {
            return Err(NativeError::Encrypt(AgeError::NotVerified));
        }
        Ok(Backup {
            generation: roots.newest(),
            bytes,
        })
    }

    /// Notes that a [`Backup`] was written and synced: from now on the provider wraps, unless it was rotated since.
    pub fn confirm_backup(&self, generation: u32) -> Result<(), NativeError> {
        self.rows.mark_backed_up(generation)?;
        let mut newest = self.newest.write().unwrap_or_else(PoisonError::into_inner);
        newest.backed_up |= newest.generation == generation;
        Ok(())
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
    #[must_use]
    pub fn why_locked(&self) -> Option<WhyLocked> {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.why.clone().filter(|_| held.roots.is_none())
    }

    /// Remembers the reason of an attempt that began then, unless there was a lock since.
    fn explain_lock(&self, why: Option<(LocksNoted, WhyLocked)>) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        let why = why.filter(|(since, _)| held.locks.are(*since));
        held.why = why.map(|(_, why)| why);
    }

    /// What tells whether it is locked later on.
    #[must_use]
    pub fn locks(&self) -> LocksNoted {
        let held = self.held.read().unwrap_or_else(PoisonError::into_inner);
        held.locks.noted()
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

    /// [`NativeProvider::rotate`] has retired the earlier ones.
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

    /// Also tells a wrong passphrase while unlocked. A lock during the second that this takes wins.
    fn unlock(&self, credential: &SecretBytes) -> Result<(), ProviderError> {
        let locks = self.locks();
        let file = self.newest().encrypted;
        self.hold(self.decrypted(&file, credential)?, locks)
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
        sealed: age_file::encrypt(&text, passphrase, Form::Binary).map_err(NativeError::Encrypt)?,
        backed_up_at,
    })
}

fn read_backup(backup: &[u8], passphrase: Option<&SecretBytes>) -> Result<RootKeys, NativeError> {
    if backup.len() > age_file::MAX_BYTES {
        return Err(NativeError::Backup(AgeError::TooLong));
    }
    if !age_file::is_age_file(backup) {
        return Ok(RootKeys::from_text(backup)?);
    }
    let passphrase = passphrase.ok_or(NativeError::BackupIsEncrypted)?;
    let text = age_file::decrypt(backup, passphrase).map_err(NativeError::Backup)?;
    Ok(RootKeys::from_text(&text)?)
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
    Keystore(#[from] StoreError),
    /// It must be unlocked first.
    #[error("is locked")]
    Locked,
    /// No secret memory.
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
    /// Encrypting a root key by its passphrase failed.
    #[error("can't encrypt the root key")]
    Encrypt(#[source] AgeError),
    /// The backup does not open.
    #[error("can't open the backup")]
    Backup(#[source] AgeError),
    /// The backup needs its passphrase.
    #[error("the backup is encrypted: give the passphrase that it was made with")]
    BackupIsEncrypted,
    /// What was opened is no root key.
    #[error("can't read the root key")]
    Document(#[from] DocumentError),
    /// Another passphrase than the one that encrypts it.
    #[error("does not accept this passphrase")]
    WrongPassphrase,
    /// The root keys can't be decrypted.
    #[error("can't open its root keys")]
    Decrypt(#[source] ProviderError),
    /// As many as one encrypted text may hold.
    #[error(
        "has had {} root keys, which is as many as there can be: move its VMs to a new provider",
        RootKeys::MOST
    )]
    TooManyGenerations,
    /// The TPM is no way in.
    #[error("is not enrolled with the TPM of this host")]
    NotEnrolled,
    /// It was rotated, and the TPM has not been told.
    #[error("has a newer root key than the TPM opens")]
    TpmStale,
    /// The TPM does not do it.
    #[error("is not opened by the TPM")]
    Tpm(#[source] TpmError),
    /// The TPM opens its part, and the rest is not what was written.
    #[error("has a damaged record of what the TPM opens")]
    TpmSeal,
    /// OpenSSL can't encrypt.
    #[error("can't encrypt the root key")]
    Cipher(#[source] openssl::error::ErrorStack),
    /// A row without its root key.
    #[error("its root key is missing from the keystore")]
    NoRoot,
}

#[cfg(test)]
mod tests;

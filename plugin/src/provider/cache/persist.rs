//! The part of a cache that outlives a reboot: KEKs on disk, which only this host's TPM opens.
//!
//! ```text
//!   enrolled: a secret of its own is bound to the TPM; it is opened once when virtseald starts, or the provider is unlocked
//!   put ─► waiting ─► a thread encrypts it under a key from that secret and the keystore's salt ─► keystore
//!   purge ─► another salt, rows gone: what was on disk opens no more, whoever has a copy
//! ```
//!
//! What writes and removes rows is in `writer`. No start waits for the disk here, nor for the TPM longer than its own call may
//! take. What was refused or purged is out of memory before anything else; where the disk does not let go of it, that is
//! tried again, and said.

mod row;
mod writer;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use thiserror::Error;

use row::{RowKey, Span};
use writer::Owed;

use crate::host::tpm::{BindPolicy, BoundToTpm, PcrList, Tpm, TpmError};
use crate::model::cache_policy::KeepTime;
use crate::model::envelope::{KekId, ProviderId};
use crate::model::problem::chain;
use crate::provider::toolbox::tpm_key;
use crate::secret::SecretBytes;
use crate::store::{CachedKek, KekCacheRows, KekEnrollment, StoreError, UnixTime, now};

/// How long the salt is; it is SHA-256 of the one before it.
const SALT: usize = 32;

/// How to keep KEKs across a reboot.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    /// What its secret is bound to.
    pub tpm: &'a Tpm,
    /// For how long after each was last fetched.
    pub keep: KeepTime,
    /// While these are what they are now.
    pub pcrs: PcrList,
}

/// How KEKs of a provider are kept across a reboot, and whether they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    /// For how long after each was last fetched.
    pub keep: KeepTime,
    /// The PCRs that must be what they were; none can be told of a damaged record.
    pub pcrs: Option<PcrList>,
    /// Those of them into which nothing was measured, so that they tell nothing.
    pub unmeasured: Option<PcrList>,
    /// Since when.
    pub enrolled: UnixTime,
    /// How many are kept now.
    pub keks: usize,
    /// Why none is kept, or not all is as it should be.
    pub problem: Option<String>,
}

/// Made and verified, and in force once the keystore has it.
#[derive(Debug)]
pub(in crate::provider) struct Enrollment {
    pub(super) record: KekEnrollment,
    secret: Arc<SecretBytes>,
    epoch: u64,
}

/// Why KEKs of a provider are not kept across a reboot.
#[derive(Debug, Error)]
pub(crate) enum Error {
    #[error("the TPM does not bind the key of its cache")]
    Tpm(#[source] TpmError),
    #[error("no memory for a key")]
    Host(#[source] io::Error),
}

/// Why a KEK does not come from here; nothing to say where none is ever kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::provider) struct NotKept(pub(in crate::provider) Option<String>);

/// The KEKs of one provider that are on disk.
#[derive(Debug)]
pub(super) struct Disk {
    rows: KekCacheRows,
    provider: ProviderId,
    name: String,
    state: Mutex<State>,
    /// The secret has come, or why it does not.
    settled: Condvar,
    /// Held while rows are written or removed: what is forgotten does not come in after.
    writing: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    enrolled: Option<KekEnrollment>,
    secret: Secret,
    /// Counts the locks and enrolments: what the TPM opens for an earlier one is dropped.
    epoch: u64,
    /// As on disk, but for what is owed.
    rows: HashMap<KekId, Row>,
    /// To be written.
    waiting: HashMap<KekId, Waiting>,
    /// To be removed from the disk.
    owed: Owed,
    /// Whether a thread is at it.
    working: bool,
    /// Why the disk does not take it.
    fault: Option<String>,
}

/// What is bound to the TPM.
#[derive(Debug, Default)]
enum Secret {
    /// Nobody has asked the TPM yet, or it has not answered.
    #[default]
    Coming,
    Failed(String),
    Held(Arc<SecretBytes>),
}

#[derive(Clone, Debug)]
struct Row {
    span: Span,
    body: Vec<u8>,
}

#[derive(Debug)]
struct Waiting {
    key: Arc<SecretBytes>,
    span: Span,
}

impl Disk {
    /// What `rows` have. The secret comes with [`Disk::load`].
    pub(super) fn open(rows: KekCacheRows, provider: ProviderId, name: &str) -> Self {
        Self {
            state: Mutex::new(State::read(&rows, provider)),
            rows,
            provider,
            name: name.to_owned(),
            settled: Condvar::new(),
            writing: Mutex::default(),
        }
    }

    /// How they are kept, if they are.
    pub(super) fn report(&self) -> Option<Report> {
        let (state, now) = (self.state(), now());
        let enrolled = state.enrolled.as_ref()?;
        let bound = BoundToTpm::from_bytes(&enrolled.bound).ok();
        Some(Report {
            keep: KeepTime::from_secs(enrolled.seconds),
            pcrs: bound.as_ref().map(BoundToTpm::pcrs),
            unmeasured: bound.as_ref().and_then(BoundToTpm::unmeasured),
            enrolled: enrolled.enrolled,
            keks: state.rows.values().filter(|row| row.span.holds(now)).count(),
            problem: match &state.secret {
                Secret::Failed(why) => Some(why.clone()),
                Secret::Coming | Secret::Held(_) => state.fault.clone(),
            },
        })
    }

    /// Binds what will keep KEKs to the TPM. Nothing changes before [`Disk::replace`].
    pub(super) fn enroll(&self, Request { tpm, keep, pcrs }: &Request<'_>) -> Result<Enrollment, Error> {
        let epoch = self.state().epoch;
        let (secret, bound) = tpm_key::bind(tpm, &BindPolicy::exactly(pcrs.clone())).map_err(Error::Tpm)?;
        let mut salt = vec![0; SALT];
        openssl::rand::rand_bytes(&mut salt).map_err(|error| Error::Host(error.into()))?;
        Ok(Enrollment {
            record: KekEnrollment {
                bound,
                salt,
                seconds: keep.as_secs(),
                enrolled: now(),
            },
            secret: Arc::new(secret),
            epoch,
        })
    }

    /// Has the keystore keep KEKs as `new` says, with the `settings` of their provider; nothing is kept yet.
    pub(super) fn replace(
        &self,
        new: Option<Enrollment>,
        settings: &serde_json::Value,
    ) -> Result<(), StoreError> {
        let _writing = lock(&self.writing);
        let written = self.rows.set(settings, new.as_ref().map(|new| &new.record));
        if written.is_err() && self.state().owed.is_something() {
            // What is on disk must not come back into memory.
            return written;
        }
        // Also where it failed: perhaps after the commit.
        let read = State::read(&self.rows, self.provider);
        let mut state = self.state();
        let before = std::mem::replace(&mut *state, read);
        state.epoch = before.epoch + 1;
        state.working = before.working;
        let bound_of =
            |enrolled: &Option<KekEnrollment>| enrolled.as_ref().map(|enrolled| enrolled.bound.clone());
        let bound = bound_of(&state.enrolled);
        state.secret = match new {
            Some(new) if Some(&new.record.bound) == bound.as_ref() => match new.epoch == before.epoch {
                true => Secret::Held(new.secret),
                // Locked meanwhile: the TPM opens it again after the unlock.
                false => Secret::Coming,
            },
            _ if bound_of(&before.enrolled) == bound => before.secret,
            _ => Secret::Coming,
        };
        self.settled.notify_all();
        written
    }

    /// Whether the TPM has something to open.
    pub(super) fn wants_tpm(&self) -> bool {
        let state = self.state();
        state.enrolled.is_some() && !matches!(state.secret, Secret::Held(_))
    }

    /// Has `tpm` open the secret. A failure is what keeps KEKs from being kept from now on.
    pub(super) fn load(&self, tpm: &Tpm) -> Result<(), TpmError> {
        let (bound, epoch) = {
            let state = self.state();
            match &state.enrolled {
                Some(enrolled) if !matches!(state.secret, Secret::Held(_)) => {
                    (enrolled.bound.clone(), state.epoch)
                }
                _ => return Ok(()),
            }
        };
        let opened = tpm_key::open(tpm, &bound, None);
        let mut state = self.state();
        if state.epoch != epoch {
            return opened.map(drop);
        }
        let (secret, outcome) = match opened {
            Ok(secret) => (Secret::Held(Arc::new(secret)), Ok(())),
            Err(error) => (Secret::Failed(chain(&error)), Err(error)),
        };
        state.secret = secret;
        self.drop_damaged(&mut state);
        self.settled.notify_all();
        outcome
    }

    /// What does not open would look young, and keep a good one out.
    fn drop_damaged(&self, state: &mut State) {
        let (Some(enrolled), Secret::Held(secret)) = (&state.enrolled, &state.secret) else {
            return;
        };
        let Ok(key) = RowKey::derive(secret, &enrolled.salt, self.provider) else {
            return;
        };
        let is_damaged =
            |kek: &KekId, row: &mut Row| matches!(key.decrypt(kek, row.span, &row.body), Ok(None));
        for (kek, _) in state.rows.extract_if(is_damaged) {
            tracing::warn!(
                provider = self.name,
                kek = kek.0,
                "its row on disk is damaged, and is removed"
            );
            state.owed.keks.insert(kek);
        }
    }

    /// Keeps KEKs that were fetched then, soon; those that it has are renewed after a quarter of their time.
    pub(super) fn put(self: &Arc<Self>, fetched: UnixTime, keks: &[KekId], keys: &[Arc<SecretBytes>]) {
        let mut state = self.state();
        let (Some(enrolled), Secret::Held(_)) = (&state.enrolled, &state.secret) else {
            return;
        };
        let span = Span::lasting(fetched, enrolled.seconds);
        let due = |kek: &KekId| {
            let waiting = state.waiting.get(kek).map(|waiting| waiting.span);
            let known = waiting.or_else(|| state.rows.get(kek).map(|row| row.span));
            known.is_none_or(|known| known.is_to_be_renewed_by(span))
        };
        let due: Vec<_> = keks.iter().zip(keys).filter(|(kek, _)| due(kek)).collect();
        for (kek, key) in due {
            let key = Arc::clone(key);
            state.waiting.insert(kek.clone(), Waiting { key, span });
        }
        if !state.waiting.is_empty() {
            self.work(&mut state);
        }
    }

    /// Whether `kek` is likely to come from here. Waits for nothing.
    pub(super) fn may_have(&self, kek: &KekId) -> bool {
        let state = self.state();
        let opens = !matches!(state.secret, Secret::Failed(_));
        opens && state.rows.get(kek).is_some_and(|row| row.span.holds(now()))
    }

    /// A KEK that is kept. Waits for the TPM, until `until`, if that has not answered yet.
    pub(super) fn recall(&self, kek: &KekId, until: Instant) -> Result<SecretBytes, NotKept> {
        self.recall_at(kek, until, now())
    }

    fn recall_at(&self, kek: &KekId, until: Instant, now: UnixTime) -> Result<SecretBytes, NotKept> {
        let refused = |why: &str| NotKept(Some(why.to_owned()));
        let mut state = self.state();
        loop {
            let Some(enrolled) = &state.enrolled else {
                return Err(NotKept(None));
            };
            let row = state
                .rows
                .get(kek)
                .ok_or_else(|| refused("its key is not kept on disk"))?;
            if !row.span.holds(now) {
                return Err(refused(row.span.why_not(now)));
            }
            match &state.secret {
                Secret::Held(secret) => {
                    let (secret, salt, row) = (Arc::clone(secret), enrolled.salt.clone(), row.clone());
                    drop(state);
                    return self.opened(&secret, &salt, kek, &row);
                }
                Secret::Failed(why) => {
                    return Err(NotKept(Some(format!("its key on disk can't be opened: {why}"))));
                }
                Secret::Coming => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(refused(
                            "its key on disk waits for the TPM, which has not answered yet",
                        ));
                    }
                    (state, _) = self
                        .settled
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn opened(
        &self,
        secret: &SecretBytes,
        salt: &[u8],
        kek: &KekId,
        row: &Row,
    ) -> Result<SecretBytes, NotKept> {
        RowKey::derive(secret, salt, self.provider)
            .and_then(|key| key.decrypt(kek, row.span, &row.body))
            .map_err(|error| NotKept(Some(format!("its key on disk can't be opened: {error}"))))?
            .ok_or_else(|| NotKept(Some("its key on disk is damaged".to_owned())))
    }

    /// Lets go of the secret, which a lock or the end of virtseald takes out of memory. What is on disk stays.
    pub(super) fn drop_secret(&self) {
        let mut state = self.state();
        state.epoch += 1;
        state.secret = Secret::Coming;
        state.waiting.clear();
    }

    /// Nothing that was kept is opened from now on. The disk lets go of it with [`Disk::settle`].
    pub(super) fn revoke(&self) {
        let mut state = self.state();
        state.waiting.clear();
        state.rows.clear();
        if let Some(enrolled) = &mut state.enrolled {
            // A way back would take turning SHA-256 around, and this can't fail.
            enrolled.salt = openssl::sha::sha256(&enrolled.salt).to_vec();
            state.owed.all = true;
        }
    }

    /// The same for one of them.
    pub(super) fn forget(&self, kek: &KekId) {
        let mut state = self.state();
        state.waiting.remove(kek);
        state.rows.remove(kek);
        if state.enrolled.is_some() {
            state.owed.keks.insert(kek.clone());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    fn read(rows: &KekCacheRows, provider: ProviderId) -> Self {
        let mut state = Self::default();
        let found = rows.enrollment().and_then(|enrolled| {
            state.enrolled = enrolled;
            rows.all()
        });
        match found {
            Ok(found) => state.rows = found.into_iter().map(row).collect(),
            Err(error) => {
                tracing::error!(%provider, "keys on disk are not used: {}", chain(&error));
                state.fault = Some(chain(&error));
            }
        }
        state
    }
}

fn row(found: CachedKek) -> (KekId, Row) {
    let CachedKek {
        kek,
        fetched,
        expires,
        body,
    } = found;
    let span = Span { fetched, expires };
    (kek, Row { span, body })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic leaves each row whole, and what is on disk is bound to what it is.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;

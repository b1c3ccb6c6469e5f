//! What gets the keys of a cache onto the disk, and off it again: one thread, which ends when there is nothing left to do.
//!
//! What it can't write is fetched and written again, what it can't remove is owed.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use thiserror::Error;

use super::row::{RowKey, Span};
use super::{Disk, Secret, State, Waiting, lock, row};
use crate::model::envelope::KekId;
use crate::model::problem::chain;
use crate::provider::cache::memory::MAX_KEKS;
use crate::secret::SecretBytes;
use crate::store::{CachedKek, Change, StoreError, now};

/// What is to be removed.
#[derive(Debug, Default)]
pub(super) struct Owed {
    pub(super) all: bool,
    pub(super) keks: HashSet<KekId>,
}

impl Owed {
    pub(super) fn is_something(&self) -> bool {
        self.all || !self.keks.is_empty()
    }
}

/// One step of the thread.
enum Task {
    Purge(Vec<u8>),
    Remove(Vec<KekId>),
    Write {
        secret: Arc<SecretBytes>,
        salt: Vec<u8>,
        keks: HashMap<KekId, Waiting>,
    },
}

/// What keeps a task from being done.
#[derive(Debug, Error)]
enum TaskError {
    #[error(transparent)]
    Keystore(#[from] StoreError),
    #[error("a key can't be encrypted")]
    Cipher(#[source] io::Error),
}

impl Disk {
    /// Makes the disk let go of what was revoked and forgotten.
    ///
    /// # Errors
    /// The keystore's; it is tried again later, and nothing of it is opened until virtseald ends.
    pub(in crate::provider::cache) fn settle(&self) -> Result<(), StoreError> {
        let _writing = lock(&self.writing);
        loop {
            let Some(task) = self.state().removal() else {
                return Ok(());
            };
            match self.perform(task) {
                Ok(()) => {}
                Err(TaskError::Keystore(error)) => return Err(error),
                // A removal encrypts nothing.
                Err(TaskError::Cipher(_)) => return Ok(()),
            }
        }
    }

    /// Whether the disk did not do something.
    pub(in crate::provider::cache) fn has_failed(&self) -> bool {
        self.state().fault.is_some()
    }

    /// Removes what has expired, and what the disk did not let go of.
    pub(in crate::provider::cache) fn tidy(self: &Arc<Self>) {
        let (mut state, now) = (self.state(), now());
        let expired: Vec<_> = state
            .rows
            .iter()
            .filter(|(_, row)| row.span.expires <= now)
            .map(|(kek, _)| kek.clone())
            .collect();
        for kek in expired {
            state.rows.remove(&kek);
            state.owed.keks.insert(kek);
        }
        if state.owed.is_something() || !state.waiting.is_empty() {
            self.work(&mut state);
        } else if !state.working {
            state.fault = None;
        }
    }

    /// Has a thread do what there is to do, unless one is at it.
    pub(super) fn work(self: &Arc<Self>, state: &mut State) {
        if state.working {
            return;
        }
        let this = Arc::clone(self);
        let started = std::thread::Builder::new()
            .name("kek-cache".to_owned())
            .spawn(move || this.run());
        match started {
            Ok(_) => state.working = true,
            Err(error) => {
                state.waiting.clear();
                state.fault = Some(format!("no thread for it: {error}"));
            }
        }
    }

    fn run(&self) {
        loop {
            let _writing = lock(&self.writing);
            let mut state = self.state();
            let Some(task) = state.removal().or_else(|| state.write()) else {
                state.working = false;
                return;
            };
            drop(state);
            if self.perform(task).is_err() {
                // What is owed is tried again by and by, what waited when it is fetched again.
                self.state().working = false;
                return;
            }
        }
    }

    fn perform(&self, task: Task) -> Result<(), TaskError> {
        let done = match task {
            Task::Purge(salt) => self.purge(&salt),
            Task::Remove(keks) => self.remove(&keks),
            Task::Write { secret, salt, keks } => self.write(&secret, &salt, keks),
        };
        let fault = done.as_ref().err().map(|error| chain(error));
        if let Some(fault) = &fault {
            tracing::error!(
                provider = self.name,
                "keys on disk are not as they should be: {fault}"
            );
        }
        self.state().fault = fault;
        done
    }

    fn purge(&self, salt: &[u8]) -> Result<(), TaskError> {
        self.rows.purge(salt)?;
        let mut state = self.state();
        // Purged once more meanwhile, which is to be done as well.
        let again = state
            .enrolled
            .as_ref()
            .is_some_and(|enrolled| enrolled.salt != salt);
        state.owed.all = again;
        Ok(())
    }

    fn remove(&self, keks: &[KekId]) -> Result<(), TaskError> {
        self.rows.delete(keks)?;
        let mut state = self.state();
        for kek in keks {
            state.owed.keks.remove(kek);
            state.rows.remove(kek);
        }
        Ok(())
    }

    fn write(
        &self,
        secret: &SecretBytes,
        salt: &[u8],
        keks: HashMap<KekId, Waiting>,
    ) -> Result<(), TaskError> {
        let key = RowKey::derive(secret, salt, self.provider).map_err(TaskError::Cipher)?;
        let encrypted = |(kek, waiting): (KekId, Waiting)| {
            let Span { fetched, expires } = waiting.span;
            let body = key
                .encrypt(&kek, waiting.span, &waiting.key)
                .map_err(TaskError::Cipher)?;
            Ok(CachedKek {
                kek,
                fetched,
                expires,
                body,
            })
        };
        let rows = keks
            .into_iter()
            .map(encrypted)
            .collect::<Result<Vec<_>, TaskError>>()?;
        let put = self.rows.put(salt, &rows, MAX_KEKS)?;
        let mut state = self.state();
        let current = state
            .enrolled
            .as_ref()
            .is_some_and(|enrolled| enrolled.salt == salt);
        if put == Change::Changed && current {
            state.rows.extend(rows.into_iter().map(row));
            state.keep_latest();
        }
        Ok(())
    }
}

impl State {
    fn removal(&self) -> Option<Task> {
        match &self.enrolled {
            Some(enrolled) if self.owed.all => Some(Task::Purge(enrolled.salt.clone())),
            _ if self.owed.keks.is_empty() => None,
            _ => Some(Task::Remove(self.owed.keks.iter().cloned().collect())),
        }
    }

    fn write(&mut self) -> Option<Task> {
        let keks = std::mem::take(&mut self.waiting);
        let (Some(enrolled), Secret::Held(secret)) = (&self.enrolled, &self.secret) else {
            return None;
        };
        (!keks.is_empty()).then(|| Task::Write {
            secret: Arc::clone(secret),
            salt: enrolled.salt.clone(),
            keks,
        })
    }

    /// As the keystore does.
    fn keep_latest(&mut self) {
        if self.rows.len() > MAX_KEKS {
            let mut order: Vec<_> = self
                .rows
                .iter()
                .map(|(kek, row)| (std::cmp::Reverse(row.span.fetched), kek.clone()))
                .collect();
            order.sort_by(|a, b| a.0.cmp(&b.0).then_with(|| a.1.0.cmp(&b.1.0)));
            for (_, kek) in order.drain(MAX_KEKS..) {
                self.rows.remove(&kek);
            }
        }
    }
}

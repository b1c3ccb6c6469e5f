//! What is known of a provider's token: which one it is, the PIN while unlocked, and the last trouble.
//!
//! A PIN is tried once. When the token refuses it, the provider is locked, and the same PIN is not sent to that token
//! again before the daemon is restarted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use super::error::TokenError;
use super::settings::{Pkcs11Settings, TokenChoice};
use crate::model::problem::chain;
use crate::provider::toolbox::locks::{Locks, LocksNoted};
use crate::secret::SecretBytes;

/// Tells the sessions of one provider from those of another on the same module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LoginNumber(u64);

/// Shared by a provider and the thread of its module.
pub(super) struct Login {
    pub(super) number: LoginNumber,
    pub(super) token: TokenChoice,
    /// The serial number of the token that was seen first.
    pub(super) serial: OnceLock<String>,
    state: Mutex<State>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) pin: Option<Arc<SecretBytes>>,
    pub(super) locks: Locks,
    pub(super) trouble: Option<String>,
    pub(super) last_answer: Option<SystemTime>,
    /// How the token described itself when it was last opened.
    pub(super) described: Option<String>,
}

impl Login {
    pub(super) fn new(settings: &Pkcs11Settings) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        Self {
            number: LoginNumber(NUMBERS.fetch_add(1, Ordering::Relaxed)),
            token: settings.token.clone(),
            serial: settings.serial.clone().map_or_else(OnceLock::new, OnceLock::from),
            state: Mutex::default(),
        }
    }

    pub(super) fn pin(&self) -> Option<Arc<SecretBytes>> {
        self.state().pin.clone()
    }

    /// Keeps `pin`, unless the provider was locked since.
    pub(super) fn hold(&self, pin: &Arc<SecretBytes>, since: LocksNoted) -> bool {
        let mut state = self.state();
        if !state.locks.are(since) {
            return false;
        }
        state.pin = Some(Arc::clone(pin));
        true
    }

    /// Locks the provider, if what the token says is that `pin` is wrong now.
    pub(super) fn forget_refused(&self, pin: &SecretBytes, error: &TokenError) {
        let mut state = self.state();
        if error.is_about_the_pin() && state.pin.as_ref().is_some_and(|held| same(held, pin)) {
            state.pin = None;
        }
    }

    /// Remembers how the last call went.
    pub(super) fn note(&self, error: Option<&TokenError>) {
        let mut state = self.state();
        match error {
            None => {
                state.trouble = None;
                state.last_answer = Some(SystemTime::now());
            }
            Some(error) if error.is_trouble() => state.trouble = Some(chain(error)),
            Some(_) => {}
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) fn same(one: &SecretBytes, other: &SecretBytes) -> bool {
    let (one, other) = (one.expose(), other.expose());
    one.len() == other.len() && openssl::memcmp::eq(one, other)
}

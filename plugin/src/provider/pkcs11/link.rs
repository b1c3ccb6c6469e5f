//! What ties a provider to its token: the PIN while unlocked, and the last trouble.
//!
//! A PIN is tried once. When the token refuses it, the provider is locked, and the same PIN is not sent to that token
//! again before the daemon is restarted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use super::error::TokenError;
use super::module::Module;
use super::settings::Pkcs11Settings;
use super::token::Token;
use crate::provider::toolbox::locks::{Locks, LocksNoted};
use crate::provider::{PinRefusal, ProviderError, ProviderStatus};
use crate::secret::SecretBytes;

/// The most time for one call, less than what the recipients allows: this one's message says more.
pub(super) const DEADLINE: Duration = Duration::from_millis(4500);

/// Tells the sessions of one provider from those of another on the same module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct LinkNumber(u64);

/// A provider's way to its token.
pub(super) struct Link {
    number: LinkNumber,
    pub(super) settings: Pkcs11Settings,
    /// The serial number of the token that was seen first.
    pub(super) serial: OnceLock<String>,
    module: Arc<Module>,
    deadline: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pin: Option<Arc<SecretBytes>>,
    locks: Locks,
    trouble: Option<String>,
    last_answer: Option<SystemTime>,
}

impl Link {
    pub(super) fn new(settings: Pkcs11Settings, deadline: Duration) -> Result<Arc<Self>, TokenError> {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let serial = OnceLock::new();
        if let Some(known) = &settings.serial {
            let _ = serial.set(known.clone());
        }
        Ok(Arc::new(Self {
            number: LinkNumber(NUMBERS.fetch_add(1, Ordering::Relaxed)),
            module: Module::of(&settings)?,
            settings,
            serial,
            deadline,
            state: Mutex::default(),
        }))
    }

    pub(super) fn number(&self) -> LinkNumber {
        self.number
    }

    /// Whether both are the same token: one login serves a whole process, so it can't be two providers.
    pub(super) fn is_same_token(self: &Arc<Self>, other: &Arc<Self>) -> bool {
        // Serial numbers would not do: all tokens of NSS have the same.
        self.module.path() == other.module.path()
            && matches!((self.find(), other.find()), (Ok(one), Ok(two)) if one == two)
    }

    pub(super) fn status(&self) -> ProviderStatus {
        let state = self.state();
        if state.pin.is_none() {
            return ProviderStatus::Locked;
        }
        let silent = self.module.silent_for(self.deadline);
        let silent = silent.map(|time| TokenError::Silent(time).to_string());
        match silent.or_else(|| state.trouble.clone()) {
            Some(trouble) => ProviderStatus::Unreachable(trouble),
            None => ProviderStatus::Ready,
        }
    }

    /// Does `op` with the token, logged in, within the deadline; twice when the token was lost in between.
    pub(super) fn call<T: Send + 'static>(
        self: &Arc<Self>,
        op: impl FnMut(&mut Token) -> Result<T, TokenError> + Send + 'static,
    ) -> Result<T, ProviderError> {
        // Said at once, not when it is this caller's turn.
        self.pin().ok_or(ProviderError::Locked)?;
        let link = Arc::clone(self);
        let done = self
            .module
            .call(self.deadline, move |worker| worker.with_token(&link, op));
        self.note(done.as_ref().err());
        Ok(done?)
    }

    /// The slot that the token is in; notes its serial number.
    pub(super) fn find(self: &Arc<Self>) -> Result<u64, ProviderError> {
        let link = Arc::clone(self);
        Ok(self
            .module
            .call(self.deadline, move |worker| worker.find(&link))?)
    }

    /// Logs in with `pin`, and keeps it in memory: a token that is taken out and put back asks for it again. It is kept,
    /// too, when the token is not there: a host that boots before its HSM comes up by itself.
    pub(super) fn unlock(self: &Arc<Self>, pin: &SecretBytes) -> Result<(), ProviderError> {
        let since = {
            let state = self.state();
            if let Some(held) = &state.pin {
                return same(held, pin)
                    .then_some(())
                    .ok_or(ProviderError::WrongPin(PinRefusal::UnlockedByAnother));
            }
            state.locks.noted()
        };
        let copy = SecretBytes::take(&mut pin.expose().to_vec()).map_err(TokenError::Memory)?;
        let copy = Arc::new(copy);
        let done = self.login(&copy, since);
        self.note(done.as_ref().err());
        if done.as_ref().is_err_and(TokenError::is_absence) && self.hold(&copy, since) {
            let link = Arc::clone(self);
            self.module.post(move |worker| worker.watch(&link));
        }
        Ok(done?)
    }

    fn login(self: &Arc<Self>, pin: &Arc<SecretBytes>, since: LocksNoted) -> Result<(), TokenError> {
        let (link, pin) = (Arc::clone(self), Arc::clone(pin));
        let expires = Instant::now() + self.deadline;
        self.module.call(self.deadline, move |worker| {
            let token = worker.connect(&link, &pin).inspect_err(|error| {
                if error.is_about_the_pin() {
                    link.forget(&pin);
                }
            })?;
            if Instant::now() < expires && link.hold(&pin, since) {
                worker.keep(&link, token);
                Ok(())
            } else {
                token.logout();
                Err(TokenError::Locked)
            }
        })
    }

    /// Forgets the PIN at once, and logs out as soon as the module lets us.
    pub(super) fn lock(&self) {
        {
            let mut state = self.state();
            state.locks.count();
            state.pin = None;
            state.trouble = None;
        }
        self.close();
        // Waits its turn behind the logout. A module that hangs keeps its session, without a PIN to be of use.
        let _ = self.module.call(self.deadline, |_| Ok(()));
    }

    fn close(&self) {
        let number = self.number;
        self.module.post(move |worker| worker.close(number));
    }

    pub(super) fn last_answer(&self) -> Option<SystemTime> {
        self.state().last_answer
    }

    pub(super) fn pin(&self) -> Option<Arc<SecretBytes>> {
        self.state().pin.clone()
    }

    /// Keeps `pin`, unless the provider was locked since.
    fn hold(&self, pin: &Arc<SecretBytes>, since: LocksNoted) -> bool {
        let mut state = self.state();
        if !state.locks.are(since) {
            return false;
        }
        state.pin = Some(Arc::clone(pin));
        true
    }

    /// Locks the provider, for `pin` is wrong now.
    pub(super) fn forget(&self, pin: &SecretBytes) {
        let mut state = self.state();
        if state.pin.as_ref().is_some_and(|held| same(held, pin)) {
            state.pin = None;
        }
    }

    /// Remembers how the last call went, for `status`.
    pub(super) fn note(&self, error: Option<&TokenError>) {
        match error {
            None => {
                let mut state = self.state();
                state.trouble = None;
                state.last_answer = Some(SystemTime::now());
            }
            Some(error) if error.is_trouble() => self.state().trouble = Some(error.in_one_line()),
            Some(_) => {}
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As if enough time had passed since the module was initialized anew.
    #[cfg(test)]
    pub(super) fn allow_reset(&self) {
        self.module.post(super::module::Worker::allow_reset);
    }

    #[cfg(test)]
    pub(super) fn probe(&self) {
        self.module
            .call(self.deadline, |worker| {
                worker.probe();
                Ok(())
            })
            .expect("the module answers");
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

fn same(one: &SecretBytes, other: &SecretBytes) -> bool {
    let (one, other) = (one.expose(), other.expose());
    one.len() == other.len() && openssl::memcmp::eq(one, other)
}

//! A provider's way to its token: each call within its deadline.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::error::TokenError;
use super::login::{Login, same};
use super::module::Module;
use super::settings::Pkcs11Settings;
use super::token::Token;
use crate::provider::toolbox::locks::LocksNoted;
use crate::provider::{PinRefusal, ProviderError, ProviderStatus};
use crate::secret::SecretBytes;

pub(super) struct Link {
    pub(super) settings: Pkcs11Settings,
    login: Arc<Login>,
    module: Arc<Module>,
    deadline: Duration,
}

impl Link {
    pub(super) fn new(settings: Pkcs11Settings, deadline: Duration) -> Result<Self, TokenError> {
        Ok(Self {
            login: Arc::new(Login::new(&settings)),
            module: Module::of(&settings)?,
            settings,
            deadline,
        })
    }

    /// What it was unlocked with, and what tells whether it was locked since.
    pub(super) fn unlocked_with(&self) -> (Option<Arc<SecretBytes>>, LocksNoted) {
        let state = self.login.state();
        (state.pin.clone(), state.locks.noted())
    }

    /// What tells whether it is locked later on.
    pub(super) fn locks(&self) -> LocksNoted {
        self.login.state().locks.noted()
    }

    pub(super) fn was_locked(&self, since: LocksNoted) -> bool {
        !self.login.state().locks.are(since)
    }

    /// How long a call may take.
    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// The serial number of the token, once one was seen that has any.
    pub(super) fn serial(&self) -> Option<&String> {
        self.login.serial.get()
    }

    /// Whether both are the same token: one login serves a whole process, so it can't be two providers.
    pub(super) fn is_same_token(&self, other: &Self) -> bool {
        // Serial numbers would not do: all tokens of NSS have the same.
        self.module.path() == other.module.path()
            && matches!((self.find(), other.find()), (Ok(one), Ok(two)) if one == two)
    }

    pub(super) fn status(&self) -> ProviderStatus {
        let state = self.login.state();
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

    /// How the token described itself, once it was opened.
    pub(super) fn described(&self) -> Option<String> {
        self.login.state().described.clone()
    }

    pub(super) fn last_answer(&self) -> Option<SystemTime> {
        self.login.state().last_answer
    }

    /// Does `op` with the token, logged in, within the deadline; twice when the token was lost in between.
    pub(super) fn call<T: Send + 'static>(
        &self,
        op: impl FnMut(&mut Token) -> Result<T, TokenError> + Send + 'static,
    ) -> Result<T, ProviderError> {
        // Said at once, not when it is this caller's turn.
        self.login.pin().ok_or(ProviderError::Locked)?;
        let login = Arc::clone(&self.login);
        let done = self
            .module
            .call(self.deadline, move |worker| worker.with_token(&login, op));
        self.login.note(done.as_ref().err());
        Ok(done?)
    }

    /// The slot that the token is in; notes its serial number.
    pub(super) fn find(&self) -> Result<u64, ProviderError> {
        let login = Arc::clone(&self.login);
        let slot = self.module.call(self.deadline, move |worker| worker.find(&login));
        Ok(slot?)
    }

    /// Logs in with `pin`, and keeps it in memory: a token that is taken out and put back asks for it again. It is kept,
    /// too, when the token is not there: a host that boots before its HSM comes up by itself.
    pub(super) fn unlock(&self, pin: &SecretBytes, since: LocksNoted) -> Result<(), ProviderError> {
        match &self.login.state().pin {
            Some(held) if same(held, pin) => return Ok(()),
            Some(_) => return Err(ProviderError::WrongPin(PinRefusal::UnlockedByAnother)),
            None => {}
        }
        let copy = SecretBytes::copy_of(pin.expose()).map_err(TokenError::Memory)?;
        let copy = Arc::new(copy);
        let done = self.log_in(&copy, since);
        self.login.note(done.as_ref().err());
        if done.as_ref().is_err_and(TokenError::is_absence) {
            self.login.hold(&copy, since);
        }
        Ok(done?)
    }

    fn log_in(&self, pin: &Arc<SecretBytes>, since: LocksNoted) -> Result<(), TokenError> {
        let (login, pin) = (Arc::clone(&self.login), Arc::clone(pin));
        let expires = Instant::now() + self.deadline;
        self.module.call(self.deadline, move |worker| {
            let token = worker.connect(&login, &pin)?;
            if Instant::now() < expires && login.hold(&pin, since) {
                worker.keep(&login, token);
                Ok(())
            } else {
                token.logout();
                Err(ProviderError::Locked.into())
            }
        })
    }

    /// Forgets the PIN at once, and logs out as soon as the module lets us.
    pub(super) fn lock(&self) {
        {
            let mut state = self.login.state();
            state.locks.count();
            state.pin = None;
            state.trouble = None;
        }
        self.close();
        // Waits its turn behind the logout. A module that hangs keeps its session, without a PIN to be of use.
        let _ = self.module.call(self.deadline, |_| Ok(()));
    }

    fn close(&self) {
        let number = self.login.number;
        self.module.post(move |worker| worker.close(number));
    }

    /// As if enough time had passed since the module was initialized anew.
    #[cfg(test)]
    pub(super) fn allow_reset(&self) {
        self.module.post(super::module::Worker::allow_reset);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.close();
    }
}

//! The link to the server: what the provider was unlocked with, the session that it made of it, and how the server was
//! when it was last asked.
//!
//! A lock takes effect at once, whatever is under way: a login that ends after it is dropped.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use super::engine::TransitEngine;
use super::http::Fault;
use super::kek;
use super::login::{self, Session};
use super::settings::{Auth, TransitSettings};
use crate::model::deadlines::transit::FRESH;
use crate::model::envelope::ProviderId;
use crate::model::finding::FindingCode;
use crate::provider::toolbox::lock;
use crate::provider::toolbox::locks::{Locks, LocksNoted};
use crate::provider::{ProviderError, ProviderStatus};
use crate::secret::SecretBytes;
pub(super) struct Link {
    pub(super) id: ProviderId,
    pub(super) settings: TransitSettings,
    state: Mutex<State>,
    /// Held while logging in: one login serves all who wait for one.
    logging_in: Mutex<()>,
    /// Held while looking at the server: the second of two looks at once must know what the first has learnt.
    looking: Mutex<()>,
}
#[derive(Default)]
pub(super) struct State {
    /// Without one it is locked.
    credential: Option<Arc<SecretBytes>>,
    pub(super) session: Option<Arc<Session>>,
    health: Health,
    /// When the server last did as asked.
    answered: Option<Instant>,
    /// The same by the clock on the wall; kept over a lock.
    last_answer: Option<SystemTime>,
    /// What will be wrong soon.
    warning: Option<(FindingCode, String)>,
    locks: Locks,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Health {
    #[default]
    Good,
    Sealed,
    /// Also where it answers, and serves nothing now.
    Unreachable(String),
    /// The server's certificate is not trusted.
    NotTrusted(String),
    /// It does not accept what the provider was unlocked with; that is not tried again.
    Ended(String),
    /// It, or what stands before it, does not let this host in.
    TurnedAway(String),
    Degraded(String),
}

fn certificate_ends(session: &Session) -> Option<(FindingCode, String)> {
    let what = session.client.warning.clone()?;
    Some((FindingCode::CertificateEnds, what))
}

impl Health {
    /// What a call has shown.
    fn after<T>(outcome: &Result<T, Fault>) -> Self {
        match outcome {
            Ok(_) | Err(Fault::Provider(_)) => Self::Good,
            Err(Fault::Sealed) => Self::Sealed,
            // It may pass, so the next call tries again.
            Err(Fault::Unreachable(why) | Fault::Trouble(why)) => Self::Unreachable(why.clone()),
            Err(Fault::NotTrusted(why)) => Self::NotTrusted(why.clone()),
            Err(Fault::Ended(why)) => Self::Ended(why.clone()),
            Err(Fault::WrongCredential) => {
                Self::Ended("the server does not accept its credential".to_owned())
            }
            Err(Fault::TurnedAway(why) | Fault::WantsCertificate(why)) => Self::TurnedAway(why.clone()),
            Err(Fault::NotFound(why)) if why.is_empty() => {
                Self::Degraded("the server does not know what it was asked for".to_owned())
            }
            Err(Fault::Denied(why) | Fault::NotFound(why) | Fault::Refused(why) | Fault::Beside(why)) => {
                Self::Degraded(why.clone())
            }
        }
    }
}

impl Link {
    /// Locked.
    pub(super) fn new(id: ProviderId, settings: TransitSettings) -> Self {
        Self {
            id,
            settings,
            state: Mutex::default(),
            logging_in: Mutex::default(),
            looking: Mutex::default(),
        }
    }

    /// How it was when it was last asked.
    pub(super) fn status(&self) -> ProviderStatus {
        let state = self.state();
        if state.credential.is_none() {
            return ProviderStatus::Locked;
        }
        match (&state.health, &state.warning) {
            (Health::Good, None) => ProviderStatus::Ready,
            (Health::Good, Some((_, what))) => ProviderStatus::Degraded(what.clone()),
            (Health::Sealed, _) => ProviderStatus::Locked,
            (Health::Unreachable(why), _) => ProviderStatus::Unreachable(why.clone()),
            (Health::NotTrusted(why) | Health::Ended(why) | Health::TurnedAway(why), _) => {
                ProviderStatus::NotTrusted(why.clone())
            }
            (Health::Degraded(why), _) => ProviderStatus::Degraded(why.clone()),
        }
    }

    /// Why it does nothing now.
    pub(super) fn refuses(&self) -> Option<ProviderError> {
        let health = self.state().health.clone();
        match (self.status(), health) {
            (ProviderStatus::Locked, Health::Sealed) => Some(ProviderError::ServerSealed),
            (ProviderStatus::NotTrusted(why), Health::NotTrusted(_)) => {
                Some(ProviderError::NotSignedByOurs(why))
            }
            (ProviderStatus::NotTrusted(why), Health::TurnedAway(_)) => Some(match self.settings.auth {
                Auth::Cert { .. } => ProviderError::CertificateRefused(why),
                Auth::Token {} | Auth::AppRole { .. } => ProviderError::CertificateWanted(why),
            }),
            (ProviderStatus::NotTrusted(why), _) => Some(ProviderError::CredentialRefused(why)),
            (status, _) => status.refusal(),
        }
    }

    pub(super) fn last_answer(&self) -> Option<SystemTime> {
        self.state().last_answer
    }

    pub(super) fn warning(&self) -> Option<(FindingCode, String)> {
        self.state().warning.clone()
    }

    /// Whether its server must be unsealed before anything opens.
    pub(super) fn is_sealed(&self) -> bool {
        let state = self.state();
        state.credential.is_some() && state.health == Health::Sealed
    }

    pub(super) fn is_unlocked(&self) -> bool {
        self.state().credential.is_some()
    }

    /// What it was unlocked with, and what tells whether it was locked since.
    pub(super) fn unlocked_with(&self) -> (Option<Arc<SecretBytes>>, LocksNoted) {
        let state = self.state();
        (state.credential.clone(), state.locks.noted())
    }

    /// What tells whether it is locked later on.
    pub(super) fn locks(&self) -> LocksNoted {
        self.state().locks.noted()
    }

    pub(super) fn was_locked(&self, since: LocksNoted) -> bool {
        !self.state().locks.are(since)
    }

    /// Why it is not as it should be after a login.
    pub(super) fn fault(&self) -> Option<ProviderError> {
        match self.state().health.clone() {
            Health::Good => None,
            Health::Degraded(why) => Some(ProviderError::Unusable(why)),
            _ => self.refuses(),
        }
    }

    /// Forgets credential and token.
    pub(super) fn lock(&self) {
        let mut state = self.state();
        state.locks.count();
        *state = State {
            locks: std::mem::take(&mut state.locks),
            last_answer: state.last_answer,
            ..State::default()
        };
    }

    /// See [`KeyProvider::unlock`](crate::provider::KeyProvider::unlock) of the provider.
    pub(super) fn unlock(&self, credential: &SecretBytes, since: LocksNoted) -> Result<(), Fault> {
        let deadline = Instant::now() + self.settings.timeout();
        let logged_in = Session::login(&self.settings, credential, deadline);
        self.hold(login::copy(credential)?, logged_in, since)?;
        let session = self.state().session.clone();
        if let Some(session) = session
            && let Err(fault) = self.check_mount(&session, deadline)
        {
            self.learn::<()>(&Err(fault), since);
        }
        Ok(())
    }

    /// Whether there is a transit engine where the settings say. A policy that does not let us look proves nothing.
    fn check_mount(&self, session: &Session, deadline: Instant) -> Result<(), Fault> {
        let key = kek::probed(&self.settings, self.id);
        match self.run(session, deadline, |engine| engine.key(&key)) {
            Err(Fault::NotFound(why)) => Err(Fault::NotFound(format!(
                "there is no transit engine at the mount {}: {why}",
                self.settings.mount
            ))),
            Err(Fault::Denied(_) | Fault::Refused(_)) | Ok(_) => Ok(()),
            Err(fault) => Err(fault),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Takes over what a login came to.
    fn hold(
        &self,
        credential: SecretBytes,
        logged_in: Result<Session, Fault>,
        since: LocksNoted,
    ) -> Result<(), Fault> {
        let health = Health::after(&logged_in);
        let mut state = self.state();
        if !state.locks.are(since) {
            return Err(Fault::Provider(ProviderError::Locked));
        }
        match logged_in {
            Ok(session) => {
                *state = State {
                    credential: Some(Arc::new(credential)),
                    warning: certificate_ends(&session),
                    session: Some(Arc::new(session)),
                    health,
                    answered: Some(Instant::now()),
                    last_answer: Some(SystemTime::now()),
                    locks: std::mem::take(&mut state.locks),
                };
                Ok(())
            }
            Err(fault) => {
                if matches!(fault, Fault::Unreachable(_) | Fault::Trouble(_) | Fault::Sealed)
                    && state.session.is_none()
                {
                    state.credential = Some(Arc::new(credential));
                    state.health = health;
                    return Err(match fault {
                        Fault::Unreachable(why) => Fault::Unreachable(format!(
                            "{why}; the login is tried again until it answers or is locked"
                        )),
                        Fault::Trouble(why) => Fault::Trouble(format!(
                            "{why}; the login is tried again until it serves or is locked"
                        )),
                        fault => fault,
                    });
                }
                Err(fault)
            }
        }
    }

    /// Does `work` with a session, logged in anew if the server has ended the token.
    pub(super) fn with_engine<T>(
        &self,
        work: impl Fn(&TransitEngine) -> Result<T, Fault>,
    ) -> Result<T, ProviderError> {
        let deadline = Instant::now() + self.settings.timeout();
        let since = self.state().locks.noted();
        let outcome = self
            .session(deadline)
            .and_then(|session| match self.run(&session, deadline, &work) {
                Err(Fault::Denied(why)) => {
                    let again = self.after_denial(&session, why, deadline)?;
                    self.run(&again, deadline, &work)
                }
                outcome => outcome,
            });
        self.learn(&outcome, since);
        match outcome {
            Ok(value) => Ok(value),
            // Whatever it failed of, locking it came first.
            Err(_) if !self.state().locks.are(since) => Err(ProviderError::Locked),
            Err(fault) => Err(fault.into()),
        }
    }

    fn run<T>(
        &self,
        session: &Session,
        deadline: Instant,
        work: impl Fn(&TransitEngine) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        work(&TransitEngine {
            session,
            mount: &self.settings.mount,
            deadline,
        })
    }

    /// The session, or a new one where there is none.
    fn session(&self, deadline: Instant) -> Result<Arc<Session>, Fault> {
        if let Some(session) = self.state().session.clone() {
            return Ok(session);
        }
        let _logging_in = lock(&self.logging_in);
        let since = {
            let state = self.state();
            if let Some(session) = state.session.clone() {
                return Ok(session);
            }
            if let Health::Ended(why) = &state.health {
                // Trying again what was refused may lock the account.
                return Err(Fault::Ended(why.clone()));
            }
            state.locks.noted()
        };

        self.replace(self.login(deadline)?, since)
    }

    fn login(&self, deadline: Instant) -> Result<Session, Fault> {
        let credential = self.state().credential.clone();
        let credential = credential.ok_or(Fault::Provider(ProviderError::Locked))?;
        Session::login(&self.settings, &credential, deadline).map_err(|fault| match fault {
            Fault::WrongCredential => {
                Fault::Ended("the server does not accept its credential any more".to_owned())
            }
            fault => fault,
        })
    }

    fn replace(&self, session: Session, since: LocksNoted) -> Result<Arc<Session>, Fault> {
        let session = Arc::new(session);
        let mut state = self.state();
        if !state.locks.are(since) {
            return Err(Fault::Provider(ProviderError::Locked));
        }
        state.session = Some(Arc::clone(&session));
        state.warning = certificate_ends(&session);
        Ok(session)
    }

    /// The server said no: to this request, or to the token? In the second case a new session.
    fn after_denial(
        &self,
        session: &Arc<Session>,
        why: String,
        deadline: Instant,
    ) -> Result<Arc<Session>, Fault> {
        match session.probe(deadline) {
            Ok(()) => Err(Fault::Refused(format!(
                "{why} (the policy of its token lacks it)"
            ))),
            Err(Fault::Denied(_)) => {
                self.forget(session);
                match self.settings.auth {
                    Auth::Token {} => Err(Fault::Ended("its token has expired or was revoked".to_owned())),
                    Auth::AppRole { .. } | Auth::Cert { .. } => self.session(deadline),
                }
            }
            Err(fault) => Err(fault),
        }
    }

    /// Unless another has taken its place.
    fn forget(&self, session: &Arc<Session>) {
        let mut state = self.state();
        if state
            .session
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, session))
        {
            state.session = None;
        }
    }

    fn learn<T>(&self, outcome: &Result<T, Fault>, since: LocksNoted) {
        let mut state = self.state();
        if state.locks.are(since) && state.credential.is_some() {
            state.health = Health::after(outcome);
            if state.health == Health::Good {
                state.answered = Some(Instant::now());
                state.last_answer = Some(SystemTime::now());
            }
        }
    }

    /// Whether a call has shown lately that all is well.
    pub(super) fn is_fresh(&self) -> bool {
        let state = self.state();
        let lately = |answered: Instant| answered.elapsed() < FRESH;
        state.health == Health::Good && state.answered.is_some_and(lately)
    }

    /// Whether the token must be renewed.
    pub(super) fn is_due(&self) -> bool {
        let state = self.state();
        state
            .session
            .as_ref()
            .is_some_and(|session| session.lease().is_due())
    }

    /// When to look at the server at the latest, for the token's sake: else that is up to who watches all providers.
    pub(super) fn next_look(&self) -> Option<Duration> {
        self.state().session.as_ref()?.lease().next_look()
    }

    /// Renews the token when it is time, else looks whether the server still takes it.
    pub(super) fn look(&self) {
        let _looking = lock(&self.looking);
        let deadline = Instant::now() + self.settings.timeout();
        let since = self.state().locks.noted();
        let looked = self.session(deadline).and_then(|session| {
            let looked = if session.lease().is_due() {
                self.renew(&session, since, deadline)
            } else {
                session
                    .probe(deadline)
                    .and_then(|()| self.check_mount(&session, deadline))
            };
            match looked {
                Err(Fault::Denied(why)) => self.after_denial(&session, why, deadline).map(drop),
                looked => looked,
            }
        });
        self.learn(&looked, since);
    }

    fn renew(&self, session: &Arc<Session>, since: LocksNoted, deadline: Instant) -> Result<(), Fault> {
        match session.renewed(deadline) {
            Ok(renewed) => self.replace(renewed, since).map(drop),
            Err(Fault::Refused(_)) if !matches!(self.settings.auth, Auth::Token {}) => {
                self.replace(self.login(deadline)?, since).map(drop)
            }
            Err(Fault::Refused(why)) => {
                session.probe(deadline)?;
                let left = session.lease().left().unwrap_or_default();
                self.replace(session.ending()?, since)?;
                let what = format!("{why}: it ends in {} s", left.as_secs());
                self.state().warning = Some((FindingCode::CredentialEnds, what));
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }
}

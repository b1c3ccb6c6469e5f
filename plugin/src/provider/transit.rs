//! The transit provider: KEKs in the transit engine of HashiCorp Vault or OpenBao, which encrypts and decrypts.
//!
//! ```text
//!   open ──► Locked ──unlock──► Ready ◄──the server is back──► Unreachable, or Locked while it is sealed
//!              ▲                 │ the token ends
//!              └──────lock───────┴──► NotTrusted ──unlock──► Ready
//! ```
//!
//! The credential (a token, a secret id, a client's key) is given when it is unlocked and stays in secret memory until
//! it is locked, so that it can log in again. An unlock that meets a server which is away or sealed keeps the
//! credential and goes on trying: a host that boots before its network does comes up by itself.
//!
//! Payloads travel as base64 inside of TLS; what holds them is wiped (`wire`, `secret`). No associated data: the
//! payload binds itself, and the server can rewrap it only without (docs/adr/0004-transit-without-associated-data.md).

mod engine;
mod http;
mod keeper;
mod kek;
mod login;
mod settings;
mod wire;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use self::engine::{TransitEngine, Wrapped};
use self::http::Fault;
use self::keeper::Keeper;
use self::kek::{KekName, MECHANISM};
use self::login::Session;
use super::{DestroyReceipt, KekScope, KeyProvider, ProviderError, ProviderName, ProviderStatus};
use crate::envelope::{KekId, Payload, ProviderId, Stanza};
use crate::keystore::{Keystore, KeystoreError, ProviderRecord};
use crate::secret::SecretBytes;

pub use settings::{Address, ApiPath, Auth, HostName, KeyName, Scope, SettingsError, TransitSettings};

/// A provider whose KEKs are in a transit engine.
pub struct TransitProvider {
    core: Arc<Core>,
    keeper: Mutex<Option<Keeper>>,
}

struct Core {
    id: ProviderId,
    name: String,
    settings: TransitSettings,
    state: Mutex<State>,
    /// Held while logging in: one login serves all who wait for one.
    logging_in: Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Without one it is locked.
    credential: Option<Arc<SecretBytes>>,
    session: Option<Arc<Session>>,
    health: Health,
    /// When the server last did as asked.
    answered: Option<Instant>,
    /// What will be wrong soon.
    warning: Option<String>,
    /// How often it was locked: a login that took its time meanwhile must not undo that.
    locks: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Health {
    #[default]
    Good,
    Sealed,
    Unreachable(String),
    NotTrusted(String),
    Degraded(String),
}

impl Health {
    /// What a call has shown.
    fn after<T>(outcome: &Result<T, Fault>) -> Self {
        match outcome {
            Ok(_) | Err(Fault::Provider(_)) => Self::Good,
            Err(Fault::Sealed) => Self::Sealed,
            Err(Fault::Unreachable(why)) => Self::Unreachable(why.clone()),
            Err(Fault::NotTrusted(why) | Fault::Ended(why)) => Self::NotTrusted(why.clone()),
            Err(Fault::WrongCredential) => {
                Self::NotTrusted("the server does not accept its credential".to_owned())
            }
            Err(Fault::Denied(why) | Fault::NotFound(why) | Fault::Refused(why)) => {
                Self::Degraded(why.clone())
            }
        }
    }
}

impl TransitProvider {
    /// The kind in the keystore.
    pub const KIND: &'static str = "transit";

    /// Records a new provider, locked.
    ///
    /// # Errors
    /// When the name or the id is taken, or the keystore can't be written.
    pub fn create(
        keystore: &Keystore,
        name: &ProviderName,
        settings: TransitSettings,
    ) -> Result<Self, KeystoreError> {
        let id = settings.id.unwrap_or_else(ProviderId::random);
        let row = serde_json::to_value(&settings).expect("settings hold only strings, numbers and enums");
        keystore.insert_provider(id, name.as_str(), Self::KIND, &row)?;
        Ok(Self::new(id, name.as_str(), settings))
    }

    /// The recorded provider, locked. Waits for nothing.
    ///
    /// # Errors
    /// When its settings make no sense.
    pub fn open(record: &ProviderRecord) -> Result<Self, SettingsError> {
        let settings: TransitSettings = serde_json::from_value(record.settings.clone())?;
        Ok(Self::new(record.id, &record.name, settings.validated()?))
    }

    fn new(id: ProviderId, name: &str, settings: TransitSettings) -> Self {
        let core = Core {
            id,
            name: name.to_owned(),
            settings,
            state: Mutex::default(),
            logging_in: Mutex::default(),
        };
        Self {
            core: Arc::new(core),
            keeper: Mutex::default(),
        }
    }

    /// Where it is and how it logs in.
    #[must_use]
    pub fn settings(&self) -> &TransitSettings {
        &self.core.settings
    }

    /// Looks whether the server answers and takes the token, and renews the token when it is time. What was found is
    /// in [`KeyProvider::status`].
    pub fn probe(&self) {
        self.core.look();
    }

    /// The same payloads under the newest version of their keys, made by the server: no payload leaves it. Which KEK
    /// is the newest [`KeyProvider::create_kek`] tells. The caller verifies them before the old ones go.
    ///
    /// # Errors
    /// As [`KeyProvider::unwrap_many`].
    pub fn rewrap(&self, stanzas: &[&Stanza]) -> Result<Vec<Stanza>, ProviderError> {
        let wrapped = self.core.wrapped(stanzas)?;
        let rewrapped = self.core.with_engine(|engine| engine.rewrap(&wrapped))?;
        let stanza = |(kek, body): (KekName, Vec<u8>)| self.core.stanza(kek.id(), body);
        Ok(rewrapped.into_iter().map(stanza).collect())
    }

    /// Makes a new version of the key that `kek` is a version of, and names it. What the old ones wrapped still opens.
    ///
    /// # Errors
    /// When the server does not, or the token may not.
    pub fn rotate(&self, kek: &KekId) -> Result<KekId, ProviderError> {
        let name = self.core.kek(kek)?;
        let version = self.core.with_engine(|engine| match engine.key(&name.key)? {
            Some(_) => engine.rotate(&name.key),
            None => Err(Fault::unknown(kek)),
        })?;
        Ok(KekName { version, ..name }.id())
    }
}

impl KeyProvider for TransitProvider {
    fn id(&self) -> ProviderId {
        self.core.id
    }

    fn name(&self) -> &str {
        &self.core.name
    }

    fn status(&self) -> ProviderStatus {
        let state = self.core.state();
        if state.credential.is_none() {
            return ProviderStatus::Locked;
        }
        match (&state.health, &state.warning) {
            (Health::Good, None) => ProviderStatus::Ready,
            (Health::Good, Some(warning)) => ProviderStatus::Degraded(warning.clone()),
            (Health::Sealed, _) => ProviderStatus::Locked,
            (Health::Unreachable(why), _) => ProviderStatus::Unreachable(why.clone()),
            (Health::NotTrusted(why), _) => ProviderStatus::NotTrusted(why.clone()),
            (Health::Degraded(why), _) => ProviderStatus::Degraded(why.clone()),
        }
    }

    fn create_kek(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let (key, context) = kek::key_of(&self.core.settings, self.core.id, scope);
        let version = self
            .core
            .with_engine(|engine| engine.ensure_key(&key, context.is_some()))?;
        Ok(KekName {
            key,
            context,
            version,
        }
        .id())
    }

    fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        let name = self.core.kek(kek)?;
        let body = self.core.with_engine(|engine| engine.encrypt(&name, payload))?;
        Ok(self.core.stanza(kek.clone(), body))
    }

    fn unwrap_many(&self, stanzas: &[&Stanza]) -> Result<Vec<Payload>, ProviderError> {
        let wrapped = self.core.wrapped(stanzas)?;
        self.core.with_engine(|engine| engine.decrypt(&wrapped))
    }

    /// Deletes a VM's own key with all its versions, and looks whether it is gone. A derived KEK, and an old version,
    /// can't be destroyed alone, as the receipt says.
    fn destroy_kek(&self, kek: &KekId) -> Result<DestroyReceipt, ProviderError> {
        let name = self.core.kek(kek)?;
        let (destroyed, observed) = self.core.with_engine(|engine| destroy(engine, &name))?;
        Ok(DestroyReceipt {
            kek: kek.clone(),
            destroyed,
            observed,
        })
    }

    fn lock(&self) {
        *guard(&self.keeper) = None;
        let mut state = self.core.state();
        *state = State {
            locks: state.locks + 1,
            ..State::default()
        };
    }

    /// Logs in. What is wrong with the credential leaves everything as it was; a server that is away or sealed is an
    /// error too, but the credential of a locked provider is kept then, and tried again.
    fn unlock(&self, credential: &SecretBytes) -> Result<(), ProviderError> {
        let locks = self.core.state().locks;
        let deadline = Instant::now() + self.core.settings.timeout();
        let logged_in = Session::login(&self.core.settings, credential, deadline);
        let credential = login::copy(credential)?;
        let held = self.core.hold(credential, logged_in, locks);
        let mut keeper = guard(&self.keeper);
        if keeper.is_none() && self.core.state().locks == locks && self.core.state().credential.is_some() {
            *keeper = Keeper::start(Arc::downgrade(&self.core));
        }
        Ok(held?)
    }
}

impl Core {
    fn state(&self) -> MutexGuard<'_, State> {
        guard(&self.state)
    }

    /// Takes over what a login came to.
    fn hold(
        &self,
        credential: SecretBytes,
        logged_in: Result<Session, Fault>,
        locks: u64,
    ) -> Result<(), Fault> {
        let health = Health::after(&logged_in);
        let mut state = self.state();
        if state.locks != locks {
            return Err(Fault::Provider(ProviderError::Locked));
        }
        match logged_in {
            Ok(session) => {
                *state = State {
                    credential: Some(Arc::new(credential)),
                    session: Some(Arc::new(session)),
                    health,
                    answered: Some(Instant::now()),
                    warning: None,
                    locks,
                };
                Ok(())
            }
            Err(fault) => {
                if matches!(fault, Fault::Unreachable(_) | Fault::Sealed) && state.session.is_none() {
                    state.credential = Some(Arc::new(credential));
                    state.health = health;
                    return Err(match fault {
                        Fault::Unreachable(why) => Fault::Unreachable(format!(
                            "{why}; the login is tried again until it answers or is locked"
                        )),
                        fault => fault,
                    });
                }
                Err(fault)
            }
        }
    }

    /// Does `work` with a session, logged in anew if the server has ended the token.
    fn with_engine<T>(&self, work: impl Fn(&TransitEngine) -> Result<T, Fault>) -> Result<T, ProviderError> {
        let deadline = Instant::now() + self.settings.timeout();
        let locks = self.state().locks;
        let outcome = self
            .session(deadline)
            .and_then(|session| match self.run(&session, deadline, &work) {
                Err(Fault::Denied(why)) => {
                    let again = self.after_denial(&session, why, deadline)?;
                    self.run(&again, deadline, &work)
                }
                outcome => outcome,
            });
        self.learn(&outcome, locks);
        match outcome {
            Ok(value) => Ok(value),
            // Whatever it failed of, locking it came first.
            Err(_) if self.state().locks != locks => Err(ProviderError::Locked),
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
        let _logging_in = guard(&self.logging_in);
        let locks = {
            let state = self.state();
            if let Some(session) = state.session.clone() {
                return Ok(session);
            }
            if let Health::NotTrusted(why) = &state.health {
                // Trying again what was refused may lock the account.
                return Err(Fault::Ended(why.clone()));
            }
            state.locks
        };
        self.replace(self.login(deadline)?, locks)
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

    fn replace(&self, session: Session, locks: u64) -> Result<Arc<Session>, Fault> {
        let session = Arc::new(session);
        let mut state = self.state();
        if state.locks != locks {
            return Err(Fault::Provider(ProviderError::Locked));
        }
        state.session = Some(Arc::clone(&session));
        state.warning = None;
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

    fn learn<T>(&self, outcome: &Result<T, Fault>, locks: u64) {
        let mut state = self.state();
        if state.locks == locks && state.credential.is_some() {
            state.health = Health::after(outcome);
            if state.health == Health::Good {
                state.answered = Some(Instant::now());
            }
        }
    }

    /// Whether a call has shown lately that all is well.
    fn is_fresh(&self) -> bool {
        let state = self.state();
        let lately = |answered: Instant| answered.elapsed() < keeper::HEALTHY;
        state.health == Health::Good && state.answered.is_some_and(lately)
    }

    /// Whether all is well, and when the token must be renewed.
    fn outlook(&self) -> (bool, Option<Instant>) {
        let state = self.state();
        let due = state.session.as_ref().and_then(|session| session.lease().due());
        (state.health == Health::Good, due)
    }

    /// Renews the token when it is time, else looks whether the server still takes it.
    fn look(&self) {
        let deadline = Instant::now() + self.settings.timeout();
        let locks = self.state().locks;
        let looked = self.session(deadline).and_then(|session| {
            let is_due = session.lease().due().is_some_and(|due| due <= Instant::now());
            let looked = if is_due {
                self.renew(&session, locks, deadline)
            } else {
                session.probe(deadline)
            };
            match looked {
                Err(Fault::Denied(why)) => self.after_denial(&session, why, deadline).map(drop),
                looked => looked,
            }
        });
        self.learn(&looked, locks);
    }

    fn renew(&self, session: &Arc<Session>, locks: u64, deadline: Instant) -> Result<(), Fault> {
        match session.renewed(deadline) {
            Ok(renewed) => self.replace(renewed, locks).map(drop),
            Err(Fault::Refused(_)) if !matches!(self.settings.auth, Auth::Token {}) => {
                self.replace(self.login(deadline)?, locks).map(drop)
            }
            Err(Fault::Refused(why)) => {
                session.probe(deadline)?;
                let left = session.lease().left().unwrap_or_default();
                self.state().warning = Some(format!("{why}: it ends in {} s", left.as_secs()));
                Ok(())
            }
            Err(fault) => Err(fault),
        }
    }

    fn kek(&self, id: &KekId) -> Result<KekName, ProviderError> {
        KekName::parse(id)
            .filter(|name| kek::is_ours(&self.settings, &name.key))
            .ok_or_else(|| ProviderError::UnknownKek(id.clone()))
    }

    fn stanza(&self, kek: KekId, body: Vec<u8>) -> Stanza {
        Stanza {
            provider: self.id,
            provider_name: self.name.clone(),
            kek,
            mechanism: MECHANISM.to_owned(),
            body,
        }
    }

    /// What can be told of stanzas without the server.
    fn wrapped<'a>(&self, stanzas: &[&'a Stanza]) -> Result<Vec<Wrapped<'a>>, ProviderError> {
        let one = |stanza: &&'a Stanza| {
            if stanza.provider != self.id {
                return Err(ProviderError::Tampered);
            }
            if stanza.mechanism != MECHANISM {
                return Err(ProviderError::UnknownMechanism(stanza.mechanism.clone()));
            }
            let kek = self.kek(&stanza.kek)?;
            if !kek::is_body(&stanza.body) {
                return Err(ProviderError::Tampered);
            }
            Ok(Wrapped {
                kek,
                body: &stanza.body,
            })
        };
        stanzas.iter().map(one).collect()
    }
}

fn destroy(engine: &TransitEngine, name: &KekName) -> Result<(bool, String), Fault> {
    let key = &name.key;
    let found = engine.key(key)?.ok_or_else(|| Fault::unknown(&name.id()))?;
    if let Some(context) = name.context {
        return Ok((
            false,
            format!(
                "the KEK is derived from key {key} and {context}, and can be again for as long as that key exists"
            ),
        ));
    }
    if name.version > found.latest_version {
        return Err(Fault::unknown(&name.id()));
    }
    if name.version < found.latest_version {
        return Ok((
            false,
            format!(
                "version {} of key {key} is not the newest ({}): old versions go at the server, by \
                 min_decryption_version and trim, once nothing needs them",
                name.version, found.latest_version
            ),
        ));
    }
    let allowed = match found.deletion_allowed {
        true => Ok(()),
        false => engine.allow_deletion(key, true),
    };
    match allowed.and_then(|()| engine.delete(key)) {
        Ok(()) => {}
        Err(Fault::Denied(why) | Fault::Refused(why)) => {
            if !found.deletion_allowed {
                // As it was; where that is denied as well, nothing was changed.
                let _ = engine.allow_deletion(key, false);
            }
            return Ok((
                false,
                format!("{why}. Somebody who may must set deletion_allowed on key {key} and delete it"),
            ));
        }
        Err(fault) => return Err(fault),
    }
    Ok(match engine.key(key)? {
        None => (
            true,
            format!(
                "the server deleted key {key} with its {} version(s) and does not know it any more; backups and \
                 snapshots of the server's storage may still hold it",
                found.latest_version
            ),
        ),
        Some(_) => (
            false,
            format!("the server took the deletion of key {key}, and still has it"),
        ),
    })
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that a panic could leave half-done is kept behind these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(super) mod bao;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;

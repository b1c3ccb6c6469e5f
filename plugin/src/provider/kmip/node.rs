//! One server of a cluster: its open connections, the version it speaks, and how it has been doing.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Instant;

use super::answer;
use super::call::Call;
use super::endpoint::Endpoint;
use super::error::{About, KmipError};
use super::health::Health;
use super::identity::Login;
use super::message;
use super::tag::Operation;
use super::tls::Connection;
use super::ttlv::{self, Item};
use super::version::KmipVersion;
use crate::provider::toolbox::certificate::CertificateFacts;
use crate::provider::toolbox::lock;
use crate::provider::toolbox::tls::Tls;
use crate::secret::SecretBytes;

/// How many quiet connections are kept.
const MAX_IDLE: usize = 4;

/// What a call may use: gone as soon as the provider is locked or its trust changes.
pub(super) struct Access {
    pub(super) tls: Tls,
    pub(super) login: Option<std::sync::Arc<Login>>,
    /// Rises with every change; connections of an earlier one are not used again.
    pub(super) epoch: u64,
}
pub(super) struct Node {
    pub(super) endpoint: Endpoint,
    /// What the admin has set instead of a negotiation.
    fixed_version: Option<KmipVersion>,
    idle: Mutex<Idle>,
    facts: Mutex<Facts>,
    pub(super) health: Mutex<Health>,
}

#[derive(Default)]
struct Idle {
    epoch: u64,
    connections: Vec<Connection>,
}

/// What is known of the server.
#[derive(Clone, Default)]
struct Facts {
    version: Option<KmipVersion>,
    operations: Option<BTreeSet<u32>>,
    certificate: Option<CertificateFacts>,
    /// The address that answered last.
    address: Option<SocketAddr>,
}

impl Node {
    pub(super) fn new(endpoint: Endpoint, fixed_version: Option<KmipVersion>) -> Self {
        Self {
            endpoint,
            fixed_version,
            idle: Mutex::default(),
            facts: Mutex::default(),
            health: Mutex::default(),
        }
    }

    /// What the server showed last.
    pub(super) fn certificate(&self) -> Option<CertificateFacts> {
        lock(&self.facts).certificate.clone()
    }

    /// The version in use, if it is known yet.
    pub(super) fn version(&self) -> Option<KmipVersion> {
        self.fixed_version.or(lock(&self.facts).version)
    }

    /// The operations that the server has, if it has been asked.
    pub(super) fn operations(&self) -> Option<BTreeSet<u32>> {
        lock(&self.facts).operations.clone()
    }

    /// Closes what is open, and keeps only connections from `epoch` on.
    pub(super) fn close(&self, epoch: u64) {
        let mut idle = lock(&self.idle);
        idle.epoch = epoch;
        idle.connections.clear();
    }

    /// Sends `calls` as one request and returns the answer, which fits it.
    ///
    /// A kept connection may have been closed by the other side meanwhile, or forgotten by a firewall, which then
    /// swallows what is sent: if all of `calls` can be done twice, a new one is tried, at once in the first case, and
    /// while there is still time for that in the second. What can't be done twice gets a new one from the start.
    pub(super) fn exchange(
        &self,
        access: &Access,
        calls: &[Call],
        deadline: Instant,
    ) -> Result<SecretBytes, KmipError> {
        let repeatable = calls.iter().all(|call| call.operation().is_idempotent());
        let version = match self.version() {
            Some(version) => version,
            None => self.negotiate(access, deadline)?,
        };
        if repeatable && let Some(mut kept) = self.take(access.epoch) {
            kept.set_deadline(early(deadline));
            match self.ask(&mut kept, access, version, calls) {
                Ok(answer) => {
                    self.keep(kept, access.epoch);
                    return Ok(answer);
                }
                // The others are as old.
                Err(KmipError::NoAnswer(_)) if Instant::now() < deadline => self.close_of(access.epoch),
                Err(error) => return Err(error),
            }
        }
        let mut fresh = self.connect(access, deadline)?;
        let answer = self.ask(&mut fresh, access, version, calls)?;
        self.keep(fresh, access.epoch);
        Ok(answer)
    }

    fn connect(&self, access: &Access, deadline: Instant) -> Result<Connection, KmipError> {
        let good = lock(&self.facts).address;
        let fresh = Connection::open(&access.tls, &self.endpoint, good, deadline)?;
        lock(&self.facts).certificate = Some(fresh.server().clone());
        Ok(fresh)
    }

    fn ask(
        &self,
        stream: &mut Connection,
        access: &Access,
        version: KmipVersion,
        calls: &[Call],
    ) -> Result<SecretBytes, KmipError> {
        let answer = round_trip(stream, version, access.login.as_deref(), calls)?;
        lock(&self.facts).address = Some(stream.peer);
        self.inspect(answer, calls, version)
    }

    /// Makes sure that the answer can be read, and sorts out what concerns the server rather than a key.
    fn inspect(
        &self,
        answer: SecretBytes,
        calls: &[Call],
        version: KmipVersion,
    ) -> Result<SecretBytes, KmipError> {
        let message = Item::decode(answer.expose()).map_err(message::ProtocolError::from)?;
        for (call, outcome) in calls.iter().zip(message::outcomes(&message, calls.len())?) {
            match outcome {
                Ok(payload) if call.operation() == Operation::Query => {
                    lock(&self.facts).operations = Some(answer::operations(payload));
                }
                Ok(_) => {}
                Err(refusal) if refusal.reason.about() == About::Client => {
                    return Err(KmipError::refused(call.operation(), refusal));
                }
                Err(refusal) if refusal.is_about_the_version() => {
                    // Another server since, perhaps: the next call negotiates again.
                    lock(&self.facts).version = None;
                    return Err(KmipError::refused(call.operation(), refusal.to(version)));
                }
                Err(_) => {}
            }
        }
        drop(message);
        Ok(answer)
    }

    /// Finds the best version that both sides speak: asks for it in the first version that knows the question, then in 2.0,
    /// where that is too old. A server that refuses to say, as one does that grants each operation by itself, is tried in
    /// each version instead.
    fn negotiate(&self, access: &Access, deadline: Instant) -> Result<KmipVersion, KmipError> {
        let found = match self.discover(access, deadline)? {
            Discovered::Version(version) => version,
            Discovered::Refused(why) => self.try_versions(access, deadline, &why)?,
        };
        lock(&self.facts).version = Some(found);
        Ok(found)
    }

    fn discover(&self, access: &Access, deadline: Instant) -> Result<Discovered, KmipError> {
        let mut refused = String::new();
        let mut stream = None;
        for version in [KmipVersion::FIRST, KmipVersion::V2_0] {
            let answer =
                match self.one_call(&mut stream, access, version, &[Call::DiscoverVersions], deadline) {
                    Ok(answer) => answer,
                    // It has answered the first question, and does not like the second.
                    Err(KmipError::NoAnswer(_) | KmipError::TurnedAway(_)) if !refused.is_empty() => break,
                    Err(error) => return Err(error),
                };
            let message = Item::decode(answer.expose()).map_err(message::ProtocolError::from)?;
            match message::outcomes(&message, 1)?.remove(0) {
                Ok(payload) => match answer::best_version(payload) {
                    Some(best) => {
                        if let Some(stream) = stream {
                            self.keep(stream, access.epoch);
                        }
                        return Ok(Discovered::Version(best));
                    }
                    None => return Err(no_common_version("it offers none of them")),
                },
                Err(refusal) if refusal.reason.about() == About::Client => {
                    return Err(KmipError::refused(Operation::DiscoverVersions, refusal));
                }
                Err(refusal) => refused = refusal.to_string(),
            }
        }
        Ok(Discovered::Refused(refused))
    }

    /// The best version whose header the server does not refuse. What it says to the question itself does not matter: it may
    /// grant Query as little as DiscoverVersions.
    fn try_versions(
        &self,
        access: &Access,
        deadline: Instant,
        discovery: &str,
    ) -> Result<KmipVersion, KmipError> {
        let mut stream = None;
        for version in KmipVersion::SPOKEN {
            let answer = match self.one_call(&mut stream, access, version, &[Call::Query], deadline) {
                Ok(answer) => answer,
                Err(KmipError::NoAnswer(_) | KmipError::TurnedAway(_)) if Instant::now() < deadline => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let Ok(message) = Item::decode(answer.expose()) else {
                continue;
            };
            match message::outcomes(&message, 1).map(|mut outcomes| outcomes.remove(0)) {
                Ok(Err(refusal)) if refusal.reason.about() == About::Client => {
                    return Err(KmipError::refused(Operation::Query, refusal));
                }
                Ok(Err(refusal)) if refusal.is_about_the_version() => {}
                Ok(_) if message::version_of(&message) == Some(version) => {
                    return Ok(version);
                }
                Ok(_) | Err(_) => {}
            }
        }
        Err(no_common_version(&format!(
            "it refuses to say which one it speaks: {discovery}"
        )))
    }

    /// On `stream`, or on a new one where there is none or the server has closed it.
    fn one_call(
        &self,
        stream: &mut Option<Connection>,
        access: &Access,
        version: KmipVersion,
        call: &[Call],
        deadline: Instant,
    ) -> Result<SecretBytes, KmipError> {
        let login = access.login.as_deref();
        if let Some(open) = stream.as_mut() {
            match round_trip(open, version, login, call) {
                Err(KmipError::NoAnswer(_)) if Instant::now() < deadline => *stream = None,
                other => return other,
            }
        }
        let fresh = stream.insert(self.connect(access, deadline)?);
        let answer = round_trip(fresh, version, login, call);
        match &answer {
            Ok(_) => lock(&self.facts).address = Some(fresh.peer),
            Err(_) => *stream = None,
        }
        answer
    }

    fn take(&self, epoch: u64) -> Option<Connection> {
        let mut idle = lock(&self.idle);
        if idle.epoch != epoch {
            return None;
        }
        idle.connections.pop()
    }

    /// Puts a connection back unless the provider was locked meanwhile.
    fn keep(&self, stream: Connection, epoch: u64) {
        let mut idle = lock(&self.idle);
        if idle.epoch == epoch && idle.connections.len() < MAX_IDLE {
            idle.connections.push(stream);
        }
    }

    fn close_of(&self, epoch: u64) {
        let mut idle = lock(&self.idle);
        if idle.epoch == epoch {
            idle.connections.clear();
        }
    }
}

/// Leaves a third of the time until `deadline` for another connection.
fn early(deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(Instant::now());
    deadline - left / 3
}

enum Discovered {
    Version(KmipVersion),
    Refused(String),
}

fn no_common_version(why: &str) -> KmipError {
    KmipError::BesideTheQuestion(format!(
        "no version of KMIP from 1.1 to 2.1 is known to work ({why}): set one with --kmip-version of provider add"
    ))
}

fn round_trip(
    stream: &mut Connection,
    version: KmipVersion,
    login: Option<&Login>,
    calls: &[Call],
) -> Result<SecretBytes, KmipError> {
    let request = message::request(version, login, calls).map_err(message::ProtocolError::from)?;
    stream.write_all(&request)?;
    let mut header = [0; 8];
    stream.read_exact(&mut header)?;
    let body = ttlv::body_length(header).map_err(message::ProtocolError::from)?;
    let mut answer = SecretBytes::zeroed(8 + body)
        .map_err(|error| KmipError::NoAnswer(format!("no memory for its answer: {error}")))?;
    let (start, rest) = answer.expose_mut().split_at_mut(8);
    start.copy_from_slice(&header);
    stream.read_exact(rest)?;
    Ok(answer)
}

//! One server of a cluster: its open connections, the version it speaks, and how it has been doing.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::answer;
use super::call::Call;
use super::certificate::CertificateFacts;
use super::endpoint::Endpoint;
use super::error::KmipError;
use super::health::Health;
use super::identity::Login;
use super::message::{self, KmipVersion};
use super::tag::{Operation, Reason};
use super::tls::{Tls, TlsStream};
use super::ttlv::{self, Item};
use crate::secret::SecretBytes;

/// How many quiet connections are kept.
const MOST_IDLE: usize = 4;

/// What a call may use: gone as soon as the provider is locked or its trust changes.
#[derive(Debug)]
pub(super) struct Access {
    pub(super) tls: Tls,
    pub(super) login: Option<std::sync::Arc<Login>>,
    /// Rises with every change; connections of an earlier one are not used again.
    pub(super) epoch: u64,
}

/// One server.
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
    connections: Vec<TlsStream>,
}

/// What is known of the server.
#[derive(Clone, Default)]
struct Facts {
    version: Option<KmipVersion>,
    operations: Option<BTreeSet<u32>>,
    certificate: Option<CertificateFacts>,
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
    /// while there is still time for that in the second.
    pub(super) fn exchange(
        &self,
        access: &Access,
        calls: &[Call],
        deadline: Instant,
    ) -> Result<SecretBytes, KmipError> {
        let repeatable = calls.iter().all(|call| call.operation().is_idempotent());
        if let Some(mut kept) = self.take(access.epoch) {
            kept.set_deadline(if repeatable { early(deadline) } else { deadline });
            match self.ask(&mut kept, access, calls) {
                Ok(answer) => {
                    self.keep(kept, access.epoch);
                    return Ok(answer);
                }
                // The others are as old.
                Err(KmipError::Unreachable(_)) if repeatable && Instant::now() < deadline => {
                    self.close_of(access.epoch);
                }
                Err(error) => return Err(error),
            }
        }
        let mut fresh = access.tls.connect(&self.endpoint, deadline)?;
        lock(&self.facts).certificate.clone_from(&fresh.server);
        let answer = self.ask(&mut fresh, access, calls)?;
        self.keep(fresh, access.epoch);
        Ok(answer)
    }

    fn ask(&self, stream: &mut TlsStream, access: &Access, calls: &[Call]) -> Result<SecretBytes, KmipError> {
        let version = match self.version() {
            Some(version) => version,
            None => self.negotiate(stream, access)?,
        };
        let answer = round_trip(stream, version, access.login.as_deref(), calls)?;
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
                Err(refusal) if refusal.reason == Reason::AUTHENTICATION_NOT_SUCCESSFUL => {
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

    /// Asks in the first version that knows the question, and in 2.0 where that is too old.
    fn negotiate(&self, stream: &mut TlsStream, access: &Access) -> Result<KmipVersion, KmipError> {
        let calls = [Call::DiscoverVersions];
        let mut refused = None;
        for version in [KmipVersion::FIRST, KmipVersion::V2_0] {
            let answer = round_trip(stream, version, access.login.as_deref(), &calls)?;
            let message = Item::decode(answer.expose()).map_err(message::ProtocolError::from)?;
            match message::outcomes(&message, 1)?.remove(0) {
                Ok(payload) => {
                    let best = answer::best_version(payload).ok_or_else(no_common_version)?;
                    lock(&self.facts).version = Some(best);
                    return Ok(best);
                }
                Err(refusal) => {
                    let error = KmipError::refused(Operation::DiscoverVersions, refusal);
                    if matches!(error, KmipError::RefusesUs(_)) {
                        return Err(error);
                    }
                    refused = Some(error);
                }
            }
        }
        Err(refused.unwrap_or_else(no_common_version))
    }

    fn take(&self, epoch: u64) -> Option<TlsStream> {
        let mut idle = lock(&self.idle);
        if idle.epoch != epoch {
            return None;
        }
        idle.connections.pop()
    }

    /// Puts a connection back unless the provider was locked meanwhile.
    fn keep(&self, stream: TlsStream, epoch: u64) {
        let mut idle = lock(&self.idle);
        if idle.epoch == epoch && idle.connections.len() < MOST_IDLE {
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

fn no_common_version() -> KmipError {
    KmipError::Unreadable("it speaks none of KMIP 1.1 to 2.1".into())
}

fn round_trip(
    stream: &mut TlsStream,
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
        .map_err(|error| KmipError::Unreadable(format!("no memory for it: {error}")))?;
    let (start, rest) = answer.expose_mut().split_at_mut(8);
    start.copy_from_slice(&header);
    stream.read_exact(rest)?;
    Ok(answer)
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each holds plain values that are replaced whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! KEKs at a KMS: which calls a wrap, an unwrap, a creation and a destruction are, and what their answers mean.
//!
//! However many envelopes a VM has, their KEKs are fetched in one request, each with its state. A new KEK is looked
//! for by its name first: a Create whose answer was lost has made a key that nothing else would ever find.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Mode;
use super::answer::{self, KeyFacts, KeyRefused};
use super::call::{Call, Cryption, Label};
use super::cluster::Cluster;
use super::error::{About, KmipError};
use super::message::{KmipVersion, Outcome, ProtocolError, Refusal};
use super::node::{Access, Node};
use super::tag::{KeyState, Operation, Reason};
use super::ttlv::Item;
use crate::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::provider::aes_gcm::{self, MECHANISM};
use crate::provider::cache::{KekCache, NotKept, Ticket};
use crate::provider::{DestroyReceipt, KekScope, ProviderError};
use crate::secret::SecretBytes;

/// Wrapped by the server's own AES-256-GCM; the body is laid out like that of [`MECHANISM`].
const SERVER_MECHANISM: &str = "KMIP-A256GCM";

/// How long a KMS may take to answer for keys that are cached; a start waits for no more of it.
const RECALL_AFTER: Duration = Duration::from_secs(2);

/// The most keys in one request.
const MOST_KEYS: usize = 64;

/// One call of the provider: who asks, whom, and until when.
pub(super) struct Keys<'a> {
    pub(super) provider: ProviderId,
    pub(super) provider_name: &'a str,
    pub(super) mode: Mode,
    pub(super) cluster: &'a Cluster,
    pub(super) cache: &'a KekCache,
    pub(super) access: &'a Arc<Access>,
    pub(super) deadline: Instant,
}

impl Keys<'_> {
    /// Sends one request and hands the outcomes of its calls to `read`, for each server that answers until one is accepted.
    fn ask<T>(
        &self,
        calls: Vec<Call>,
        read: impl FnMut(&[Outcome]) -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        self.cluster.call(self.access, calls, self.deadline, read)
    }

    /// The active KEK for `scope`: the newest one there is, or a new one where that was taken out of use. An earlier one is
    /// never taken up again.
    pub(super) fn create(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let label = self.label(scope);
        match newest(self.locate(&label)?) {
            Some((kek, KeyState::Active)) => Ok(kek),
            Some((kek, KeyState::PreActive)) => {
                self.activate(&kek)?;
                Ok(kek)
            }
            _ => self.create_active(label),
        }
    }

    /// The KEK that takes the place of `old`: a new one, unless a newer one than that is in use.
    pub(super) fn rotate(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError> {
        let current = self.create(scope)?;
        if current == *old {
            self.create_active(self.label(scope))
        } else {
            Ok(current)
        }
    }

    fn create_active(&self, label: Label) -> Result<KekId, ProviderError> {
        let kek = self.create_labelled(label)?;
        self.activate(&kek)?;
        Ok(kek)
    }

    pub(super) fn label(&self, scope: &KekScope) -> Label {
        let (whose, vm) = match scope {
            KekScope::Vm(vm) => (format!("vm-{vm}"), format!("vm={vm}; ")),
            KekScope::Provider => ("shared".to_owned(), String::new()),
        };
        let host = super::host_name();
        Label {
            name: format!("virtseal-{whose}-{}", self.provider),
            tag: Some(format!(
                "{vm}host={host}; purpose=virtseal-kek; provider={}",
                self.provider_name
            )),
        }
    }

    /// The AES-256 keys with that label.
    fn locate(&self, label: &Label) -> Result<Vec<(KekId, KeyFacts)>, ProviderError> {
        let name = label.name.clone();
        let mut keks = self.ask(vec![Call::Locate { name }], |outcomes| {
            match &outcomes[0] {
                Ok(payload) => Ok(answer::located(payload)),
                // Some servers call it an error to find nothing.
                Err(refusal) if refusal.reason.about() == About::UnknownKey => Ok(Vec::new()),
                Err(refusal) => Err(refused(Operation::Locate, refusal)),
            }
        })?;
        keks.truncate(MOST_KEYS);
        if keks.is_empty() {
            return Ok(Vec::new());
        }
        let calls = keks.iter().cloned().map(Call::GetAttributesAndAge).collect();
        self.ask(calls, |outcomes| {
            let facts = keks.iter().zip(outcomes).map(|(kek, outcome)| match outcome {
                Ok(_) => facts_of(kek, outcome).map(Some),
                // Destroyed meanwhile, or another client's.
                Err(_) => Ok(None),
            });
            let facts = facts.collect::<Result<Vec<_>, _>>()?;
            let fitting = keks.iter().cloned().zip(facts);
            Ok(fitting
                .filter_map(|(kek, facts)| Some((kek, facts.filter(|facts| facts.is_aes_256)?)))
                .collect())
        })
    }

    fn create_labelled(&self, label: Label) -> Result<KekId, ProviderError> {
        let mut plain = label.clone();
        plain.tag = None;
        match self.create_once(label)? {
            Ok(kek) => Ok(kek),
            // The name says most of what the tag does.
            Err(refusal) if refusal.reason.is_about_an_attribute() => self
                .create_once(plain)?
                .map_err(|refusal| refused(Operation::Create, &refusal)),
            Err(refusal) => Err(refused(Operation::Create, &refusal)),
        }
    }

    fn create_once(&self, label: Label) -> Result<Result<KekId, Refusal>, ProviderError> {
        self.ask(vec![Call::Create(label)], |outcomes| match &outcomes[0] {
            Ok(payload) => answer::created(payload).map(Ok).map_err(unreadable),
            Err(refusal) => Ok(Err(refusal.clone())),
        })
    }

    /// Some servers make keys active at once and refuse to do it again.
    fn activate(&self, kek: &KekId) -> Result<(), ProviderError> {
        let refusal = self.ask(vec![Call::Activate(kek.clone())], |outcomes| {
            Ok(outcomes[0].as_ref().err().cloned())
        })?;
        match refusal {
            None => Ok(()),
            Some(_) if self.facts(kek)?.state == KeyState::Active => Ok(()),
            Some(refusal) => Err(refused(Operation::Activate, &refusal)),
        }
    }

    fn facts(&self, kek: &KekId) -> Result<KeyFacts, ProviderError> {
        self.ask(vec![Call::GetAttributes(kek.clone())], |outcomes| {
            facts_of(kek, &outcomes[0])
        })
    }

    pub(super) fn wrap(&self, kek: &KekId, payload: &Payload) -> Result<Stanza, ProviderError> {
        known_form(kek)?;
        let (mechanism, body) = match self.mode {
            Mode::Local => (MECHANISM, self.wrap_here(kek, payload)?),
            Mode::Server => (SERVER_MECHANISM, self.wrap_there(kek, payload)?),
        };
        Ok(Stanza {
            provider: self.provider,
            provider_name: self.provider_name.to_owned(),
            kek: kek.clone(),
            mechanism: mechanism.to_owned(),
            body,
        })
    }

    fn wrap_here(&self, kek: &KekId, payload: &Payload) -> Result<Vec<u8>, ProviderError> {
        let mut keys = self.fetch(std::slice::from_ref(kek), KeyState::may_wrap, self.deadline)?;
        let key = keys.pop().expect("one KEK was asked for");
        aes_gcm::wrap(&key, &self.additional_data(kek, MECHANISM), payload)
    }

    fn wrap_there(&self, kek: &KekId, payload: &Payload) -> Result<Vec<u8>, ProviderError> {
        self.check_server_encrypts()?;
        let mut nonce = [0; aes_gcm::NONCE];
        openssl::rand::rand_bytes(&mut nonce).map_err(ProviderError::internal("making a nonce"))?;
        let data = copy(payload.expose())?;
        let encrypt = Call::Encrypt(Cryption {
            kek: kek.clone(),
            nonce,
            additional_data: self.additional_data(kek, SERVER_MECHANISM),
            data,
            tag: None,
        });
        self.ask(vec![Call::GetAttributes(kek.clone()), encrypt], |outcomes| {
            check_state(kek, facts_of(kek, &outcomes[0])?.state, KeyState::may_wrap)?;
            let payload = outcomes[1]
                .as_ref()
                .map_err(|refusal| refused(Operation::Encrypt, refusal))?;
            answer::check_subject(payload, kek).map_err(unreadable)?;
            answer::body(payload, &nonce).map_err(unreadable)
        })
    }

    fn check_server_encrypts(&self) -> Result<(), ProviderError> {
        let nodes = self.cluster.nodes();
        if nodes.iter().all(|node| node.operations().is_none()) {
            self.ask(vec![Call::Query], |outcomes| match &outcomes[0] {
                Ok(_) => Ok(()),
                Err(refusal) => Err(refused(Operation::Query, refusal)),
            })?;
        }
        match nodes.iter().find_map(|node| cannot_encrypt(node)) {
            None => Ok(()),
            Some(why) => Err(ProviderError::Refused(why)),
        }
    }

    /// What comes from the server is cached under `ticket`.
    pub(super) fn unwrap_many(
        &self,
        ticket: Ticket,
        stanzas: &[&Stanza],
    ) -> Result<Vec<Payload>, ProviderError> {
        for stanza in stanzas {
            self.check(stanza)?;
        }
        let (here, there): (Vec<_>, Vec<_>) =
            (0..stanzas.len()).partition(|nth| stanzas[*nth].mechanism == MECHANISM);
        let mut payloads: Vec<_> = stanzas.iter().map(|_| None).collect();
        self.unwrap_here(ticket, stanzas, &here, &mut payloads)?;
        self.unwrap_there(stanzas, &there, &mut payloads)?;
        let payloads = payloads.into_iter().collect::<Option<Vec<_>>>();
        Ok(payloads.expect("every stanza was unwrapped here or there"))
    }

    /// What can be said without asking anyone.
    fn check(&self, stanza: &Stanza) -> Result<(), ProviderError> {
        if stanza.provider != self.provider {
            return Err(ProviderError::Tampered);
        }
        if ![MECHANISM, SERVER_MECHANISM].contains(&stanza.mechanism.as_str()) {
            return Err(ProviderError::UnknownMechanism(stanza.mechanism.clone()));
        }
        known_form(&stanza.kek)?;
        aes_gcm::Parts::of(&stanza.body).map(drop)
    }

    fn unwrap_here(
        &self,
        ticket: Ticket,
        stanzas: &[&Stanza],
        members: &[usize],
        payloads: &mut [Option<Payload>],
    ) -> Result<(), ProviderError> {
        let mut of_kek: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for nth in members {
            of_kek.entry(&stanzas[*nth].kek.0).or_default().push(*nth);
        }
        let wanted: Vec<_> = of_kek.keys().map(|kek| KekId((*kek).to_owned())).collect();
        for keks in wanted.chunks(MOST_KEYS) {
            let keys = self.fetch_or_recall(ticket, keks)?;
            for (kek, key) in keks.iter().zip(&keys) {
                for nth in &of_kek[kek.0.as_str()] {
                    let data = self.additional_data(kek, MECHANISM);
                    payloads[*nth] = Some(aes_gcm::unwrap(key, &data, &stanzas[*nth].body)?);
                }
            }
        }
        Ok(())
    }

    /// The bytes of `keks` to unwrap with: from the server, or, where none answers, from the cache.
    fn fetch_or_recall(
        &self,
        ticket: Ticket,
        keks: &[KekId],
    ) -> Result<Vec<Arc<SecretBytes>>, ProviderError> {
        let deadline = match self.cache.may_have(keks) {
            true => self.deadline.min(Instant::now() + RECALL_AFTER),
            false => self.deadline,
        };
        match self.fetch(keks, KeyState::may_unwrap, deadline) {
            Ok(keys) => {
                let keys: Vec<_> = keys.into_iter().map(Arc::new).collect();
                self.cache.put(ticket, keks, &keys);
                Ok(keys)
            }
            Err(error) if KekCache::may_stand_in(&error) => match self.cache.recall(keks, self.deadline) {
                Ok(keys) => {
                    tracing::warn!(provider = self.provider_name, "opened with cached keys: {error}");
                    Ok(keys)
                }
                Err(NotKept(reason)) => Err(with_reason(error, reason)),
            },
            Err(error) => {
                self.cache.heed(&error);
                Err(error)
            }
        }
    }

    /// The bytes of `keks`, each with its state checked in the same request.
    fn fetch(
        &self,
        keks: &[KekId],
        may: impl Fn(KeyState) -> bool,
        deadline: Instant,
    ) -> Result<Vec<SecretBytes>, ProviderError> {
        let pairs = |kek: &KekId| [Call::GetAttributes(kek.clone()), Call::Get(kek.clone())];
        let calls = keks.iter().flat_map(pairs).collect();
        self.cluster.call(self.access, calls, deadline, |outcomes| {
            let read = |(kek, pair): (&KekId, &[Outcome])| {
                check_state(kek, facts_of(kek, &pair[0])?.state, &may)?;
                answer::key(about(kek, Operation::Get, &pair[1])?).map_err(|why| unusable_key(kek, why))
            };
            keks.iter().zip(outcomes.chunks_exact(2)).map(read).collect()
        })
    }

    fn unwrap_there(
        &self,
        stanzas: &[&Stanza],
        members: &[usize],
        payloads: &mut [Option<Payload>],
    ) -> Result<(), ProviderError> {
        for members in members.chunks(MOST_KEYS) {
            let calls = members.iter().map(|nth| self.decrypt(stanzas[*nth]));
            let calls = calls.collect::<Result<Vec<_>, _>>()?;
            self.ask(calls, |outcomes| {
                for (nth, outcome) in members.iter().zip(outcomes) {
                    let payload = outcome
                        .as_ref()
                        .map_err(|refusal| decryption_refused(&stanzas[*nth].kek, refusal))?;
                    answer::check_subject(payload, &stanzas[*nth].kek).map_err(unreadable)?;
                    let plain = answer::decrypted(payload).map_err(unreadable)?;
                    payloads[*nth] = Some(Payload::from_unwrapped(plain).map_err(ProviderError::Payload)?);
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    fn decrypt(&self, stanza: &Stanza) -> Result<Call, ProviderError> {
        let parts = aes_gcm::Parts::of(&stanza.body)?;
        let lengths = "a body's parts have fixed lengths";
        Ok(Call::Decrypt(Cryption {
            kek: stanza.kek.clone(),
            nonce: parts.nonce.try_into().expect(lengths),
            additional_data: self.additional_data(&stanza.kek, SERVER_MECHANISM),
            data: copy(parts.ciphertext)?,
            tag: Some(parts.tag.try_into().expect(lengths)),
        }))
    }

    fn additional_data(&self, kek: &KekId, mechanism: &str) -> Vec<u8> {
        aes_gcm::additional_data(self.provider, &kek.0, mechanism)
    }

    /// Revokes and destroys a key that bears the name of the keys of `vm`; can be repeated from wherever it was interrupted.
    pub(super) fn destroy(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        known_form(kek)?;
        let name = self.label(&KekScope::Vm(vm)).name;
        let (before, is_own) = self.ask(vec![Call::GetAttributesAndName(kek.clone())], |outcomes| {
            let payload = about(kek, Operation::GetAttributes, &outcomes[0])?;
            let facts = answer::facts(payload).map_err(unreadable)?;
            Ok((facts.state, answer::names(payload).contains(&name.as_str())))
        })?;
        if !is_own && before != KeyState::Destroyed {
            let why = format!("at the KMS it does not bear the name {name}");
            return Ok(DestroyReceipt::shared(kek, &why));
        }
        self.cache.forget(kek).map_err(stays_on_disk())?;
        if before == KeyState::Active {
            self.once(kek, Call::Revoke(kek.clone()))?;
        }
        if before != KeyState::Destroyed {
            self.once(kek, Call::Destroy(kek.clone()))?;
        }
        let (destroyed, seen) = match self.facts(kek) {
            Err(ProviderError::UnknownKek(_)) => (true, "says that it has no such key".to_owned()),
            Ok(KeyFacts { state, .. }) => (
                state == KeyState::Destroyed,
                format!("says that the key is {state}"),
            ),
            Err(error) => return Err(error),
        };
        let kept = match self.cache.persistence() {
            Some(_) => "; what this host kept of it for a reboot is removed",
            None => "",
        };
        Ok(DestroyReceipt {
            kek: kek.clone(),
            destroyed,
            observed: format!(
                "the KMS was told to destroy the key (it was {before}), and {seen}; backups and replicas of the KMS may \
                 still hold it{kept}"
            ),
        })
    }

    fn once(&self, kek: &KekId, call: Call) -> Result<(), ProviderError> {
        let operation = call.operation();
        self.ask(vec![call], |outcomes| match &outcomes[0] {
            Ok(_) => Ok(()),
            Err(refusal) => Err(key_refused(kek, operation, refusal)),
        })
    }
}

/// A KEK that is to be destroyed must be off this host's disk too.
pub(super) fn stays_on_disk<E: Into<Box<dyn std::error::Error + Send + Sync>>>()
-> impl FnOnce(E) -> ProviderError {
    ProviderError::internal("removing the KEK that is kept on disk")
}

/// Why the server can't do what `mode: server` needs; `None` if it can or has not been asked.
pub(super) fn cannot_encrypt(node: &Node) -> Option<String> {
    let endpoint = &node.endpoint;
    let operations = node.operations()?;
    let version = node.version()?;
    if !answer::can_encrypt(&operations) {
        return Some(format!(
            "{endpoint} offers no Encrypt and Decrypt: add the provider with --mode local"
        ));
    }
    (version < KmipVersion::WITH_GCM).then(|| {
        format!(
            "{endpoint} speaks KMIP {version}, whose Encrypt has no AES-GCM ({} has): add the provider with --mode local",
            KmipVersion::WITH_GCM
        )
    })
}

/// The newest of them by the server's clock, whose seconds may not tell two apart: of these one that can be used, then
/// always the same one.
fn newest(candidates: Vec<(KekId, KeyFacts)>) -> Option<(KekId, KeyState)> {
    let order = |(kek, facts): &(KekId, KeyFacts)| {
        let usable = [KeyState::Active, KeyState::PreActive].contains(&facts.state);
        (facts.made, usable, kek.0.len(), kek.0.clone())
    };
    let newest = candidates.into_iter().max_by_key(order);
    newest.map(|(kek, facts)| (kek, facts.state))
}

/// An empty identifier means "the one of the call before" to KMIP.
fn known_form(kek: &KekId) -> Result<(), ProviderError> {
    if answer::is_identifier(&kek.0) {
        Ok(())
    } else {
        Err(ProviderError::UnknownKek(kek.clone()))
    }
}

fn facts_of(kek: &KekId, outcome: &Outcome) -> Result<KeyFacts, ProviderError> {
    answer::facts(about(kek, Operation::GetAttributes, outcome)?).map_err(unreadable)
}

/// The payload of an answer about `kek`.
fn about<'m, 'b>(
    kek: &KekId,
    operation: Operation,
    outcome: &Outcome<'m, 'b>,
) -> Result<&'m Item<'b>, ProviderError> {
    let payload = outcome
        .as_ref()
        .map_err(|refusal| key_refused(kek, operation, refusal))?;
    answer::check_subject(payload, kek).map_err(unreadable)?;
    Ok(payload)
}

fn check_state(kek: &KekId, state: KeyState, may: impl Fn(KeyState) -> bool) -> Result<(), ProviderError> {
    if may(state) {
        return Ok(());
    }
    if state == KeyState::Destroyed {
        return Err(ProviderError::UnknownKek(kek.clone()));
    }
    Err(ProviderError::KekUnusable {
        kek: kek.clone(),
        why: format!("it is {state} at the KMS"),
    })
}

fn unusable_key(kek: &KekId, why: KeyRefused) -> ProviderError {
    let why = match why {
        KeyRefused::Memory(error) => return ProviderError::internal("getting memory for a KEK")(error),
        KeyRefused::Shape => return unreadable(ProtocolError::Missing("key")),
        KeyRefused::Wrapped => "the KMS hands it out wrapped only: allow its export, or use --mode server",
        KeyRefused::NotAes256 => "it is no AES key of 256 bits",
    };
    ProviderError::KekUnusable {
        kek: kek.clone(),
        why: why.to_owned(),
    }
}

/// Why there is nothing in the cache either.
fn with_reason(error: ProviderError, reason: Option<String>) -> ProviderError {
    match (error, reason) {
        (ProviderError::Unreachable(why), Some(reason)) => {
            ProviderError::Unreachable(format!("{why}; {reason}"))
        }
        (ProviderError::Trouble(why), Some(reason)) => ProviderError::Trouble(format!("{why}; {reason}")),
        (error, _) => error,
    }
}

fn decryption_refused(kek: &KekId, refusal: &Refusal) -> ProviderError {
    if [
        Reason::CRYPTOGRAPHIC_FAILURE,
        Reason::INVALID_FIELD,
        Reason::GENERAL_FAILURE,
    ]
    .contains(&refusal.reason)
    {
        // Few servers say more about a tag that does not fit.
        return ProviderError::Tampered;
    }
    key_refused(kek, Operation::Decrypt, refusal)
}

/// A refusal that is about one key.
fn key_refused(kek: &KekId, operation: Operation, refusal: &Refusal) -> ProviderError {
    KmipError::refused_key(kek, operation, refusal)
}

fn refused(operation: Operation, refusal: &Refusal) -> ProviderError {
    KmipError::refused(operation, refusal.clone()).into()
}

fn unreadable(error: ProtocolError) -> ProviderError {
    KmipError::from(error).into()
}

fn copy(bytes: &[u8]) -> Result<SecretBytes, ProviderError> {
    let mut copy =
        SecretBytes::zeroed(bytes.len()).map_err(ProviderError::internal("getting memory for a data key"))?;
    copy.expose_mut().copy_from_slice(bytes);
    Ok(copy)
}

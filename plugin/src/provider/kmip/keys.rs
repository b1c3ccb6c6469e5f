//! KEKs at a KMS: which calls a wrap, an unwrap, a creation and a destruction are, and what their answers mean.
//!
//! However many envelopes a VM has, their KEKs are fetched in one request, each with its state. What a KEK is called is in the
//! keystore before it is made: one whose Create got no answer is found by that name. Whatever a server finds is compared with
//! what was looked for before it is used.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Mode;
use super::answer::{self, KeyFacts, KeyRefused};
use super::call::{Call, Cryption, LOCATED_PAGE, Label};
use super::cluster::Cluster;
use super::error::{About, KmipError};
use super::message::{Outcome, ProtocolError, Refusal};
use super::node::{Access, Node};
use super::tag::{KeyState, Operation, Reason};
use super::ttlv::Item;
use super::version::KmipVersion;
use crate::crypto::aead;
use crate::model::envelope::{KekId, Payload, ProviderId, Stanza, VmId};
use crate::model::problem::chain;
use crate::provider::cache::{KekCache, NotKept, Ticket};
use crate::provider::toolbox::gcm::{self, MECHANISM};
use crate::provider::toolbox::kek_name::{KekBook, KekGeneration, generation};
use crate::provider::{DestroyReceipt, ErrorClass, KekScope, ProviderError};
use crate::secret::SecretBytes;

/// Wrapped by the server's own AES-256-GCM; the body is laid out like that of [`MECHANISM`].
const SERVER_MECHANISM: &str = "KMIP-A256GCM";

/// How long a KMS may take to answer for keys that are cached; a start waits for no more of it.
const RECALL_AFTER: Duration = Duration::from_secs(2);

/// The most pages of a list that are read, and the most keys of it that are looked at: a name is used once.
const MAX_PAGES: i32 = 16;
const MAX_LOCATED: usize = 512;

/// The most keys in one request.
const MAX_KEYS: usize = 64;

/// One call of the provider: who asks, whom, and until when.
pub(super) struct Keys<'a> {
    pub(super) provider: ProviderId,
    pub(super) provider_name: &'a str,
    pub(super) mode: Mode,
    pub(super) cluster: &'a Cluster,
    pub(super) cache: &'a KekCache,
    pub(super) book: &'a KekBook,
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

    /// The active KEK for `scope`: the one of the highest generation, or a new one where that was taken out of use. An earlier
    /// one is never taken up again, nor is one that a job has retired.
    pub(super) fn create(&self, scope: &KekScope) -> Result<KekId, ProviderError> {
        let there = self.look_for(scope, None)?;
        match there.in_use {
            Some(kek) => Ok(kek),
            None => self.create_next(scope, there.highest),
        }
    }

    /// The KEK that takes the place of `old`: a new one, unless another one is in use by now.
    pub(super) fn rotate(&self, scope: &KekScope, old: &KekId) -> Result<KekId, ProviderError> {
        let there = self.look_for(scope, Some(old))?;
        match there.in_use {
            Some(kek) if kek != *old => Ok(kek),
            _ => self.create_next(scope, there.highest),
        }
    }

    /// What begins the names of the KEKs for `scope`; the whole name of one from before they were counted.
    pub(super) fn stem(&self, scope: &KekScope) -> String {
        let whose = match scope {
            KekScope::Vm(vm) => format!("vm-{vm}"),
            KekScope::Provider => "shared".to_owned(),
        };
        format!("virtseal-{whose}-{}", self.provider)
    }

    pub(super) fn label(&self, scope: &KekScope, name: String) -> Label {
        let vm = match scope {
            KekScope::Vm(vm) => format!("vm={vm}; "),
            KekScope::Provider => String::new(),
        };
        let host = super::host_name();
        Label {
            name,
            tag: Some(format!(
                "{vm}host={host}; purpose=virtseal-kek; provider={}",
                self.provider_name
            )),
        }
    }

    /// Which KEKs there are for `scope`: of those that are known here and `old`, those that an earlier Create made without an
    /// answer, and, where there are none of these, those from before they were counted.
    fn look_for(&self, scope: &KekScope, old: Option<&KekId>) -> Result<There, ProviderError> {
        let stem = self.stem(scope);
        let known = self.book.known(scope, &stem)?;
        let old = old.filter(|old| !known.keks.contains(old)).cloned();
        let uncounted = known.is_empty() && old.is_none();
        let keks: Vec<_> = known.keks.into_iter().chain(old).collect();
        let mut found = Vec::new();
        for keks in keks.chunks(MAX_KEYS) {
            found.extend(self.look_at(keks, &stem)?);
        }
        for name in &known.unanswered {
            for (kek, key) in self.located(name, &stem)? {
                self.book.made(name, &kek)?;
                found.push((kek, key));
            }
        }
        if uncounted {
            found.extend(self.located(&stem, &stem)?);
        }
        let highest = found
            .iter()
            .map(|(_, key)| key.generation)
            .chain(known.made)
            .max();
        let mut serving: Vec<_> = found
            .into_iter()
            .filter(|(_, key)| Some(key.generation) == highest && key.may_serve())
            .collect();
        let kept = self
            .book
            .without_retired(serving.iter().map(|(kek, _)| kek.clone()).collect())?;
        serving.retain(|(kek, _)| kept.contains(kek));
        // Which of several that were not counted is the newest, nobody knows.
        let ambiguous = serving.len() > 1 && highest == Some(KekGeneration::UNCOUNTED);
        let first = serving
            .into_iter()
            .filter(|_| !ambiguous)
            .min_by(|(a, _), (b, _)| (a.0.len(), &a.0).cmp(&(b.0.len(), &b.0)));
        let in_use = match first {
            Some((kek, key)) => {
                if key.state == KeyState::PreActive {
                    self.activate(&kek)?;
                }
                Some(kek)
            }
            None => None,
        };
        Ok(There {
            highest: highest.max(known.asked),
            in_use,
        })
    }

    /// The keys that the servers find by exactly `name`, which begins with `stem`, and that bear it.
    fn located(&self, name: &str, stem: &str) -> Result<Vec<(KekId, Candidate)>, ProviderError> {
        let mut keks: Vec<KekId> = Vec::new();
        for page in 0..MAX_PAGES {
            let locate = Call::Locate {
                name: name.to_owned(),
                offset: page * LOCATED_PAGE,
            };
            let listed = self.ask(vec![locate], |outcomes| match &outcomes[0] {
                Ok(payload) => Ok(answer::located(payload)),
                // Some servers call it an error to find nothing.
                Err(refusal) if refusal.reason.about() == About::UnknownKey => Ok(Vec::new()),
                Err(refusal) => Err(refused(Operation::Locate, refusal)),
            })?;
            let (count, before) = (listed.len(), keks.len());
            for kek in listed {
                if !keks.contains(&kek) {
                    keks.push(kek);
                }
            }
            // The last page, or all of a server that knows no pages.
            if i32::try_from(count) != Ok(LOCATED_PAGE) || keks.len() == before {
                break;
            }
        }
        keks.truncate(MAX_LOCATED);
        let mut found = Vec::new();
        for keks in keks.chunks(MAX_KEYS) {
            found.extend(self.look_at(keks, stem)?);
        }
        found.retain(|(_, key)| key.name == name);
        Ok(found)
    }

    /// What those of `keks` are that bear a name of `stem`. Others are left out: destroyed meanwhile, another client's, or
    /// another VM's, which a server found that ignores what it was asked for.
    fn look_at(&self, keks: &[KekId], stem: &str) -> Result<Vec<(KekId, Candidate)>, ProviderError> {
        let calls = keks.iter().cloned().map(Call::GetAttributesAndName).collect();
        self.ask(calls, |outcomes| {
            let mut found = Vec::new();
            for (kek, outcome) in keks.iter().zip(outcomes) {
                let payload = match outcome {
                    Ok(payload) => payload,
                    Err(refusal) => match key_refused(kek, Operation::GetAttributes, refusal) {
                        error if error.class() == ErrorClass::Key => continue,
                        error => return Err(error),
                    },
                };
                let key = answer::found(payload, kek).map_err(unreadable)?;
                found.extend(Candidate::of(key, stem).map(|candidate| (kek.clone(), candidate)));
            }
            Ok(found)
        })
    }

    /// A new KEK, of the generation after `highest`.
    fn create_next(&self, scope: &KekScope, highest: Option<KekGeneration>) -> Result<KekId, ProviderError> {
        let next = highest.unwrap_or(KekGeneration::UNCOUNTED).next()?;
        let stem = self.stem(scope);
        let name = self.book.plan(scope, &stem, next)?;
        let kek = match self.create_labelled(self.label(scope, name.clone())) {
            Ok(kek) => kek,
            // Another node has made it, perhaps, and its answer was lost.
            Err(error @ ProviderError::Refused(_)) => match self.located(&name, &stem)?.pop() {
                Some((kek, _)) => kek,
                None => {
                    self.book.refused(&name)?;
                    return Err(error);
                }
            },
            Err(error) => return Err(error),
        };
        // A server that answers with a key that was there before must not have that used, nor activated.
        let made = self.look_at_new(&kek, &stem)?;
        match made.filter(|key| key.name == name && key.fits) {
            Some(key) if key.state == KeyState::PreActive => self.activate(&kek)?,
            Some(key) => check_state(&kek, key.state, KeyState::may_wrap)?,
            None => {
                return Err(ProviderError::BesideTheQuestion(format!(
                    "it made the key {kek}, and does not say that this is an AES key of 256 bits called {name}"
                )));
            }
        }
        self.book.made(&name, &kek)?;
        Ok(kek)
    }

    /// As [`Keys::look_at`], where a node that does not have it yet is no answer.
    fn look_at_new(&self, kek: &KekId, stem: &str) -> Result<Option<Candidate>, ProviderError> {
        self.ask(vec![Call::GetAttributesAndName(kek.clone())], |outcomes| {
            let payload = about(kek, Operation::GetAttributes, &outcomes[0])?;
            let key = answer::found(payload, kek).map_err(unreadable)?;
            Ok(Candidate::of(key, stem))
        })
    }

    fn create_labelled(&self, label: Label) -> Result<KekId, ProviderError> {
        let mut plain = label.clone();
        plain.tag = None;
        let dislikes_an_attribute = Cell::new(false);
        let create = |label| {
            self.ask(vec![Call::Create(label)], |outcomes| match &outcomes[0] {
                Ok(payload) => answer::created(payload).map_err(unreadable),
                Err(refusal) => {
                    if refusal.reason.is_about_an_attribute() {
                        dislikes_an_attribute.set(true);
                    }
                    Err(refused(Operation::Create, refusal))
                }
            })
        };
        match create(label) {
            // The name says most of what the tag does.
            Err(_) if dislikes_an_attribute.get() => create(plain),
            created => created,
        }
    }

    /// Some servers make keys active at once and refuse to do it again.
    fn activate(&self, kek: &KekId) -> Result<(), ProviderError> {
        let activated = self.once(kek, Call::Activate(kek.clone()));
        match activated {
            Err(error) if error.class() != ErrorClass::Trouble => match self.facts(kek)?.state {
                KeyState::Active => Ok(()),
                _ => Err(error),
            },
            activated => activated,
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
        gcm::wrap(&key, &self.additional_data(kek, MECHANISM), payload)
    }

    fn wrap_there(&self, kek: &KekId, payload: &Payload) -> Result<Vec<u8>, ProviderError> {
        self.check_server_encrypts()?;
        let mut nonce = [0; aead::NONCE];
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

    /// A server that does not say what it can do is simply asked to do it.
    fn check_server_encrypts(&self) -> Result<(), ProviderError> {
        let nodes = self.cluster.nodes();
        if nodes.iter().all(|node| node.operations().is_none()) {
            self.ask(vec![Call::Query], |_| Ok(()))?;
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
        gcm::parts(&stanza.body).map(drop)
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
        for keks in wanted.chunks(MAX_KEYS) {
            let keys = self.fetch_or_recall(ticket, keks)?;
            for (kek, key) in keks.iter().zip(&keys) {
                for nth in &of_kek[kek.0.as_str()] {
                    let data = self.additional_data(kek, MECHANISM);
                    payloads[*nth] = Some(gcm::unwrap(key, &data, &stanzas[*nth].body)?);
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
        for members in members.chunks(MAX_KEYS) {
            let calls = members.iter().map(|nth| self.decrypt(stanzas[*nth]));
            let calls = calls.collect::<Result<Vec<_>, _>>()?;
            let mut unexplained = None;
            let asked = self.ask(calls, |outcomes| {
                for (nth, outcome) in members.iter().zip(outcomes) {
                    let stanza = stanzas[*nth];
                    let payload = outcome.as_ref().map_err(|refusal| {
                        if refusal.reason.about() == About::Server {
                            unexplained = Some(&stanza.kek);
                        }
                        decryption_refused(&stanza.kek, refusal)
                    })?;
                    answer::check_subject(payload, &stanza.kek).map_err(unreadable)?;
                    let plain = answer::decrypted(payload).map_err(unreadable)?;
                    payloads[*nth] = Some(Payload::from_unwrapped(plain).map_err(ProviderError::Payload)?);
                }
                Ok(())
            });
            match (asked, unexplained) {
                (Err(ProviderError::Trouble(_)), Some(kek)) if self.opens_its_own(kek) => {
                    return Err(ProviderError::Tampered);
                }
                (asked, _) => asked?,
            }
        }
        Ok(())
    }

    /// Few servers say more than "General Failure" of a tag that does not fit, and all say that of trouble of their own: one
    /// that opens what it has just wrapped has no trouble.
    fn opens_its_own(&self, kek: &KekId) -> bool {
        let work = || -> Result<(), ProviderError> {
            let mut random = SecretBytes::zeroed(Payload::LEN)
                .map_err(ProviderError::internal("getting memory for a payload"))?;
            openssl::rand::rand_bytes(random.expose_mut())
                .map_err(ProviderError::internal("making a payload"))?;
            let payload = Payload::from_unwrapped(random).map_err(ProviderError::Payload)?;
            let stanza = Stanza {
                provider: self.provider,
                provider_name: String::new(),
                kek: kek.clone(),
                mechanism: SERVER_MECHANISM.to_owned(),
                body: self.wrap_there(kek, &payload)?,
            };
            self.ask(vec![self.decrypt(&stanza)?], |outcomes| {
                let opened = about(kek, Operation::Decrypt, &outcomes[0])?;
                let opened = answer::decrypted(opened).map_err(unreadable)?;
                match openssl::memcmp::eq(opened.expose(), payload.expose()) {
                    true => Ok(()),
                    false => Err(ProviderError::Tampered),
                }
            })
        };
        work().is_ok()
    }

    fn decrypt(&self, stanza: &Stanza) -> Result<Call, ProviderError> {
        let parts = gcm::parts(&stanza.body)?;
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
        gcm::additional_data(self.provider, &kek.0, mechanism)
    }

    /// Revokes and destroys a key that bears the name of the keys of `vm`; can be repeated from wherever it was interrupted.
    pub(super) fn destroy(&self, kek: &KekId, vm: VmId) -> Result<DestroyReceipt, ProviderError> {
        known_form(kek)?;
        let stem = self.stem(&KekScope::Vm(vm));
        let (before, is_own) = self.ask(vec![Call::GetAttributesAndName(kek.clone())], |outcomes| {
            let payload = about(kek, Operation::GetAttributes, &outcomes[0])?;
            let facts = answer::facts(payload).map_err(unreadable)?;
            let mut names = answer::names(payload).into_iter();
            Ok((facts.state, names.any(|name| generation(&stem, name).is_some())))
        })?;
        if !is_own && before != KeyState::Destroyed {
            let why = format!("at the KMS it bears no name of this VM's keys ({stem}-…)");
            return Ok(DestroyReceipt::shared(kek, &why));
        }
        let had_it = self.nodes_with(kek);
        self.cache.forget(kek).map_err(stays_on_disk())?;
        if before == KeyState::Active {
            self.once(kek, Call::Revoke(kek.clone()))?;
        }
        if before != KeyState::Destroyed {
            self.once(kek, Call::Destroy(kek.clone()))?;
        }
        let ask = [Call::GetAttributes(kek.clone())];
        let each = self
            .cluster
            .ask_each(self.access, &ask, self.deadline, |outcomes| {
                facts_of(kek, &outcomes[0]).map(|facts| facts.state)
            });
        let (destroyed, seen) = end_of_key(&had_it, &each);
        let kept = match self.cache.persistence() {
            Some(_) => "; what this host kept of it for a reboot is removed",
            None => "",
        };
        Ok(DestroyReceipt {
            kek: kek.clone(),
            destroyed,
            observed: format!(
                "the KMS was told to destroy the key (it was {before}): {seen}; backups and replicas of the KMS may \
                 still hold it{kept}"
            ),
        })
    }

    /// The nodes that have the key now, for this client: of these alone a later "no such key" says that it has come to an end.
    /// One that is silent is not waited for until the deadline.
    fn nodes_with(&self, kek: &KekId) -> Vec<String> {
        if let [node] = self.cluster.nodes() {
            // It has just described the key.
            return vec![node.endpoint.to_string()];
        }
        let deadline = self.deadline.min(Instant::now() + RECALL_AFTER);
        let ask = [Call::GetAttributes(kek.clone())];
        let each = self.cluster.ask_each(self.access, &ask, deadline, |outcomes| {
            facts_of(kek, &outcomes[0]).map(drop)
        });
        let have_it = each.into_iter().filter(|(_, found)| found.is_ok());
        have_it.map(|(node, _)| node).collect()
    }

    fn once(&self, kek: &KekId, call: Call) -> Result<(), ProviderError> {
        let operation = call.operation();
        self.ask(vec![call], |outcomes| match &outcomes[0] {
            Ok(_) => Ok(()),
            Err(refusal) => Err(key_refused(kek, operation, refusal)),
        })
    }
}

/// Whether the end of a key was seen at every node, and what each said. A node that lags, or that hides the key from this client,
/// knows no such key either: that counts where it `had_it` before.
fn end_of_key(had_it: &[String], each: &[(String, Result<KeyState, ProviderError>)]) -> (bool, String) {
    let mut destroyed = !each.is_empty();
    let said = each.iter().map(|(node, found)| match found {
        Ok(KeyState::Destroyed) => format!("{node} says that the key is {}", KeyState::Destroyed),
        Err(ProviderError::UnknownKek(_)) if had_it.contains(node) => {
            format!("{node} had it, and says that it has no such key now")
        }
        Err(ProviderError::UnknownKek(_)) => {
            destroyed = false;
            format!("{node} knows no such key for this client, nor did it before: not proven")
        }
        Ok(state) => {
            destroyed = false;
            format!("{node} says that the key is {state}")
        }
        Err(error) => {
            destroyed = false;
            format!("{node} has not said that it is gone: {}", chain(error))
        }
    });
    let said = said.collect::<Vec<_>>().join("; ");
    (destroyed, said)
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

/// What there is for a scope.
struct There {
    /// Of all that were ever asked for, also of those that are out of use.
    highest: Option<KekGeneration>,
    /// The KEK of that generation, if it may be used.
    in_use: Option<KekId>,
}

/// A key that bears a name of the scope.
struct Candidate {
    generation: KekGeneration,
    name: String,
    state: KeyState,
    /// Whether it is of the right kind.
    fits: bool,
}

impl Candidate {
    fn of(key: answer::FoundKey, stem: &str) -> Option<Self> {
        let mut names = key.names.into_iter();
        let (name, generation) = names.find_map(|name| {
            let generation = generation(stem, &name)?;
            Some((name, generation))
        })?;
        Some(Self {
            generation,
            name,
            state: key.state,
            fits: key.fits,
        })
    }

    fn may_serve(&self) -> bool {
        self.fits && matches!(self.state, KeyState::Active | KeyState::PreActive)
    }
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
    match refusal.reason {
        Reason::CRYPTOGRAPHIC_FAILURE | Reason::INVALID_FIELD => ProviderError::Tampered,
        _ => key_refused(kek, Operation::Decrypt, refusal),
    }
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

#[cfg(test)]
mod end_tests {
    use super::*;

    #[test]
    fn a_key_is_destroyed_when_every_node_says_so() {
        let node = |name: &str, found| (name.to_owned(), found);
        let gone = || Ok(KeyState::Destroyed);
        let unknown = || Err(ProviderError::UnknownKek(KekId("7".to_owned())));
        let silent = || Err(ProviderError::Unreachable("connect timed out".to_owned()));
        let both = ["a".to_owned(), "b".to_owned()];
        assert!(end_of_key(&both, &[node("a", gone()), node("b", unknown())]).0);
        assert!(end_of_key(&both[..1], &[node("a", unknown())]).0);
        assert!(!end_of_key(&both, &[]).0);
        for other in [Ok(KeyState::Active), silent()] {
            let (destroyed, said) = end_of_key(&both, &[node("a", gone()), node("b", other)]);
            assert!(!destroyed && said.contains("b "), "{said}");
        }
        // It lags, or hides the key from this client: it will have it, or has it.
        for had_it in [&both[..1], &[]] {
            let (destroyed, said) = end_of_key(had_it, &[node("a", gone()), node("b", unknown())]);
            assert!(!destroyed && said.contains("b knows no such key"), "{said}");
        }
    }
}

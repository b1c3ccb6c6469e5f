//! Wrapping and unwrapping under a KEK: here, with its bytes from the KMS or the cache, or at the server.
//!
//! However many envelopes a VM has, their KEKs are fetched in one request, each with its state.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::answer::{self, KeyRefused};
use super::call::{Call, Cryption};
use super::error::About;
use super::keys::{Keys, MAX_KEYS, about, check_state, key_refused, known_form, refused, state_of};
use super::message::{Outcome, ProtocolError, Refusal};
use super::node::Node;
use super::settings::Mode;
use super::tag::{KeyState, Operation, Reason};
use super::version::KmipVersion;
use crate::crypto::aead;
use crate::model::deadlines::kmip::RECALL_AFTER;
use crate::model::envelope::{KekId, Payload, Stanza};
use crate::provider::ProviderError;
use crate::provider::cache::persist::NotKept;
use crate::provider::cache::{KekCache, Ticket};
use crate::provider::toolbox::gcm::{self, MECHANISM};
use crate::secret::SecretBytes;

/// Wrapped by the server's own AES-256-GCM; the body is laid out like that of [`MECHANISM`].
const SERVER_MECHANISM: &str = "KMIP-A256GCM";

impl Keys<'_> {
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
            check_state(kek, state_of(kek, &outcomes[0])?, KeyState::may_wrap)?;
            let payload = outcomes[1]
                .as_ref()
                .map_err(|refusal| refused(Operation::Encrypt, refusal))?;
            answer::check_subject(payload, kek)?;
            Ok(answer::body(payload, &nonce)?)
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
        self.unwrap(stanzas, |keks| self.fetch_or_recall(ticket, keks))
    }

    /// The servers alone open them, and what they say changes nothing of what is cached.
    pub(super) fn opens(&self, stanzas: &[&Stanza]) -> Result<(), ProviderError> {
        let fetch = |keks: &[KekId]| self.fetch(keks, KeyState::may_unwrap, self.deadline);
        self.unwrap(stanzas, |keks| {
            Ok(fetch(keks)?.into_iter().map(Arc::new).collect())
        })
        .map(drop)
    }

    fn unwrap(
        &self,
        stanzas: &[&Stanza],
        keys: impl Fn(&[KekId]) -> Result<Vec<Arc<SecretBytes>>, ProviderError>,
    ) -> Result<Vec<Payload>, ProviderError> {
        for stanza in stanzas {
            self.check(stanza)?;
        }
        let (here, there): (Vec<_>, Vec<_>) =
            (0..stanzas.len()).partition(|nth| stanzas[*nth].mechanism == MECHANISM);
        let mut payloads: Vec<_> = stanzas.iter().map(|_| None).collect();
        self.unwrap_here(keys, stanzas, &here, &mut payloads)?;
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
        keys_of: impl Fn(&[KekId]) -> Result<Vec<Arc<SecretBytes>>, ProviderError>,
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
            let keys = keys_of(keks)?;
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
                // Why there is nothing in the cache either.
                Err(NotKept(Some(reason))) => Err(error.retold(|why| format!("{why}; {reason}"))),
                Err(NotKept(None)) => Err(error),
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
                check_state(kek, state_of(kek, &pair[0])?, &may)?;
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
                    answer::check_subject(payload, &stanza.kek)?;
                    let plain = answer::decrypted(payload)?;
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
            let random =
                SecretBytes::random(Payload::LEN).map_err(ProviderError::internal("making a payload"))?;
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
                let opened = answer::decrypted(opened)?;
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
fn unusable_key(kek: &KekId, why: KeyRefused) -> ProviderError {
    let why = match why {
        KeyRefused::Memory(error) => return ProviderError::internal("getting memory for a KEK")(error),
        KeyRefused::Shape => return ProviderError::from(ProtocolError::Missing("key")),
        KeyRefused::Wrapped => "the KMS hands it out wrapped only: allow its export, or use --mode server",
        KeyRefused::NotAes256 => "it is not an AES key of 256 bits",
    };
    ProviderError::KekUnusable {
        kek: kek.clone(),
        why: why.to_owned(),
    }
}

fn decryption_refused(kek: &KekId, refusal: &Refusal) -> ProviderError {
    match refusal.reason {
        Reason::CRYPTOGRAPHIC_FAILURE | Reason::INVALID_FIELD => ProviderError::Tampered,
        _ => key_refused(kek, Operation::Decrypt, refusal),
    }
}

fn copy(bytes: &[u8]) -> Result<SecretBytes, ProviderError> {
    SecretBytes::copy_of(bytes).map_err(ProviderError::internal("getting memory for a data key"))
}

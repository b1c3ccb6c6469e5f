//! The four things asked of a transit engine: look at a key, make one, encrypt, decrypt; and destroy.
//!
//! Stanzas under one key go in one request, whatever VM they belong to. Nothing is encrypted under a key that was not
//! looked at before: a server whose policy is too generous would make one up.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::http::{Answer, Ask, Data, Fault};
use super::kek::KekName;
use super::login::{Session, json};
use super::settings::{ApiPath, KeyName};
use crate::model::envelope::Payload;
use crate::provider::toolbox::printable;
use crate::provider::{ProviderError, ScopeSetting};
use crate::secret::SecretBytes;

const BATCH: usize = 256;
/// The base64 text of a payload.
const PAYLOAD_TEXT: usize = Payload::LEN.div_ceil(3) * 4;
/// Types whose ciphertext shows that it was changed, as the engine calls them.
const AEAD: [&str; 5] = [
    "aes256-gcm96",
    "aes128-gcm96",
    "chacha20-poly1305",
    "xchacha20-poly1305",
    "managed_key",
];

/// One conversation with one engine, until its deadline.
pub(super) struct TransitEngine<'a> {
    pub(super) session: &'a Session,
    pub(super) mount: &'a ApiPath,
    pub(super) deadline: Instant,
}

/// What the engine says of a key.
#[derive(Debug, Deserialize)]
pub(super) struct KeyInfo {
    /// What the server calls it.
    #[serde(default)]
    name: String,
    pub(super) latest_version: u32,
    #[serde(default)]
    pub(super) min_decryption_version: u32,
    #[serde(default)]
    pub(super) deletion_allowed: bool,
    #[serde(default)]
    derived: bool,
    #[serde(default)]
    soft_deleted: bool,
    #[serde(rename = "type")]
    kind: String,
}

/// A wrapped payload under its KEK.
pub(super) struct Wrapped<'a> {
    pub(super) kek: KekName,
    pub(super) body: &'a [u8],
}

#[derive(Deserialize)]
struct Results<'a> {
    #[serde(borrow)]
    batch_results: Vec<ResultItem<'a>>,
}

#[derive(Deserialize)]
struct ResultItem<'a> {
    #[serde(borrow, default)]
    plaintext: Cow<'a, str>,
    #[serde(borrow, default)]
    ciphertext: Cow<'a, str>,
    #[serde(default)]
    error: Option<String>,
}

#[derive(Serialize)]
struct Batch<'a> {
    batch_input: Vec<Item<'a>>,
}

#[derive(Default, Serialize)]
struct Item<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    plaintext: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ciphertext: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    context: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_version: Option<u32>,
}

#[derive(Serialize)]
struct NewKey {
    #[serde(rename = "type")]
    kind: &'static str,
    derived: bool,
}

/// A key for many VMs derives one from the context of each.
fn is_derived(serves: ScopeSetting) -> bool {
    serves == ScopeSetting::Provider
}

impl TransitEngine<'_> {
    fn path(&self, verb: &str, key: &KeyName) -> String {
        format!("{}/{verb}/{key}", self.mount)
    }

    fn ask(&self, ask: Ask) -> Result<Answer, Fault> {
        let Session { client, token, .. } = self.session;
        client.ask(Some(token), ask, self.deadline)
    }

    fn ask_batch(&self, path: &str, items: Vec<Item>) -> Result<Answer, Fault> {
        let Session { client, token, .. } = self.session;
        let (count, batch) = (items.len(), json(&Batch { batch_input: items })?);
        client.ask_batch(token, Ask::post(path, &batch).items(count), self.deadline)
    }

    /// The key, if there is one.
    pub(super) fn key(&self, key: &KeyName) -> Result<Option<KeyInfo>, Fault> {
        let found = match self.ask(Ask::get(&self.path("keys", key))) {
            Ok(answer) => answer.json::<Data<KeyInfo>>()?.data,
            Err(Fault::NotFound(why)) if why.is_empty() => return Ok(None),
            Err(fault) => return Err(fault),
        };
        // A proxy or a mount that answers with another key must not have that used.
        if !found.name.is_empty() && found.name != key.as_str() {
            let name = printable(&found.name);
            return Err(Fault::Beside(format!(
                "asked for key {key}, it answers with key {name}"
            )));
        }
        Ok(Some(found))
    }

    /// The newest version of the key, if there is such a key and payloads may be wrapped under it.
    pub(super) fn newest(&self, key: &KeyName, serves: ScopeSetting) -> Result<Option<u32>, Fault> {
        let Some(found) = self.key(key)? else {
            return Ok(None);
        };
        found.check(key, serves)?;
        Ok(Some(found.latest_version))
    }

    /// Makes a key, whose name no other key may ever have had, and looks at it.
    pub(super) fn make_key(&self, key: &KeyName, serves: ScopeSetting) -> Result<u32, Fault> {
        let (kind, derived) = (AEAD[0], is_derived(serves));
        let body = json(&NewKey { kind, derived })?;
        self.ask(Ask::post(&self.path("keys", key), &body))?;
        self.newest(key, serves)?
            .ok_or_else(|| Fault::odd("a key that it made is not there"))
    }

    /// The body of a stanza that holds `payload`.
    pub(super) fn encrypt(&self, kek: &KekName, payload: &Payload) -> Result<Vec<u8>, Fault> {
        let found = self.key(&kek.key)?.ok_or_else(|| Fault::unknown(&kek.id()))?;
        found.check(&kek.key, kek.serves())?;
        if kek.version > found.latest_version {
            return Err(Fault::unknown(&kek.id()));
        }
        let mut plaintext = SecretBytes::zeroed(PAYLOAD_TEXT).map_err(Fault::memory)?;
        STANDARD
            .encode_slice(payload.expose(), plaintext.expose_mut())
            .map_err(|_| Fault::odd("a payload of another length"))?;
        let item = Item {
            plaintext: std::str::from_utf8(plaintext.expose()).ok(),
            context: kek.context(),
            key_version: Some(kek.version),
            ..Item::default()
        };
        let answer = self.ask_batch(&self.path("encrypt", &kek.key), vec![item])?;
        let results = results(&answer, 1)?;
        if let Some(error) = results[0].error() {
            return Err(Fault::Refused(format!("the server refuses to encrypt: {error}")));
        }
        let (version, body) = results[0].ciphertext()?;
        if version == kek.version {
            Ok(body)
        } else {
            Err(Fault::odd("another version of the key"))
        }
    }

    /// The payloads of `wrapped`, in their order: one request for each key, unless there are very many.
    pub(super) fn decrypt(&self, wrapped: &[Wrapped]) -> Result<Vec<Payload>, Fault> {
        let mut payloads: Vec<_> = wrapped.iter().map(|_| None).collect();
        let mut scratch = SecretBytes::zeroed(PAYLOAD_TEXT).map_err(Fault::memory)?;
        let mut by_key: BTreeMap<&KeyName, Vec<usize>> = BTreeMap::new();
        for (at, one) in wrapped.iter().enumerate() {
            by_key.entry(&one.kek.key).or_default().push(at);
        }
        for (key, members) in by_key {
            for chunk in members.chunks(BATCH) {
                self.decrypt_batch(key, chunk, wrapped, |at, item| {
                    payloads[at] = Some(item.payload(&mut scratch)?);
                    Ok(())
                })?;
            }
        }
        Ok(payloads.into_iter().flatten().collect())
    }

    /// Hands what each of `members` of `wrapped` came to, all under one key, to `take`.
    fn decrypt_batch(
        &self,
        key: &KeyName,
        members: &[usize],
        wrapped: &[Wrapped],
        mut take: impl FnMut(usize, &ResultItem) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let item = |at: &usize| Item {
            ciphertext: Some(wrapped[*at].kek.ciphertext(wrapped[*at].body)),
            context: wrapped[*at].kek.context(),
            ..Item::default()
        };
        let answer = match self.ask_batch(&self.path("decrypt", key), members.iter().map(item).collect()) {
            Ok(answer) => answer,
            // The first of them stands for all.
            Err(Fault::Refused(_)) => return Err(self.why_not(&wrapped[members[0]].kek)?),
            Err(fault) => return Err(fault),
        };
        for (at, item) in members.iter().zip(results(&answer, members.len())?) {
            if item.error().is_some() {
                return Err(self.why_not(&wrapped[*at].kek)?);
            }
            take(*at, &item)?;
        }
        Ok(())
    }

    /// Why a ciphertext does not open: what the engine says of its key decides, for its words differ by version.
    fn why_not(&self, kek: &KekName) -> Result<Fault, Fault> {
        let tampered = Fault::Provider(ProviderError::Tampered);
        let found = match self.key(&kek.key) {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(Fault::unknown(&kek.id())),
            // The policy need not let us look.
            Err(Fault::Denied(_)) => return Ok(tampered),
            Err(fault) => return Err(fault),
        };
        if found.soft_deleted {
            return Ok(KeyInfo::soft_deleted(&kek.key));
        }
        if kek.version < found.min_decryption_version {
            return Ok(Fault::Provider(ProviderError::KekUnusable {
                kek: kek.id(),
                why: format!(
                    "version {} of key {} is below its min_decryption_version at the server, which is {}: an admin of the \
                     server can lower that setting",
                    kek.version, kek.key, found.min_decryption_version
                ),
            }));
        }
        Ok(if kek.version <= found.latest_version {
            tampered
        } else {
            Fault::unknown(&kek.id())
        })
    }

    /// Makes a new version of the key.
    pub(super) fn rotate(&self, key: &KeyName) -> Result<u32, Fault> {
        self.ask(Ask::post(&format!("{}/rotate", self.path("keys", key)), b"{}"))?;
        let found = self
            .key(key)?
            .ok_or_else(|| Fault::odd("the rotated key is not there"))?;
        Ok(found.latest_version)
    }

    pub(super) fn allow_deletion(&self, key: &KeyName) -> Result<(), Fault> {
        self.configure(key, br#"{"deletion_allowed":true}"#)
    }

    pub(super) fn forbid_deletion(&self, key: &KeyName) -> Result<(), Fault> {
        self.configure(key, br#"{"deletion_allowed":false}"#)
    }

    fn configure(&self, key: &KeyName, body: &[u8]) -> Result<(), Fault> {
        let path = format!("{}/config", self.path("keys", key));
        self.ask(Ask::post(&path, body)).map(drop)
    }

    /// Deletes the key with all its versions.
    pub(super) fn delete(&self, key: &KeyName) -> Result<(), Fault> {
        self.ask(Ask::delete(&self.path("keys", key))).map(drop)
    }
}

impl KeyInfo {
    /// Whether payloads may be wrapped under it.
    fn check(&self, key: &KeyName, serves: ScopeSetting) -> Result<(), Fault> {
        if self.soft_deleted {
            return Err(Self::soft_deleted(key));
        }
        if !AEAD.contains(&self.kind.as_str()) {
            let kind = printable(&self.kind);
            return Err(Fault::Refused(format!(
                "key {key} at the server has the type {kind}, which does not detect changes: make one of type {}",
                AEAD[0]
            )));
        }
        if self.derived != is_derived(serves) {
            let needed = match serves {
                ScopeSetting::Provider => "derived=true, to be shared by VMs",
                ScopeSetting::Vm => "derived=false",
            };
            return Err(Fault::Refused(format!(
                "key {key} at the server is not made with {needed}"
            )));
        }
        Ok(())
    }

    fn soft_deleted(key: &KeyName) -> Fault {
        Fault::Refused(format!(
            "key {key} is marked as deleted at the server, which can take that back"
        ))
    }
}

fn results(answer: &Answer, expected: usize) -> Result<Vec<ResultItem<'_>>, Fault> {
    let items = answer.json::<Data<Results<'_>>>()?.data.batch_results;
    if items.len() == expected {
        Ok(items)
    } else {
        Err(Fault::odd("another number of results"))
    }
}

impl ResultItem<'_> {
    fn error(&self) -> Option<String> {
        let error = self.error.as_deref().filter(|error| !error.is_empty());
        error.map(printable)
    }

    fn ciphertext(&self) -> Result<(u32, Vec<u8>), Fault> {
        KekName::parse_ciphertext(&self.ciphertext).ok_or_else(|| Fault::odd("no ciphertext"))
    }

    /// By way of `scratch`, which is wiped again.
    fn payload(&self, scratch: &mut SecretBytes) -> Result<Payload, Fault> {
        let text = self.plaintext.as_ref();
        if text.len() != PAYLOAD_TEXT {
            return Err(Fault::Provider(ProviderError::Tampered));
        }
        let len = STANDARD
            .decode_slice(text, scratch.expose_mut())
            .map_err(|_| Fault::odd("a payload that is not base64"))?;
        let payload = SecretBytes::take(&mut scratch.expose_mut()[..len]).map_err(Fault::memory)?;
        Payload::from_unwrapped(payload).map_err(|error| Fault::Provider(ProviderError::Payload(error)))
    }
}

//! KEKs in a token: how they are made, named and found.
//!
//! A KEK is an AES key, generated in the token, sensitive and not extractable. Its CKA_ID, 16 bytes, is its
//! [`KekId`] in lowercase hex. The first one of a label has a random ID; one that takes its place has a lesser one, so the
//! least is the one in use: the token alone says so, to any host, and changes from one to the other in one call. The label says what it is for:
//! `virtseal:<mechanism>:<provider>:<VM, or "all">:<host>`. A KEK of `AES-CBC-PAD+HMAC-SHA256` has a second key of
//! the same ID and label, for the HMAC.

use std::collections::HashSet;

use cryptoki::mechanism::Mechanism as Pkcs11Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use cryptoki::types::Ulong;

use super::body::{Wrapping, random};
use super::error::TokenError;
use super::mechanism::{HMAC_KEY, Mechanism};
use super::object::{Object, objects, objects_of, secret_key};
use super::settings::KeyBits;
use super::token::{Kek, Token};
use crate::model::envelope::{KekId, ProviderId, VmId};
use crate::provider::{KekScope, ProviderError};

/// A CKA_ID.
type Id = [u8; 16];

/// Whose KEKs, and how new ones are made.
#[derive(Clone, Debug)]
pub(super) struct Owner {
    pub(super) provider: ProviderId,
    pub(super) host: String,
    pub(super) key_bits: KeyBits,
}

impl Owner {
    /// What a body of this KEK is bound to.
    fn context(&self, kek: &KekId) -> Vec<u8> {
        let mut context = b"virtseal pkcs11 v1\0".to_vec();
        context.extend_from_slice(self.provider.0.as_bytes());
        context.extend_from_slice(kek.0.as_bytes());
        context
    }

    fn label(&self, mechanism: Mechanism, scope: &KekScope) -> String {
        let scope = match scope {
            KekScope::Vm(vm) => vm.to_string(),
            KekScope::Provider => "all".to_owned(),
        };
        format!(
            "virtseal:{}:{}:{scope}:{}",
            mechanism.as_str(),
            self.provider,
            self.host
        )
    }
}

/// What a label says, if it is one of ours.
fn read_label(label: &[u8]) -> Option<(Mechanism, ProviderId)> {
    let text = std::str::from_utf8(label).ok()?;
    let mut parts = text.strip_prefix("virtseal:")?.split(':');
    let mechanism = Mechanism::parse(parts.next()?)?;
    Some((mechanism, parts.next()?.parse().ok()?))
}

/// Whom the KEK with this label serves, if it is one of ours.
fn serves(label: &[u8]) -> Option<KekScope> {
    read_label(label)?;
    match std::str::from_utf8(label).ok()?.split(':').nth(3)? {
        "all" => Some(KekScope::Provider),
        vm => vm.parse().ok().map(KekScope::Vm),
    }
}

/// The KEK of `scope` that is in use, unless that is `old`; else a new one, which has wrapped and unwrapped. Those that jobs of this
/// host have `retired` never come back, also when those that took their place are gone.
pub(super) fn in_use_or_new(
    token: &mut Token,
    owner: &Owner,
    scope: &KekScope,
    retired: &HashSet<KekId>,
    old: Option<&KekId>,
) -> Result<KekId, TokenError> {
    let mut ids = Vec::new();
    for mechanism in Mechanism::ALL {
        ids.extend(labelled(token, owner, mechanism, scope)?);
    }
    if ids.is_empty() {
        // Of a token that is gone nothing is listed, and the KEK must not be made twice.
        token.check()?;
    }
    let is_retired = |id: &Id| retired.contains(&name(*id));
    match ids.iter().copied().filter(|id| !is_retired(id)).min().map(name) {
        Some(kek) if Some(&kek) != old => Ok(kek),
        _ => make(token, owner, scope, ids.into_iter().min()),
    }
}

/// A new KEK, in the place of `before`.
fn make(token: &mut Token, owner: &Owner, scope: &KekScope, before: Option<Id>) -> Result<KekId, TokenError> {
    let mut refusal = None;
    for mechanism in Mechanism::choose(&token.offers()?, owner.key_bits)? {
        match generate(token, owner, mechanism, scope, new_id(before)?) {
            // Listed is not yet allowed: policies of HSMs forbid single mechanisms.
            Err(error @ (TokenError::Call(_) | TokenError::Provider(ProviderError::Tampered)))
                if token.check().is_ok() =>
            {
                refusal = Some(error);
            }
            done => return done,
        }
    }
    Err(refusal.expect("a token that offers nothing was refused above"))
}

fn generate(
    token: &mut Token,
    owner: &Owner,
    mechanism: Mechanism,
    scope: &KekScope,
    id: Id,
) -> Result<KekId, TokenError> {
    let kek = name(id);
    let label = owner.label(mechanism, scope);
    let session = token.writable()?;
    // Nothing relies on a KEK that has not wrapped and unwrapped before.
    let done = generate_keys(&session, owner, mechanism, &id, &label)
        .and_then(|()| with(token, owner, &kek, |wrapping| wrapping.try_out()));
    if done.is_err() {
        token.keks.remove(&kek);
        for object in objects_of(&session, &id, label.as_bytes())? {
            session.destroy_object(object.handle)?;
        }
    }
    done.map(|()| kek)
}

/// A random ID or, for a KEK in the place of `before`, one that is less by a random step: so small that the IDs last for ever.
fn new_id(before: Option<Id>) -> Result<Id, TokenError> {
    let Some(before) = before else {
        return random();
    };
    let step = u128::from(u64::from_be_bytes(random()?)) + 1;
    let id = u128::from_be_bytes(before).checked_sub(step);
    Ok(id.ok_or(TokenError::NoValue)?.to_be_bytes())
}

/// The key for the HMAC first: a KEK is found by its AES key, and is whole then.
fn generate_keys(
    session: &Session,
    owner: &Owner,
    mechanism: Mechanism,
    id: &[u8],
    label: &str,
) -> Result<(), TokenError> {
    if mechanism == Mechanism::CbcHmac {
        let mut template = kept_key(id, label, HMAC_KEY)?;
        template.extend([Attribute::Sign(true), Attribute::Verify(true)]);
        template.extend(allowed(Use::Signing));
        session.generate_key(&Pkcs11Mechanism::GenericSecretKeyGen, &template)?;
    }
    let mut template = kept_key(id, label, owner.key_bits.bytes())?;
    template.extend(allowed(match mechanism.wraps_objects() {
        true => Use::Wrapping,
        false => Use::Encrypting,
    }));
    template.extend([Attribute::Sign(false), Attribute::Verify(false)]);
    let key = session.generate_key(&Pkcs11Mechanism::AesKeyGen, &template)?;
    let kept = session.get_attributes(key, &[AttributeType::Sensitive, AttributeType::Extractable])?;
    if kept.contains(&Attribute::Sensitive(true)) && kept.contains(&Attribute::Extractable(false)) {
        Ok(())
    } else {
        Err(TokenError::NotKept)
    }
}

fn kept_key(id: &[u8], label: &str, bytes: usize) -> Result<Vec<Attribute>, TokenError> {
    Ok(vec![
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Id(id.to_vec()),
        Attribute::Label(label.as_bytes().to_vec()),
        Attribute::ValueLen(Ulong::try_from(bytes)?),
    ])
}

/// The one thing that a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Encrypting,
    Wrapping,
    Signing,
}

fn allowed(only: Use) -> [Attribute; 5] {
    let (encrypt, wrap) = (only == Use::Encrypting, only == Use::Wrapping);
    [
        Attribute::Derive(false),
        Attribute::Encrypt(encrypt),
        Attribute::Decrypt(encrypt),
        Attribute::Wrap(wrap),
        Attribute::Unwrap(wrap),
    ]
}

/// The KEK that is called `id`, as one of `owner`'s.
pub(super) fn find(token: &mut Token, owner: &Owner, id: &KekId) -> Result<Kek, TokenError> {
    if let Some(kek) = token.keks.get(id) {
        return Ok(kek.clone());
    }
    let unknown = || ProviderError::UnknownKek(id.clone());
    let bytes = parse(id).ok_or_else(unknown)?;
    for object in objects(&token.session, &secret_key(KeyType::AES, &bytes))? {
        let Some((mechanism, provider)) = read_label(&object.label) else {
            continue;
        };
        if !object.is_key(KeyType::AES, &bytes) || provider != owner.provider {
            continue;
        }
        let unfit = |why| ProviderError::KekUnusable { kek: id.clone(), why };
        object.check(mechanism).map_err(unfit)?;
        let mac = match mechanism {
            Mechanism::CbcHmac => mac_of(&token.session, &object)?,
            _ => None,
        };
        let kek = Kek {
            mechanism,
            key: object.handle,
            mac,
        };
        token.keks.insert(id.clone(), kek.clone());
        return Ok(kek);
    }
    // A token that is gone may list nothing, and say nothing else: that must not read like a key that was destroyed.
    token.check()?;
    Err(unknown().into())
}

/// What `work` does with the KEK that is called `id`.
pub(super) fn with<T>(
    token: &mut Token,
    owner: &Owner,
    id: &KekId,
    work: impl FnOnce(Wrapping<'_>) -> Result<T, TokenError>,
) -> Result<T, TokenError> {
    let kek = find(token, owner, id)?;
    work(Wrapping {
        session: &token.session,
        kek: &kek,
        context: &owner.context(id),
    })
}

/// The key for the HMAC that belongs to `key`.
fn mac_of(session: &Session, key: &Object) -> Result<Option<ObjectHandle>, TokenError> {
    let found = objects(session, &secret_key(KeyType::GENERIC_SECRET, &key.id))?;
    let serves = |object: &Object| {
        object.is_key(KeyType::GENERIC_SECRET, &key.id)
            && object.label == key.label
            && object.bytes == Some(HMAC_KEY)
            && object.may(&[Attribute::Sign(true), Attribute::Verify(true)])
    };
    Ok(found
        .iter()
        .find(|object| serves(object))
        .map(|object| object.handle))
}

/// Destroys the KEK, if it serves `vm` alone, and looks whether it is gone. Each object is one of that KEK by its own word.
pub(super) fn destroy(
    token: &mut Token,
    owner: &Owner,
    vm: VmId,
    id: &KekId,
) -> Result<Option<usize>, TokenError> {
    // Never by a handle that was found before: handles are given anew.
    token.keks.remove(id);
    let found = find(token, owner, id)?;
    let label = Object::read(&token.session, found.key)?.label;
    if serves(&label) != Some(KekScope::Vm(vm)) {
        return Ok(None);
    }
    token.keks.remove(id);
    let bytes = parse(id).ok_or_else(|| ProviderError::UnknownKek(id.clone()))?;
    let session = token.writable()?;
    let objects = objects_of(&session, &bytes, &label)?;
    for object in &objects {
        session.destroy_object(object.handle)?;
    }
    if !objects_of(&session, &bytes, &label)?.is_empty() {
        return Err(TokenError::NotDestroyed);
    }
    // Of a token that is gone nothing is listed.
    token.check()?;
    Ok(Some(objects.len()))
}

/// The providers whose KEKs are in the token.
pub(super) fn providers(token: &Token) -> Result<Vec<ProviderId>, TokenError> {
    let template = [Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Token(true)];
    let mut providers = Vec::new();
    for object in objects(&token.session, &template)? {
        if object.is_stored_key() {
            providers.extend(read_label(&object.label).map(|(_, provider)| provider));
        }
    }
    providers.sort_unstable();
    providers.dedup();
    Ok(providers)
}

/// The IDs of the KEKs with one label that may wrap.
fn labelled(
    token: &Token,
    owner: &Owner,
    mechanism: Mechanism,
    scope: &KekScope,
) -> Result<Vec<Id>, TokenError> {
    let label = owner.label(mechanism, scope).into_bytes();
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::Token(true),
        Attribute::Label(label.clone()),
    ];
    let mut ids = Vec::new();
    for object in objects(&token.session, &template)? {
        let Ok(id) = Id::try_from(object.id.as_slice()) else {
            continue;
        };
        let is_ours = object.is_key(KeyType::AES, &id) && object.label == label;
        if is_ours && object.check(mechanism).is_ok() && object.is_kept() {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// The CKA_ID, if the name is spelt as it is here: two spellings would be two names.
fn parse(id: &KekId) -> Option<Id> {
    let bytes = hex::decode(&id.0).ok()?.try_into().ok()?;
    (name(bytes) == *id).then_some(bytes)
}

fn name(id: Id) -> KekId {
    KekId(hex::encode(id))
}

/// Whether of `keys` only the first passes for `id`.
#[cfg(test)]
pub(super) fn is_told_from_others(
    session: &Session,
    keys: &[ObjectHandle],
    id: &KekId,
) -> Result<bool, TokenError> {
    let bytes = parse(id).ok_or_else(|| ProviderError::UnknownKek(id.clone()))?;
    let mut passes = Vec::new();
    for key in keys {
        passes.push(Object::read(session, *key)?.is_key(KeyType::AES, &bytes));
    }
    Ok(passes[0] && passes[1..].iter().all(|passes| !passes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::envelope::VmId;

    #[test]
    fn labels_are_read_back() {
        let owner = Owner {
            provider: ProviderId::random(),
            host: "node-1.example".to_owned(),
            key_bits: KeyBits::Aes256,
        };
        for mechanism in Mechanism::ALL {
            for scope in [KekScope::Provider, KekScope::Vm(VmId::random())] {
                let label = owner.label(mechanism, &scope);
                assert_eq!(read_label(label.as_bytes()), Some((mechanism, owner.provider)));
            }
        }
        for other in [
            "",
            "virtseal:",
            "virtseal:ROT13:x",
            "kek",
            "virtseal:AES-GCM:not-a-uuid:all:h",
        ] {
            assert_eq!(read_label(other.as_bytes()), None);
        }
        assert_eq!(read_label(b"virtseal:\xff"), None);
    }

    #[test]
    fn names_have_one_spelling() {
        let name = "00ff00ff00ff00ff00ff00ff00ff00ff";
        assert!(parse(&KekId(name.to_owned())).is_some());
        for bad in [
            name.to_uppercase(),
            format!("{name}00"),
            String::new(),
            "../../etc".to_owned(),
        ] {
            assert_eq!(parse(&KekId(bad)), None);
        }
    }
}

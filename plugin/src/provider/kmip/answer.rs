//! What servers answer, in all the shapes that they choose for it.

use std::collections::BTreeSet;

use super::call::Attribute;
use super::message::ProtocolError;
use super::tag::{ALGORITHM_AES, KeyState, OBJECT_TYPE_SYMMETRIC_KEY, Operation, Tag, USAGE_MASK};
use super::ttlv::{Item, Value};
use super::version::KmipVersion;
use crate::crypto::aead;
use crate::model::envelope::{KekId, Payload};
use crate::provider::toolbox::gcm;
use crate::provider::toolbox::kek_name::{KekGeneration, generation};
use crate::secret::SecretBytes;

/// The most characters of a server's name for a key: it must fit an envelope several times.
const MAX_UID: usize = 512;

/// The key that Create made.
pub(super) fn created(payload: &Item) -> Result<KekId, ProtocolError> {
    let uid = payload.find(Tag::UNIQUE_IDENTIFIER).and_then(Item::as_text);
    uid.and_then(kek_id)
        .ok_or(ProtocolError::Missing("usable identifier of the new key"))
}

/// The keys that Locate found.
pub(super) fn located(payload: &Item) -> Vec<KekId> {
    let uids = payload.all(Tag::UNIQUE_IDENTIFIER).filter_map(Item::as_text);
    uids.filter_map(kek_id).collect()
}

/// Makes sure that an answer is about `kek`, where it says so: a server that mixes answers up must not have a data key
/// wrapped under a KEK that its stanza does not name.
pub(super) fn check_subject(payload: &Item, kek: &KekId) -> Result<(), ProtocolError> {
    match payload.find(Tag::UNIQUE_IDENTIFIER).and_then(Item::as_text) {
        Some(uid) if !uid.eq_ignore_ascii_case(&kek.0) => Err(ProtocolError::AnotherKey),
        _ => Ok(()),
    }
}

fn kek_id(uid: &str) -> Option<KekId> {
    is_identifier(uid).then(|| KekId(uid.to_owned()))
}

/// Whether a key at a server may be called that.
pub(super) fn is_identifier(uid: &str) -> bool {
    !uid.is_empty() && uid.len() <= MAX_UID && !uid.contains(char::is_control)
}

/// The state of a key, as GetAttributes tells it.
pub(super) fn state(payload: &Item) -> Result<KeyState, ProtocolError> {
    let state = Attribute::STATE.of(payload).and_then(Item::as_enumeration);
    state.map(KeyState::of).ok_or(ProtocolError::Missing("State"))
}

/// A key that a server has found, before it is used for the first time: a filter may have been ignored, and a list may be
/// somebody else's.
pub(super) struct FoundKey {
    pub(super) generation: KekGeneration,
    pub(super) name: String,
    pub(super) state: KeyState,
    /// Whether it is a symmetric AES key of 256 bits that encrypts and decrypts.
    pub(super) fits: bool,
}

impl FoundKey {
    pub(super) fn may_serve(&self) -> bool {
        self.fits && matches!(self.state, KeyState::Active | KeyState::PreActive)
    }
}

/// The attributes of `kek`, of which the server must say all that any server has; `None` if no name of it begins with `stem`.
pub(super) fn found(payload: &Item, kek: &KekId, stem: &str) -> Result<Option<FoundKey>, ProtocolError> {
    match payload.find(Tag::UNIQUE_IDENTIFIER).and_then(Item::as_text) {
        Some(uid) if uid.eq_ignore_ascii_case(&kek.0) => {}
        _ => return Err(ProtocolError::AnotherKey),
    }
    let number = |attribute: Attribute| attribute.of(payload).and_then(Item::as_enumeration);
    let integer = |attribute: Attribute| attribute.of(payload).and_then(Item::as_integer);
    let algorithm = number(Attribute::CRYPTOGRAPHIC_ALGORITHM);
    let length = integer(Attribute::CRYPTOGRAPHIC_LENGTH);
    let mask = integer(Attribute::CRYPTOGRAPHIC_USAGE_MASK);
    let state = state(payload)?;
    let fits = algorithm.ok_or(ProtocolError::Missing("Cryptographic Algorithm"))? == ALGORITHM_AES
        && length.ok_or(ProtocolError::Missing("Cryptographic Length"))? == 256
        && mask.is_none_or(|mask| mask & USAGE_MASK == USAGE_MASK)
        && is_or_unsaid(number(Attribute::OBJECT_TYPE), OBJECT_TYPE_SYMMETRIC_KEY);
    let found = |name: &str| {
        Some(FoundKey {
            generation: generation(stem, name)?,
            name: name.to_owned(),
            state,
            fits,
        })
    };
    Ok(names(payload).into_iter().find_map(found))
}

pub(super) fn names<'m>(payload: &'m Item) -> Vec<&'m str> {
    let names = Attribute::NAME.all_of(payload).into_iter();
    names
        .filter_map(|name| name.find(Tag::NAME_VALUE)?.as_text())
        .collect()
}

fn is_or_unsaid<T: PartialEq>(said: Option<T>, wanted: T) -> bool {
    said.is_none_or(|said| said == wanted)
}

/// The 32 bytes of a key that Get returned: raw, or as a transparent symmetric key.
pub(super) fn key(payload: &Item) -> Result<SecretBytes, KeyRefused> {
    let block = payload
        .find(Tag::SYMMETRIC_KEY)
        .and_then(|key| key.find(Tag::KEY_BLOCK))
        .ok_or(KeyRefused::Shape)?;
    let value = block.find(Tag::KEY_VALUE).ok_or(KeyRefused::Shape)?;
    if block.find(Tag::KEY_WRAPPING_DATA).is_some() || matches!(value.value, Value::Bytes(_)) {
        return Err(KeyRefused::Wrapped);
    }
    let algorithm = block
        .find(Tag::CRYPTOGRAPHIC_ALGORITHM)
        .and_then(Item::as_enumeration);
    if !is_or_unsaid(algorithm, ALGORITHM_AES) {
        return Err(KeyRefused::NotAes256);
    }
    let material = value.find(Tag::KEY_MATERIAL).ok_or(KeyRefused::Shape)?;
    let transparent = || material.find(Tag::KEY).and_then(Item::as_bytes);
    let bytes = material
        .as_bytes()
        .or_else(transparent)
        .ok_or(KeyRefused::Shape)?;
    if bytes.len() != aead::KEY {
        return Err(KeyRefused::NotAes256);
    }
    SecretBytes::copy_of(bytes).map_err(KeyRefused::Memory)
}

/// Why what Get returned is no KEK.
#[derive(Debug)]
pub(super) enum KeyRefused {
    Shape,
    Wrapped,
    NotAes256,
    Memory(std::io::Error),
}

/// The operations that Query lists; numbers that this client has no name for are left out.
pub(super) fn operations(payload: &Item) -> BTreeSet<u32> {
    payload
        .all(Tag::OPERATION)
        .filter_map(Item::as_enumeration)
        .collect()
}

/// Whether a server with `operations` can wrap by itself.
pub(super) fn can_encrypt(operations: &BTreeSet<u32>) -> bool {
    [Operation::Encrypt, Operation::Decrypt]
        .iter()
        .all(|operation| operations.contains(&(*operation as u32)))
}

/// The best version that both sides speak.
pub(super) fn best_version(payload: &Item) -> Option<KmipVersion> {
    let offered: Vec<_> = payload
        .all(Tag::PROTOCOL_VERSION)
        .filter_map(KmipVersion::of_item)
        .collect();
    KmipVersion::SPOKEN
        .into_iter()
        .find(|version| offered.contains(version))
}

/// What Encrypt returned, laid out as a stanza's body.
///
/// Some servers put the tag in its own field, others behind the ciphertext.
pub(super) fn body(payload: &Item, nonce: &[u8]) -> Result<Vec<u8>, ProtocolError> {
    let bytes = |tag| payload.find(tag).and_then(Item::as_bytes);
    let data = bytes(Tag::DATA).ok_or(ProtocolError::Missing("ciphertext"))?;
    let nonce = bytes(Tag::IV_COUNTER_NONCE).unwrap_or(nonce);
    let tag = bytes(Tag::AUTHENTICATED_ENCRYPTION_TAG).unwrap_or_default();
    let body = [nonce, data, tag].concat();
    match gcm::parts(&body) {
        Ok(_) if nonce.len() == aead::NONCE => Ok(body),
        _ => Err(ProtocolError::Missing("AES-GCM ciphertext with a 16-byte tag")),
    }
}

/// What Decrypt returned.
pub(super) fn decrypted(payload: &Item) -> Result<SecretBytes, ProtocolError> {
    let data = payload.find(Tag::DATA).and_then(Item::as_bytes);
    let data = data.filter(|data| data.len() == Payload::LEN);
    data.and_then(|data| SecretBytes::copy_of(data).ok())
        .ok_or(ProtocolError::Missing("wrapped key of the right length"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(items: impl Into<Vec<Item<'static>>>) -> Item<'static> {
        Item::structure(Tag::RESPONSE_PAYLOAD, items)
    }

    fn got(block: impl Into<Vec<Item<'static>>>) -> Item<'static> {
        response([Item::structure(
            Tag::SYMMETRIC_KEY,
            [Item::structure(Tag::KEY_BLOCK, block)],
        )])
    }

    fn material(item: Item<'static>) -> Item<'static> {
        Item::structure(Tag::KEY_VALUE, [item])
    }

    #[test]
    fn answers_about_another_key_are_refused() {
        let kek = KekId("Abc-7".to_owned());
        let about = |uid: &'static str| response([Item::text(Tag::UNIQUE_IDENTIFIER, uid)]);
        for good in [about("Abc-7"), about("ABC-7"), response([])] {
            check_subject(&good, &kek).unwrap();
        }
        assert!(check_subject(&about("Abc-8"), &kek).is_err());
    }

    #[test]
    fn keys_come_raw_or_transparent() {
        let raw = got([material(Item::bytes(Tag::KEY_MATERIAL, vec![7; 32]))]);
        assert_eq!(key(&raw).unwrap().expose(), [7; 32]);
        let inner = Item::structure(Tag::KEY_MATERIAL, [Item::bytes(Tag::KEY, vec![8; 32])]);
        assert_eq!(key(&got([material(inner)])).unwrap().expose(), [8; 32]);
    }

    #[test]
    fn wrapped_short_and_odd_keys_are_refused() {
        let wrapped = got([Item::bytes(Tag::KEY_VALUE, vec![7; 40])]);
        assert!(matches!(key(&wrapped), Err(KeyRefused::Wrapped)));
        let wrapped = got([
            material(Item::bytes(Tag::KEY_MATERIAL, vec![7; 40])),
            Item::structure(Tag::KEY_WRAPPING_DATA, []),
        ]);
        assert!(matches!(key(&wrapped), Err(KeyRefused::Wrapped)));
        for length in [0, 16, 24, 31, 33] {
            let short = got([material(Item::bytes(Tag::KEY_MATERIAL, vec![7; length]))]);
            assert!(matches!(key(&short), Err(KeyRefused::NotAes256)), "{length}");
        }
        let camellia = got([
            material(Item::bytes(Tag::KEY_MATERIAL, vec![7; 32])),
            Item::enumeration(Tag::CRYPTOGRAPHIC_ALGORITHM, 0xf),
        ]);
        assert!(matches!(key(&camellia), Err(KeyRefused::NotAes256)));
        assert!(matches!(key(&got([])), Err(KeyRefused::Shape)));
        assert!(matches!(key(&response([])), Err(KeyRefused::Shape)));
    }

    #[test]
    fn attributes_are_read_in_both_forms() {
        let of_2x = response([Item::structure(
            Tag::ATTRIBUTES,
            [
                Item::enumeration(Tag::STATE, 2),
                Item::integer(Tag::CRYPTOGRAPHIC_LENGTH, 256),
            ],
        )]);
        let pair = |name: &'static str, value| {
            Item::structure(Tag::ATTRIBUTE, [Item::text(Tag::ATTRIBUTE_NAME, name), value])
        };
        let of_1x = response([
            pair("Cryptographic Length", Item::integer(Tag::ATTRIBUTE_VALUE, 256)),
            pair("State", Item::enumeration(Tag::ATTRIBUTE_VALUE, 2)),
        ]);
        for payload in [of_1x, of_2x] {
            assert_eq!(state(&payload).unwrap(), KeyState::Active);
            let length = Attribute::CRYPTOGRAPHIC_LENGTH.of(&payload);
            assert_eq!(length.and_then(Item::as_integer), Some(256));
        }
        assert!(state(&response([])).is_err());
    }

    #[test]
    fn a_found_key_is_compared_with_what_was_looked_for() {
        let kek = KekId("7".into());
        let key = |uid: &'static str, changed: Option<(Tag, u32)>| {
            let number = |tag: Tag, number: u32| match changed {
                Some((other, changed)) if other == tag => changed,
                _ => number,
            };
            let integer = |tag, value| {
                let value = i32::try_from(number(tag, value)).unwrap();
                Item::integer(tag, value)
            };
            let name = [
                Item::text(Tag::NAME_VALUE, "n"),
                Item::enumeration(Tag::NAME_TYPE, 1),
            ];
            let attributes = [
                Item::enumeration(Tag::STATE, 2),
                Item::enumeration(
                    Tag::CRYPTOGRAPHIC_ALGORITHM,
                    number(Tag::CRYPTOGRAPHIC_ALGORITHM, 3),
                ),
                integer(Tag::CRYPTOGRAPHIC_LENGTH, 256),
                integer(Tag::CRYPTOGRAPHIC_USAGE_MASK, 0xc),
                Item::enumeration(Tag::OBJECT_TYPE, number(Tag::OBJECT_TYPE, 2)),
                Item::structure(Tag::NAME, name),
            ];
            response([
                Item::text(Tag::UNIQUE_IDENTIFIER, uid),
                Item::structure(Tag::ATTRIBUTES, attributes),
            ])
        };
        let look = |payload: &Item| found(payload, &kek, "n");
        let good = look(&key("7", None)).unwrap().unwrap();
        assert!(good.fits && good.name == "n" && good.state == KeyState::Active);
        assert!(found(&key("7", None), &kek, "another").unwrap().is_none());
        for change in [
            (Tag::CRYPTOGRAPHIC_ALGORITHM, 2),
            (Tag::CRYPTOGRAPHIC_LENGTH, 128),
            (Tag::CRYPTOGRAPHIC_USAGE_MASK, 4),
            (Tag::OBJECT_TYPE, 7),
        ] {
            let other = look(&key("7", Some(change))).unwrap().unwrap();
            assert!(!other.fits, "{change:?}");
        }
        assert!(look(&key("8", None)).is_err());
        assert!(look(&response([Item::text(Tag::UNIQUE_IDENTIFIER, "7")])).is_err());
    }

    #[test]
    fn tag_is_found_behind_the_ciphertext_or_beside_it() {
        let whole: Vec<u8> = (0..80).collect();
        let beside = response([
            Item::bytes(Tag::DATA, whole[..64].to_vec()),
            Item::bytes(Tag::AUTHENTICATED_ENCRYPTION_TAG, whole[64..].to_vec()),
        ]);
        let behind = response([
            Item::bytes(Tag::DATA, whole.clone()),
            Item::bytes(Tag::IV_COUNTER_NONCE, vec![9; 12]),
        ]);
        assert_eq!(body(&beside, &[9; 12]).unwrap(), body(&behind, &[1; 12]).unwrap());
        let none = response([Item::bytes(Tag::DATA, whole[..64].to_vec())]);
        assert!(body(&none, &[9; 12]).is_err());
        let shifted = response([
            Item::bytes(Tag::DATA, whole[..76].to_vec()),
            Item::bytes(Tag::IV_COUNTER_NONCE, vec![9; 16]),
        ]);
        assert!(body(&shifted, &[9; 12]).is_err());
    }

    #[test]
    fn best_common_version_is_chosen() {
        let offer = |versions: &[&str]| {
            let version = |text: &&str| text.parse::<KmipVersion>().unwrap().item();
            best_version(&response(versions.iter().map(version).collect::<Vec<_>>()))
        };
        assert_eq!(offer(&["1.1", "1.4", "1.2"]).unwrap().to_string(), "1.4");
        assert_eq!(offer(&["2.0", "1.4"]).unwrap().to_string(), "2.0");
        assert_eq!(offer(&[]), None);
    }

    #[test]
    fn identifiers_of_keys_are_bounded() {
        let uid = |text: String| response([Item::text(Tag::UNIQUE_IDENTIFIER, text)]);
        assert_eq!(created(&uid("a-1".into())).unwrap().0, "a-1");
        for bad in [String::new(), "a\nb".into(), "x".repeat(MAX_UID + 1)] {
            assert!(created(&uid(bad.clone())).is_err());
            assert!(located(&uid(bad)).is_empty());
        }
    }
}

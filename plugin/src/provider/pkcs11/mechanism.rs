//! How a payload is wrapped by a KEK in a token: what a token must offer for it, and the body of a stanza.
//!
//! | mechanism | body |
//! | --- | --- |
//! | `AES-GCM` | nonce (12 bytes) ‖ ciphertext (64) ‖ tag (16); provider and KEK are additional data |
//! | `AES-KW`, `AES-KW-PAD` | what `C_WrapKey` makes of a session object of 16 random bytes ‖ payload (64) |
//! | `AES-CBC-PAD+HMAC-SHA256` | IV (16) ‖ ciphertext (80) ‖ HMAC (32) of provider, KEK, IV and ciphertext, by a second key in the token |
//!
//! The order is the order of preference. The random bytes hide that two stanzas hold the same payload. A KEK serves
//! one mechanism only: its attributes allow nothing else.

use std::fmt;

use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::{Mechanism as Pkcs11Mechanism, MechanismInfo, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::types::Ulong;
use thiserror::Error;

use super::error::TokenError;
use super::kek::Kek;
use super::settings::KeyBits;
use super::token::Token;
use crate::model::envelope::Payload;
use crate::secret::SecretBytes;

const GCM_NONCE: usize = 12;
const GCM_TAG: usize = 16;
const KW_SALT: usize = 16;
const CBC_IV: usize = 16;
const CBC_BLOCK: usize = 16;
const HMAC: usize = 32;
/// No body is longer; what is, never reaches the token.
const MAX_BODY: usize = 256;

/// A way to wrap, in the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mechanism {
    Gcm,
    KeyWrap,
    KeyWrapPad,
    CbcHmac,
}

/// What a mechanism of the token must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Encrypt,
    Wrap,
    Sign,
    Generate,
}

impl Mechanism {
    /// All, best first.
    pub(super) const ALL: [Self; 4] = [Self::Gcm, Self::KeyWrap, Self::KeyWrapPad, Self::CbcHmac];

    /// The name in a stanza.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Gcm => "AES-GCM",
            Self::KeyWrap => "AES-KW",
            Self::KeyWrapPad => "AES-KW-PAD",
            Self::CbcHmac => "AES-CBC-PAD+HMAC-SHA256",
        }
    }

    pub(super) fn parse(name: &str) -> Result<Self, TokenError> {
        let found = Self::ALL.into_iter().find(|mechanism| mechanism.as_str() == name);
        found.ok_or_else(|| TokenError::UnknownMechanism(name.to_owned()))
    }

    /// Whether KEKs for it wrap session objects; else they encrypt.
    pub(super) fn wraps_objects(self) -> bool {
        matches!(self, Self::KeyWrap | Self::KeyWrapPad)
    }

    fn needs(self) -> &'static [(MechanismType, Use)] {
        match self {
            Self::Gcm => &[(MechanismType::AES_GCM, Use::Encrypt)],
            Self::KeyWrap => &[(MechanismType::AES_KEY_WRAP, Use::Wrap)],
            Self::KeyWrapPad => &[(MechanismType::AES_KEY_WRAP_PAD, Use::Wrap)],
            Self::CbcHmac => &[
                (MechanismType::AES_CBC_PAD, Use::Encrypt),
                (MechanismType::SHA256_HMAC, Use::Sign),
                (MechanismType::GENERIC_SECRET_KEY_GEN, Use::Generate),
            ],
        }
    }

    /// What a token that offers all of `offers` can do, best first.
    ///
    /// # Errors
    /// What it lacks, when it can do nothing.
    pub(super) fn choose(offers: &[Offered], bits: KeyBits) -> Result<Vec<Self>, Missing> {
        let lacks = |need: &(MechanismType, Use)| !offers.iter().any(|offered| offered.serves(*need, bits));
        let generate = (MechanismType::AES_KEY_GEN, Use::Generate);
        let possible: Vec<_> = Self::ALL
            .into_iter()
            .filter(|mechanism| !mechanism.needs().iter().any(&lacks))
            .collect();
        if !possible.is_empty() && !lacks(&generate) {
            return Ok(possible);
        }
        let name = |need: &(MechanismType, Use)| need.0.to_string();
        let lacking = |mechanism: Self| {
            let needs = mechanism.needs().iter().filter(|need| lacks(need));
            needs.map(name).collect::<Vec<_>>().join(" and ")
        };
        let alternatives = match possible.is_empty() {
            true => Self::ALL.into_iter().map(lacking).collect(),
            false => Vec::new(),
        };
        Err(Missing {
            bits: bits.into(),
            key_generation: lacks(&generate),
            alternatives,
        })
    }
}

/// A mechanism that a token offers.
#[derive(Clone, Debug)]
pub(super) struct Offered {
    mechanism: MechanismType,
    uses: Vec<Use>,
    /// Smallest and largest key, in bytes or in bits: tokens differ.
    sizes: (usize, usize),
}

impl Offered {
    pub(super) fn new(mechanism: MechanismType, info: &MechanismInfo) -> Self {
        let uses = [
            (Use::Encrypt, info.encrypt() && info.decrypt()),
            (Use::Wrap, info.wrap() && info.unwrap()),
            (Use::Sign, info.sign() && info.verify()),
            (Use::Generate, info.generate()),
        ];
        Self {
            mechanism,
            uses: uses
                .into_iter()
                .filter(|(_, can)| *can)
                .map(|(one, _)| one)
                .collect(),
            sizes: (info.min_key_size(), info.max_key_size()),
        }
    }

    fn serves(&self, (mechanism, purpose): (MechanismType, Use), bits: KeyBits) -> bool {
        self.mechanism == mechanism && self.uses.contains(&purpose) && self.takes(mechanism, bits)
    }

    fn takes(&self, mechanism: MechanismType, bits: KeyBits) -> bool {
        let generic = [MechanismType::SHA256_HMAC, MechanismType::GENERIC_SECRET_KEY_GEN];
        let bytes = if generic.contains(&mechanism) {
            HMAC
        } else {
            bits.bytes()
        };
        let (least, most) = self.sizes;
        let within = |size| least <= size && size <= most;
        // Tokens that do not care say 0.
        most == 0 || within(bytes) || within(8 * bytes)
    }
}

/// What a token would have to offer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) struct Missing {
    bits: u32,
    key_generation: bool,
    /// Any of these would do; empty when something is there.
    alternatives: Vec<String>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the token can't protect keys with AES-{}: it lacks ",
            self.bits
        )?;
        if self.key_generation {
            f.write_str("CKM_AES_KEY_GEN")?;
        }
        if self.key_generation && !self.alternatives.is_empty() {
            f.write_str(", and ")?;
        }
        f.write_str(&self.alternatives.join(", or else "))
    }
}

/// Wraps `payload` under `kek`; `context` is what the body is bound to.
pub(super) fn wrap(token: &Token, kek: &Kek, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, TokenError> {
    match kek.mechanism {
        Mechanism::Gcm => gcm_wrap(token, kek, context, payload),
        Mechanism::KeyWrap => object_wrap(token, kek, &Pkcs11Mechanism::AesKeyWrap, payload),
        Mechanism::KeyWrapPad => object_wrap(token, kek, &Pkcs11Mechanism::AesKeyWrapPad, payload),
        Mechanism::CbcHmac => cbc_wrap(token, kek, context, payload),
    }
}

/// The payload in `body`.
///
/// # Errors
/// [`TokenError::Tampered`] when `body` is not what [`wrap`] made with this KEK and this context.
pub(super) fn unwrap(
    token: &Token,
    kek: &Kek,
    context: &[u8],
    body: &[u8],
) -> Result<SecretBytes, TokenError> {
    if body.len() > MAX_BODY {
        return Err(TokenError::Tampered);
    }
    let opened = unwrap_once(token, kek, context, body);
    match opened {
        // Tokens call a bad tag anything up to this, and say the same when they are about to go.
        Err(TokenError::Call(Error::Pkcs11(RvError::GeneralError | RvError::FunctionFailed, _)))
            if still_opens(token, kek, context) =>
        {
            Err(TokenError::Tampered)
        }
        opened => opened,
    }
}

/// Whether the KEK wraps and unwraps at this moment: then it was the body that did not open.
fn still_opens(token: &Token, kek: &Kek, context: &[u8]) -> bool {
    let Ok(sample) = SecretBytes::random(Payload::LEN) else {
        return false;
    };
    let opened =
        wrap(token, kek, context, sample.expose()).and_then(|body| unwrap_once(token, kek, context, &body));
    opened.is_ok_and(|opened| openssl::memcmp::eq(sample.expose(), opened.expose()))
}

fn unwrap_once(token: &Token, kek: &Kek, context: &[u8], body: &[u8]) -> Result<SecretBytes, TokenError> {
    match kek.mechanism {
        Mechanism::Gcm => gcm_unwrap(token, kek, context, body),
        Mechanism::KeyWrap => object_unwrap(token, kek, &Pkcs11Mechanism::AesKeyWrap, body),
        Mechanism::KeyWrapPad => object_unwrap(token, kek, &Pkcs11Mechanism::AesKeyWrapPad, body),
        Mechanism::CbcHmac => cbc_unwrap(token, kek, context, body),
    }
}

fn gcm_wrap(token: &Token, kek: &Kek, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, TokenError> {
    let mut nonce = [0; GCM_NONCE];
    openssl::rand::rand_bytes(&mut nonce).map_err(|error| TokenError::Memory(error.into()))?;
    let sealed = token
        .session
        .encrypt(&gcm(&mut nonce, context)?, kek.key, payload)?;
    if sealed.len() != payload.len() + GCM_TAG {
        return Err(TokenError::Tampered);
    }
    // Read after the call: some tokens choose the nonce, and write it there.
    Ok([&nonce[..], &sealed].concat())
}

fn gcm_unwrap(token: &Token, kek: &Kek, context: &[u8], body: &[u8]) -> Result<SecretBytes, TokenError> {
    if body.len() != GCM_NONCE + Payload::LEN + GCM_TAG {
        return Err(TokenError::Tampered);
    }
    let mut nonce = [0; GCM_NONCE];
    nonce.copy_from_slice(&body[..GCM_NONCE]);
    let opened = token
        .session
        .decrypt(&gcm(&mut nonce, context)?, kek.key, &body[GCM_NONCE..])?;
    secret(opened, 0)
}

fn gcm<'a>(nonce: &'a mut [u8], context: &'a [u8]) -> Result<Pkcs11Mechanism<'a>, TokenError> {
    let tag_bits = Ulong::try_from(8 * GCM_TAG)?;
    Ok(Pkcs11Mechanism::AesGcm(GcmParams::new(nonce, context, tag_bits)?))
}

fn object_wrap(
    token: &Token,
    kek: &Kek,
    mechanism: &Pkcs11Mechanism<'_>,
    payload: &[u8],
) -> Result<Vec<u8>, TokenError> {
    let mut salted = SecretBytes::random(KW_SALT + payload.len()).map_err(TokenError::Memory)?;
    salted.expose_mut()[KW_SALT..].copy_from_slice(payload);
    let mut template = session_object();
    template.push(Attribute::Value(salted.expose().to_vec()));
    let object = token.session.create_object(&template)?;
    let wrapped = token.session.wrap_key(mechanism, kek.key, object);
    token.session.destroy_object(object)?;
    Ok(wrapped?)
}

fn object_unwrap(
    token: &Token,
    kek: &Kek,
    mechanism: &Pkcs11Mechanism<'_>,
    body: &[u8],
) -> Result<SecretBytes, TokenError> {
    if body.len() < KW_SALT + Payload::LEN || !body.len().is_multiple_of(8) {
        return Err(TokenError::Tampered);
    }
    let object = token
        .session
        .unwrap_key(mechanism, kek.key, body, &session_object())?;
    let value = value(token, object);
    // Also when the value can't be read: session objects live as long as the session, which is long.
    token.session.destroy_object(object)?;
    secret(value?, KW_SALT)
}

/// A payload while it passes through the token: readable, and gone with the session.
fn session_object() -> Vec<Attribute> {
    vec![
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::Sensitive(false),
        Attribute::Extractable(true),
    ]
}

fn value(token: &Token, object: ObjectHandle) -> Result<Vec<u8>, TokenError> {
    let read = token.session.get_attributes(object, &[AttributeType::Value])?;
    match read.into_iter().next() {
        Some(Attribute::Value(value)) => Ok(value),
        _ => Err(TokenError::NoValue),
    }
}

fn cbc_wrap(token: &Token, kek: &Kek, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, TokenError> {
    let mut iv = [0; CBC_IV];
    openssl::rand::rand_bytes(&mut iv).map_err(|error| TokenError::Memory(error.into()))?;
    let sealed = token
        .session
        .encrypt(&Pkcs11Mechanism::AesCbcPad(iv), kek.key, payload)?;
    let mut body = [&iv[..], &sealed].concat();
    let mac = token.session.sign(
        &Pkcs11Mechanism::Sha256Hmac,
        kek.mac()?,
        &[context, &body].concat(),
    )?;
    body.extend_from_slice(&mac);
    Ok(body)
}

/// Decrypts nothing that the token has not authenticated.
fn cbc_unwrap(token: &Token, kek: &Kek, context: &[u8], body: &[u8]) -> Result<SecretBytes, TokenError> {
    if body.len() != CBC_IV + Payload::LEN + CBC_BLOCK + HMAC {
        return Err(TokenError::Tampered);
    }
    let (sealed, mac) = body.split_at(body.len() - HMAC);
    token.session.verify(
        &Pkcs11Mechanism::Sha256Hmac,
        kek.mac()?,
        &[context, sealed].concat(),
        mac,
    )?;
    let (iv, ciphertext) = sealed.split_at(CBC_IV);
    let iv = iv.try_into().expect("it was split off at that length");
    let opened = token
        .session
        .decrypt(&Pkcs11Mechanism::AesCbcPad(iv), kek.key, ciphertext)?;
    secret(opened, 0)
}

/// The payload behind `skip` bytes of what a token returned.
fn secret(mut opened: Vec<u8>, skip: usize) -> Result<SecretBytes, TokenError> {
    if opened.len() != skip + Payload::LEN {
        return Err(TokenError::Tampered);
    }
    SecretBytes::take(&mut opened[skip..]).map_err(TokenError::Memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(mechanism: MechanismType, uses: &[Use], sizes: (usize, usize)) -> Offered {
        Offered {
            mechanism,
            uses: uses.to_vec(),
            sizes,
        }
    }

    fn key_generation() -> Offered {
        offered(MechanismType::AES_KEY_GEN, &[Use::Generate], (16, 32))
    }

    fn everything() -> Vec<Offered> {
        vec![
            offered(MechanismType::SHA256_HMAC, &[Use::Sign], (32, 512)),
            offered(MechanismType::AES_CBC_PAD, &[Use::Encrypt], (16, 32)),
            offered(
                MechanismType::GENERIC_SECRET_KEY_GEN,
                &[Use::Generate],
                (1, 1 << 31),
            ),
            offered(MechanismType::AES_KEY_WRAP_PAD, &[Use::Wrap], (0, 0)),
            offered(MechanismType::AES_KEY_WRAP, &[Use::Wrap], (128, 256)),
            offered(MechanismType::AES_GCM, &[Use::Encrypt], (16, 32)),
            key_generation(),
        ]
    }

    fn choose(offers: &[Offered]) -> Result<Vec<Mechanism>, String> {
        Mechanism::choose(offers, KeyBits::Aes256).map_err(|missing| missing.to_string())
    }

    #[test]
    fn best_comes_first_whatever_the_token_lists_first() {
        let mut offers = everything();
        assert_eq!(choose(&offers).unwrap(), Mechanism::ALL);
        offers.remove(5);
        assert_eq!(choose(&offers).unwrap()[0], Mechanism::KeyWrap);
        offers.drain(3..5);
        assert_eq!(choose(&offers).unwrap(), [Mechanism::CbcHmac]);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            choose(&[]).unwrap_err(),
            "the token can't protect keys with AES-256: it lacks CKM_AES_KEY_GEN, and CKM_AES_GCM, or else \
             CKM_AES_KEY_WRAP, or else CKM_AES_KEY_WRAP_PAD, or else CKM_AES_CBC_PAD and CKM_SHA256_HMAC and \
             CKM_GENERIC_SECRET_KEY_GEN"
        );
        let mut offers = everything();
        offers.pop();
        assert_eq!(
            choose(&offers).unwrap_err(),
            "the token can't protect keys with AES-256: it lacks CKM_AES_KEY_GEN"
        );
        // As TPMs do: a MAC, and no way to make the key for it.
        let tpm = [
            key_generation(),
            offered(MechanismType::AES_CBC_PAD, &[Use::Encrypt], (16, 32)),
            offered(MechanismType::SHA256_HMAC, &[Use::Sign], (32, 32)),
        ];
        assert!(
            choose(&tpm)
                .unwrap_err()
                .ends_with("or else CKM_GENERIC_SECRET_KEY_GEN")
        );
    }

    #[test]
    fn a_mechanism_that_only_wraps_or_takes_short_keys_does_not_count() {
        let offers = [
            key_generation(),
            offered(MechanismType::AES_GCM, &[Use::Wrap], (16, 32)),
            offered(MechanismType::AES_KEY_WRAP, &[Use::Wrap], (16, 16)),
        ];
        assert!(choose(&offers).is_err());
        assert_eq!(
            Mechanism::choose(&offers, KeyBits::Aes128).unwrap(),
            [Mechanism::KeyWrap]
        );
    }

    #[test]
    fn names_are_read_back() {
        for mechanism in Mechanism::ALL {
            assert_eq!(Mechanism::parse(mechanism.as_str()).unwrap(), mechanism);
        }
        assert!(matches!(
            Mechanism::parse("ROT13"),
            Err(TokenError::UnknownMechanism(_))
        ));
    }
}

//! The body of a stanza: how a payload is wrapped by a KEK in a token.
//!
//! | mechanism | body |
//! | --- | --- |
//! | `AES-GCM` | nonce (12 bytes) ‖ ciphertext (64) ‖ tag (16); provider and KEK are additional data |
//! | `AES-KW`, `AES-KW-PAD` | what `C_WrapKey` makes of a session object of 16 random bytes ‖ payload (64) |
//! | `AES-CBC-PAD+HMAC-SHA256` | IV (16) ‖ ciphertext (80) ‖ HMAC (32) of provider, KEK, IV and ciphertext, by a second key in the token |
//!
//! The order is the order of preference. The random bytes hide that two stanzas hold the same payload. A KEK serves
//! one mechanism only: its attributes allow nothing else.

use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism as Pkcs11Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass};
use cryptoki::session::Session;
use cryptoki::types::Ulong;

use super::error::TokenError;
use super::mechanism::Mechanism;
use super::token::Kek;
use crate::model::envelope::Payload;
use crate::provider::ProviderError;
use crate::secret::SecretBytes;

const GCM_NONCE: usize = 12;
const GCM_TAG: usize = 16;
const KW_SALT: usize = 16;
const CBC_IV: usize = 16;
const CBC_BLOCK: usize = 16;
const HMAC: usize = 32;
/// No body is longer; what is, never reaches the token.
const MAX_BODY: usize = 256;

/// A KEK at work.
pub(super) struct Wrapping<'a> {
    pub(super) session: &'a Session,
    pub(super) kek: &'a Kek,
    /// What each body is bound to.
    pub(super) context: &'a [u8],
}

impl Wrapping<'_> {
    pub(super) fn wrap(&self, payload: &[u8]) -> Result<Vec<u8>, TokenError> {
        match self.kek.mechanism {
            Mechanism::Gcm => self.gcm_wrap(payload),
            Mechanism::KeyWrap => self.object_wrap(&Pkcs11Mechanism::AesKeyWrap, payload),
            Mechanism::KeyWrapPad => self.object_wrap(&Pkcs11Mechanism::AesKeyWrapPad, payload),
            Mechanism::CbcHmac => self.cbc_wrap(payload),
        }
    }

    /// The payload in `body`.
    ///
    /// # Errors
    /// [`ProviderError::Tampered`] when `body` is not what [`Self::wrap`] made with this KEK and this context.
    pub(super) fn unwrap(&self, body: &[u8]) -> Result<SecretBytes, TokenError> {
        if body.len() > MAX_BODY {
            return Err(tampered());
        }
        match self.unwrap_once(body) {
            // Tokens call a bad tag anything up to this, and say the same when they are about to go. If the KEK wraps and
            // unwraps at this moment, it was the body that did not open.
            Err(TokenError::Call(Error::Pkcs11(RvError::GeneralError | RvError::FunctionFailed, _)))
                if self.try_out().is_ok() =>
            {
                Err(tampered())
            }
            opened => opened,
        }
    }

    /// Wraps and unwraps a sample.
    pub(super) fn try_out(&self) -> Result<(), TokenError> {
        let sample = SecretBytes::random(Payload::LEN).map_err(TokenError::Memory)?;
        let opened = self.unwrap_once(&self.wrap(sample.expose())?)?;
        match openssl::memcmp::eq(sample.expose(), opened.expose()) {
            true => Ok(()),
            false => Err(tampered()),
        }
    }

    fn unwrap_once(&self, body: &[u8]) -> Result<SecretBytes, TokenError> {
        match self.kek.mechanism {
            Mechanism::Gcm => self.gcm_unwrap(body),
            Mechanism::KeyWrap => self.object_unwrap(&Pkcs11Mechanism::AesKeyWrap, body),
            Mechanism::KeyWrapPad => self.object_unwrap(&Pkcs11Mechanism::AesKeyWrapPad, body),
            Mechanism::CbcHmac => self.cbc_unwrap(body),
        }
    }

    fn gcm_wrap(&self, payload: &[u8]) -> Result<Vec<u8>, TokenError> {
        let mut nonce = random::<GCM_NONCE>()?;
        let gcm = gcm(&mut nonce, self.context)?;
        let ciphertext = self.session.encrypt(&gcm, self.kek.key, payload)?;
        if ciphertext.len() != payload.len() + GCM_TAG {
            return Err(tampered());
        }
        // Read after the call: some tokens choose the nonce, and write it there.
        Ok([&nonce[..], &ciphertext].concat())
    }

    fn gcm_unwrap(&self, body: &[u8]) -> Result<SecretBytes, TokenError> {
        let (nonce, ciphertext) = body.split_first_chunk::<GCM_NONCE>().ok_or_else(tampered)?;
        if ciphertext.len() != Payload::LEN + GCM_TAG {
            return Err(tampered());
        }
        let mut nonce = *nonce;
        let gcm = gcm(&mut nonce, self.context)?;
        secret(self.session.decrypt(&gcm, self.kek.key, ciphertext)?, 0)
    }

    fn object_wrap(&self, mechanism: &Pkcs11Mechanism<'_>, payload: &[u8]) -> Result<Vec<u8>, TokenError> {
        let mut salted = SecretBytes::random(KW_SALT + payload.len()).map_err(TokenError::Memory)?;
        salted.expose_mut()[KW_SALT..].copy_from_slice(payload);
        let mut template = session_object();
        template.push(Attribute::Value(salted.expose().to_vec()));
        let object = self.session.create_object(&template)?;
        let wrapped = self.session.wrap_key(mechanism, self.kek.key, object);
        self.session.destroy_object(object)?;
        Ok(wrapped?)
    }

    fn object_unwrap(&self, mechanism: &Pkcs11Mechanism<'_>, body: &[u8]) -> Result<SecretBytes, TokenError> {
        if body.len() < KW_SALT + Payload::LEN || !body.len().is_multiple_of(8) {
            return Err(tampered());
        }
        let object = self
            .session
            .unwrap_key(mechanism, self.kek.key, body, &session_object())?;
        let read = self.session.get_attributes(object, &[AttributeType::Value]);
        // Also when the value can't be read: session objects live as long as the session, which is long.
        self.session.destroy_object(object)?;
        match read?.pop() {
            Some(Attribute::Value(value)) => secret(value, KW_SALT),
            _ => Err(TokenError::NoValue),
        }
    }

    fn cbc_wrap(&self, payload: &[u8]) -> Result<Vec<u8>, TokenError> {
        let iv = random::<CBC_IV>()?;
        let cbc = Pkcs11Mechanism::AesCbcPad(iv);
        let ciphertext = self.session.encrypt(&cbc, self.kek.key, payload)?;
        let mut body = [&iv[..], &ciphertext].concat();
        let text = [self.context, &body].concat();
        let mac = self
            .session
            .sign(&Pkcs11Mechanism::Sha256Hmac, self.kek.mac()?, &text)?;
        body.extend_from_slice(&mac);
        Ok(body)
    }

    /// Decrypts nothing that the token has not authenticated.
    fn cbc_unwrap(&self, body: &[u8]) -> Result<SecretBytes, TokenError> {
        if body.len() != CBC_IV + Payload::LEN + CBC_BLOCK + HMAC {
            return Err(tampered());
        }
        let (encrypted, mac) = body.split_at(body.len() - HMAC);
        let text = [self.context, encrypted].concat();
        self.session
            .verify(&Pkcs11Mechanism::Sha256Hmac, self.kek.mac()?, &text, mac)?;
        let (iv, ciphertext) = encrypted.split_first_chunk().ok_or_else(tampered)?;
        let cbc = Pkcs11Mechanism::AesCbcPad(*iv);
        secret(self.session.decrypt(&cbc, self.kek.key, ciphertext)?, 0)
    }
}

fn gcm<'a>(nonce: &'a mut [u8], context: &'a [u8]) -> Result<Pkcs11Mechanism<'a>, TokenError> {
    let tag_bits = Ulong::try_from(8 * GCM_TAG)?;
    Ok(Pkcs11Mechanism::AesGcm(GcmParams::new(nonce, context, tag_bits)?))
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

pub(super) fn random<const LEN: usize>() -> Result<[u8; LEN], TokenError> {
    let mut bytes = [0; LEN];
    openssl::rand::rand_bytes(&mut bytes).map_err(|error| TokenError::Memory(error.into()))?;
    Ok(bytes)
}

fn tampered() -> TokenError {
    ProviderError::Tampered.into()
}

/// The payload behind `skip` bytes of what a token returned.
fn secret(mut opened: Vec<u8>, skip: usize) -> Result<SecretBytes, TokenError> {
    if opened.len() != skip + Payload::LEN {
        return Err(tampered());
    }
    SecretBytes::take(&mut opened[skip..]).map_err(TokenError::Memory)
}

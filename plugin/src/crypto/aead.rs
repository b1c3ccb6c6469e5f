//! AES-256-GCM (NIST SP 800-38D) under a 32-byte key, with a random nonce.
//!
//! A body is nonce (12 bytes) ‖ ciphertext ‖ tag (16).

use openssl::cipher::Cipher;
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;
use thiserror::Error;

use crate::secret::SecretBytes;

/// Length of a key in bytes.
pub(crate) const KEY: usize = 32;
pub(crate) const NONCE: usize = 12;
pub(crate) const TAG: usize = 16;

/// Not what was encrypted under this key with this additional data.
#[derive(Debug, Error)]
#[error("it is damaged, or was encrypted under another key")]
pub(crate) struct NotAuthentic;

/// A body split into its parts.
pub(crate) struct Parts<'a> {
    pub(crate) nonce: &'a [u8],
    pub(crate) ciphertext: &'a [u8],
    pub(crate) tag: &'a [u8],
}

impl<'a> Parts<'a> {
    /// # Errors
    /// When `body` is shorter than nonce and tag.
    pub(crate) fn of(body: &'a [u8]) -> Result<Self, NotAuthentic> {
        let (nonce, rest) = body.split_at_checked(NONCE).ok_or(NotAuthentic)?;
        let length = rest.len().checked_sub(TAG).ok_or(NotAuthentic)?;
        let (ciphertext, tag) = rest.split_at(length);
        Ok(Self {
            nonce,
            ciphertext,
            tag,
        })
    }
}

/// The body of `text`. `key` has [`KEY`] bytes.
pub(crate) fn encrypt(key: &SecretBytes, additional_data: &[u8], text: &[u8]) -> Result<Vec<u8>, ErrorStack> {
    let mut body = vec![0; NONCE + text.len() + TAG];
    let (nonce, rest) = body.split_at_mut(NONCE);
    let (ciphertext, tag) = rest.split_at_mut(text.len());
    openssl::rand::rand_bytes(nonce)?;
    let mut cipher = CipherCtx::new()?;
    cipher.encrypt_init(Some(Cipher::aes_256_gcm()), Some(key.expose()), Some(nonce))?;
    cipher.cipher_update(additional_data, None)?;
    cipher.cipher_update(text, Some(ciphertext))?;
    cipher.cipher_final(&mut [0; 16])?;
    cipher.tag(tag)?;
    Ok(body)
}

/// Fills `text`, which is as long as the ciphertext of `body`. It counts for nothing unless this returns `Ok`.
pub(crate) fn decrypt(
    key: &SecretBytes,
    additional_data: &[u8],
    body: &[u8],
    text: &mut [u8],
) -> Result<(), NotAuthentic> {
    let parts = Parts::of(body)?;
    if parts.ciphertext.len() != text.len() {
        return Err(NotAuthentic);
    }
    let mut open = || -> Result<(), ErrorStack> {
        let mut cipher = CipherCtx::new()?;
        cipher.decrypt_init(Some(Cipher::aes_256_gcm()), Some(key.expose()), Some(parts.nonce))?;
        cipher.cipher_update(additional_data, None)?;
        cipher.cipher_update(parts.ciphertext, Some(text))?;
        cipher.set_tag(parts.tag)?;
        cipher.cipher_final(&mut [0; 16])?;
        Ok(())
    };
    open().map_err(|_| NotAuthentic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_under_its_key_and_data_only_and_whole() {
        let (key, other) = (
            SecretBytes::random(KEY).unwrap(),
            SecretBytes::random(KEY).unwrap(),
        );
        let body = encrypt(&key, b"data", b"text").unwrap();
        let opens = |key: &SecretBytes, data: &[u8], body: &[u8]| {
            let mut text = [0; 4];
            decrypt(key, data, body, &mut text).is_ok() && text == *b"text"
        };
        assert!(opens(&key, b"data", &body));
        assert!(!opens(&other, b"data", &body) && !opens(&key, b"date", &body));
        for bit in 0..body.len() * 8 {
            let mut flipped = body.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!opens(&key, b"data", &flipped), "bit {bit}");
        }
        for length in 0..body.len() {
            assert!(!opens(&key, b"data", &body[..length]), "{length} bytes");
        }
        assert!(decrypt(&key, b"data", &body, &mut [0; 5]).is_err());
    }
}

//! Authenticating and opening an encrypted state: HMAC-SHA256 first, then AES-256-CBC, both under the one key.
//!
//! No byte is decrypted before the HMAC has been found right.

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::memcmp;
use openssl::pkey::PKey;
use openssl::sign::Signer;
use openssl::symm::{Cipher, Crypter, Mode};
use thiserror::Error;
use zeroize::Zeroizing;

use crate::StateKey;
use crate::format::{CIPHER_BLOCK_BYTES, HMAC_BYTES, IV_RECORD_BYTES};

/// A well-formed encrypted state. Its contents are unknown until it is authenticated.
pub struct EncryptedState {
    ciphertext: Vec<u8>,
    hmac: [u8; HMAC_BYTES],
    iv: [u8; IV_RECORD_BYTES],
}

/// Why an encrypted state was not opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The HMAC does not fit. Nothing in the format tells a wrong key from a changed file.
    #[error("the TPM state does not fit this key: the key is another one's, or the file was changed")]
    NotAuthentic,
    /// The HMAC fits and the plaintext's padding is wrong: whoever held the key wrote no proper state.
    #[error("the TPM state is authentic, but its writer padded it wrongly")]
    BadPadding,
    /// libcrypto failed, which says nothing about state or key.
    #[error("libcrypto failed on a TPM state")]
    Crypto(#[source] ErrorStack),
}

impl EncryptedState {
    pub(crate) fn new(ciphertext: &[u8], hmac: [u8; HMAC_BYTES], iv: [u8; IV_RECORD_BYTES]) -> Self {
        Self {
            ciphertext: ciphertext.to_vec(),
            hmac,
            iv,
        }
    }

    /// Checks that `key` wrote exactly these bytes. Decrypts nothing.
    ///
    /// The file's header is not covered by the HMAC, and an older state under the same key passes.
    ///
    /// # Errors
    ///
    /// [`OpenError::NotAuthentic`] for a wrong key or a changed file, [`OpenError::Crypto`] when libcrypto fails.
    pub fn authenticate(&self, key: &StateKey) -> Result<(), OpenError> {
        let computed = self.compute_hmac(key).map_err(OpenError::Crypto)?;
        if memcmp::eq(&computed, &self.hmac) {
            Ok(())
        } else {
            Err(OpenError::NotAuthentic)
        }
    }

    /// Authenticates and decrypts the state: libtpms' own serialized form, which holds the TPM's seeds and NV indices.
    ///
    /// # Errors
    ///
    /// Those of [`authenticate`](Self::authenticate), and [`OpenError::BadPadding`].
    pub fn open(&self, key: &StateKey) -> Result<Zeroizing<Vec<u8>>, OpenError> {
        self.authenticate(key)?;
        let mut decryption = self.decryption(key).map_err(OpenError::Crypto)?;
        let mut plaintext = Zeroizing::new(vec![0; self.ciphertext.len() + CIPHER_BLOCK_BYTES]);
        let written = decryption
            .update(&self.ciphertext, &mut plaintext)
            .map_err(OpenError::Crypto)?;
        let rest = decryption
            .finalize(&mut plaintext[written..])
            .map_err(|_| OpenError::BadPadding)?;
        plaintext.truncate(written + rest);
        Ok(plaintext)
    }

    fn compute_hmac(&self, key: &StateKey) -> Result<[u8; HMAC_BYTES], ErrorStack> {
        let key = PKey::hmac(key.expose())?;
        let mut signer = Signer::new(MessageDigest::sha256(), &key)?;
        signer.update(&self.ciphertext)?;
        signer.update(&self.iv)?;
        let mut computed = [0; HMAC_BYTES];
        signer.sign(&mut computed)?;
        Ok(computed)
    }

    fn decryption(&self, key: &StateKey) -> Result<Crypter, ErrorStack> {
        let iv = &self.iv[..CIPHER_BLOCK_BYTES];
        Crypter::new(Cipher::aes_256_cbc(), Mode::Decrypt, key.expose(), Some(iv))
    }
}

impl std::fmt::Debug for EncryptedState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EncryptedState")
            .field("ciphertext_bytes", &self.ciphertext.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openssl::symm;
    use proptest::prelude::*;

    fn key() -> StateKey {
        StateKey::derive(b"a passphrase").unwrap()
    }

    fn authentic(ciphertext: &[u8]) -> EncryptedState {
        let mut state = EncryptedState::new(ciphertext, [0; HMAC_BYTES], [7; IV_RECORD_BYTES]);
        state.hmac = state.compute_hmac(&key()).unwrap();
        state
    }

    fn sealed(plaintext: &[u8]) -> EncryptedState {
        let iv = [7; CIPHER_BLOCK_BYTES];
        authentic(&symm::encrypt(Cipher::aes_256_cbc(), key().expose(), Some(&iv), plaintext).unwrap())
    }

    #[test]
    fn authentic_bytes_that_are_no_state_are_told_apart() {
        let state = authentic(&[0; 32]);
        state.authenticate(&key()).unwrap();
        assert!(matches!(state.open(&key()), Err(OpenError::BadPadding)));
    }

    #[test]
    fn the_unused_half_of_the_iv_is_authenticated_too() {
        let mut state = sealed(b"TPM state");
        state.iv[IV_RECORD_BYTES - 1] ^= 1;
        assert!(matches!(state.open(&key()), Err(OpenError::NotAuthentic)));
    }

    #[test]
    fn debug_shows_sizes_only() {
        assert_eq!(
            format!("{:?}", sealed(b"TPM state")),
            "EncryptedState { ciphertext_bytes: 16, .. }"
        );
    }

    proptest! {
        #[test]
        fn what_was_sealed_is_what_opens(plaintext in proptest::collection::vec(any::<u8>(), 0..200)) {
            let state = sealed(&plaintext);
            prop_assert_eq!(&*state.open(&key()).unwrap(), &plaintext);
            let other = StateKey::derive(b"another passphrase").unwrap();
            prop_assert!(matches!(state.open(&other), Err(OpenError::NotAuthentic)));
        }
    }
}

//! The key of a state file, derived from its passphrase as swtpm derives it.

use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkcs5::pbkdf2_hmac;
use thiserror::Error;
use zeroize::Zeroizing;

pub(crate) const KEY_BYTES: usize = 32;

const SALT: &[u8] = b"swtpm";
const ITERATIONS: usize = 1000;

/// A 256-bit key that encrypts and authenticates state files. It is zeroized when dropped and never printed.
///
/// Boxed, so that moving it leaves no copies on the stack.
pub struct StateKey(Box<Zeroizing<[u8; KEY_BYTES]>>);

/// Why a passphrase gave no key.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KeyError {
    /// swtpm takes no empty passphrase either.
    #[error("the passphrase of a TPM state is empty")]
    EmptyPassphrase,
    /// libcrypto refused the derivation, as in a FIPS mode that allows no short salts.
    #[error("libcrypto can't derive the key of a TPM state")]
    Crypto(#[source] ErrorStack),
}

impl StateKey {
    /// Derives the key from the bytes that swtpm gets through `--key pwdfd=…` or `pwdfile=…`.
    ///
    /// PBKDF2-HMAC-SHA512 with the salt `swtpm` and 1000 iterations, swtpm's default `kdf=pbkdf2`. The salt is
    /// fixed and the count low, so the passphrase itself must carry the strength: use 256 random bits, for instance
    /// as 64 hex digits. Every byte counts, also a newline at the end.
    ///
    /// # Errors
    ///
    /// [`KeyError::EmptyPassphrase`], or [`KeyError::Crypto`] when libcrypto refuses.
    pub fn derive(passphrase: &[u8]) -> Result<Self, KeyError> {
        if passphrase.is_empty() {
            return Err(KeyError::EmptyPassphrase);
        }
        let mut key = Box::new(Zeroizing::new([0; KEY_BYTES]));
        pbkdf2_hmac(
            passphrase,
            SALT,
            ITERATIONS,
            MessageDigest::sha512(),
            key.as_mut_slice(),
        )
        .map_err(KeyError::Crypto)?;
        Ok(Self(key))
    }

    pub(crate) fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }
}

impl std::fmt::Debug for StateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StateKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn derives_the_key_that_swtpm_derives() {
        // Python: hashlib.pbkdf2_hmac("sha512", b"0123456789abcdef" * 4, b"swtpm", 1000, 32)
        let expected = [
            0x5b, 0x77, 0x1a, 0xa5, 0x82, 0x8c, 0x12, 0x59, 0x90, 0x33, 0x00, 0xcc, 0x9a, 0xe9, 0xfb, 0xfc,
            0x28, 0x62, 0xf7, 0xc1, 0x50, 0x9e, 0x54, 0x8d, 0xca, 0x16, 0x87, 0xfb, 0xd6, 0x25, 0x83, 0x80,
        ];
        assert_eq!(
            StateKey::derive(&b"0123456789abcdef".repeat(4)).unwrap().expose(),
            &expected
        );
    }

    #[test]
    fn refuses_an_empty_passphrase() {
        assert!(matches!(StateKey::derive(b""), Err(KeyError::EmptyPassphrase)));
    }

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(
            format!("{:?}", StateKey::derive(b"passphrase").unwrap()),
            "StateKey(redacted)"
        );
    }
}

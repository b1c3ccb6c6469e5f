//! The key of a state file, derived from its passphrase as swtpm derives it.

use openssl::sha::Sha512;
use thiserror::Error;
use zeroize::{Zeroize, Zeroizing};

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
    /// [`KeyError::EmptyPassphrase`].
    pub fn derive(passphrase: &[u8]) -> Result<Self, KeyError> {
        if passphrase.is_empty() {
            return Err(KeyError::EmptyPassphrase);
        }
        let mut key = Box::new(Zeroizing::new([0; KEY_BYTES]));
        pbkdf2(passphrase, key.as_mut_slice());
        scrub_stack();
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

const BLOCK_BYTES: usize = 128;
const DIGEST_BYTES: usize = 64;

/// HMAC-SHA512 (RFC 2104) that starts from the two states in which a key leaves the hash.
///
/// The EVP interface allocates and copies a context for each of the 2000 digests: twice the time of the digests.
struct Hmac {
    inner: Sha512,
    outer: Sha512,
}

impl Hmac {
    fn new(key: &[u8]) -> Self {
        let mut block = Zeroizing::new([0; BLOCK_BYTES]);
        if key.len() > BLOCK_BYTES {
            let mut hash = Sha512::new();
            hash.update(key);
            block[..DIGEST_BYTES].copy_from_slice(&hash.finish());
        } else {
            block[..key.len()].copy_from_slice(key);
        }
        let mut state_after = |pad: u8, before: u8| {
            block.iter_mut().for_each(|byte| *byte ^= before ^ pad);
            let mut hash = Sha512::new();
            hash.update(block.as_slice());
            hash
        };
        let inner = state_after(0x36, 0);
        let outer = state_after(0x5c, 0x36);
        Self { inner, outer }
    }

    fn of(&self, message: &[u8]) -> [u8; DIGEST_BYTES] {
        let (mut inner, mut outer) = (self.inner.clone(), self.outer.clone());
        inner.update(message);
        outer.update(&inner.finish());
        outer.finish()
    }
}

/// The first block of PBKDF2 (RFC 8018, section 5.2), cut to the length of `key`.
#[inline(never)]
fn pbkdf2(passphrase: &[u8], key: &mut [u8]) {
    let hmac = Hmac::new(passphrase);
    let mut block = Zeroizing::new(hmac.of(&[SALT, &1_u32.to_be_bytes()].concat()));
    let mut sum = block.clone();
    for _ in 1..ITERATIONS {
        *block = hmac.of(block.as_slice());
        sum.iter_mut()
            .zip(block.iter())
            .for_each(|(sum, byte)| *sum ^= byte);
    }
    key.copy_from_slice(&sum[..key.len()]);
}

/// Overwrites the part of the stack where hash states of the key were.
#[inline(never)]
fn scrub_stack() {
    let mut deeper = [0_u8; 8 * 1024];
    deeper.zeroize();
    std::hint::black_box(&deeper);
}

#[cfg(test)]
mod tests {
    use openssl::hash::MessageDigest;
    use proptest::prelude::*;

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

    proptest! {
        #[test]
        fn derives_what_libcrypto_derives(passphrase in prop::collection::vec(any::<u8>(), 1..300)) {
            let mut expected = [0; KEY_BYTES];
            let sha512 = MessageDigest::sha512();
            openssl::pkcs5::pbkdf2_hmac(&passphrase, SALT, ITERATIONS, sha512, &mut expected).unwrap();
            let key = StateKey::derive(&passphrase).unwrap();
            prop_assert_eq!(key.expose(), &expected);
        }
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

//! The volume key of a LUKS1 header: made, and found again by its passphrase.

use openssl::hash::MessageDigest;
use openssl::pkcs5::pbkdf2_hmac;
use uuid::Uuid;

use super::{DIGEST_LEN, Header, KEYSLOTS, Keyslot, SALT_LEN, VOLUME_KEY_LEN, first_sector_of, keymaterial};
use crate::object::disk::VolumeError;
use crate::secret::{Passphrase, SecretBytes};

/// QEMU's floor. The passphrase has 256 random bits: more rounds add time and no strength.
const ITERATIONS: u32 = 1000;
/// The most rounds that opening asks for, of one derivation and of all those of a header: keys of ours have 1000. A header
/// that others wrote costs a start no more than a fraction of a second.
pub(crate) const MAX_ITERATIONS_OPENED: u32 = 100_000;
const MAX_ITERATIONS_OPENED_TOGETHER: u64 = 400_000;

impl Header {
    /// A new volume key under `passphrase`: aes-256-xts-plain64, SHA-256, 1000 rounds, keyslot 0. With the key material of that
    /// keyslot.
    pub(crate) fn create(passphrase: &Passphrase) -> Result<(Self, Vec<u8>, SecretBytes), VolumeError> {
        let key = SecretBytes::random(VOLUME_KEY_LEN).map_err(VolumeError::Memory)?;
        let mut header = Self {
            payload_sector: first_sector_of(KEYSLOTS as u32),
            key_len: VOLUME_KEY_LEN,
            key_digest: [0; DIGEST_LEN],
            key_digest_salt: random_salt()?,
            key_digest_iterations: ITERATIONS,
            uuid: Uuid::new_v4(),
            keyslots: std::array::from_fn(|number| Keyslot {
                active: false,
                iterations: 0,
                salt: [0; SALT_LEN],
                first_sector: first_sector_of(number as u32),
            }),
        };
        header.key_digest = header.digest_of(&key)?;
        header.keyslots[0].active = true;
        header.keyslots[0].iterations = ITERATIONS;
        header.keyslots[0].salt = random_salt()?;
        let slot_key = header.slot_key(&header.keyslots[0], passphrase)?;
        let material = keymaterial::split(&key, &slot_key)?;
        Ok((header, material, key))
    }

    /// The volume key, from the first active keyslot that `passphrase` opens; `None` if there is none. `read`
    /// fills a buffer with the bytes at an offset from the header.
    ///
    /// # Errors
    /// Those of `read`, and when OpenSSL fails or there is no memory for keys.
    pub(crate) fn unlock(
        &self,
        passphrase: &Passphrase,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), VolumeError>,
    ) -> Result<Option<SecretBytes>, VolumeError> {
        let mut material = vec![0; keymaterial::len(self.key_len)];
        for (number, keyslot) in self.keyslots.iter().enumerate().filter(|(_, k)| k.active) {
            read(self.material(number).start, &mut material)?;
            let slot_key = self.slot_key(keyslot, passphrase)?;
            let key = keymaterial::merge(&material, &slot_key)?;
            if openssl::memcmp::eq(&self.digest_of(&key)?, &self.key_digest) {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Whether looking for the right keyslot takes bounded work.
    pub(crate) fn is_cheap_to_open(&self) -> bool {
        let active = || self.keyslots.iter().filter(|keyslot| keyslot.active);
        let digest = self.key_digest_iterations;
        let total: u64 = active()
            .map(|keyslot| u64::from(keyslot.iterations) + u64::from(digest))
            .sum();
        digest <= MAX_ITERATIONS_OPENED
            && active().all(|keyslot| keyslot.iterations <= MAX_ITERATIONS_OPENED)
            && total <= MAX_ITERATIONS_OPENED_TOGETHER
    }

    fn slot_key(&self, keyslot: &Keyslot, passphrase: &Passphrase) -> Result<SecretBytes, VolumeError> {
        let mut key = SecretBytes::zeroed(self.key_len).map_err(VolumeError::Memory)?;
        derive(
            passphrase.expose(),
            &keyslot.salt,
            keyslot.iterations,
            key.expose_mut(),
        )?;
        Ok(key)
    }

    fn digest_of(&self, key: &SecretBytes) -> Result<[u8; DIGEST_LEN], VolumeError> {
        let mut digest = [0; DIGEST_LEN];
        derive(
            key.expose(),
            &self.key_digest_salt,
            self.key_digest_iterations,
            &mut digest,
        )?;
        Ok(digest)
    }
}

fn random_salt() -> Result<[u8; SALT_LEN], VolumeError> {
    let mut salt = [0; SALT_LEN];
    openssl::rand::rand_bytes(&mut salt)?;
    Ok(salt)
}

fn derive(secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) -> Result<(), VolumeError> {
    pbkdf2_hmac(secret, salt, iterations as usize, MessageDigest::sha256(), out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Dek;

    fn reader<'a>(
        header: &Header,
        material: &'a [u8],
    ) -> impl FnMut(u64, &mut [u8]) -> Result<(), VolumeError> + 'a {
        let start = header.material(0).start;
        move |offset, out| {
            assert_eq!(offset, start);
            out.copy_from_slice(material);
            Ok(())
        }
    }

    #[test]
    fn opens_with_its_passphrase_and_no_other() {
        let passphrase = Dek::random().unwrap().passphrase().unwrap();
        let other = Dek::random().unwrap().passphrase().unwrap();
        let (header, material, key) = Header::create(&passphrase).unwrap();
        let opened = header
            .unlock(&passphrase, reader(&header, &material))
            .unwrap()
            .unwrap();
        assert_eq!(opened.expose(), key.expose());
        assert!(
            header
                .unlock(&other, reader(&header, &material))
                .unwrap()
                .is_none()
        );
    }
}

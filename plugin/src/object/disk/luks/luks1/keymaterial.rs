//! The anti-forensic split of a volume key (LUKS On-Disk Format 1.2.3, section 2.4), encrypted sector by sector.
//!
//! A split key is 4000 stripes as long as the key; losing any one loses the key. It is made and merged one sector
//! at a time, so that no more than 512 bytes of it are ever in the clear, and those in secret memory.

use openssl::sha::Sha256;

use super::super::sector::{SECTOR, SectorCipher};
use crate::object::disk::VolumeError;
use crate::secret::SecretBytes;

/// The number of stripes; QEMU takes no other.
pub(super) const STRIPES: u32 = 4000;

/// The length of the key material of a key of `key_len` bytes: whole sectors for the two lengths allowed.
pub(super) fn len(key_len: usize) -> usize {
    key_len * STRIPES as usize
}

/// Splits `key` and encrypts the stripes under `slot_key`.
pub(super) fn split(key: &SecretBytes, slot_key: &SecretBytes) -> Result<Vec<u8>, VolumeError> {
    let key_len = key.expose().len();
    let mut material = vec![0; len(key_len)];
    let mut cipher = SectorCipher::encryptor(slot_key.expose())?;
    let mut mixer = Mixer::new(key_len)?;
    let mut clear = SecretBytes::zeroed(SECTOR).map_err(VolumeError::Memory)?;
    let last = material.len() / SECTOR - 1;
    for (number, encrypted) in material.chunks_exact_mut(SECTOR).enumerate() {
        openssl::rand::rand_priv_bytes(clear.expose_mut())?;
        let random = if number == last { SECTOR - key_len } else { SECTOR };
        let (stripes, closing) = clear.expose_mut().split_at_mut(random);
        mixer.absorb(stripes);
        if number == last {
            mixer.mask(key.expose(), closing);
        }
        cipher.apply(number as u64, clear.expose(), encrypted)?;
    }
    Ok(material)
}

/// Decrypts `material` under `slot_key` and merges its stripes. A wrong key gives other bytes, not an error.
pub(super) fn merge(material: &[u8], slot_key: &SecretBytes) -> Result<SecretBytes, VolumeError> {
    let key_len = material.len() / STRIPES as usize;
    let mut cipher = SectorCipher::decryptor(slot_key.expose())?;
    let mut mixer = Mixer::new(key_len)?;
    let mut clear = SecretBytes::zeroed(SECTOR).map_err(VolumeError::Memory)?;
    let mut key = SecretBytes::zeroed(key_len).map_err(VolumeError::Memory)?;
    let last = material.len() / SECTOR - 1;
    for (number, encrypted) in material.chunks_exact(SECTOR).enumerate() {
        cipher.apply(number as u64, encrypted, clear.expose_mut())?;
        let random = if number == last { SECTOR - key_len } else { SECTOR };
        let (stripes, closing) = clear.expose().split_at(random);
        mixer.absorb(stripes);
        if number == last {
            mixer.mask(closing, key.expose_mut());
        }
    }
    Ok(key)
}

/// What the stripes so far add up to.
struct Mixer {
    sum: SecretBytes,
}

impl Mixer {
    fn new(key_len: usize) -> Result<Self, VolumeError> {
        Ok(Self {
            sum: SecretBytes::zeroed(key_len).map_err(VolumeError::Memory)?,
        })
    }

    fn absorb(&mut self, stripes: &[u8]) {
        for stripe in stripes.chunks_exact(self.sum.expose().len()) {
            for (sum, byte) in self.sum.expose_mut().iter_mut().zip(stripe) {
                *sum ^= byte;
            }
            self.diffuse();
        }
    }

    /// Each 32-byte block becomes SHA-256(be32(its number) ‖ block). Both key lengths are whole blocks. It is done 8000 times for
    /// each key, and through EVP most of the time would go into its contexts.
    fn diffuse(&mut self) {
        for (number, block) in (0_u32..).zip(self.sum.expose_mut().chunks_exact_mut(32)) {
            let mut digest = Sha256::new();
            digest.update(&number.to_be_bytes());
            digest.update(block);
            block.copy_from_slice(&digest.finish());
        }
    }

    fn mask(&self, input: &[u8], output: &mut [u8]) {
        for ((output, input), sum) in output.iter_mut().zip(input).zip(self.sum.expose()) {
            *output = input ^ sum;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_with_its_slot_key_only_and_needs_every_sector() {
        for key_len in [32, 64] {
            let key = SecretBytes::random(key_len).unwrap();
            let slot_key = SecretBytes::random(key_len).unwrap();
            let other = SecretBytes::random(key_len).unwrap();
            let mut material = split(&key, &slot_key).unwrap();
            assert_eq!(merge(&material, &slot_key).unwrap().expose(), key.expose());
            assert_ne!(merge(&material, &other).unwrap().expose(), key.expose());
            material[100_000] ^= 1;
            assert_ne!(merge(&material, &slot_key).unwrap().expose(), key.expose());
        }
    }
}

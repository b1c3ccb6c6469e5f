//! AES-XTS over 512-byte sectors with the sector's number as the IV (`plain64`).

use openssl::cipher::{Cipher, CipherRef};
use openssl::cipher_ctx::CipherCtx;
use openssl::error::ErrorStack;

pub(crate) const SECTOR: usize = 512;

#[derive(Clone, Copy)]
enum Direction {
    Encrypt,
    Decrypt,
}

/// One key, set once; only the IV changes from sector to sector.
pub(crate) struct SectorCipher {
    context: CipherCtx,
    direction: Direction,
}

impl SectorCipher {
    /// Encrypts with a key of 32 (AES-128) or 64 (AES-256) bytes.
    pub(crate) fn encryptor(key: &[u8]) -> Result<Self, ErrorStack> {
        let mut context = CipherCtx::new()?;
        context.encrypt_init(Some(cipher_for(key)), Some(key), Some(&[0; 16]))?;
        Ok(Self {
            context,
            direction: Direction::Encrypt,
        })
    }

    /// Decrypts with a key of 32 (AES-128) or 64 (AES-256) bytes.
    pub(crate) fn decryptor(key: &[u8]) -> Result<Self, ErrorStack> {
        let mut context = CipherCtx::new()?;
        context.decrypt_init(Some(cipher_for(key)), Some(key), Some(&[0; 16]))?;
        Ok(Self {
            context,
            direction: Direction::Decrypt,
        })
    }

    /// Turns the whole sectors of `input` into `output`; the first of them has the number `first`.
    pub(crate) fn apply(&mut self, first: u64, input: &[u8], output: &mut [u8]) -> Result<(), ErrorStack> {
        debug_assert!(input.len() == output.len() && input.len().is_multiple_of(SECTOR));
        let sectors = input.chunks_exact(SECTOR).zip(output.chunks_exact_mut(SECTOR));
        for (number, (input, output)) in (first..).zip(sectors) {
            self.set_iv(number)?;
            self.context.cipher_update(input, Some(output))?;
        }
        Ok(())
    }

    fn set_iv(&mut self, sector: u64) -> Result<(), ErrorStack> {
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&sector.to_le_bytes());
        match self.direction {
            Direction::Encrypt => self.context.encrypt_init(None, None, Some(&iv)),
            Direction::Decrypt => self.context.decrypt_init(None, None, Some(&iv)),
        }
    }
}

fn cipher_for(key: &[u8]) -> &'static CipherRef {
    if key.len() == 32 {
        Cipher::aes_128_xts()
    } else {
        Cipher::aes_256_xts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_sector_has_its_own_iv_and_comes_back() {
        let key: Vec<u8> = (0..64).collect();
        let plain = vec![7; 4 * SECTOR];
        let mut sealed = vec![0; plain.len()];
        SectorCipher::encryptor(&key)
            .unwrap()
            .apply(5, &plain, &mut sealed)
            .unwrap();
        assert_ne!(sealed[..SECTOR], sealed[SECTOR..2 * SECTOR]);

        let mut opened = vec![0; SECTOR];
        SectorCipher::decryptor(&key)
            .unwrap()
            .apply(7, &sealed[2 * SECTOR..3 * SECTOR], &mut opened)
            .unwrap();
        assert_eq!(opened, plain[..SECTOR]);
    }
}

//! The only home of plaintext keys.
//!
//! Every DEK, KEK, root key and passphrase lives in [`SecretBytes`] or a newtype over it: its own pages from
//! `memfd_secret(2)`, which neither another process, a core dump nor `O_DIRECT` can read, or locked anonymous
//! pages that core dumps leave out where the kernel has no such call. The bytes are zeroed before the pages go
//! back, and so is every block of the ordinary heap, for what libraries copy. Nothing here is `Clone`,
//! `Serialize` or `PartialEq`, and `Debug` shows the length only.

pub(crate) mod heap;
pub(crate) mod pages;

use std::fmt;
use std::io;

use zeroize::{Zeroize, Zeroizing};

use pages::Pages;

/// A fixed number of secret bytes in memory that does not leave the process.
pub(crate) struct SecretBytes {
    pages: Pages,
    len: usize,
}

impl SecretBytes {
    /// `len` zero bytes, at least one page of secret memory.
    ///
    /// # Errors
    /// The kernel's, when memory can't be mapped or locked (`RLIMIT_MEMLOCK`).
    pub(crate) fn zeroed(len: usize) -> io::Result<Self> {
        Ok(Self {
            pages: Pages::zeroed(len)?,
            len,
        })
    }

    /// `len` bytes from the system's random generator (OpenSSL's, seeded by the kernel).
    pub(crate) fn random(len: usize) -> io::Result<Self> {
        let mut secret = Self::zeroed(len)?;
        openssl::rand::rand_priv_bytes(secret.expose_mut()).map_err(io::Error::other)?;
        Ok(secret)
    }

    pub(crate) fn copy_of(bytes: &[u8]) -> io::Result<Self> {
        let mut secret = Self::zeroed(bytes.len())?;
        secret.expose_mut().copy_from_slice(bytes);
        Ok(secret)
    }

    /// Moves the bytes of `source` here; `source` is zeroed.
    pub(crate) fn take(source: &mut [u8]) -> io::Result<Self> {
        let secret = Self::copy_of(source)?;
        source.zeroize();
        Ok(secret)
    }

    /// Reads `source` (a pipe, a file, a descriptor) to its end, `limit` bytes at the most, without the bytes
    /// ever touching ordinary memory.
    ///
    /// # Errors
    /// `InvalidData` when there are more than `limit` bytes, else what `source` says.
    pub(crate) fn read_from(mut source: impl io::Read, limit: usize) -> io::Result<Self> {
        let mut secret = Self::zeroed(limit + 1)?;
        let mut filled = 0;
        while filled <= limit {
            match source.read(&mut secret.expose_mut()[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if filled > limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("more than {limit} bytes where a secret was expected"),
            ));
        }
        secret.len = filled;
        Ok(secret)
    }

    /// Forgets one trailing newline, which editors and `echo` add to passphrase files.
    pub(crate) fn trim_newline(&mut self) {
        for end in [b'\n', b'\r'] {
            if self.expose().last() == Some(&end) {
                self.len -= 1;
            }
        }
    }

    /// The bytes. For the edge of a cipher, an FFI call or a pipe; never to keep a copy.
    pub(crate) fn expose(&self) -> &[u8] {
        &self.pages.bytes()[..self.len]
    }

    /// The bytes, to be filled in place.
    pub(crate) fn expose_mut(&mut self) -> &mut [u8] {
        &mut self.pages.bytes_mut()[..self.len]
    }
}

impl fmt::Debug for SecretBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretBytes([redacted]; {})", self.len)
    }
}

/// A data key: 32 random bytes, one per sealed object.
#[derive(Debug)]
pub(crate) struct Dek(SecretBytes);

impl Dek {
    /// Length in bytes.
    pub(crate) const LEN: usize = 32;

    /// A new data key.
    pub(crate) fn random() -> io::Result<Self> {
        SecretBytes::random(Self::LEN).map(Self)
    }

    /// The key whose 32 bytes these are.
    ///
    /// # Errors
    /// `InvalidData` for any other length.
    pub(crate) fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        if bytes.len() != Self::LEN {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a DEK has 32 bytes"));
        }
        SecretBytes::copy_of(bytes).map(Self)
    }

    /// The raw 32 bytes: wrapped by a provider, never given to QEMU.
    pub(crate) fn expose(&self) -> &[u8] {
        self.0.expose()
    }

    /// What QEMU, swtpm and cryptsetup get: the key's lowercase hex.
    pub(crate) fn passphrase(&self) -> io::Result<Passphrase> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut hex = SecretBytes::zeroed(2 * Self::LEN)?;
        for (pair, byte) in hex.expose_mut().chunks_exact_mut(2).zip(self.expose()) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        Ok(Passphrase(hex))
    }
}

/// The 64 ASCII characters of a [`Dek`] in lowercase hex.
#[derive(Debug)]
pub(crate) struct Passphrase(SecretBytes);

impl Passphrase {
    /// The 64 bytes, for a cipher, an FFI call or a pipe.
    pub(crate) fn expose(&self) -> &[u8] {
        self.0.expose()
    }
}

/// Heap bytes that are zeroed when dropped, for values that are secret only for a moment.
pub(crate) type Transient = Zeroizing<Vec<u8>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passphrase_is_lowercase_hex_of_the_key() {
        let bytes: Vec<u8> = (0..32).map(|n| n * 8).collect();
        let dek = Dek::from_bytes(&bytes).unwrap();
        assert_eq!(dek.passphrase().unwrap().expose(), hex::encode(&bytes).as_bytes());
    }

    #[test]
    fn debug_shows_no_bytes() {
        let shown = format!(
            "{:?} {:?}",
            Dek::from_bytes(&[0x41; 32]).unwrap(),
            SecretBytes::random(9).unwrap()
        );
        assert_eq!(
            shown,
            "Dek(SecretBytes([redacted]; 32)) SecretBytes([redacted]; 9)"
        );
    }

    #[test]
    fn take_zeroes_its_source() {
        let mut source = *b"hunter2";
        let secret = SecretBytes::take(&mut source).unwrap();
        assert_eq!(source, [0; 7]);
        assert_eq!(secret.expose(), b"hunter2");
    }

    #[test]
    fn read_from_refuses_more_than_its_limit() {
        assert!(SecretBytes::read_from(&b"12345"[..], 4).is_err());
        let mut secret = SecretBytes::read_from(&b"1234\n"[..], 5).unwrap();
        secret.trim_newline();
        assert_eq!(secret.expose(), b"1234");
    }
}

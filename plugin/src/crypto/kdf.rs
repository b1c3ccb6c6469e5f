//! Keys that are derived from other keys: HKDF-SHA256 (RFC 5869), 32 bytes.
//!
//! Each use has a label of its own in `info`, and a test that pins what comes out. Passphrases and PINs go through scrypt
//! ([`age_file`](super::age_file)) or PBKDF2, never through this.

use std::io;

use openssl::error::ErrorStack;
use openssl::md::Md;
use openssl::pkey::Id;
use openssl::pkey_ctx::PkeyCtx;

use crate::secret::SecretBytes;

/// The key of `secret`, which is uniformly random; a `salt` may be empty.
pub(crate) fn hkdf(secret: &[u8], salt: &[u8], info: &[u8]) -> io::Result<SecretBytes> {
    let mut key = SecretBytes::zeroed(32)?;
    let mut derive = || -> Result<(), ErrorStack> {
        let mut context = PkeyCtx::new_id(Id::HKDF)?;
        context.derive_init()?;
        context.set_hkdf_md(Md::sha256())?;
        if !salt.is_empty() {
            context.set_hkdf_salt(salt)?;
        }
        context.set_hkdf_key(secret)?;
        context.add_hkdf_info(info)?;
        context.derive(Some(key.expose_mut()))?;
        Ok(())
    };
    derive().map_err(io::Error::other)?;
    Ok(key)
}

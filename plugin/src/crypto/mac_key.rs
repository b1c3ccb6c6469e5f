//! The key that says who may have written an envelope: whoever has its DEK.

use std::io;

use openssl::error::ErrorStack;
use openssl::md::Md;
use openssl::pkey::Id;
use openssl::pkey_ctx::PkeyCtx;

use crate::secret::{Dek, SecretBytes};

/// Never of another use of a DEK: as a LUKS or swtpm passphrase it goes through PBKDF2, never through HKDF.
const INFO: &[u8] = b"virtseal envelope mac v2";

impl Dek {
    /// HKDF-SHA256 (RFC 5869) of the DEK without a salt, which a uniformly random key does not need; the info is a label.
    /// 32 bytes, for the HMAC over the envelope that carries this DEK.
    ///
    /// # Errors
    /// When there is no memory for it, or OpenSSL can't derive.
    pub(crate) fn envelope_mac_key(&self) -> io::Result<SecretBytes> {
        let mut key = SecretBytes::zeroed(32)?;
        derive(self, &mut key).map_err(io::Error::other)?;
        Ok(key)
    }
}

fn derive(dek: &Dek, key: &mut SecretBytes) -> Result<(), ErrorStack> {
    let mut context = PkeyCtx::new_id(Id::HKDF)?;
    context.derive_init()?;
    context.set_hkdf_md(Md::sha256())?;
    context.set_hkdf_key(dek.expose())?;
    context.add_hkdf_info(INFO)?;
    context.derive(Some(key.expose_mut()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// HKDF-SHA256 worked out with another implementation, so that neither label nor length ever changes.
    #[test]
    fn the_derivation_never_changes() {
        let bytes: Vec<u8> = (0..32).collect();
        let key = Dek::from_bytes(&bytes).unwrap().envelope_mac_key().unwrap();
        assert_eq!(
            hex::encode(key.expose()),
            "a4bf7750a862b448884eae6014d79aa18d19c04bea244e554036d1b1d83ef68f"
        );
    }
}

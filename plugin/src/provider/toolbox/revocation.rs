//! Revocation lists: a server's certificate that its CA has taken back is no more trusted.
//!
//! They come in the same PEM file as the CA's certificate. Where there is one, every server's certificate must be judged
//! by a list of its own CA that has not run out: a list that somebody forgot to renew refuses rather than permits.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use nix::sys::memfd::{MFdFlags, memfd_create};
use openssl::error::ErrorStack;
use openssl::ssl::SslFiletype;
use openssl::x509::store::{X509Lookup, X509StoreBuilderRef};
use openssl::x509::verify::X509VerifyFlags;

const LIST: &[u8] = b"-----BEGIN X509 CRL-----";

/// Judges certificates by the revocation lists in `pem`, if there are any.
pub(crate) fn add_lists(store: &mut X509StoreBuilderRef, pem: &[u8]) -> Result<(), ErrorStack> {
    if !pem.windows(LIST.len()).any(|text| text == LIST) {
        return Ok(());
    }
    // OpenSSL reads them from files only.
    let file = in_memory(pem).ok();
    // An error of the system shows as a list that can't be read.
    let path = file.as_ref().map_or(String::new(), |file| {
        format!("/proc/self/fd/{}", file.as_raw_fd())
    });
    store
        .add_lookup(X509Lookup::file())?
        .load_crl_file(path, SslFiletype::PEM)?;
    store.set_flags(X509VerifyFlags::CRL_CHECK)
}

fn in_memory(text: &[u8]) -> std::io::Result<File> {
    let mut file = File::from(memfd_create("revocation-lists", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text)?;
    Ok(file)
}

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
///
/// # Errors
/// When one can't be read.
pub(in crate::provider) fn add_lists(store: &mut X509StoreBuilderRef, pem: &[u8]) -> Result<(), ErrorStack> {
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

/// The list (PEM) of the authority with `certificate` and `key`.
#[cfg(test)]
pub(in crate::provider) fn list(
    certificate: &openssl::x509::X509,
    key: &openssl::pkey::PKey<openssl::pkey::Private>,
    revoked: &[&openssl::x509::X509],
) -> String {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &[u8]| std::fs::write(dir.path().join(name), text).unwrap();
    write("ca.pem", &certificate.to_pem().unwrap());
    write("ca.key", &key.private_key_to_pem_pkcs8().unwrap());
    let index = revoked.iter().map(|certificate| {
        let serial = certificate.serial_number().to_bn().unwrap().to_hex_str().unwrap();
        format!("R\t491231235959Z\t200101000000Z\t{serial}\tunknown\t/CN=x\n")
    });
    write("index.txt", index.collect::<String>().as_bytes());
    write(
        "ca.cnf",
        b"[ca]\ndefault_ca=it\n[it]\ndatabase=index.txt\ndefault_md=sha256\n",
    );
    let output = std::process::Command::new("openssl")
        .args(["ca", "-config", "ca.cnf", "-gencrl", "-crldays", "30"])
        .args(["-keyfile", "ca.key", "-cert", "ca.pem"])
        .current_dir(dir.path())
        .output()
        .expect("openssl: install openssl");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

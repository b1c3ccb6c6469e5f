//! Whether a TLS server asked for this client's certificate: only then can its silence be a refusal.
//!
//! In TLS 1.3 a server judges the client's certificate after the handshake has ended for the client. One that does not
//! accept it may send an alert, and may as well close the connection, so that no alert ever arrives.

use std::ffi::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use foreign_types::ForeignTypeRef;
use openssl::error::ErrorStack;
use openssl::ex_data::Index;
use openssl::ssl::{Ssl, SslRef};

type Asked = Index<Ssl, AtomicBool>;
type RawSsl = <SslRef as ForeignTypeRef>::CType;

unsafe extern "C" {
    /// `SSL_set_cert_cb(3)`: on a client, `cb` is called when the server has asked for a certificate.
    fn SSL_set_cert_cb(
        ssl: *mut RawSsl,
        cb: Option<unsafe extern "C" fn(*mut RawSsl, *mut libc::c_void) -> c_int>,
        arg: *mut libc::c_void,
    );
}

fn index() -> Result<Asked, ErrorStack> {
    static INDEX: OnceLock<Asked> = OnceLock::new();
    if let Some(index) = INDEX.get() {
        return Ok(*index);
    }
    let made = Ssl::new_ex_index::<AtomicBool>()?;
    Ok(*INDEX.get_or_init(|| made))
}

/// Before the handshake of `ssl`: from now on its server is listened to for that.
pub(crate) fn watch(ssl: &mut SslRef) -> Result<(), ErrorStack> {
    ssl.set_ex_data(index()?, AtomicBool::new(false));
    // SAFETY: the pointer is that of a live SSL, the callback lives as long as the program, and it gets no argument.
    unsafe { SSL_set_cert_cb(ssl.as_ptr(), Some(note), std::ptr::null_mut()) };
    Ok(())
}

/// After it: whether a certificate was asked for.
pub(crate) fn came(ssl: &SslRef) -> bool {
    let index = index().ok();
    index
        .and_then(|index| ssl.ex_data(index))
        .is_some_and(|asked| asked.load(Ordering::Relaxed))
}

unsafe extern "C" fn note(ssl: *mut RawSsl, _: *mut libc::c_void) -> c_int {
    // SAFETY: OpenSSL calls this with the SSL whose handshake it is in.
    let ssl = unsafe { SslRef::from_ptr(ssl) };
    if let Ok(index) = index()
        && let Some(asked) = ssl.ex_data(index)
    {
        asked.store(true, Ordering::Relaxed);
    }
    // Go on, with the certificate that there is or without.
    1
}

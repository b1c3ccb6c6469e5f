//! Texts encrypted by a passphrase, as age files (<https://c2sp.org/age>, the scrypt recipient).
//!
//! scrypt takes 256 MiB for about a second, so one runs at a time; the memory is one mapping that goes back to
//! the kernel. A passphrase is UTF-8 text of one line, as `age` reads it from a terminal; a trailing newline is
//! the caller's to trim.

use std::io::{self, BufRead, Read, Write};
use std::iter;
use std::sync::{Mutex, PoisonError};

use age::armor::{ArmoredReader, ArmoredWriter, Format};
use age::secrecy::SecretString;
use age::stream::{StreamReader, StreamWriter};
use age::{DecryptError, Decryptor, EncryptError, Encryptor, scrypt};
use thiserror::Error;
use zeroize::Zeroize;

use crate::secret::{SecretBytes, Transient};

/// scrypt's cost is 2 to this power. 18 is what `age` itself uses: 256 MiB, about a second. A fixed figure
/// rather than one calibrated at the time: a busy host must not yield a weak file, nor a fast one a file that a
/// small recovery machine has not the memory for.
const WORK: u8 = 18;

/// What [`encrypt`] uses. A debug build is for tests, which make and open many files; `virtseald` says so when it starts.
const WORK_HERE: u8 = if cfg!(any(test, debug_assertions)) {
    10
} else {
    WORK
};

/// The most that is accepted from a file, 1 GiB and some seconds: it may be hostile, or made by a program that
/// calibrates.
const MAX_WORK: u8 = 20;

/// The most bytes that an age file, or the text in it, may have.
pub(crate) const MAX_BYTES: usize = 64 * 1024;

static ONE_SCRYPT_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How the age file is written; both are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// For the keystore.
    Binary,
    /// Printable: a backup may travel by mail or on paper.
    Armored,
}

/// Why a text can't be encrypted or decrypted.
#[derive(Debug, Error)]
pub(crate) enum AgeError {
    #[error("the passphrase is empty")]
    EmptyPassphrase,
    #[error("the passphrase is not one line of UTF-8 text, so no terminal could enter it")]
    PassphraseText,
    #[error("the passphrase is wrong")]
    WrongPassphrase,
    #[error(
        "the age file asks for scrypt work factor {required}, at most {MAX_WORK} is accepted: \
         decrypt it with age -d and restore the result"
    )]
    TooMuchWork { required: u8 },
    #[error("the age file is not encrypted by a passphrase: decrypt it with age -d and restore the result")]
    NotByPassphrase,
    #[error("it has more than {MAX_BYTES} bytes, no virtseal backup is that long")]
    TooLong,
    #[error("the age file is damaged")]
    Damaged(#[source] DecryptError),
    #[error("encrypting with age failed")]
    Encrypt(#[source] EncryptError),
    #[error("what was encrypted does not open again")]
    NotVerified,
}

/// Encrypts `text` and opens the result again before it is returned.
pub(crate) fn encrypt(text: &[u8], passphrase: &SecretBytes, form: Form) -> Result<Vec<u8>, AgeError> {
    let file = encrypt_with(text, passphrase, form, WORK_HERE)?;
    let opened = decrypt(&file, passphrase)?;
    if opened.len() == text.len() && openssl::memcmp::eq(&opened, text) {
        Ok(file)
    } else {
        Err(AgeError::NotVerified)
    }
}

fn encrypt_with(text: &[u8], passphrase: &SecretBytes, form: Form, work: u8) -> Result<Vec<u8>, AgeError> {
    let encryptor = encryptor(passphrase, work)?;
    let format = match form {
        Form::Binary => Format::Binary,
        Form::Armored => Format::AsciiArmor,
    };
    let write = || -> io::Result<Vec<u8>> {
        let mut writer = encryptor.wrap_output(ArmoredWriter::wrap_output(Vec::new(), format)?)?;
        writer.write_all(text)?;
        writer.finish()?.finish()
    };
    let file = write().map_err(|error| AgeError::Encrypt(error.into()));
    scrub_stack();
    file
}

fn encryptor(passphrase: &SecretBytes, work: u8) -> Result<Encryptor, AgeError> {
    let mut recipient = scrypt::Recipient::new(typed(passphrase)?);
    recipient.set_work_factor(work);
    one_at_a_time(|| Encryptor::with_recipients(iter::once(&recipient as _))).map_err(AgeError::Encrypt)
}

/// Whether `bytes` look like an age file, binary or armored.
pub(crate) fn is_age_file(bytes: &[u8]) -> bool {
    let bytes = bytes.trim_ascii_start();
    bytes.starts_with(b"age-encryption.org/") || bytes.starts_with(b"-----BEGIN AGE ENCRYPTED FILE-----")
}

/// Opens an age file, binary or armored.
pub(crate) fn decrypt(file: &[u8], passphrase: &SecretBytes) -> Result<Transient, AgeError> {
    if file.len() > MAX_BYTES {
        return Err(AgeError::TooLong);
    }
    let text = opened(ArmoredReader::new(file), passphrase).and_then(|reader| {
        // The plaintext is shorter than the file: no growing buffer leaves a copy behind.
        let mut text = Transient::new(Vec::with_capacity(file.len() + 1));
        let read = reader.take(MAX_BYTES as u64).read_to_end(&mut text);
        read.map_err(|error| AgeError::Damaged(error.into()))?;
        Ok(text)
    });
    scrub_stack();
    text
}

/// A writer that encrypts with `passphrase` what is too long for memory, as a binary age file. It must be finished.
pub(crate) fn writer<W: Write>(output: W, passphrase: &SecretBytes) -> Result<StreamWriter<W>, AgeError> {
    let writer = encryptor(passphrase, WORK_HERE)?.wrap_output(output);
    scrub_stack();
    writer.map_err(|error| AgeError::Encrypt(error.into()))
}

/// A reader of what [`writer`] wrote; it ends with an error unless all of it is there.
pub(crate) fn reader<R: BufRead>(input: R, passphrase: &SecretBytes) -> Result<StreamReader<R>, AgeError> {
    let reader = opened(input, passphrase);
    scrub_stack();
    reader
}

fn opened<R: BufRead>(file: R, passphrase: &SecretBytes) -> Result<StreamReader<R>, AgeError> {
    let mut identity = scrypt::Identity::new(typed(passphrase)?);
    identity.set_max_work_factor(MAX_WORK);
    let decryptor = Decryptor::new_buffered(file).map_err(AgeError::Damaged)?;
    if !decryptor.is_scrypt() {
        return Err(AgeError::NotByPassphrase);
    }
    one_at_a_time(|| decryptor.decrypt(iter::once(&identity as _))).map_err(refused)
}

fn refused(error: DecryptError) -> AgeError {
    match error {
        DecryptError::DecryptionFailed | DecryptError::KeyDecryptionFailed => AgeError::WrongPassphrase,
        DecryptError::ExcessiveWork { required, .. } => AgeError::TooMuchWork { required },
        error => AgeError::Damaged(error),
    }
}

fn one_at_a_time<T>(scrypt: impl FnOnce() -> T) -> T {
    let _turn = ONE_SCRYPT_AT_A_TIME
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    scrypt()
}

/// The passphrase as age takes it; zeroed when dropped.
fn typed(passphrase: &SecretBytes) -> Result<SecretString, AgeError> {
    let text = std::str::from_utf8(passphrase.expose()).map_err(|_| AgeError::PassphraseText)?;
    if text.is_empty() {
        return Err(AgeError::EmptyPassphrase);
    }
    if text.contains(char::is_control) {
        return Err(AgeError::PassphraseText);
    }
    Ok(SecretString::from(text))
}

/// Overwrites the part of the stack where age and scrypt leave keys behind.
#[inline(never)]
fn scrub_stack() {
    let mut deeper = [0_u8; 32 * 1024];
    deeper.zeroize();
    std::hint::black_box(&deeper);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> SecretBytes {
        SecretBytes::take(&mut text.as_bytes().to_vec()).unwrap()
    }

    #[test]
    fn both_forms_open_again_and_only_with_the_passphrase() {
        for form in [Form::Binary, Form::Armored] {
            let file = encrypt(b"root", &secret("correct horse"), form).unwrap();
            assert!(is_age_file(&file));
            assert_eq!(
                decrypt(&file, &secret("correct horse")).unwrap().as_slice(),
                b"root"
            );
            assert!(matches!(
                decrypt(&file, &secret("correct horse ")),
                Err(AgeError::WrongPassphrase)
            ));
        }
    }

    #[test]
    fn passphrases_that_no_terminal_could_enter_are_refused() {
        assert!(matches!(
            encrypt(b"", &secret(""), Form::Binary),
            Err(AgeError::EmptyPassphrase)
        ));
        for bytes in [&b"two\nlines"[..], b"\0", b"\xff\xfe", b"tab\t"] {
            let passphrase = SecretBytes::take(&mut bytes.to_vec()).unwrap();
            assert!(matches!(
                encrypt(b"", &passphrase, Form::Binary),
                Err(AgeError::PassphraseText)
            ));
        }
        encrypt(b"", &secret("größer 🔑"), Form::Binary).unwrap();
    }

    #[test]
    fn every_damaged_byte_is_an_error() {
        let file = encrypt(b"root", &secret("p"), Form::Binary).unwrap();
        for at in 0..file.len() {
            let mut bytes = file.clone();
            bytes[at] ^= 1;
            assert!(decrypt(&bytes, &secret("p")).is_err(), "byte {at}");
            assert!(decrypt(&file[..at], &secret("p")).is_err(), "{at} bytes");
        }
    }

    #[test]
    fn excessive_work_is_refused_before_it_is_done() {
        let mut greedy = encrypt(b"root", &secret("p"), Form::Binary).unwrap();
        let factor = greedy.windows(4).position(|bytes| bytes == b" 10\n").unwrap() + 1;
        greedy[factor] = b'3';
        assert!(matches!(
            decrypt(&greedy, &secret("p")),
            Err(AgeError::TooMuchWork { required: 30 })
        ));
    }

    #[test]
    fn memory_of_a_real_scrypt_goes_back_to_the_kernel() {
        let resident_kib = || -> usize {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        crate::host::own_process::run(|| {
            let file = encrypt_with(b"root", &secret("p"), Form::Armored, WORK).unwrap();
            let before = resident_kib();
            assert_eq!(decrypt(&file, &secret("p")).unwrap().as_slice(), b"root");
            let grown = resident_kib().saturating_sub(before);
            assert!(grown < 64 * 1024, "{grown} KiB more than before");
        });
    }

    #[test]
    fn file_for_a_key_says_what_to_do() {
        let key = age::x25519::Identity::generate();
        let file = age::encrypt(&key.to_public(), b"root").unwrap();
        assert!(matches!(
            decrypt(&file, &secret("p")),
            Err(AgeError::NotByPassphrase)
        ));
        let long = vec![b'a'; MAX_BYTES + 1];
        assert!(matches!(decrypt(&long, &secret("p")), Err(AgeError::TooLong)));
    }
}

//! Cryptography that more than one room needs, each once: over OpenSSL and age, and nothing else.

pub(crate) mod aead;
pub(crate) mod age_file;
pub(crate) mod kdf;

//! Cryptography that more than one room needs, each once: over OpenSSL and age, and nothing else.

pub(crate) mod age_file;
mod mac_key;

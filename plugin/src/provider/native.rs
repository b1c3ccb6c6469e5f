//! The embedded provider: a root key sealed by a passphrase, KEKs derived per VM.

//! For tests: a provider with its PyKMIP, a server that misbehaves on purpose, and one that only greets.

mod fake;
mod server;

pub(in crate::provider) use fake::{Fake, Fault};
pub(in crate::provider) use server::{Kept, Kmip, TlsServer, identity, secret, settings};

//! Where there are no KEKs to keep.

use thiserror::Error;

/// Why there is nothing that a cache could keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum NothingToCache {
    /// Derived from the root key, which is in memory while unlocked.
    #[error(
        "a native provider needs no server, so there is nothing to cache: it opens its VMs while it is unlocked"
    )]
    Native,
    #[error("the keys of a transit provider never leave its server, so there is nothing to cache")]
    Transit,
    #[error("the keys of a pkcs11 provider never leave its token, so there is nothing to cache")]
    Pkcs11,
    #[error(
        "with mode server the keys of a kmip provider never leave its server, so there is nothing to cache: that takes \
         mode local"
    )]
    ModeServer,
}

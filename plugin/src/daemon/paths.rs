//! Where root acts at paths that domain XML names, on this host and now.

use std::path::Path;

use super::Daemon;
use crate::failure::chain;
use crate::permitted::{PathError, PathRule, PermittedPath};

impl Daemon {
    /// What the settings permit, and the storage pools that are active. Asks libvirt on the background connection; as long as that
    /// does not say, pools permit nothing.
    pub(super) fn path_rule(&self) -> PathRule {
        let pools = self.background.active_pools().unwrap_or_else(|error| {
            tracing::warn!("storage pools permit nothing now: {}", chain(&error));
            Vec::new()
        });
        PathRule::of(&self.config()).with_pools(pools)
    }

    /// The place of an object that the keystore has, as long as no link of others leads elsewhere.
    pub(super) fn known_place(&self, path: &Path) -> Result<PermittedPath, PathError> {
        PathRule::of(&self.config()).permit_known(path, std::iter::once(path))
    }
}

//! How long a KMIP provider keeps KEKs, in memory and, encrypted under a key that is bound to the host's TPM, across a reboot.

use std::sync::Arc;

use super::settings::{KmipSettings, SettingsError};
use super::{KmipProvider, KmipProviderError, Line};
use crate::host::tpm::{Tpm, TpmError};
use crate::model::advice::Advice;
use crate::model::cache_policy::CachePolicy;
use crate::provider::cache::persist;
use crate::provider::toolbox::lock;
use crate::store::StoreError;

impl KmipProvider {
    /// Keeps KEKs as `policy` says, once that is recorded, and across a reboot where there is a `persist`. What was kept on
    /// disk is gone.
    ///
    /// # Errors
    /// When there is nothing to keep, the TPM does not bind, or the keystore can't be written; then nothing changes.
    pub(crate) fn set_cache(
        &self,
        policy: CachePolicy,
        persist: Option<&persist::Request<'_>>,
    ) -> Result<(), KmipProviderError> {
        let _changing = lock(&self.changing);
        let line = self.line();
        line.settings.check_cache(policy)?;
        let settings = KmipSettings {
            cache: Some(policy),
            ..line.settings.clone()
        };
        let json = serde_json::to_value(&settings).map_err(SettingsError::Json)?;
        let new = persist
            .map(|persist| {
                if policy == CachePolicy::None {
                    return Err(KmipProviderError::PersistNothing);
                }
                if self.held().locked {
                    return Err(KmipProviderError::Locked);
                }
                Ok(self.cache.enroll(persist)?)
            })
            .transpose()?;
        self.cache.set(policy, new, &json)?;
        self.work_by(Line {
            settings,
            cluster: Arc::clone(&line.cluster),
        });
        Ok(())
    }

    /// Whether the TPM is to open what its cache keeps on disk.
    pub(crate) fn wants_tpm(&self) -> bool {
        !self.held().locked && self.cache.wants_tpm()
    }

    /// Has `tpm` open what its cache keeps on disk.
    ///
    /// # Errors
    /// Why it does not; then nothing comes from there, and nothing is kept there, until it does.
    pub(crate) fn load_cache(&self, tpm: &Tpm) -> Result<(), TpmError> {
        self.cache.load(tpm)
    }

    /// After a lock: whether the disk has let go of what the cache kept there. Tries again where it did not.
    pub(crate) fn settle_cache(&self) -> Result<(), StoreError> {
        self.cache.settle()
    }

    /// What to say where the TPM or the disk fails.
    pub(super) fn persists_badly(&self) -> Option<String> {
        let persistence = self.cache.persistence()?;
        let problem = persistence.problem?;
        let (name, policy) = (&self.name, self.cache.policy());
        // What was bound to 11 in earlier versions can't be so again.
        let pcrs = persistence
            .pcrs
            .and_then(|pcrs| pcrs.without_kernel())
            .map_or_else(String::new, |pcrs| format!(" --pcrs {pcrs}"));
        let again = Advice::CacheOnDisk {
            name: name.clone(),
            policy,
            options: format!("--persist-for {}{pcrs}", persistence.keep),
        };
        Some(format!(
            "no key is kept for a reboot ({problem}): {again} begins anew"
        ))
    }
}

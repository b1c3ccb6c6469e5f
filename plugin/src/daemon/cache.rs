//! What `virtseal provider cache` asks for.

use super::Daemon;
use crate::api::Providers;
use crate::failure::{Code, Failure, chain};
use crate::provider::cache::{CachePolicy, NothingToCache};
use crate::provider::kmip::KmipProviderError;
use crate::provider::registry::Provider;

impl Daemon {
    /// Keeps KEKs of `name` in memory as `policy` says, from now on and after a restart.
    pub fn set_provider_cache(&self, name: &str, policy: &str) -> Result<Providers, Failure> {
        let set = self.set_cache(name, policy);
        crate::process::trim();
        self.audit_provider("provider-cache", name, &set);
        set?;
        Ok(Providers {
            providers: vec![self.view_of(name)?],
        })
    }

    fn set_cache(&self, name: &str, policy: &str) -> Result<(), Failure> {
        let policy: CachePolicy = policy
            .parse()
            .map_err(|error| Failure::new(Code::Usage, chain(&error)))?;
        let known = self.registry.find(name)?;
        let Provider::Kmip(kmip) = &known else {
            return match NothingToCache::of_kind(known.kind()) {
                Some(why) => Err(Failure::new(Code::Usage, format!("provider '{name}': {why}"))),
                None => Err(Failure::new(
                    Code::Failed,
                    format!("provider '{name}' {}", known.provider().status()),
                )
                .next(format!("virtseal provider show {name}"))),
            };
        };
        kmip.set_cache(&self.keystore, policy).map_err(|error| {
            let code = match &error {
                KmipProviderError::Cache(_) => Code::Usage,
                _ => Code::Failed,
            };
            Failure::from_error(code, format!("provider '{name}'"), &error)
        })
    }
}

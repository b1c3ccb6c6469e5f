//! What `virtseal provider cache` asks for, and the opening of what caches keep across a reboot.
//!
//! The TPM is asked when virtseald starts and when a provider was unlocked, on threads that no start waits for.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::tpm::warnings_of_pcrs;
use crate::api::{PersistRequest, PersistView, Providers};
use crate::daemon::Daemon;
use crate::host::local_time::rfc3339;
use crate::host::secure_boot::SecureBoot;
use crate::host::tpm::{PcrList, Tpm, TpmError};
use crate::model::problem::{Code, Problem, chain};
use crate::provider::KeyProvider;
use crate::provider::cache::{CachePolicy, KekCache, NothingToCache, PersistError, PersistTime};
use crate::provider::kmip::{KmipProvider, KmipProviderError, Persist};
use crate::recipients::Provider;

impl Daemon {
    /// Keeps KEKs of `name` in memory as `policy` says, from now on and after a restart; and across one if it is to `persist`.
    pub fn set_provider_cache(
        &self,
        name: &str,
        policy: &str,
        persist: Option<&PersistRequest>,
    ) -> Result<Providers, Problem> {
        let set = self.set_cache(name, policy, persist);
        crate::host::process::trim();
        self.audit_provider("provider-cache", name, &set);
        set?;
        let mut view = self.view_of(name)?;
        if persist.is_some() {
            view.warnings.extend(self.warnings_of_cache(name)?);
        }
        Ok(Providers {
            providers: vec![view],
        })
    }

    fn set_cache(&self, name: &str, policy: &str, persist: Option<&PersistRequest>) -> Result<(), Problem> {
        let policy: CachePolicy = policy
            .parse()
            .map_err(|error| Problem::new(Code::Usage, chain(&error)))?;
        let known = self.recipients.find(name)?;
        let Provider::Kmip(kmip) = &known else {
            return match NothingToCache::of_kind(known.kind()) {
                Some(why) => Err(Problem::new(Code::Usage, format!("provider '{name}': {why}"))),
                None => Err(Problem::new(
                    Code::Failed,
                    format!("provider '{name}' {}", known.provider().status()),
                )
                .next(format!("virtseal provider show {name}"))),
            };
        };
        let persist = persist
            .map(|asked| self.persist(name, policy, asked))
            .transpose()?;
        kmip.set_cache(policy, persist.as_ref())
            .map_err(|error| cache_failure(name, &error))
    }

    /// Why what the cache of `name` keeps on disk is bound to less than it seems.
    fn warnings_of_cache(&self, name: &str) -> Result<Vec<String>, Problem> {
        let known = self.recipients.find(name)?;
        let persistence = known.cache().and_then(KekCache::persistence);
        let Some((pcrs, unmeasured)) = persistence.and_then(|kept| Some((kept.pcrs?, kept.unmeasured)))
        else {
            return Ok(Vec::new());
        };
        Ok(warnings_of_pcrs(
            &pcrs,
            unmeasured.as_ref(),
            &SecureBoot::of_host(Path::new("/")),
            "what was kept opens no more, and VMs start from the KMS alone until this command is repeated",
        ))
    }

    fn persist(
        &self,
        name: &str,
        policy: CachePolicy,
        asked: &PersistRequest,
    ) -> Result<Persist<'_>, Problem> {
        let usage = |error: &dyn std::error::Error| Problem::new(Code::Usage, chain(error));
        let keep = asked
            .keep
            .as_deref()
            .map_or(Ok(PersistTime::default()), str::parse);
        let pcrs: PcrList = asked
            .pcrs
            .as_deref()
            .map_or(Ok(PcrList::default()), str::parse)
            .map_err(|error| usage(&error))?;
        if pcrs.has_kernel() {
            let others = pcrs.without_kernel().unwrap_or_default();
            return Err(Problem::new(
                Code::Usage,
                format!(
                    "provider '{name}': PCR 11 changes with each update of the kernel, and what the cache keeps would be \
                     lost each time; a cache takes no key that signs it"
                ),
            )
            .next(format!(
                "virtseal provider cache {name} {policy} --persist tpm --pcrs {others}"
            )));
        }
        Ok(Persist {
            tpm: &self.tpm,
            keep: keep.map_err(|error| usage(&error))?,
            pcrs,
        })
    }

    /// Has the TPM open what caches keep on disk. Start-up waits for none of it.
    pub fn load_caches(&self) {
        for known in self.recipients.providers() {
            self.load_in_background(&known);
        }
    }

    /// The same for one of them, once it is unlocked.
    pub(in crate::daemon) fn load_in_background(&self, known: &Provider) {
        let Provider::Kmip(provider) = known else {
            return;
        };
        if !provider.wants_tpm() {
            return;
        }
        let (tpm, provider) = (Arc::clone(&self.tpm), Arc::clone(provider));
        let started = std::thread::Builder::new()
            .name("kek-cache".to_owned())
            .spawn(move || load(&provider, &tpm));
        if let Err(error) = started {
            tracing::warn!(%error, "what keeps keys on disk is not opened: no thread");
        }
    }

    /// After a lock: an error where the disk has not let go of the keys that a cache kept there.
    pub(in crate::daemon) fn check_disk_after_lock(&self, known: &Provider) -> Result<(), Problem> {
        let Provider::Kmip(provider) = known else {
            return Ok(());
        };
        let name = provider.name();
        provider.settle_cache().map_err(|error| {
            Problem::from_error(
                Code::Failed,
                format!(
                    "'{name}' is locked, but the keys that its cache keeps on disk are still there, and open again after a \
                     restart of virtseald"
                ),
                &error,
            )
            .next(format!("virtseal provider lock {name}"))
        })
    }
}

/// Tries again for a while: the TPM's driver may come later than this daemon, or others use the TPM first.
fn load(provider: &KmipProvider, tpm: &Tpm) {
    const PATIENCE: Duration = Duration::from_secs(120);
    let mut wait = Duration::from_millis(500);
    while provider.wants_tpm() && wait < PATIENCE {
        let loaded = provider.load_cache(tpm);
        crate::host::process::trim();
        let Err(error) = loaded else {
            tracing::info!(
                provider = provider.name(),
                "the TPM has opened what keeps its keys on disk"
            );
            return;
        };
        tracing::warn!(
            provider = provider.name(),
            "the TPM does not open what keeps its keys on disk: {}",
            chain(&error)
        );
        if !error.may_pass() {
            return;
        }
        std::thread::sleep(wait);
        wait *= 2;
    }
}

/// How the cache of `known` is kept across a reboot.
pub(in crate::daemon) fn persist_view(known: &Provider) -> Option<PersistView> {
    let persistence = known.cache()?.persistence()?;
    let since = Duration::from_secs(persistence.enrolled.max(0).unsigned_abs());
    Some(PersistView {
        by: "tpm".to_owned(),
        keep: persistence.keep.to_string(),
        pcrs: persistence.pcrs.map(|pcrs| pcrs.to_string()),
        since: rfc3339(UNIX_EPOCH + since),
        keks: persistence.keks as i64,
        problem: persistence.problem,
    })
}

fn cache_failure(name: &str, error: &KmipProviderError) -> Problem {
    let code = match error {
        KmipProviderError::Cache(_) | KmipProviderError::PersistNothing => Code::Usage,
        KmipProviderError::Locked => Code::Locked,
        KmipProviderError::Persist(PersistError::Tpm(error)) if error.may_pass() => Code::Unreachable,
        _ => Code::Failed,
    };
    let failure = Problem::new(code, format!("provider '{name}' {}", chain(error)));
    match error {
        KmipProviderError::Cache(_) | KmipProviderError::PersistNothing => {
            Problem::new(code, format!("provider '{name}': {}", chain(error)))
        }
        KmipProviderError::Locked => failure.next(format!("virtseal provider unlock {name}")),
        KmipProviderError::Persist(PersistError::Tpm(
            TpmError::NoSuchPcr(_) | TpmError::OwnerPassword | TpmError::LockedOut { .. },
        )) => Problem::new(code, format!("provider '{name}': {}", chain(error))),
        KmipProviderError::Persist(_) => {
            Problem::new(code, format!("provider '{name}': {}", chain(error))).next(format!(
                "look at the setting 'tpm' in virtseald.yaml, or virtseal provider cache {name} without --persist"
            ))
        }
        _ => failure,
    }
}

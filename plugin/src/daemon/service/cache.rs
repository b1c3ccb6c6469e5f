//! What `virtseal provider cache` asks for, and the opening of what caches keep across a reboot.
//!
//! The TPM is asked when virtseald starts and when a provider was unlocked, on threads of their own.

use std::path::Path;
use std::sync::Arc;

use super::provider_view::view_of;
use super::tpm_policy::warnings_of_pcrs;
use crate::api::{FindingView, PersistRequest, ProvidersChanged};
use crate::audit::Actor;
use crate::daemon::first_unlocks::Trying;
use crate::daemon::{Daemon, records};
use crate::host::secure_boot::SecureBoot;
use crate::host::tpm::{PcrList, Tpm, TpmError};
use crate::model::advice::Advice;
use crate::model::backoff::Backoff;
use crate::model::cache_policy::CachePolicy;
use crate::model::deadlines::tpm::{AT_START, TRIES_AT_START};
use crate::model::finding::Finding;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::KeyProvider;
use crate::provider::cache::{KekCache, persist};
use crate::provider::kmip::{KmipProvider, KmipProviderError, SettingsError};
use crate::recipients::Provider;

pub(crate) fn set(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    policy: CachePolicy,
    persist: Option<&PersistRequest>,
) -> Result<ProvidersChanged, Problem> {
    let kept = || {
        let known = daemon.recipients.find(name).ok()?;
        let cache = known.cache()?;
        Some((cache.policy(), cache.persistence().is_some()))
    };
    let before = kept();
    let set = set_cache(daemon, name, policy, persist);
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-cache", name, &set);
    set?;
    let mut view = view_of(daemon, name)?;
    if persist.is_some() {
        view.warnings
            .extend(FindingView::all(&warnings_of_cache(daemon, name)?));
    }
    Ok(ProvidersChanged {
        providers: vec![view],
        // What is kept on disk is bound anew each time.
        changed: persist.is_some() || kept() != before,
    })
}

fn set_cache(
    daemon: &Daemon,
    name: &str,
    policy: CachePolicy,
    persist: Option<&PersistRequest>,
) -> Result<(), Problem> {
    let known = daemon.recipients.find(name)?;
    let Some(kmip) = known.of_kind::<KmipProvider>() else {
        return match known.row().and_then(|kind| kind.nothing_to_cache) {
            Some(why) => Err(Problem::usage(format!("provider '{name}': {why}"))),
            None => Err(
                Problem::failed(format!("provider '{name}' {}", known.provider().status()))
                    .next(Advice::ShowProvider(name.to_owned())),
            ),
        };
    };
    let persist = persist
        .map(|asked| persistence(daemon, name, policy, asked))
        .transpose()?;
    kmip.set_cache(policy, persist.as_ref())
        .map_err(|error| cache_failure(name, &error))
}

/// Why what the cache of `name` keeps on disk is bound to less than it seems.
fn warnings_of_cache(daemon: &Daemon, name: &str) -> Result<Vec<Finding>, Problem> {
    let known = daemon.recipients.find(name)?;
    let persistence = known.cache().and_then(KekCache::persistence);
    let Some((pcrs, unmeasured)) = persistence.and_then(|kept| Some((kept.pcrs?, kept.unmeasured))) else {
        return Ok(Vec::new());
    };
    Ok(warnings_of_pcrs(
        name,
        &pcrs,
        unmeasured.as_ref(),
        &SecureBoot::of_host(Path::new("/")),
        "what was kept no longer opens, and VMs start from the KMS alone until this command is repeated",
    ))
}

fn persistence<'a>(
    daemon: &'a Daemon,
    name: &str,
    policy: CachePolicy,
    asked: &PersistRequest,
) -> Result<persist::Request<'a>, Problem> {
    let pcrs: PcrList = asked
        .pcrs
        .as_deref()
        .map_or(Ok(PcrList::default()), str::parse)
        .map_err(|error| Problem::usage(chain(&error)))?;
    if pcrs.has_kernel() {
        let others = pcrs.without_kernel().unwrap_or_default();
        return Err(Problem::usage(format!(
                "provider '{name}': PCR 11 changes with each update of the kernel, and what the cache keeps would be \
                 lost each time; a cache takes no key that signs it"
            ),
        )
        .next(Advice::CacheOnDisk { name: name.to_owned(), policy, options: format!("--pcrs {others}") }));
    }
    Ok(persist::Request {
        tpm: &daemon.tpm,
        keep: asked.keep.unwrap_or_default(),
        pcrs,
    })
}

/// Has the TPM open what caches keep on disk, as virtseald starts; each lets go of `trying` when that was tried once.
pub(crate) fn load_all(daemon: &Daemon, trying: &Trying) {
    for known in daemon.recipients.providers() {
        begin_to_load(daemon, &known, Some(trying.clone()));
    }
}

/// The same for one of them, once it is unlocked.
pub(crate) fn load_in_background(daemon: &Daemon, known: &Provider) {
    begin_to_load(daemon, known, None);
}

fn begin_to_load(daemon: &Daemon, known: &Provider, trying: Option<Trying>) {
    let Some(provider) = known.of_kind::<KmipProvider>() else {
        return;
    };
    if !provider.wants_tpm() {
        return;
    }
    let (tpm, provider) = (Arc::clone(&daemon.tpm), provider);
    let started = std::thread::Builder::new()
        .name("kek-cache".to_owned())
        .spawn(move || load(&provider, &tpm, trying));
    if let Err(error) = started {
        tracing::warn!(%error, "its keys on disk are not opened: no thread");
    }
}

/// After a lock: an error where the disk has not let go of the keys that a cache kept there.
pub(crate) fn check_disk_after_lock(known: &Provider) -> Result<(), Problem> {
    let Some(provider) = known.of_kind::<KmipProvider>() else {
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
        .next(Advice::LockProvider(name.to_owned()))
    })
}

/// Tries again for a while: the TPM's driver may come later than this daemon, or others use the TPM first.
fn load(provider: &KmipProvider, tpm: &Tpm, mut trying: Option<Trying>) {
    const BACKOFF: Backoff = Backoff::new(AT_START.start, AT_START.end);
    for failures in 1..=TRIES_AT_START {
        if !provider.wants_tpm() {
            return;
        }
        let loaded = provider.load_cache(tpm);
        drop(trying.take());
        crate::host::process::trim();
        let Err(error) = loaded else {
            tracing::info!(provider = provider.name(), "the TPM has opened its keys on disk");
            return;
        };
        tracing::warn!(
            provider = provider.name(),
            "the TPM does not open its keys on disk: {}",
            chain(&error)
        );
        if !error.may_pass() {
            return;
        }
        std::thread::sleep(BACKOFF.pause(failures));
    }
}

fn cache_failure(name: &str, error: &KmipProviderError) -> Problem {
    let code = match error {
        KmipProviderError::Settings(SettingsError::Cache(_)) | KmipProviderError::PersistNothing => {
            Code::Usage
        }
        KmipProviderError::Locked => Code::Locked,
        KmipProviderError::Persist(persist::Error::Tpm(error)) if error.may_pass() => Code::Unreachable,
        _ => Code::Failed,
    };
    let failure = Problem::new(code, format!("provider '{name}' {}", chain(error)));
    match error {
        KmipProviderError::Settings(SettingsError::Cache(_)) | KmipProviderError::PersistNothing => {
            Problem::new(code, format!("provider '{name}': {}", chain(error)))
        }
        KmipProviderError::Locked => failure.next(Advice::UnlockProvider(name.to_owned())),
        KmipProviderError::Persist(persist::Error::Tpm(
            TpmError::NoSuchPcr(_) | TpmError::OwnerPassword | TpmError::LockedOut { .. },
        )) => Problem::new(code, format!("provider '{name}': {}", chain(error))),
        KmipProviderError::Persist(_) => Problem::new(code, format!("provider '{name}': {}", chain(error)))
            .next(
                Advice::from("look at the setting 'tpm' in virtseald.yaml")
                    .or(Advice::CacheInMemory(name.to_owned())),
            ),
        _ => failure,
    }
}

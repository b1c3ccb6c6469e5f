//! How providers are shown.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use time::OffsetDateTime;

use super::tpm::{CREDENTIAL, enroll_command};
use super::tpm_policy::view;
use super::{setting_views, tpm, tpm_credential};
use crate::api::{
    DetailView, FindingView, OrNewer, PersistView, PersistedBy, ProviderView, Providers, TpmView, words,
};
use crate::daemon::glance::Uses;
use crate::daemon::{Daemon, look};
use crate::host::local_time::rfc3339;
use crate::model::advice::Advice;
use crate::model::envelope::ProviderId;
use crate::model::problem::Problem;
use crate::provider::native::{NativeProvider, WhyLocked};
use crate::provider::toolbox::bound_credential::TpmEnrollment;
use crate::provider::{KeyProvider, ProviderStatus};
use crate::recipients::Provider;
use crate::store::{ProviderRecord, UnixTime};

/// All providers, by name.
pub(crate) fn list(daemon: &Daemon) -> Result<Providers, Problem> {
    let uses = look::provider_uses(daemon)?;
    with_uses(daemon, &uses).map(|providers| Providers { providers })
}

/// The same, where it is known how many envelopes each of them opens.
pub(super) fn with_uses(daemon: &Daemon, uses: &Uses) -> Result<Vec<ProviderView>, Problem> {
    let default = daemon
        .recipients
        .default_provider()
        .map(|known| known.provider().id());
    let records: BTreeMap<ProviderId, ProviderRecord> = daemon
        .keystore
        .providers()?
        .sound
        .into_iter()
        .map(|record| (record.id, record))
        .collect();
    let view = |known: &Provider| {
        let provider = known.provider();
        let report = daemon.recipients.report(known);
        let cache = known.cache();
        let is_default = Some(provider.id()) == default;
        ProviderView {
            name: provider.name().to_owned(),
            id: provider.id().to_string(),
            kind: OrNewer::named(known.kind()),
            state: report.status.state().into(),
            reason: reason(report.status).or_else(|| why_locked(daemon, known)),
            asks_for: tpm_credential::asks_for(daemon, known).map(OrNewer::from),
            unlocked_by: openable_by(daemon, known),
            tpm: tpm_view(daemon, known),
            settings: setting_views::views(daemon, known, records.get(&provider.id()), is_default),
            details: details(known),
            since: rfc3339(report.since),
            last_answer: report.last_answer.map(rfc3339),
            warnings: FindingView::all(&report.warnings),
            cache: cache.map(|cache| cache.policy().into()),
            cached_keks: cache.map_or(0, |cache| cache.len() as i64),
            persist: persist_view(known),
            is_default,
            envelopes: uses.get(&provider.id()).map_or(0, |count| *count as i64),
        }
    };
    let mut providers: Vec<_> = daemon.recipients.providers().iter().map(view).collect();
    providers.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(providers)
}

pub(crate) fn view_of(daemon: &Daemon, name: &str) -> Result<ProviderView, Problem> {
    let id = daemon.recipients.find(name)?.provider().id().to_string();
    let mut views = list(daemon)?.providers.into_iter();
    views
        .find(|view| view.id == id)
        .ok_or_else(|| Problem::not_found(format!("provider '{name}' is gone")))
}

fn details(known: &Provider) -> Vec<DetailView> {
    let details = known.provider().details().into_iter();
    details
        .map(|(what, said)| DetailView {
            what: what.to_owned(),
            said,
        })
        .collect()
}

fn reason(status: ProviderStatus) -> Option<String> {
    match status {
        ProviderStatus::NotTrusted(reason)
        | ProviderStatus::Unreachable(reason)
        | ProviderStatus::Degraded(reason) => Some(reason),
        ProviderStatus::NotBackedUp | ProviderStatus::Locked | ProviderStatus::Ready => None,
    }
}

/// What unlocks a provider here: `passphrase`, `TPM (PCR 7, since 2026-11-22)`, `systemd credential`. Only what is told
/// without asking anybody.
fn openable_by(daemon: &Daemon, known: &Provider) -> Vec<String> {
    let mut ways = Vec::new();
    ways.extend(tpm_credential::asks_for(daemon, known).map(|kind| words(&kind)));
    ways.extend(tpm::enrollment(daemon, known).as_ref().map(way_in));
    if has_credential(known.provider().name()) {
        ways.push("systemd credential".to_owned());
    }
    ways
}

/// Why a native provider is locked that the TPM should have unlocked, with what to do.
fn why_locked(daemon: &Daemon, known: &Provider) -> Option<String> {
    let Some(native) = known.of_kind::<NativeProvider>() else {
        return tpm_credential::why_locked(daemon, known);
    };
    let name = native.name();
    native.why_locked().map(|why| match why {
        WhyLocked::NeedsPin => format!("{why}: {}", Advice::UnlockByTpm(name.to_owned())),
        WhyLocked::NotSigned(_) => format!(
            "{why}; unlock it with its passphrase, and have that key sign this kernel: see systemd-measure(1)"
        ),
        WhyLocked::NotOpened(_) => format!(
            "{why}; unlock it with its passphrase, then enroll it again: {}",
            enroll_command(&native)
        ),
    })
}

/// What the TPM asks for before it unlocks a provider.
fn tpm_view(daemon: &Daemon, known: &Provider) -> Option<TpmView> {
    tpm::enrollment(daemon, known).as_ref().map(view)
}

/// Such as `TPM (PCR 7,11, 11 signed by 5f7a0c3be8d1f2aa, with its PIN, since 2026-11-28)`.
fn way_in(enrollment: &TpmEnrollment) -> String {
    let pcrs = enrollment.pcrs.as_ref();
    let mut parts = vec![pcrs.map_or("damaged".to_owned(), |pcrs| format!("PCR {pcrs}"))];
    if let Some(key) = &enrollment.signed_by {
        let fingerprint = key.fingerprint();
        parts.push(format!("11 signed by {}", &fingerprint[..16]));
    }
    if enrollment.needs_pin {
        parts.push("with its PIN".to_owned());
    }
    parts.push(format!("since {}", date(enrollment.enrolled)));
    if enrollment.stale {
        parts.push("stale: enroll again".to_owned());
    }
    format!("TPM ({})", parts.join(", "))
}

fn has_credential(name: &str) -> bool {
    std::env::var_os("CREDENTIALS_DIRECTORY")
        .is_some_and(|directory| Path::new(&directory).join(format!("{CREDENTIAL}{name}")).exists())
}

/// Such as 2026-11-22.
fn date(time: UnixTime) -> String {
    OffsetDateTime::from_unix_timestamp(time).map_or_else(|_| "?".to_owned(), |time| time.date().to_string())
}

/// How the cache of `known` is kept across a reboot.
fn persist_view(known: &Provider) -> Option<PersistView> {
    let persistence = known.cache()?.persistence()?;
    let since = Duration::from_secs(persistence.enrolled.max(0).unsigned_abs());
    Some(PersistView {
        by: PersistedBy::Tpm.into(),
        keep: persistence.keep.into(),
        pcrs: persistence.pcrs.map(|pcrs| pcrs.to_string()),
        since: rfc3339(UNIX_EPOCH + since),
        keks: persistence.keks as i64,
        problem: persistence.problem,
    })
}

//! What `virtseal provider set` asks for.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::descriptors::passphrase_from;
use super::provider_view::view_of;
use super::setting_views::OfHost;
use super::{cache, tpm};
use crate::api::{PersistRequest, SettingsRequest, SettingsSet, TpmRequest};
use crate::audit::Actor;
use crate::daemon::{Daemon, records};
use crate::model::advice::Advice;
use crate::model::cache_policy::{CachePolicy, NotAKeepTime};
use crate::model::envelope::{ProviderId, Stanza};
use crate::model::problem::{Problem, chain};
use crate::provider::SettingsChange;
use crate::provider::cache::KekCache;
use crate::provider::kind::{KeysAt, Kind};
use crate::provider::setting::SettingError;
use crate::recipients::Provider;
use crate::store::{Change, ProviderRecord};

pub(super) fn set(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    request: &SettingsRequest,
    fds: Vec<OwnedFd>,
) -> Result<SettingsSet, Problem> {
    if let Some((setting, value)) = bound_to_tpm(name, request)? {
        return set_bound(daemon, by, name, setting, value, fds);
    }
    let done = change(daemon, name, request, fds);
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-set", name, &done);
    let done = done?;
    // It may be what a job waits for.
    daemon.jobs.ring();
    Ok(SettingsSet {
        provider: view_of(daemon, name)?,
        changed: done.changed == Change::Changed,
        tried: done.tried,
        warnings: Vec::new(),
    })
}

/// The setting that the TPM of this host is asked for, and its value. It takes effect by itself, so nothing else is set with it.
fn bound_to_tpm<'a>(name: &str, request: &'a SettingsRequest) -> Result<Option<(OfHost, &'a str)>, Problem> {
    let mut found = request.assigned.iter().filter_map(|assigned| {
        let setting = OfHost::named(&assigned.key)?;
        matches!(setting, OfHost::Tpm | OfHost::Persist).then_some((setting, assigned.value.as_str()))
    });
    match (found.next(), request.assigned.len()) {
        (Some((setting, _)), 2..) => Err(Problem::usage(format!(
            "provider '{name}': '{}' is set alone, for the TPM may refuse it",
            setting.key()
        ))
        .next("the same command for each")),
        (found, _) => Ok(found),
    }
}

/// As `provider tpm` and `provider cache --persist` do; an empty value ends it.
fn set_bound(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    setting: OfHost,
    value: &str,
    fds: Vec<OwnedFd>,
) -> Result<SettingsSet, Problem> {
    let known = daemon.recipients.find(name)?;
    let (changed, warnings) = match (setting, value) {
        (OfHost::Persist, keep) => {
            let cache = known.cache();
            let policy = cache.map_or_else(CachePolicy::default, KekCache::policy);
            let before = cache.and_then(KekCache::persistence);
            let pcrs_of_before = before.map(|kept| kept.pcrs.ok_or_else(|| pcrs_not_told(name, policy)));
            let persist = match keep {
                "" => None,
                keep => Some(PersistRequest {
                    keep: Some(
                        keep.parse()
                            .map_err(|error: NotAKeepTime| Problem::usage(chain(&error)))?,
                    ),
                    pcrs: pcrs_of_before.transpose()?.map(|pcrs| pcrs.to_string()),
                }),
            };
            let set = cache::set(daemon, by, name, policy, persist.as_ref())?;
            let views = set.providers.into_iter();
            (set.changed, views.flat_map(|view| view.warnings).collect())
        }
        (_, "") => (tpm::remove(daemon, by, name)?.changed, Vec::new()),
        (_, pcrs) => {
            // A native provider is enrolled by its root keys, and the descriptor would be its PIN.
            let is_native = known.row().is_some_and(|kind| kind.keys == KeysAt::Host);
            let fds = if is_native { Vec::new() } else { fds };
            let request = TpmRequest {
                with_credential: !fds.is_empty(),
                pcrs: Some(pcrs.to_owned()),
                public_key: None,
                without_pin: false,
            };
            (true, tpm::enroll(daemon, by, name, &request, fds)?.warnings)
        }
    };
    Ok(SettingsSet {
        provider: view_of(daemon, name)?,
        changed,
        tried: false,
        warnings,
    })
}

fn pcrs_not_told(name: &str, policy: CachePolicy) -> Problem {
    Problem::usage(format!(
        "provider '{name}': the record of what its cache keeps on disk is damaged, and does not say which PCRs it is for"
    ))
    .next(Advice::CacheOnDisk {
        name: name.to_owned(),
        policy,
        options: "--pcrs LIST".to_owned(),
    })
}

struct Done {
    changed: Change,
    tried: bool,
}

fn change(
    daemon: &Daemon,
    name: &str,
    request: &SettingsRequest,
    fds: Vec<OwnedFd>,
) -> Result<Done, Problem> {
    let known = daemon.recipients.find(name)?;
    let (id, name) = (known.provider().id(), known.provider().name());
    let credential = fds.into_iter().next().map(passphrase_from).transpose()?;
    let (of_host, of_kind): (Vec<_>, Vec<_>) = request
        .assigned
        .iter()
        .map(|assigned| (assigned.key.clone(), assigned.value.clone()))
        .partition(|(key, _)| OfHost::named(key).is_some());
    let of_host = of_host
        .iter()
        .map(|(key, value)| default_only(&known, key, value));
    let becomes_default = !of_host.collect::<Result<Vec<_>, _>>()?.is_empty();

    let record = record(daemon, id)?;
    let row = Kind::named(&record.kind).ok_or_else(|| not_of_a_kind(&known))?;
    let new = row
        .settings
        .change(&record.settings, &of_kind)
        .map_err(|error| refused(name, &error))?;
    let stanzas = match new.is_tried && !request.no_probe {
        true => Some(one_of_each_kek(daemon, id)?),
        false => None,
    };
    let mut done = Done {
        changed: Change::Unchanged,
        tried: false,
    };
    if new.settings != (row.settings.check)(record.settings.clone()).unwrap_or_default() {
        let note = || {
            let changed = daemon
                .keystore
                .change_provider_settings(id, &record.settings, &new.settings);
            changed.map(drop)
        };
        let others: Vec<_> = daemon
            .recipients
            .providers()
            .iter()
            .map(Provider::shared)
            .collect();
        let changed = match known.row() {
            Some(_) => known.provider().change(&SettingsChange {
                settings: &new.settings,
                credential: credential.as_ref(),
                trial: stanzas.as_deref(),
                others: &others,
                record: &note,
            }),
            None => {
                let settings = new.settings.clone();
                daemon.recipients.reopen(
                    ProviderRecord {
                        settings,
                        ..record.clone()
                    },
                    &note,
                )
            }
        };
        changed.map_err(|error| error.problem(name, known.row()))?;
        done.changed = Change::Changed;
        done.tried = stanzas.is_some();
        // Notes the time.
        let _ = daemon.recipients.report(&known);
    }
    if becomes_default && daemon.recipients.set_default(&known)? == Change::Changed {
        done.changed = Change::Changed;
    }
    Ok(done)
}

fn record(daemon: &Daemon, id: ProviderId) -> Result<ProviderRecord, Problem> {
    let records = daemon.keystore.providers()?;
    let found = records.sound.into_iter().find(|record| record.id == id);
    found.ok_or_else(|| {
        Problem::not_found(format!("the keystore's record of provider {id} can't be read"))
            .next(Advice::ShowStatus)
    })
}

fn not_of_a_kind(known: &Provider) -> Problem {
    Problem::failed(format!(
        "provider '{}' {}",
        known.provider().name(),
        known.provider().status()
    ))
    .next(Advice::Upgrade)
}

/// What the new settings must open.
fn one_of_each_kek(daemon: &Daemon, id: ProviderId) -> Result<Vec<Stanza>, Problem> {
    let mut of_kek: BTreeMap<String, Stanza> = BTreeMap::new();
    daemon.keystore.each_envelope(|record| {
        for stanza in record
            .envelope
            .stanzas
            .iter()
            .filter(|stanza| stanza.provider == id)
        {
            of_kek
                .entry(stanza.kek.0.clone())
                .or_insert_with(|| stanza.clone());
        }
    })?;
    Ok(of_kek.into_values().collect())
}

fn refused(name: &str, error: &SettingError) -> Problem {
    Problem::usage(format!("provider '{name}': {}", chain(error))).next(Advice::ShowProvider(name.to_owned()))
}

/// Of what is not of the kind, one thing can be set here.
fn default_only(known: &Provider, key: &str, value: &str) -> Result<(), Problem> {
    let name = known.provider().name();
    let setting = OfHost::named(key).unwrap_or(OfHost::Default);
    match (setting.changed_by(known), value) {
        (None, "yes") => Ok(()),
        (None, _) => Err(Problem::usage(format!(
            "only default=yes can be set: '{name}' stops being the default when another provider becomes it"
        ))
        .next(Advice::MakeDefault("OTHER".to_owned()))),
        (Some(command), _) => Err(Problem::usage(format!(
            "provider '{name}': '{key}' is not set by this command"
        ))
        .next(command)),
    }
}

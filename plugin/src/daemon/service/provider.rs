//! What `virtseal provider …` asks for.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use super::descriptors::{passphrase_from, take, wrong_fds};
use super::refused::refused;
use super::{cache, provider_view, tpm, tpm_credential};
use crate::api::{
    BackupMade, Changed, CredentialKind, DefaultSet, FindingView, OrphanEnvelope, OrphanKek, Orphans,
    Outcome, ProviderKind, Providers, pages, words,
};
use crate::audit::Actor;
use crate::daemon::glance::Age;
use crate::daemon::locks::Doing;
use crate::daemon::{Daemon, paths, records};
use crate::host::permitted::PathError;
use crate::job::record::Work;
use crate::model::advice::Advice;
use crate::model::deadlines::status::{FRESH_PROVIDERS, PAGES};
use crate::model::envelope::ProviderId;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem, chain};
use crate::provider::kind::{Credential, KeysAt, Kind};
use crate::provider::native::NativeProvider;
use crate::provider::{ProviderName, ProviderStatus};
use crate::secret::SecretBytes;
use crate::store::Change;
use crate::store::EnvelopeRecord;
use crate::vm::names::{ProviderNames, VmNames, unreachable};
use crate::vm::status::damaged;
use crate::vm::{deletion, forget_volume, orphans};

pub(crate) fn add(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    kind: ProviderKind,
    settings: &str,
    fds: Vec<OwnedFd>,
) -> Result<Providers, Problem> {
    let Some(kind) = Kind::named(&words(&kind)) else {
        return Err(
            Problem::usage(format!("there is no kind of provider called '{}'", words(&kind)))
                .next(Advice::AddProviderHelp(None)),
        );
    };
    let added = add_of(daemon, kind, name, settings, fds);
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-add", name, &added);
    added?;
    provider_view::list(daemon)
}

fn add_of(
    daemon: &Daemon,
    kind: &Kind,
    name: &str,
    settings: &str,
    fds: Vec<OwnedFd>,
) -> Result<(), Problem> {
    let credential = match kind.credential {
        Credential::Wanted => {
            let [credential] = take(fds)?;
            Some(passphrase_from(credential)?)
        }
        Credential::Later => None,
    };
    let name = provider_name(name)?;
    daemon.recipients.add(kind, &name, settings, credential.as_ref())
}

pub(crate) fn set_default(daemon: &Daemon, by: Actor, name: &str) -> Result<DefaultSet, Problem> {
    let provider = daemon.recipients.find(name)?;
    let set = daemon.recipients.set_default(&provider).map_err(Problem::from);
    records::note_provider(daemon, by, "provider-default", name, &set);
    let refused = daemon.recipients.cannot_wrap(provider.provider().id());
    Ok(DefaultSet {
        changed: set? == Change::Changed,
        warnings: refused
            .map(|problem| {
                let problem = problem.of("nothing can be sealed for it now");
                Finding::beside(
                    FindingCode::CannotWrap,
                    Subject::Provider(name.to_owned()),
                    problem,
                )
            })
            .map(FindingView::from)
            .into_iter()
            .collect(),
    })
}

/// Purges the keys of `name` from memory, and those that its cache keeps on disk.
pub(crate) fn lock(daemon: &Daemon, by: Actor, name: &str) -> Result<Changed, Problem> {
    let provider = daemon.recipients.find(name)?;
    let changed = provider.provider().status() != ProviderStatus::Locked;
    provider.provider().lock();
    // Notes the time.
    let _ = daemon.recipients.report(&provider);
    crate::host::process::trim();
    let locked = cache::check_disk_after_lock(&provider);
    records::note_provider(daemon, by, "provider-lock", name, &locked);
    locked.map(|()| Changed { changed })
}

pub(crate) fn unlock(daemon: &Daemon, by: Actor, name: &str, fds: Vec<OwnedFd>) -> Result<Changed, Problem> {
    let provider = daemon.recipients.find(name)?;
    let asks_for = provider.provider().asks_for();
    if fds.is_empty() && tpm_credential::is_unattended(daemon, &provider) {
        return unlock_by_tpm(daemon, by, name, fds);
    }
    let credential = match (asks_for, fds.is_empty()) {
        (None, true) => SecretBytes::copy_of(&[])
            .map_err(|error| Problem::from_error(Code::Failed, "no memory for a secret", &error))?,
        _ => {
            let [credential] = take(fds)?;
            passphrase_from(credential)?
        }
    };
    let changed = asks_for.is_some_and(CredentialKind::takes_the_place_of_another)
        || provider.provider().status() == ProviderStatus::Locked;
    let unlocked = provider
        .provider()
        .unlock(&credential)
        .map_err(|error| refused(&provider, &error));
    let _ = daemon.recipients.report(&provider);
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-unlock", name, &unlocked);
    if let (Some(native), Ok(())) = (provider.of_kind::<NativeProvider>(), &unlocked) {
        tpm::renew(daemon, by, &native);
    }
    if unlocked.is_ok() {
        tpm_credential::forget_reason(daemon, &provider);
    }
    cache::load_in_background(daemon, &provider);
    // A job may have waited for this.
    daemon.jobs.ring();
    unlocked.map(|()| Changed { changed })
}

pub(crate) fn unlock_by_tpm(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    fds: Vec<OwnedFd>,
) -> Result<Changed, Problem> {
    let unlocked = tpm::unlock(daemon, by, name, fds);
    cache::load_in_background(daemon, &daemon.recipients.find(name)?);
    unlocked
}

pub(crate) fn backup(daemon: &Daemon, name: &str, fds: Vec<OwnedFd>) -> Result<BackupMade, Problem> {
    let mut fds = fds.into_iter();
    let output = fds.next().ok_or_else(wrong_fds)?;
    let passphrase = fds.next().map(passphrase_from).transpose()?;
    let backup = native(daemon, name)?
        .backup(passphrase.as_ref())
        .map_err(|error| error.problem(name))?;
    let mut output = File::from(output);
    output
        .write_all(&backup.bytes)
        .and_then(|()| output.sync_all())
        .map_err(|error| Problem::from_error(Code::Failed, "can't write the backup", &error))?;
    Ok(BackupMade {
        generation: backup.generation.into(),
    })
}

pub(crate) fn confirm_backup(daemon: &Daemon, by: Actor, name: &str, generation: i64) -> Result<(), Problem> {
    let generation = u32::try_from(generation)
        .map_err(|_| Problem::usage(format!("there is no root key of generation {generation}")))?;
    let confirmed = native(daemon, name)?
        .confirm_backup(generation)
        .map_err(|error| error.problem(name));
    records::note_provider(daemon, by, "provider-backup", name, &confirmed);
    // A rotation waits for this.
    daemon.jobs.ring();
    confirmed
}

pub(crate) fn restore(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    fds: Vec<OwnedFd>,
) -> Result<Providers, Problem> {
    let mut fds = fds.into_iter();
    let (Some(backup), Some(passphrase)) = (fds.next(), fds.next()) else {
        return Err(wrong_fds());
    };
    let backup = SecretBytes::read_from(File::from(backup), NativeProvider::MAX_BACKUP_BYTES)
        .map_err(|error| Problem::from_error(Code::Failed, "can't read the backup", &error))?;
    let passphrase = passphrase_from(passphrase)?;
    let of_backup = fds.next().map(passphrase_from).transpose()?;
    let restored = provider_name(name).and_then(|valid| {
        daemon
            .recipients
            .add_by(|table| {
                NativeProvider::restore(table, &valid, backup.expose(), of_backup.as_ref(), &passphrase)
            })
            .map_err(|error| error.problem(name))
    });
    records::note_provider(daemon, by, "provider-restore", name, &restored);
    daemon.jobs.ring();
    restored?;
    provider_view::list(daemon)
}

fn native(daemon: &Daemon, name: &str) -> Result<std::sync::Arc<NativeProvider>, Problem> {
    let provider = daemon.recipients.find(name)?;
    if let Some(native) = provider.of_kind() {
        return Ok(native);
    }
    let why = match provider.row().map(|kind| kind.keys) {
        Some(KeysAt::Server) => "keeps its keys at its server, which is backed up there".to_owned(),
        Some(KeysAt::Token) => "keeps its keys in a token, which gives none out".to_owned(),
        Some(KeysAt::Host) | None => provider.provider().status().to_string(),
    };
    let problem = Problem::failed(format!("provider '{name}' {why}"));
    Err(match provider.row().map(|kind| kind.keys) {
        Some(KeysAt::Server) => problem,
        Some(KeysAt::Token) => problem.next("back the token up with its vendor's tools"),
        Some(KeysAt::Host) | None => problem.next(Advice::ShowProvider(name.to_owned())),
    })
}

fn provider_name(name: &str) -> Result<ProviderName, Problem> {
    name.parse().map_err(|error| Problem::usage(chain(&error)))
}

/// Deletes a provider. One that is needed goes only when its name was `typed`; the default one only as the last.
pub(crate) fn delete(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    typed: Option<&str>,
) -> Result<Outcome, Problem> {
    let _jobs = daemon.claims.jobs(Doing::Delete)?;
    let deleted = delete_if_free(daemon, name, typed);
    // What it has found behind can follow.
    daemon.copies_bell.ring();
    records::note_provider(daemon, by, "provider-delete", name, &deleted);
    deleted
}

fn delete_if_free(daemon: &Daemon, name: &str, typed: Option<&str>) -> Result<Outcome, Problem> {
    let provider = daemon.recipients.find(name)?;
    refuse_while_a_job_needs(daemon, provider.provider().id(), provider.provider().name())?;
    // Whoever types the name need not see who else needs it.
    let (host, seen) = match daemon.host_of_vms() {
        Ok(host) => (host, Ok(())),
        Err(blind) => (daemon.host(), Err(blind)),
    };
    deletion::delete(&host, &provider, &daemon.config().recipients, seen, typed)
}

fn refuse_while_a_job_needs(daemon: &Daemon, id: ProviderId, name: &str) -> Result<(), Problem> {
    for job in daemon.keystore.running_jobs()? {
        if Work::from_json(&job.task)?.providers().contains(&id) {
            return Err(
                Problem::busy(format!("'{name}' stays: job {} is about it", job.id.0))
                    .next(Advice::WatchJob(job.id.0).or(Advice::AbortJob(job.id.0))),
            );
        }
    }
    Ok(())
}

/// Envelopes whose VM is not defined, and KEKs that no defined VM's envelope needs.
pub(crate) fn orphans(daemon: &Daemon, age: Age, after: Option<&str>) -> Result<Orphans, Problem> {
    let most = match (age, after) {
        (_, Some(_)) => PAGES,
        (Age::Lately, None) => FRESH_PROVIDERS,
        (Age::Now, None) => Duration::ZERO,
    };
    let all = daemon.orphans.take(most, || all_orphans(daemon))?;
    let page = pages::of_orphans(&all, after);
    // What had to be read in pages is kept until the last one.
    if after.is_some() && page.next.is_none() {
        daemon.orphans.forget();
    }
    Ok(page)
}

/// By a link that somebody has planted meanwhile nothing is looked for.
fn is_present(daemon: &Daemon, location: &str) -> bool {
    match paths::known_place(daemon, Path::new(location)) {
        Ok(place) => place.exists(),
        Err(error) => matches!(error, PathError::HardLink(_)),
    }
}

fn all_orphans(daemon: &Daemon) -> Result<Orphans, Problem> {
    let domains = daemon.background.domains().map_err(|error| unreachable(&error))?;
    let names = VmNames::of_keystore(daemon.keystore.as_ref())?;
    // What destroys a key asks for all of them; here those that can't be read are named.
    let records = daemon.keystore.envelopes()?.sound;
    let facts = orphans::Facts {
        defined: domains.iter().map(|domain| domain.vm).collect(),
        known: records.iter().map(|record| record.envelope.clone()).collect(),
        behind: daemon.host_store.needed_keks()?.sound,
        retired: daemon.keystore.retired_keks()?.sound,
        made: daemon.keystore.made_keks()?.sound,
    };
    let providers = ProviderNames::of_host(&daemon.recipients, daemon.keystore.as_ref());
    let is_needed = |record: &EnvelopeRecord| {
        let mut defined = domains.iter();
        defined.any(|domain| forget_volume::is_needed_by(&domain.xml, record))
    };
    let envelopes = records.iter().filter_map(|record| {
        let is_present = is_present(daemon, &record.location);
        let is_listed = facts.lists(record, is_present, || is_needed(record));
        is_listed.then_some((record, is_present))
    });
    let keks = facts.keks().into_iter();
    let mut all = Orphans {
        envelopes: envelopes
            .map(|(record, present)| OrphanEnvelope {
                envelope: record.envelope.id.to_string(),
                vm: names.of(record.envelope.vm),
                kind: record.envelope.kind.into(),
                path: (!record.location.is_empty()).then(|| record.location.clone()),
                present,
                vm_defined: !facts.is_orphan(&record.envelope),
                providers: providers.of(&record.envelope),
            })
            .collect(),
        keks: keks
            .map(|((provider, kek), uses)| OrphanKek {
                provider: daemon.recipients.name_of(provider),
                kek,
                envelopes: uses.envelopes,
                copies: uses.copies,
                origin: uses.origin().into(),
            })
            .collect(),
        damaged: FindingView::all(&damaged::records(daemon.keystore.as_ref(), &daemon.host_store)),
        next: None,
    };
    pages::sort(&mut all);
    Ok(all)
}

//! What `virtseal provider …` asks for.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use super::descriptors::{passphrase_from, take, wrong_fds};
use super::{cache, provider_view, tpm};
use crate::api::{BackupMade, Providers};
use crate::audit::Actor;
use crate::daemon::{Daemon, records};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::kmip::{KmipProvider, KmipProviderError};
use crate::provider::native::{NativeError, NativeProvider};
use crate::provider::pkcs11::{Pkcs11Error, Pkcs11Provider};
use crate::provider::transit::{TransitProvider, TransitSettings};
use crate::provider::{KeyProvider, PinRefusal, ProviderError, ProviderName};
use crate::recipients::Provider;
use crate::secret::SecretBytes;

/// Adds a provider of `kind`; `settings` is the JSON of what the kind needs to know.
pub(crate) fn add(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    kind: &str,
    settings: &str,
    fds: Vec<OwnedFd>,
) -> Result<Providers, Problem> {
    let added = match kind {
        NativeProvider::KIND => add_native(daemon, name, fds),
        Pkcs11Provider::KIND => add_pkcs11(daemon, name, settings, fds),
        KmipProvider::KIND => add_kmip(daemon, name, settings),
        TransitProvider::KIND => add_transit(daemon, name, settings),
        _ => {
            return Err(Problem::new(
                Code::Usage,
                format!("there is no kind of provider called '{kind}'"),
            )
            .next(Advice::AddProviderHelp(None)));
        }
    };
    records::note_provider(daemon, by, "provider-add", name, &added);
    added?;
    provider_view::list(daemon)
}

fn add_native(daemon: &Daemon, name: &str, fds: Vec<OwnedFd>) -> Result<(), Problem> {
    let [passphrase] = take(fds)?;
    let passphrase = passphrase_from(passphrase)?;
    daemon
        .recipients
        .add_native(&provider_name(name)?, &passphrase)
        .map(drop)
        .map_err(|error| native_failure(name, &error))
}

fn add_transit(daemon: &Daemon, name: &str, settings: &str) -> Result<(), Problem> {
    let settings = TransitSettings::parse(settings).map_err(|error| {
        Problem::from_error(Code::Usage, format!("can't add provider '{name}'"), &error)
            .next(Advice::AddProviderHelp(Some(TransitProvider::KIND)))
    })?;
    daemon
        .recipients
        .add_transit(&provider_name(name)?, settings)
        .map(drop)
        .map_err(Problem::from)
}

fn add_pkcs11(daemon: &Daemon, name: &str, settings: &str, fds: Vec<OwnedFd>) -> Result<(), Problem> {
    let [pin] = take(fds)?;
    let settings = serde_json::from_str(settings).map_err(|error| {
        Problem::from_error(Code::Usage, format!("can't add provider '{name}'"), &error)
            .next(Advice::AddProviderHelp(Some(Pkcs11Provider::KIND)))
    })?;
    let pin = passphrase_from(pin)?;
    let added = daemon
        .recipients
        .add_pkcs11(&provider_name(name)?, settings, &pin);
    crate::host::process::trim();
    added.map(drop).map_err(|error| pkcs11_failure(name, &error))
}

fn add_kmip(daemon: &Daemon, name: &str, settings: &str) -> Result<(), Problem> {
    let valid = provider_name(name)?;
    let settings = serde_json::from_str(settings)
        .map_err(|error| Problem::from_error(Code::Usage, "the settings can't be used", &error))?;
    daemon
        .recipients
        .add_kmip(&valid, settings)
        .map(drop)
        .map_err(|error| {
            let code = match &error {
                KmipProviderError::Keystore(_) => Code::Failed,
                _ => Code::Usage,
            };
            Problem::from_error(code, format!("provider '{name}' is not added"), &error)
        })
}

/// Makes new envelopes go to `name`.
pub(crate) fn set_default(daemon: &Daemon, by: Actor, name: &str) -> Result<(), Problem> {
    let provider = daemon.recipients.find(name)?;
    let set = daemon
        .recipients
        .set_default(&provider)
        .map(drop)
        .map_err(Problem::from);
    records::note_provider(daemon, by, "provider-default", name, &set);
    set
}

/// Purges the keys of `name` from memory, and those that its cache keeps on disk.
pub(crate) fn lock(daemon: &Daemon, by: Actor, name: &str) -> Result<(), Problem> {
    let provider = daemon.recipients.find(name)?;
    provider.provider().lock();
    // Notes the time.
    let _ = daemon.recipients.report(&provider);
    crate::host::process::trim();
    let locked = cache::check_disk_after_lock(&provider);
    records::note_provider(daemon, by, "provider-lock", name, &locked);
    locked
}

/// Unlocks `name` with the passphrase in `fds`.
pub fn unlock(daemon: &Daemon, by: Actor, name: &str, fds: Vec<OwnedFd>) -> Result<(), Problem> {
    let [passphrase] = take(fds)?;
    let passphrase = passphrase_from(passphrase)?;
    let provider = daemon.recipients.find(name)?;
    let unlocked = provider
        .provider()
        .unlock(&passphrase)
        .map_err(|error| refused(provider.provider(), &error));
    let _ = daemon.recipients.report(&provider);
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-unlock", name, &unlocked);
    if let (Provider::Native(native), Ok(())) = (&provider, &unlocked) {
        tpm::renew(daemon, by, native);
    }
    cache::load_in_background(daemon, &provider);
    // A job may have waited for this.
    daemon.jobs.ring();
    unlocked
}

/// Writes a backup of `name` to the first of `fds`.
pub(crate) fn backup(daemon: &Daemon, name: &str, fds: Vec<OwnedFd>) -> Result<BackupMade, Problem> {
    let mut fds = fds.into_iter();
    let output = fds.next().ok_or_else(wrong_fds)?;
    let passphrase = fds.next().map(passphrase_from).transpose()?;
    let backup = native(daemon, name)?
        .backup(passphrase.as_ref())
        .map_err(|error| native_failure(name, &error))?;
    let mut output = File::from(output);
    output
        .write_all(&backup.bytes)
        .and_then(|()| output.sync_all())
        .map_err(|error| Problem::from_error(Code::Failed, "can't write the backup", &error))?;
    Ok(BackupMade {
        generation: backup.generation.into(),
    })
}

/// Notes that the backup of `name` is on disk.
pub(crate) fn confirm_backup(daemon: &Daemon, by: Actor, name: &str, generation: i64) -> Result<(), Problem> {
    let generation = u32::try_from(generation).map_err(|_| {
        Problem::new(
            Code::Usage,
            format!("{generation} is no generation of a root key"),
        )
    })?;
    let confirmed = native(daemon, name)?
        .confirm_backup(generation)
        .map_err(|error| native_failure(name, &error));
    records::note_provider(daemon, by, "provider-backup", name, &confirmed);
    // A rotation waits for this.
    daemon.jobs.ring();
    confirmed
}

/// Restores a provider as `name`; `fds` holds the backup, the new passphrase, and the backup's own if any.
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
            .restore_native(&valid, backup.expose(), of_backup.as_ref(), &passphrase)
            .map_err(|error| native_failure(name, &error))
    });
    records::note_provider(daemon, by, "provider-restore", name, &restored);
    daemon.jobs.ring();
    restored?;
    provider_view::list(daemon)
}

fn native(daemon: &Daemon, name: &str) -> Result<std::sync::Arc<NativeProvider>, Problem> {
    match daemon.recipients.find(name)? {
        Provider::Native(native) => Ok(native),
        Provider::Kmip(_) | Provider::Transit(_) => Err(Problem::new(
            Code::Failed,
            format!("provider '{name}' keeps its keys at its server, which is backed up there"),
        )),
        Provider::Pkcs11(_) => Err(Problem::new(
            Code::Failed,
            format!("provider '{name}' keeps its keys in a token, which gives none out"),
        )
        .next("back the token up with its vendor's tools")),
        Provider::Unusable(other) => Err(Problem::new(
            Code::Failed,
            format!("provider '{name}' {}", other.status()),
        )
        .next(Advice::ShowProvider(name.to_owned()))),
    }
}

fn provider_name(name: &str) -> Result<ProviderName, Problem> {
    name.parse()
        .map_err(|error| Problem::new(Code::Usage, chain(&error)))
}

fn refused(provider: &dyn KeyProvider, error: &ProviderError) -> Problem {
    let name = provider.name();
    let (code, next) = error.advice(name);
    Problem::new(code, format!("provider '{name}' {}", chain(error))).advised(next)
}

pub(crate) fn native_failure(name: &str, error: &NativeError) -> Problem {
    let (code, next) = match error {
        NativeError::Keystore(error) => return error.into(),
        NativeError::WrongPassphrase => (
            Code::Locked,
            Some(Advice::RotateProvider(name.to_owned()).note("with the passphrase that unlocks it")),
        ),
        NativeError::Locked => (Code::Locked, Some(Advice::UnlockProvider(name.to_owned()))),
        NativeError::BackupIsEncrypted | NativeError::Backup(_) => (
            Code::Failed,
            Some(Advice::RestoreProvider(name.to_owned()).note("with the passphrase of the backup")),
        ),
        _ => (Code::Failed, None),
    };
    let joint = match error {
        NativeError::Locked | NativeError::Encrypt(_) | NativeError::Backup(_) | NativeError::Document(_) => {
            ""
        }
        _ => ":",
    };
    Problem::new(code, format!("provider '{name}'{joint} {}", chain(error))).advised(next)
}

fn pkcs11_failure(name: &str, error: &Pkcs11Error) -> Problem {
    let add = Advice::AddProviderHelp(Some(Pkcs11Provider::KIND));
    let (code, next) = match error {
        Pkcs11Error::Provider(ProviderError::WrongPin(PinRefusal::Blocked | PinRefusal::NoneIsSet)) => (
            Code::Locked,
            Some("a new PIN (pkcs11-tool --login --login-type so --init-pin), then the same command".into()),
        ),
        Pkcs11Error::Provider(ProviderError::WrongPin(PinRefusal::NotTheLastTry)) => (
            Code::Locked,
            Some("pkcs11-tool --login --list-objects with the right PIN, then the same command".into()),
        ),
        Pkcs11Error::Provider(ProviderError::WrongPin(_)) => (
            Code::Locked,
            Some(format!("the same command with the right PIN for '{name}'").into()),
        ),
        Pkcs11Error::Provider(error) => (error.advice(name).0, Some(add)),
        Pkcs11Error::ManyProviders(_) => (Code::Usage, Some("the same command with --id UUID".into())),
        Pkcs11Error::TokenInUse(other) => (Code::Failed, Some(Advice::ShowProvider(other.clone()))),
        Pkcs11Error::Settings(_) => (Code::Usage, Some(add)),
        Pkcs11Error::Keystore(_) | Pkcs11Error::Json(_) => (Code::Failed, None),
    };
    let message = match error {
        Pkcs11Error::Provider(ProviderError::WrongPin(_)) => format!("the token {}", chain(error)),
        Pkcs11Error::Provider(error) => format!("provider '{name}' {}", chain(error)),
        error => chain(error),
    };
    Problem::new(code, message).advised(next)
}

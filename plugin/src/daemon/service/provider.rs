//! What `virtseal provider …` asks for.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use super::cache::persist_view;
use super::tpm::{tpm_view, why_locked};
use crate::api::{BackupMade, ProviderView, Providers};
use crate::daemon::{Daemon, glance};
use crate::host::local_time::rfc3339;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::kmip::{KmipProvider, KmipProviderError};
use crate::provider::native::{NativeError, NativeProvider};
use crate::provider::pkcs11::{Pkcs11Error, Pkcs11Provider};
use crate::provider::transit::{TransitProvider, TransitSettings};
use crate::provider::{KeyProvider, PinRefusal, ProviderError, ProviderName, ProviderStatus};
use crate::recipients::Provider;
use crate::secret::SecretBytes;

/// The most bytes of a passphrase, or of a client's key and its certificates in PEM.
const MAX_PASSPHRASE: usize = 32 * 1024;

impl Daemon {
    /// All providers, by name.
    pub fn providers(&self) -> Result<Providers, Problem> {
        let uses = glance::provider_uses(self)?;
        let default = self
            .recipients
            .default_provider()
            .map(|known| known.provider().id());
        let view = |known: &Provider| {
            let provider = known.provider();
            let report = self.recipients.report(known);
            let cache = known.cache();
            ProviderView {
                name: provider.name().to_owned(),
                id: provider.id().to_string(),
                kind: known.kind().to_owned(),
                state: report.status.as_str().to_owned(),
                reason: reason(report.status).or_else(|| why_locked(known)),
                unlocked_by: self.openable_by(known),
                tpm: tpm_view(known),
                since: rfc3339(report.since),
                last_answer: report.last_answer.map(rfc3339),
                warnings: report.warnings,
                cache: cache.map(|cache| cache.policy().to_string()),
                cached_keks: cache.map_or(0, |cache| cache.len() as i64),
                persist: persist_view(known),
                is_default: Some(provider.id()) == default,
                envelopes: uses.get(&provider.id()).map_or(0, |count| *count as i64),
            }
        };
        let mut providers: Vec<_> = self.recipients.providers().iter().map(view).collect();
        providers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Providers { providers })
    }

    /// Adds a provider of `kind`; `settings` is the JSON of what the kind needs to know.
    pub fn add_provider(
        &self,
        name: &str,
        kind: &str,
        settings: &str,
        fds: Vec<OwnedFd>,
    ) -> Result<Providers, Problem> {
        let added = match kind {
            NativeProvider::KIND => self.add_native(name, fds),
            Pkcs11Provider::KIND => self.add_pkcs11(name, settings, fds),
            KmipProvider::KIND => self.add_kmip(name, settings),
            TransitProvider::KIND => self.add_transit(name, settings),
            _ => {
                return Err(Problem::new(
                    Code::Usage,
                    format!("there is no kind of provider called '{kind}'"),
                )
                .next(Advice::AddProviderHelp(None)));
            }
        };
        self.audit_provider("provider-add", name, &added);
        added?;
        self.providers()
    }

    fn add_native(&self, name: &str, fds: Vec<OwnedFd>) -> Result<(), Problem> {
        let [passphrase] = take(fds)?;
        let passphrase = passphrase_from(passphrase)?;
        self.recipients
            .add_native(&provider_name(name)?, &passphrase)
            .map(drop)
            .map_err(|error| native_failure(name, &error))
    }

    fn add_transit(&self, name: &str, settings: &str) -> Result<(), Problem> {
        let settings = TransitSettings::parse(settings).map_err(|error| {
            Problem::from_error(Code::Usage, format!("can't add provider '{name}'"), &error)
                .next(Advice::AddProviderHelp(Some(TransitProvider::KIND)))
        })?;
        self.recipients
            .add_transit(&provider_name(name)?, settings)
            .map(drop)
            .map_err(Problem::from)
    }

    fn add_pkcs11(&self, name: &str, settings: &str, fds: Vec<OwnedFd>) -> Result<(), Problem> {
        let [pin] = take(fds)?;
        let settings = serde_json::from_str(settings).map_err(|error| {
            Problem::from_error(Code::Usage, format!("can't add provider '{name}'"), &error)
                .next(Advice::AddProviderHelp(Some(Pkcs11Provider::KIND)))
        })?;
        let pin = passphrase_from(pin)?;
        let added = self.recipients.add_pkcs11(&provider_name(name)?, settings, &pin);
        crate::host::process::trim();
        added.map(drop).map_err(|error| pkcs11_failure(name, &error))
    }

    fn add_kmip(&self, name: &str, settings: &str) -> Result<(), Problem> {
        let valid = provider_name(name)?;
        let settings = serde_json::from_str(settings)
            .map_err(|error| Problem::from_error(Code::Usage, "the settings can't be used", &error))?;
        self.recipients
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
    pub fn set_default_provider(&self, name: &str) -> Result<(), Problem> {
        let provider = self.recipients.find(name)?;
        let set = self
            .recipients
            .set_default(&provider)
            .map(drop)
            .map_err(Problem::from);
        self.audit_provider("provider-default", name, &set);
        set
    }

    /// Purges the keys of `name` from memory, and those that its cache keeps on disk.
    pub fn lock_provider(&self, name: &str) -> Result<(), Problem> {
        let provider = self.recipients.find(name)?;
        provider.provider().lock();
        // Notes the time.
        let _ = self.recipients.report(&provider);
        crate::host::process::trim();
        let locked = self.check_disk_after_lock(&provider);
        self.audit_provider("provider-lock", name, &locked);
        locked
    }

    /// Unlocks `name` with the passphrase in `fds`.
    pub fn unlock_provider(&self, name: &str, fds: Vec<OwnedFd>) -> Result<(), Problem> {
        let [passphrase] = take(fds)?;
        let passphrase = passphrase_from(passphrase)?;
        let provider = self.recipients.find(name)?;
        let unlocked = provider
            .provider()
            .unlock(&passphrase)
            .map_err(|error| refused(provider.provider(), &error));
        let _ = self.recipients.report(&provider);
        crate::host::process::trim();
        self.audit_provider("provider-unlock", name, &unlocked);
        if let (Provider::Native(native), Ok(())) = (&provider, &unlocked) {
            self.renew_tpm(native);
        }
        self.load_in_background(&provider);
        // A job may have waited for this.
        self.jobs_bell.ring();
        unlocked
    }

    /// Writes a backup of `name` to the first of `fds`.
    pub fn backup_provider(&self, name: &str, fds: Vec<OwnedFd>) -> Result<BackupMade, Problem> {
        let mut fds = fds.into_iter();
        let output = fds.next().ok_or_else(wrong_fds)?;
        let passphrase = fds.next().map(passphrase_from).transpose()?;
        let backup = self
            .native(name)?
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
    pub fn confirm_backup(&self, name: &str, generation: i64) -> Result<(), Problem> {
        let generation = u32::try_from(generation).map_err(|_| {
            Problem::new(
                Code::Usage,
                format!("{generation} is no generation of a root key"),
            )
        })?;
        let confirmed = self
            .native(name)?
            .confirm_backup(generation)
            .map_err(|error| native_failure(name, &error));
        self.audit_provider("provider-backup", name, &confirmed);
        // A rotation waits for this.
        self.jobs_bell.ring();
        confirmed
    }

    /// Restores a provider as `name`; `fds` holds the backup, the new passphrase, and the backup's own if any.
    pub fn restore_provider(&self, name: &str, fds: Vec<OwnedFd>) -> Result<Providers, Problem> {
        let mut fds = fds.into_iter();
        let (Some(backup), Some(passphrase)) = (fds.next(), fds.next()) else {
            return Err(wrong_fds());
        };
        let backup = SecretBytes::read_from(File::from(backup), NativeProvider::MAX_BACKUP_BYTES)
            .map_err(|error| Problem::from_error(Code::Failed, "can't read the backup", &error))?;
        let passphrase = passphrase_from(passphrase)?;
        let of_backup = fds.next().map(passphrase_from).transpose()?;
        let restored = provider_name(name).and_then(|valid| {
            self.recipients
                .restore_native(&valid, backup.expose(), of_backup.as_ref(), &passphrase)
                .map_err(|error| native_failure(name, &error))
        });
        self.audit_provider("provider-restore", name, &restored);
        self.jobs_bell.ring();
        restored?;
        self.providers()
    }

    fn native(&self, name: &str) -> Result<std::sync::Arc<NativeProvider>, Problem> {
        match self.recipients.find(name)? {
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
}

fn reason(status: ProviderStatus) -> Option<String> {
    match status {
        ProviderStatus::NotTrusted(reason)
        | ProviderStatus::Unreachable(reason)
        | ProviderStatus::Degraded(reason) => Some(reason),
        ProviderStatus::NotBackedUp | ProviderStatus::Locked | ProviderStatus::Ready => None,
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

pub(in crate::daemon) fn native_failure(name: &str, error: &NativeError) -> Problem {
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

pub(in crate::daemon) fn take<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], Problem> {
    fds.try_into().map_err(|_| wrong_fds())
}

pub(in crate::daemon) fn wrong_fds() -> Problem {
    Problem::new(
        Code::Usage,
        "the call came without the file descriptors that it needs",
    )
    .next("use the virtseal of the same version as virtseald")
}

pub(in crate::daemon) fn passphrase_from(fd: OwnedFd) -> Result<SecretBytes, Problem> {
    let mut passphrase = SecretBytes::read_from(File::from(fd), MAX_PASSPHRASE)
        .map_err(|error| Problem::from_error(Code::Usage, "can't read the passphrase", &error))?;
    passphrase.trim_newline();
    if passphrase.expose().is_empty() {
        return Err(Problem::new(Code::Usage, "the passphrase is empty").next("choose one"));
    }
    Ok(passphrase)
}

//! What `virtseal provider tpm` and `provider unlock --tpm` ask for, and the unlocking at the daemon's start.
//!
//! Start-up waits for none of it. A lock by hand counts: what began to unlock before it, or tries again after it, does
//! not undo it.

use std::path::Path;
use std::sync::Arc;

use time::OffsetDateTime;

use super::Daemon;
use crate::failure::{Code, Failure, chain};
use crate::keystore::{Change, UnixTime};
use crate::provider::native::{NativeError, NativeProvider};
use crate::provider::registry::Provider;
use crate::provider::{KeyProvider, ProviderStatus};
use crate::tpm::{PcrList, TpmError};

/// A systemd credential of this name, followed by a provider's, unlocks that provider.
pub const CREDENTIAL: &str = "virtseal.passphrase.";

/// A provider that the TPM is to unlock when the daemon starts.
pub struct TpmUnlock {
    provider: Arc<NativeProvider>,
    /// How often it was locked before.
    locks: u64,
}

/// What came of a [`TpmUnlock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    /// It is unlocked, or will not be in this way.
    Over,
    /// The TPM may come.
    Again,
}

impl Daemon {
    /// Lets the TPM open `name` while `pcrs` are what they are now; if none are given, those of the enrolment that this
    /// one replaces: who repeats a command without thinking of them must not end up with fewer. Says which they are.
    pub fn enroll_tpm(&self, name: &str, pcrs: Option<&str>) -> Result<PcrList, Failure> {
        let native = self.native_for_tpm(name)?;
        let pcrs = match pcrs {
            Some(given) => given
                .parse::<PcrList>()
                .map_err(|error| Failure::new(Code::Usage, chain(&error)).next(enroll(&native)))?,
            None => pcrs_of_before(&native)?,
        };
        let enrolled = native
            .enroll_tpm(&self.tpm, &pcrs)
            .map_err(|error| tpm_failure(&native, &error));
        crate::process::trim();
        self.audit_provider("provider-tpm-enroll", name, &enrolled);
        enrolled.map(|()| pcrs)
    }

    /// Takes that away. Says whether there was anything to take.
    pub fn remove_tpm(&self, name: &str) -> Result<bool, Failure> {
        let native = self.native_for_tpm(name)?;
        let removed = native.remove_tpm().map_err(|error| tpm_failure(&native, &error));
        self.audit_provider("provider-tpm-remove", name, &removed);
        removed.map(|change| change == Change::Changed)
    }

    /// Unlocks `name` by the TPM.
    pub fn unlock_by_tpm(&self, name: &str) -> Result<(), Failure> {
        let native = self.native_for_tpm(name)?;
        let unlocked = native
            .unlock_by_tpm(&self.tpm, native.locks())
            .map_err(|error| tpm_failure(&native, &error));
        crate::process::trim();
        self.audit_provider("provider-unlock", name, &unlocked);
        self.jobs_bell.ring();
        unlocked
    }

    /// The providers that the TPM is to unlock now that the daemon starts.
    #[must_use]
    pub fn to_unlock_by_tpm(&self) -> Vec<TpmUnlock> {
        self.registry
            .providers()
            .into_iter()
            .filter_map(|known| match known {
                Provider::Native(provider) => Some(provider),
                _ => None,
            })
            .filter(|native| matches!(native.tpm_enrollment(), Ok(Some(_))))
            .map(|provider| TpmUnlock {
                locks: provider.locks(),
                provider,
            })
            .collect()
    }

    /// Tries it once, and logs what came of it.
    pub fn try_to_unlock(&self, unlock: &TpmUnlock) -> Tried {
        let TpmUnlock { provider, locks } = unlock;
        let name = provider.name();
        if provider.locks() != *locks || provider.status() != ProviderStatus::Locked {
            return Tried::Over;
        }
        let unlocked = provider.unlock_by_tpm(&self.tpm, *locks);
        crate::process::trim();
        if let Err(NativeError::Tpm(error)) = &unlocked
            && error.may_pass()
        {
            tracing::warn!(provider = name, "not unlocked by the TPM yet: {}", chain(error));
            return Tried::Again;
        }
        let unlocked = unlocked.map_err(|error| tpm_failure(provider, &error));
        self.audit_provider("provider-unlock", name, &unlocked);
        match &unlocked {
            Ok(()) => tracing::info!(provider = name, "unlocked by the TPM"),
            Err(failure) => tracing::error!(provider = name, "{failure}"),
        }
        self.jobs_bell.ring();
        Tried::Over
    }

    /// At an unlock that follows a rotation: the TPM gets the new root keys too. Says why it does not.
    pub(super) fn renew_tpm(&self, native: &NativeProvider) -> Option<String> {
        self.tpm_lags(native, native.renew_tpm(&self.tpm))
    }

    /// Why the TPM has not got the new root keys, if it has not.
    pub(super) fn tpm_lags(
        &self,
        native: &NativeProvider,
        renewed: Result<Change, NativeError>,
    ) -> Option<String> {
        let name = native.name();
        match renewed {
            Ok(Change::Unchanged) => None,
            Ok(Change::Changed) => {
                self.audit_provider("provider-tpm-enroll", name, &Ok(()));
                None
            }
            Err(error) => {
                let failure = tpm_failure(native, &error);
                tracing::warn!(
                    provider = name,
                    "the TPM does not get its new root key: {failure}"
                );
                Some(format!(
                    "the TPM does not unlock '{name}' any more ({}): {}",
                    chain(&error),
                    enroll(native)
                ))
            }
        }
    }

    /// What unlocks a provider here: `passphrase`, `TPM (PCR 7, since 2026-11-22)`, `systemd credential`. Only what is told
    /// without asking anybody.
    pub(super) fn ways_in(&self, known: &Provider) -> Vec<String> {
        let mut ways = Vec::new();
        if let Provider::Native(native) = known {
            ways.push("passphrase".to_owned());
            if let Ok(Some(enrollment)) = native.tpm_enrollment() {
                let pcrs = enrollment
                    .pcrs
                    .map_or("damaged".to_owned(), |pcrs| format!("PCR {pcrs}"));
                let stale = if enrollment.stale {
                    ", stale: enroll again"
                } else {
                    ""
                };
                ways.push(format!(
                    "TPM ({pcrs}, since {}{stale})",
                    date(enrollment.enrolled)
                ));
            }
        }
        if has_credential(known.provider().name()) {
            ways.push("systemd credential".to_owned());
        }
        ways
    }

    fn native_for_tpm(&self, name: &str) -> Result<Arc<NativeProvider>, Failure> {
        match self.registry.find(name)? {
            Provider::Native(native) => Ok(native),
            other => Err(Failure::new(
                Code::Usage,
                format!(
                    "the TPM unlocks native providers, and provider '{name}' is of kind {}",
                    other.kind()
                ),
            )
            .next("to unlock it at start, use a systemd credential: see unlock-at-boot.conf")),
        }
    }
}

/// Why a native provider is locked that the TPM should have unlocked, with what to do.
pub(super) fn why_locked(known: &Provider) -> Option<String> {
    let Provider::Native(native) = known else {
        return None;
    };
    native.why_locked().map(|why| {
        format!(
            "{why}; unlock it with its passphrase, then enroll it again: {}",
            enroll(native)
        )
    })
}

/// The PCRs that the TPM looks at now, or the usual ones when it looks at none.
fn pcrs_of_before(native: &NativeProvider) -> Result<PcrList, Failure> {
    let enrollment = native
        .tpm_enrollment()
        .map_err(|error| tpm_failure(native, &error))?;
    match enrollment {
        None => Ok(PcrList::default()),
        Some(enrollment) => enrollment.pcrs.ok_or_else(|| {
            let name = native.name();
            Failure::new(
                Code::Usage,
                format!(
                    "provider '{name}': its enrolment is damaged, and does not say which PCRs it was for"
                ),
            )
            .next(format!("virtseal provider tpm {name} --enroll --pcrs LIST"))
        }),
    }
}

/// The command that enrolls it for the PCRs that it is enrolled for.
fn enroll(native: &NativeProvider) -> String {
    let command = format!("virtseal provider tpm {} --enroll", native.name());
    let enrollment = native.tpm_enrollment().ok().flatten();
    match enrollment.map(|enrollment| enrollment.pcrs) {
        Some(None) => format!("{command} --pcrs LIST"),
        Some(Some(pcrs)) if pcrs != PcrList::default() => format!("{command} --pcrs {pcrs}"),
        Some(Some(_)) | None => command,
    }
}

fn tpm_failure(native: &NativeProvider, error: &NativeError) -> Failure {
    let name = native.name();
    let message = format!("provider '{name}' {}", chain(error));
    let enroll_again = || {
        format!(
            "virtseal provider unlock {name}, with its passphrase, then {}",
            enroll(native)
        )
    };
    match error {
        NativeError::Keystore(error) => Failure::new(Code::Failed, chain(error)),
        NativeError::Locked => {
            Failure::new(Code::Locked, message).next(format!("virtseal provider unlock {name}"))
        }
        NativeError::NotEnrolled => Failure::new(Code::NotFound, message).next(enroll_again()),
        NativeError::Tpm(TpmError::NoSuchPcr(_) | TpmError::OwnerPassword) => Failure::new(Code::Failed, message),
        NativeError::Tpm(error) if error.may_pass() => Failure::new(Code::Unreachable, message).next(format!(
            "virtseal provider unlock {name}, with its passphrase, or set 'tpm' in virtseald.yaml and restart virtseald"
        )),
        NativeError::Tpm(TpmError::LockedOut { .. } | TpmError::OutOfOrder | TpmError::Failed { .. }) => {
            Failure::new(Code::Failed, message)
                .next(format!("virtseal provider unlock {name}, with its passphrase"))
        }
        NativeError::Tpm(_) | NativeError::TpmStale | NativeError::TpmSeal => {
            Failure::new(Code::Locked, message).next(enroll_again())
        }
        _ => Failure::new(Code::Failed, message),
    }
}

fn has_credential(name: &str) -> bool {
    std::env::var_os("CREDENTIALS_DIRECTORY")
        .is_some_and(|directory| Path::new(&directory).join(format!("{CREDENTIAL}{name}")).exists())
}

/// Such as 2026-11-22.
fn date(time: UnixTime) -> String {
    OffsetDateTime::from_unix_timestamp(time).map_or_else(|_| "?".to_owned(), |time| time.date().to_string())
}

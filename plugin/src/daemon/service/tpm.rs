//! What `virtseal provider tpm` and `provider unlock --tpm` ask for, and the unlocking at the daemon's start.
//!
//! A lock by hand counts: what began to unlock before it, or tries again after it, does
//! not undo it.

use std::os::fd::OwnedFd;

use super::descriptors::pin_from;
use super::tpm_credential::{self, Tried};
use super::tpm_policy::{enroll_again, policy, refuse_to_drop_pin, said};
use crate::api::{Changed, TpmEnrolled, TpmRequest};
use crate::audit::Actor;
use crate::daemon::{Daemon, records};
use crate::host::tpm::TpmError;
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem, chain};
use crate::provider::native::{LocksNoted, NativeError, NativeProvider};
use crate::provider::toolbox::bound_credential::TpmEnrollment;
use crate::provider::{KeyProvider, ProviderStatus};
use crate::recipients::Provider;
use crate::store::Change;

/// A systemd credential of this name, followed by a provider's, unlocks that provider.
pub(crate) const CREDENTIAL: &str = "virtseal.passphrase.";

/// A provider that the TPM is to unlock when the daemon starts.
pub(crate) struct TpmUnlock {
    provider: Provider,
    /// How often it was locked before.
    locks: LocksNoted,
}

impl TpmUnlock {
    pub(crate) fn provider(&self) -> &Provider {
        &self.provider
    }
}

/// Lets the TPM open `name` as `request` says, and by the PIN in `fds` if there is one. What it does not say is as in the
/// enrolment that this one replaces: who repeats a command without thinking of it must not end up with less.
pub(crate) fn enroll(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    request: &TpmRequest,
    fds: Vec<OwnedFd>,
) -> Result<TpmEnrolled, Problem> {
    let known = daemon.recipients.find(name)?;
    let Some(native) = known.of_kind::<NativeProvider>() else {
        return tpm_credential::enroll(daemon, by, &known, request, fds);
    };
    let pin = fds.into_iter().next().map(pin_from).transpose()?;
    let before = enrollment_of(&native)?;
    let policy = policy(name, before.as_ref(), request)?;
    refuse_to_drop_pin(name, before.as_ref(), request, pin.is_some())?;
    let enrolled = native
        .enroll_tpm(&daemon.tpm, &policy.with_pin(pin))
        .map_err(|error| tpm_failure(&native, &error));
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-tpm-enroll", name, &enrolled);
    enrolled?;
    let enrollment =
        enrollment_of(&native)?.ok_or_else(|| tpm_failure(&native, &NativeError::NotEnrolled))?;
    Ok(said(name, &enrollment))
}

/// Takes that away. Says whether there was anything to take.
pub(crate) fn remove(daemon: &Daemon, by: Actor, name: &str) -> Result<Changed, Problem> {
    let known = daemon.recipients.find(name)?;
    let Some(native) = known.of_kind::<NativeProvider>() else {
        return tpm_credential::remove(daemon, by, &known);
    };
    let removed = native.remove_tpm().map_err(|error| tpm_failure(&native, &error));
    records::note_provider(daemon, by, "provider-tpm-remove", name, &removed);
    Ok(Changed {
        changed: removed? == Change::Changed,
    })
}

pub(crate) fn unlock(daemon: &Daemon, by: Actor, name: &str, fds: Vec<OwnedFd>) -> Result<Changed, Problem> {
    let known = daemon.recipients.find(name)?;
    let changed = known.provider().status() == ProviderStatus::Locked;
    let pin = fds.into_iter().next().map(pin_from).transpose()?;
    let Some(native) = known.of_kind::<NativeProvider>() else {
        tpm_credential::unlock(daemon, by, &known, pin.as_ref())?;
        return Ok(Changed { changed });
    };
    let unlocked = native
        .unlock_by_tpm(&daemon.tpm, native.locks(), pin.as_ref())
        .map_err(|error| tpm_failure(&native, &error));
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-unlock", name, &unlocked);
    daemon.jobs.ring();
    unlocked.map(|()| Changed { changed })
}

/// The providers that the TPM is to unlock now that the daemon starts.
pub(crate) fn to_unlock(daemon: &Daemon) -> Vec<TpmUnlock> {
    let providers = daemon.recipients.providers().into_iter();
    providers
        .inspect(|known| tpm_credential::settle(daemon, known))
        .filter(|known| enrollment(daemon, known).is_some())
        .map(|provider| TpmUnlock {
            locks: provider.provider().locks(),
            provider,
        })
        .collect()
}

/// Tries it once, and logs what came of it.
pub(crate) fn try_to_unlock(daemon: &Daemon, unlock: &TpmUnlock) -> Tried {
    let TpmUnlock {
        provider: known,
        locks,
    } = unlock;
    let name = known.provider().name();
    if known.provider().locks() != *locks || known.provider().status() != ProviderStatus::Locked {
        return Tried::Over;
    }
    let Some(provider) = known.of_kind::<NativeProvider>() else {
        return tpm_credential::try_to_unlock(daemon, known, *locks);
    };
    let unlocked = provider.unlock_by_tpm(&daemon.tpm, *locks, None);
    crate::host::process::trim();
    if let Err(NativeError::Tpm(TpmError::NeedsPin)) = &unlocked {
        tracing::info!(
            provider = name,
            "it waits for its PIN: {}",
            Advice::UnlockByTpm(name.to_owned())
        );
        return Tried::Over;
    }
    if let Err(NativeError::Tpm(error)) = &unlocked
        && error.may_pass()
    {
        tracing::warn!(provider = name, "not unlocked by the TPM yet: {}", chain(error));
        return Tried::Again;
    }
    let unlocked = unlocked.map_err(|error| tpm_failure(&provider, &error));
    records::note_provider(daemon, Actor::Virtseald, "provider-unlock", name, &unlocked);
    match &unlocked {
        Ok(()) => tracing::info!(provider = name, "unlocked by the TPM"),
        Err(failure) => tracing::error!(provider = name, "{failure}"),
    }
    daemon.jobs.ring();
    Tried::Over
}

/// At an unlock that follows a rotation: the TPM gets the new root keys too. Says why it does not.
pub(crate) fn renew(daemon: &Daemon, by: Actor, native: &NativeProvider) -> Option<Finding> {
    tpm_lags(daemon, by, native, native.renew_tpm(&daemon.tpm, None))
}

/// Why the TPM has not got the new root keys, if it has not.
pub(crate) fn tpm_lags(
    daemon: &Daemon,
    by: Actor,
    native: &NativeProvider,
    renewed: Result<Change, NativeError>,
) -> Option<Finding> {
    let name = native.name();
    match renewed {
        Ok(Change::Unchanged) => None,
        Ok(Change::Changed) => {
            records::note_provider(daemon, by, "provider-tpm-enroll", name, &Ok(()));
            None
        }
        Err(error) => {
            let failure = tpm_failure(native, &error);
            tracing::warn!(
                provider = name,
                "the TPM does not get its new root key: {failure}"
            );
            let why = chain(&error);
            let what = format!("the TPM does not unlock '{name}' any more ({why})");
            let provider = Subject::Provider(name.to_owned());
            Some(Finding::warning(FindingCode::TpmStale, provider, what).next(enroll_command(native)))
        }
    }
}

/// How the TPM unlocks `known`, if it does.
pub(super) fn enrollment(daemon: &Daemon, known: &Provider) -> Option<TpmEnrollment> {
    match known.of_kind::<NativeProvider>() {
        Some(native) => native.tpm_enrollment().ok().flatten(),
        None => tpm_credential::enrollment(daemon, known),
    }
}

fn enrollment_of(native: &NativeProvider) -> Result<Option<TpmEnrollment>, Problem> {
    native
        .tpm_enrollment()
        .map_err(|error| tpm_failure(native, &error))
}

/// The command that enrolls it for the PCRs that it is enrolled for.
pub(super) fn enroll_command(native: &NativeProvider) -> Advice {
    enroll_again(native.name(), native.tpm_enrollment().ok().flatten().as_ref())
}

pub(crate) fn tpm_failure(native: &NativeProvider, error: &NativeError) -> Problem {
    let name = native.name();
    let message = format!("provider '{name}' {}", chain(error));
    let unlock = || Advice::UnlockProvider(name.to_owned()).note("with its passphrase");
    let enroll_again = || unlock().then(enroll_command(native));
    match error {
        NativeError::Keystore(error) => error.into(),
        NativeError::Locked => {
            Problem::new(Code::Locked, message).next(Advice::UnlockProvider(name.to_owned()))
        }
        NativeError::NotEnrolled => Problem::not_found(message).next(enroll_again()),
        NativeError::Tpm(TpmError::NeedsPin | TpmError::WrongPin { .. }) => {
            Problem::new(Code::Locked, message).next(Advice::UnlockByPin(name.to_owned()))
        }
        NativeError::Tpm(TpmError::NotSigned { .. }) => Problem::new(Code::Locked, message)
            .next(Advice::from("have that key sign this kernel (systemd-measure(1))").or(unlock())),
        NativeError::Tpm(TpmError::NoSuchPcr(_) | TpmError::OwnerPassword) => Problem::failed(message),
        NativeError::Tpm(error) if error.may_pass() => Problem::unreachable(message).next(
            unlock()
                .or("set 'tpm' in virtseald.yaml")
                .then(Advice::RestartDaemon),
        ),
        NativeError::Tpm(TpmError::LockedOut { .. } | TpmError::OutOfOrder | TpmError::Failed { .. }) => {
            Problem::failed(message).next(unlock())
        }
        NativeError::Tpm(_) | NativeError::TpmStale | NativeError::TpmRecord => {
            Problem::new(Code::Locked, message).next(enroll_again())
        }
        _ => Problem::failed(message),
    }
}

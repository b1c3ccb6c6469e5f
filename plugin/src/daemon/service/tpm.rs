//! What `virtseal provider tpm` and `provider unlock --tpm` ask for, and the unlocking at the daemon's start.
//!
//! Start-up waits for none of it. A lock by hand counts: what began to unlock before it, or tries again after it, does
//! not undo it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::descriptors::pin_from;
use crate::api::{TpmEnrolled, TpmRequest, TpmView};
use crate::audit::Actor;
use crate::daemon::{Daemon, records};
use crate::host::local_time::rfc3339;
use crate::host::secure_boot::SecureBoot;
use crate::host::tpm::{BindPolicy, PcrList, SigningKey, TpmError};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::native::{LocksNoted, NativeError, NativeProvider, TpmEnrollment};
use crate::provider::{KeyProvider, ProviderStatus};
use crate::store::Change;

/// A systemd credential of this name, followed by a provider's, unlocks that provider.
pub const CREDENTIAL: &str = "virtseal.passphrase.";

/// A provider that the TPM is to unlock when the daemon starts.
pub struct TpmUnlock {
    provider: Arc<NativeProvider>,
    /// How often it was locked before.
    locks: LocksNoted,
}

/// What came of a [`TpmUnlock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tried {
    /// It is unlocked, or will not be in this way.
    Over,
    /// The TPM may come.
    Again,
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
    let native = native_for_tpm(daemon, name)?;
    let pin = fds.into_iter().next().map(pin_from).transpose()?;
    let policy = policy(&native, request)?;
    refuse_to_drop_pin(&native, request, pin.is_some())?;
    let enrolled = native
        .enroll_tpm(&daemon.tpm, &policy.with_pin(pin))
        .map_err(|error| tpm_failure(&native, &error));
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-tpm-enroll", name, &enrolled);
    enrolled?;
    let enrollment = enrollment(&native)?.ok_or_else(|| tpm_failure(&native, &NativeError::NotEnrolled))?;
    Ok(TpmEnrolled {
        warnings: warnings(&enrollment, &SecureBoot::of_host(Path::new("/"))),
        tpm: view(&enrollment),
    })
}

/// Takes that away. Says whether there was anything to take.
pub(crate) fn remove(daemon: &Daemon, by: Actor, name: &str) -> Result<bool, Problem> {
    let native = native_for_tpm(daemon, name)?;
    let removed = native.remove_tpm().map_err(|error| tpm_failure(&native, &error));
    records::note_provider(daemon, by, "provider-tpm-remove", name, &removed);
    removed.map(|change| change == Change::Changed)
}

/// Unlocks `name` by the TPM, and the PIN in `fds` if there is one.
pub(crate) fn unlock(daemon: &Daemon, by: Actor, name: &str, fds: Vec<OwnedFd>) -> Result<(), Problem> {
    let native = native_for_tpm(daemon, name)?;
    let pin = fds.into_iter().next().map(pin_from).transpose()?;
    let unlocked = native
        .unlock_by_tpm(&daemon.tpm, native.locks(), pin.as_ref())
        .map_err(|error| tpm_failure(&native, &error));
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-unlock", name, &unlocked);
    daemon.jobs.ring();
    unlocked
}

/// The providers that the TPM is to unlock now that the daemon starts.
#[must_use]
pub fn to_unlock(daemon: &Daemon) -> Vec<TpmUnlock> {
    daemon
        .recipients
        .providers()
        .into_iter()
        .filter_map(|provider| provider.of_kind::<NativeProvider>())
        .filter(|native| matches!(native.tpm_enrollment(), Ok(Some(_))))
        .map(|provider| TpmUnlock {
            locks: provider.locks(),
            provider,
        })
        .collect()
}

/// Tries it once, and logs what came of it.
pub fn try_to_unlock(daemon: &Daemon, unlock: &TpmUnlock) -> Tried {
    let TpmUnlock { provider, locks } = unlock;
    let name = provider.name();
    if provider.locks() != *locks || provider.status() != ProviderStatus::Locked {
        return Tried::Over;
    }
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
    let unlocked = unlocked.map_err(|error| tpm_failure(provider, &error));
    records::note_provider(daemon, Actor::Virtseald, "provider-unlock", name, &unlocked);
    match &unlocked {
        Ok(()) => tracing::info!(provider = name, "unlocked by the TPM"),
        Err(failure) => tracing::error!(provider = name, "{failure}"),
    }
    daemon.jobs.ring();
    Tried::Over
}

/// At an unlock that follows a rotation: the TPM gets the new root keys too. Says why it does not.
pub(crate) fn renew(daemon: &Daemon, by: Actor, native: &NativeProvider) -> Option<String> {
    tpm_lags(daemon, by, native, native.renew_tpm(&daemon.tpm, None))
}

/// Why the TPM has not got the new root keys, if it has not.
pub(crate) fn tpm_lags(
    daemon: &Daemon,
    by: Actor,
    native: &NativeProvider,
    renewed: Result<Change, NativeError>,
) -> Option<String> {
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
            Some(format!(
                "the TPM does not unlock '{name}' any more ({}): {}",
                chain(&error),
                enroll_command(native)
            ))
        }
    }
}

fn native_for_tpm(daemon: &Daemon, name: &str) -> Result<Arc<NativeProvider>, Problem> {
    let provider = daemon.recipients.find(name)?;
    provider.of_kind().ok_or_else(|| {
        Problem::new(
            Code::Usage,
            format!(
                "the TPM unlocks native providers, and provider '{name}' is of kind {}",
                provider.kind()
            ),
        )
        .next("to unlock it at start, use a systemd credential: see unlock-at-boot.conf")
    })
}

pub(super) fn view(enrollment: &TpmEnrollment) -> TpmView {
    let since = Duration::from_secs(enrollment.enrolled.max(0).unsigned_abs());
    TpmView {
        pcrs: enrollment.pcrs.as_ref().map(PcrList::to_string),
        signed_by: enrollment.signed_by.as_ref().map(SigningKey::fingerprint),
        pin: enrollment.needs_pin,
        since: rfc3339(UNIX_EPOCH + since),
        stale: enrollment.stale,
    }
}

/// Why an enrolment is worth less than it seems.
fn warnings(enrollment: &TpmEnrollment, secure_boot: &SecureBoot) -> Vec<String> {
    let Some(pcrs) = &enrollment.pcrs else {
        return Vec::new();
    };
    let mut warnings = warnings_of_pcrs(
        pcrs,
        enrollment.unmeasured.as_ref(),
        secure_boot,
        "it takes the passphrase, and another enrolment",
    );
    if !warnings.is_empty() && !enrollment.needs_pin {
        warnings.push("--pin makes the TPM ask for a PIN too, whatever has booted".to_owned());
    }
    warnings
}

/// The same of anything that is bound to `pcrs`; `after_update` is what a changed one costs.
pub(crate) fn warnings_of_pcrs(
    pcrs: &PcrList,
    unmeasured: Option<&PcrList>,
    secure_boot: &SecureBoot,
    after_update: &str,
) -> Vec<String> {
    let mut warnings = Vec::new();
    if pcrs.has_secure_boot() {
        warnings.extend(secure_boot.doubt());
    }
    if let Some(unmeasured) = unmeasured {
        warnings.push(format!(
            "nothing was measured into PCR {unmeasured} since this host has booted: it is the same whatever boots"
        ));
    }
    if let Some(changing) = pcrs.changed_by_updates() {
        warnings.push(format!(
            "PCR {changing} changes with updates of the boot loader, the kernel or the initrd: each time {after_update}"
        ));
    }
    warnings
}

fn enrollment(native: &NativeProvider) -> Result<Option<TpmEnrollment>, Problem> {
    native
        .tpm_enrollment()
        .map_err(|error| tpm_failure(native, &error))
}

/// What `request` asks for but for the PIN.
fn policy(native: &NativeProvider, request: &TpmRequest) -> Result<BindPolicy, Problem> {
    let usage =
        |error: &dyn std::error::Error| Problem::new(Code::Usage, chain(error)).next(enroll_command(native));
    let pcrs = match &request.pcrs {
        Some(given) => given.parse::<PcrList>().map_err(|error| usage(&error))?,
        None => pcrs_of_before(native)?,
    };
    let key = match &request.public_key {
        Some(pem) => Some(SigningKey::from_pem(pem.as_bytes()).map_err(|error| usage(&error))?),
        None if pcrs.has_kernel() => enrollment(native)?.and_then(|before| before.signed_by),
        None => None,
    };
    BindPolicy::new(pcrs, key).map_err(|error| {
        let name = native.name();
        Problem::new(Code::Usage, format!("provider '{name}' is not enrolled: {error}")).next(
            Advice::EnrollTpm {
                name: name.to_owned(),
                options: "--pcrs 7,11 --pcr-public-key FILE".into(),
            }
            .or("--pcrs 7"),
        )
    })
}

/// A PIN is taken away only by who says so.
fn refuse_to_drop_pin(native: &NativeProvider, request: &TpmRequest, has_pin: bool) -> Result<(), Problem> {
    let had_pin = match enrollment(native)? {
        None => false,
        // A damaged one does not tell.
        Some(before) => before.needs_pin || before.pcrs.is_none(),
    };
    if !had_pin || has_pin || request.without_pin {
        return Ok(());
    }
    let name = native.name();
    Err(Problem::new(
        Code::Usage,
        format!("provider '{name}' may be enrolled with a PIN, and this would take it away"),
    )
    .next(enroll_command(native).note("with --pin or --no-pin")))
}

/// The PCRs that the TPM looks at now, or the usual ones when it looks at none.
fn pcrs_of_before(native: &NativeProvider) -> Result<PcrList, Problem> {
    match enrollment(native)? {
        None => Ok(PcrList::default()),
        Some(enrollment) => enrollment.pcrs.ok_or_else(|| {
            let name = native.name();
            Problem::new(
                Code::Usage,
                format!(
                    "provider '{name}': its enrolment is damaged, and does not say which PCRs it was for"
                ),
            )
            .next(Advice::EnrollTpm {
                name: name.to_owned(),
                options: "--pcrs LIST".into(),
            })
        }),
    }
}

/// The command that enrolls it for the PCRs that it is enrolled for.
pub(super) fn enroll_command(native: &NativeProvider) -> Advice {
    let with = |options: String| Advice::EnrollTpm {
        name: native.name().to_owned(),
        options: options.into(),
    };
    let enrollment = native.tpm_enrollment().ok().flatten();
    match enrollment.map(|before| before.pcrs.zip(Some(before.signed_by))) {
        Some(None) => with("--pcrs LIST".into()),
        Some(Some((pcrs, None))) if pcrs.has_kernel() => {
            with(format!("--pcrs {pcrs} --pcr-public-key FILE")).or("--pcrs 7")
        }
        Some(Some((pcrs, _))) if pcrs != PcrList::default() => with(format!("--pcrs {pcrs}")),
        Some(Some(_)) | None => with(String::new()),
    }
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
        NativeError::NotEnrolled => Problem::new(Code::NotFound, message).next(enroll_again()),
        NativeError::Tpm(TpmError::NeedsPin | TpmError::WrongPin { .. }) => {
            Problem::new(Code::Locked, message).next(Advice::UnlockByPin(name.to_owned()))
        }
        NativeError::Tpm(TpmError::NotSigned { .. }) => Problem::new(Code::Locked, message)
            .next(Advice::from("have that key sign this kernel (systemd-measure(1))").or(unlock())),
        NativeError::Tpm(TpmError::NoSuchPcr(_) | TpmError::OwnerPassword) => {
            Problem::new(Code::Failed, message)
        }
        NativeError::Tpm(error) if error.may_pass() => Problem::new(Code::Unreachable, message).next(
            unlock()
                .or("set 'tpm' in virtseald.yaml")
                .then(Advice::RestartDaemon),
        ),
        NativeError::Tpm(TpmError::LockedOut { .. } | TpmError::OutOfOrder | TpmError::Failed { .. }) => {
            Problem::new(Code::Failed, message).next(unlock())
        }
        NativeError::Tpm(_) | NativeError::TpmStale | NativeError::TpmSeal => {
            Problem::new(Code::Locked, message).next(enroll_again())
        }
        _ => Problem::new(Code::Failed, message),
    }
}

//! How the TPM unlocks providers of any kind but native: what unlocks them is bound to it.
//!
//! A native provider's root keys are bound themselves, and by `tpm.rs`.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard, PoisonError};

use uuid::Uuid;

use super::descriptors::{passphrase_from, pin_from, wrong_fds};
use super::refused::refused;
use super::tpm_policy::{enroll_again, policy, refuse_to_drop_pin, said};
use crate::api::{Changed, CredentialKind, TpmEnrolled, TpmRequest, words};
use crate::audit::Actor;
use crate::daemon::{Daemon, records};
use crate::host::tpm::{BindPolicy, TpmError};
use crate::model::advice::Advice;
use crate::model::envelope::ProviderId;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::ProviderStatus;
use crate::provider::kind::TrustBy;
use crate::provider::kmip::{FilesError, KmipProvider};
use crate::provider::native::LocksNoted;
use crate::provider::toolbox::bound_credential::{BoundCredential, BoundError, Origin, TpmEnrollment};
use crate::recipients::Provider;
use crate::secret::SecretBytes;
use crate::store::Change;

/// What came of an unlock while virtseald starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tried {
    /// It is unlocked, or will not be in this way.
    Over,
    /// The TPM may come.
    Again,
}

/// The credential that counts, by what its identity says on disk: also where that was written, and its caller told otherwise.
pub(super) fn of(daemon: &Daemon, known: &Provider) -> BoundCredential {
    with(daemon, known, bound_by(known).unwrap_or_default())
}

pub(super) fn with(daemon: &Daemon, known: &Provider, made: Option<Uuid>) -> BoundCredential {
    BoundCredential::of(daemon.host_store.dir(), known.provider().id(), made)
}

fn bound_by(known: &Provider) -> Result<Option<Uuid>, FilesError> {
    known
        .of_kind::<KmipProvider>()
        .map_or(Ok(None), |kmip| kmip.bound_by())
}

/// Removes what the TPM has of it besides, which a change that was killed or refused has left.
pub(super) fn settle(daemon: &Daemon, known: &Provider) {
    let settled = bound_by(known)
        .map_err(BoundError::Files)
        .and_then(|made| with(daemon, known, made).remove_others());
    if let Err(error) = settled {
        tracing::warn!(
            provider = known.provider().name(),
            "what the TPM had of it stays: {}",
            chain(&error)
        );
    }
}

/// How the TPM unlocks it, if it does.
pub(super) fn enrollment(daemon: &Daemon, known: &Provider) -> Option<TpmEnrollment> {
    of(daemon, known).enrollment().ok().flatten()
}

/// What somebody can give to unlock it: nothing where the TPM alone has it.
pub(super) fn asks_for(daemon: &Daemon, known: &Provider) -> Option<CredentialKind> {
    let asks_for = known.provider().asks_for()?;
    (!is_unattended(daemon, known)).then_some(asks_for)
}

/// Which of those on disk its identity names, and what the TPM asks for before it opens that.
pub(super) struct Before {
    pub made: Option<Uuid>,
    pub enrolled: Option<TpmEnrollment>,
}

/// None where there is something, and nobody can tell what: with another in its place the TPM might ask for less.
pub(super) fn before(daemon: &Daemon, known: &Provider) -> Result<Option<Before>, BoundError> {
    let made = match bound_by(known) {
        Err(FilesError::Damaged { .. }) if with(daemon, known, None).is_any()? => return Ok(None),
        Err(FilesError::Damaged { .. }) => None,
        made => made?,
    };
    let enrolled = with(daemon, known, made).enrollment()?;
    let is_told = match &enrolled {
        Some(enrolled) => enrolled.pcrs.is_some(),
        None => made.is_none(),
    };
    Ok(is_told.then_some(Before { made, enrolled }))
}

/// Whether the TPM alone has what unlocks it.
pub(super) fn is_unattended(daemon: &Daemon, known: &Provider) -> bool {
    matches!(bound_by(known), Ok(Some(_))) || of(daemon, known).is_made_here()
}

/// Why the TPM did not unlock it.
pub(super) fn why_locked(daemon: &Daemon, known: &Provider) -> Option<String> {
    let is_locked = known.provider().status() == ProviderStatus::Locked;
    let told = reasons(daemon);
    told.get(&known.provider().id()).filter(|_| is_locked).cloned()
}

/// Has the TPM keep what unlocks `known`: what comes with the call, or what it has so far.
pub(super) fn enroll(
    daemon: &Daemon,
    by: Actor,
    known: &Provider,
    request: &TpmRequest,
    fds: Vec<OwnedFd>,
) -> Result<TpmEnrolled, Problem> {
    let name = known.provider().name();
    let Some(asks_for) = known.provider().asks_for() else {
        return Err(Problem::usage(format!(
            "provider '{name}' is unlocked by nothing that the TPM could keep"
        ))
        .next(nothing_to_keep(known)));
    };
    let mut fds = fds.into_iter();
    let given = match request.with_credential {
        true => Some(passphrase_from(fds.next().ok_or_else(wrong_fds)?)?),
        false => None,
    };
    let pin = fds.next().map(pin_from).transpose()?;
    let bound = of(daemon, known);
    let before = bound
        .enrollment()
        .map_err(|error| failure(daemon, known, &error))?;
    let policy = policy(name, before.as_ref(), request)?;
    refuse_to_drop_pin(name, before.as_ref(), request, pin.is_some())?;
    let enrolled = bind(daemon, known, asks_for, given, &policy.with_pin(pin));
    crate::host::process::trim();
    records::note_provider(daemon, by, "provider-tpm-enroll", name, &enrolled);
    enrolled?;
    forget_reason(daemon, known);
    let enrollment = bound.enrollment().ok().flatten();
    let enrollment = enrollment.ok_or_else(|| failure(daemon, known, &BoundError::NotEnrolled))?;
    Ok(said(name, &enrollment))
}

fn bind(
    daemon: &Daemon,
    known: &Provider,
    asks_for: CredentialKind,
    given: Option<SecretBytes>,
    policy: &BindPolicy,
) -> Result<(), Problem> {
    let (name, bound) = (known.provider().name(), of(daemon, known));
    let (credential, origin) = match given {
        Some(given) => {
            // Only what does unlock it is of any use.
            let unlocked = known.provider().unlock(&given);
            unlocked.map_err(|error| refused(known, &error))?;
            (given, Origin::Given)
        }
        None => {
            let origin = match bound.is_made_here() {
                true => Origin::MadeHere,
                false => Origin::Given,
            };
            let opened = bound.open(&daemon.tpm, policy.pin());
            (
                opened.map_err(|error| match error {
                    BoundError::NotEnrolled => Problem::usage(format!(
                        "provider '{name}': its {} is needed, for the TPM to keep",
                        words(&asks_for)
                    ))
                    .next(enroll_anew(name, None)),
                    error => failure(daemon, known, &error),
                })?,
                origin,
            )
        }
    };
    bound
        .bind(&daemon.tpm, policy, &credential, origin)
        .map_err(|error| failure(daemon, known, &error))
}

fn nothing_to_keep(known: &Provider) -> Advice {
    let name = known.provider().name().to_owned();
    match known.row().map(|kind| kind.trust) {
        Some(TrustBy::Command) => Advice::BindIdentity(name),
        _ => Advice::ShowProvider(name),
    }
}

/// By way of a passphrase: then there is nothing that the TPM could ask for less than.
pub(super) fn bind_anew(name: &str) -> Advice {
    Advice::EncryptIdentity(name.to_owned())
        .then(Advice::UnlockProvider(name.to_owned()))
        .then(Advice::BindIdentity(name.to_owned()))
}

/// It unlocks nothing any more: something else does.
pub(super) fn forget(daemon: &Daemon, known: &Provider) {
    settle(daemon, known);
    if let Err(error) = of(daemon, known).remove() {
        tracing::warn!(
            provider = known.provider().name(),
            "can't remove what the TPM keeps: {}",
            chain(&error)
        );
    }
    forget_reason(daemon, known);
}

/// Takes that away, unless nobody else has what unlocks it.
pub(super) fn remove(daemon: &Daemon, by: Actor, known: &Provider) -> Result<Changed, Problem> {
    let name = known.provider().name();
    if is_unattended(daemon, known) {
        return Err(Problem::would_lose_key(format!(
            "provider '{name}': nobody but the TPM has what encrypts its private key"
        ))
        .next(Advice::SetIdentity(name.to_owned()).or(Advice::EncryptIdentity(name.to_owned()))));
    }
    let removed = of(daemon, known)
        .remove()
        .map_err(|error| failure(daemon, known, &error));
    records::note_provider(daemon, by, "provider-tpm-remove", name, &removed);
    forget_reason(daemon, known);
    Ok(Changed {
        changed: removed? == Change::Changed,
    })
}

/// Unlocks it by the TPM, with `pin` where that asks for one.
pub(super) fn unlock(
    daemon: &Daemon,
    by: Actor,
    known: &Provider,
    pin: Option<&Arc<SecretBytes>>,
) -> Result<(), Problem> {
    let locks = known.provider().locks();
    let unlocked = open(daemon, known, locks, pin);
    crate::host::process::trim();
    note(daemon, by, known, &unlocked);
    unlocked
}

fn open(
    daemon: &Daemon,
    known: &Provider,
    locks: LocksNoted,
    pin: Option<&Arc<SecretBytes>>,
) -> Result<(), Problem> {
    let credential = of(daemon, known)
        .open(&daemon.tpm, pin)
        .map_err(|error| failure(daemon, known, &error))?;
    let unlocked = known.provider().unlock_since(locks, &credential);
    unlocked.map_err(|error| refused(known, &error))
}

/// Tries it once while virtseald starts, and logs what came of it.
pub(super) fn try_to_unlock(daemon: &Daemon, known: &Provider, locks: LocksNoted) -> Tried {
    let name = known.provider().name();
    match of(daemon, known).open(&daemon.tpm, None) {
        Err(BoundError::Tpm(TpmError::NeedsPin)) => {
            let next = Advice::UnlockByTpm(name.to_owned());
            tracing::info!(provider = name, "it waits for its PIN: {next}");
            note_reason(daemon, known, format!("it needs its PIN for the TPM: {next}"));
            return Tried::Over;
        }
        Err(BoundError::Tpm(error)) if error.may_pass() => {
            tracing::warn!(provider = name, "not unlocked by the TPM yet: {}", chain(&error));
            note_reason(
                daemon,
                known,
                format!("the TPM does not unlock it yet: {}", chain(&error)),
            );
            return Tried::Again;
        }
        _ => {}
    }
    let unlocked = open(daemon, known, locks, None);
    crate::host::process::trim();
    match &unlocked {
        Ok(()) => tracing::info!(provider = name, "unlocked by the TPM"),
        Err(problem) => tracing::error!(provider = name, "{problem}"),
    }
    note(daemon, Actor::Virtseald, known, &unlocked);
    Tried::Over
}

fn note(daemon: &Daemon, by: Actor, known: &Provider, unlocked: &Result<(), Problem>) {
    let _ = daemon.recipients.report(known);
    records::note_provider(daemon, by, "provider-unlock", known.provider().name(), unlocked);
    match unlocked {
        Ok(()) => forget_reason(daemon, known),
        Err(problem) => note_reason(daemon, known, problem.to_string()),
    }
    daemon.jobs.ring();
}

fn reasons(daemon: &Daemon) -> MutexGuard<'_, BTreeMap<ProviderId, String>> {
    daemon.tpm_reasons.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note_reason(daemon: &Daemon, known: &Provider, reason: String) {
    reasons(daemon).insert(known.provider().id(), reason);
}

pub(super) fn forget_reason(daemon: &Daemon, known: &Provider) {
    reasons(daemon).remove(&known.provider().id());
}

/// With what unlocks it, which the TPM does not have, or not any more.
fn enroll_anew(name: &str, before: Option<&TpmEnrollment>) -> Advice {
    let file = "--credential-file FILE";
    match enroll_again(name, before) {
        Advice::EnrollTpm { name, options } => Advice::EnrollTpm {
            name,
            options: format!("{options} {file}").trim_start().to_owned().into(),
        },
        other => other.note(format!("with {file}")),
    }
}

pub(super) fn failure(daemon: &Daemon, known: &Provider, error: &BoundError) -> Problem {
    let name = known.provider().name();
    let message = format!("provider '{name}' {}", chain(error));
    let is_unattended = is_unattended(daemon, known);
    let again = || match is_unattended {
        // Nobody has what would unlock it.
        true if matches!(before(daemon, known), Ok(None)) => bind_anew(name),
        true => Advice::BindIdentity(name.to_owned()),
        false => Advice::UnlockProvider(name.to_owned())
            .then(enroll_anew(name, enrollment(daemon, known).as_ref())),
    };
    let (code, next) = match error {
        BoundError::Tpm(TpmError::NeedsPin | TpmError::WrongPin { .. }) => (
            Code::Locked,
            Advice::UnlockByTpm(name.to_owned()).note("with its PIN"),
        ),
        BoundError::Tpm(error) if error.may_pass() => (
            Code::Unreachable,
            Advice::from("set 'tpm' in virtseald.yaml")
                .then(Advice::RestartDaemon)
                .or_else(match is_unattended {
                    true => {
                        Advice::EncryptIdentity(name.to_owned()).then(Advice::UnlockProvider(name.to_owned()))
                    }
                    false => again(),
                }),
        ),
        BoundError::NotEnrolled => (Code::NotFound, again()),
        BoundError::Tpm(_) | BoundError::Damaged | BoundError::Files(FilesError::Damaged { .. }) => {
            (Code::Locked, again())
        }
        BoundError::Cipher(_) | BoundError::Memory(_) | BoundError::Files(_) => {
            (Code::Failed, Advice::Journal)
        }
    };
    Problem::new(code, message).next(next)
}

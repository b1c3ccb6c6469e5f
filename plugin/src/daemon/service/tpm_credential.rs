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
use crate::host::tpm::{BindPolicy, PcrList, TpmError};
use crate::model::advice::Advice;
use crate::model::envelope::ProviderId;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::ProviderStatus;
use crate::provider::kind::TrustBy;
use crate::provider::kmip::{FilesError, KmipProvider};
use crate::provider::native::LocksNoted;
use crate::provider::toolbox::bound_credential::{BoundCredential, BoundError, Origin, TpmEnrollment};
use crate::recipients::Provider;
use crate::secret::{SecretBytes, Transient};
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
fn of(daemon: &Daemon, known: &Provider) -> BoundCredential {
    with(daemon, known, bound_by(known).unwrap_or_default())
}

fn with(daemon: &Daemon, known: &Provider, made: Option<Uuid>) -> BoundCredential {
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

/// Has `set` encrypt the identity of `known` by a credential that is made here, for the TPM alone to keep: by the one that it keeps
/// already, where it opens that. Else the new one is kept beside what there is, until the identity on disk says which of them counts; the
/// TPM looks at what it has looked at so far, and asks for `pin` where it did.
pub(super) fn made_for<T>(
    daemon: &Daemon,
    known: &Provider,
    pin: Option<Arc<SecretBytes>>,
    set: impl FnOnce(MadeHere) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let failed = |error: BoundError| failure(daemon, known, &error);
    let before = bound_by(known).unwrap_or_default();
    let is_unattended = is_unattended(daemon, known);
    let enrolled = enrollment(daemon, known);
    let needs_pin = enrolled.as_ref().is_some_and(|enrolled| enrolled.needs_pin);
    let pin = pin.filter(|_| needs_pin);
    if needs_pin && pin.is_none() {
        return Err(without_pin(known, BoundError::Tpm(TpmError::NeedsPin)));
    }
    match with(daemon, known, before).open(&daemon.tpm, pin.as_ref()) {
        Ok(passphrase) if is_unattended => {
            return set(MadeHere {
                passphrase,
                id: before,
                is_lost: false,
            });
        }
        Err(error @ BoundError::Tpm(TpmError::WrongPin { .. })) => return Err(without_pin(known, error)),
        Ok(_) | Err(_) => {}
    }
    let passphrase = random().map_err(|error| failed(BoundError::Memory(error)))?;
    // Of a damaged one nothing is known.
    let policy = match enrolled.filter(|enrolled| enrolled.pcrs.is_some()) {
        Some(enrolled) => policy(known.provider().name(), Some(&enrolled), &TpmRequest::default())?,
        None => BindPolicy::exactly(PcrList::default()),
    };
    let policy = policy.with_pin(pin);
    let id = Some(Uuid::new_v4());
    with(daemon, known, id)
        .bind(&daemon.tpm, &policy, &passphrase, Origin::MadeHere)
        .map_err(failed)?;
    let done = set(MadeHere {
        passphrase,
        id,
        is_lost: is_unattended,
    });
    settle(daemon, known);
    done
}

/// A PIN goes with an identity that the TPM has nothing to do with, and with no other.
fn without_pin(known: &Provider, error: BoundError) -> Problem {
    let name = known.provider().name();
    let what = format!(
        "provider '{name}' keeps its identity, and its PIN for the TPM: {}",
        chain(&error)
    );
    let anew = Advice::EncryptIdentity(name.to_owned()).then(Advice::BindIdentity(name.to_owned()));
    Problem::new(Code::Locked, what).next(
        Advice::BindIdentity(name.to_owned())
            .note("with its PIN")
            .or_else(anew.note("if nobody knows that")),
    )
}

/// A credential that nobody but the TPM has.
pub(super) struct MadeHere {
    pub passphrase: SecretBytes,
    /// Which one it is; none of one that an earlier virtseal has made.
    pub id: Option<Uuid>,
    /// Whether there was another, which the TPM does not open now.
    pub is_lost: bool,
}

/// 64 hex digits.
fn random() -> std::io::Result<SecretBytes> {
    let random = SecretBytes::random(32)?;
    let mut hex = Transient::new(vec![0; 64]);
    hex::encode_to_slice(random.expose(), &mut hex).map_err(std::io::Error::other)?;
    SecretBytes::copy_of(&hex)
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

fn failure(daemon: &Daemon, known: &Provider, error: &BoundError) -> Problem {
    let name = known.provider().name();
    let message = format!("provider '{name}' {}", chain(error));
    let again = || match is_unattended(daemon, known) {
        // Nobody has what would unlock it.
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
                .or_else(again()),
        ),
        BoundError::NotEnrolled => (Code::NotFound, again()),
        BoundError::Tpm(_) | BoundError::Damaged => (Code::Locked, again()),
        BoundError::Cipher(_) | BoundError::Memory(_) | BoundError::Files(_) => {
            (Code::Failed, Advice::Journal)
        }
    };
    Problem::new(code, message).next(next)
}

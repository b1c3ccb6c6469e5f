//! An identity whose private key the TPM alone can decrypt: by a passphrase that is made here, and that nobody else has.

use std::sync::Arc;

use uuid::Uuid;

use super::tpm_credential::{Before, before, bind_anew, failure, is_unattended, of, settle, with};
use super::tpm_policy::policy;
use crate::api::TpmRequest;
use crate::daemon::Daemon;
use crate::host::tpm::{BindPolicy, PcrList, TpmError};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::provider::ProviderStatus;
use crate::provider::toolbox::bound_credential::{BoundError, Origin};
use crate::recipients::Provider;
use crate::secret::{SecretBytes, Transient};

/// Has `set` encrypt the identity of `known` by a credential that is made here, for the TPM alone to keep: by the one that it keeps
/// already, where it opens that. Else the new one is kept beside what there is, until the identity on disk says which of them counts; the
/// TPM looks at what it has looked at so far, and asks for `pin` where it did. Where nobody can tell what that was, nothing is bound.
pub(super) fn made_for<T>(
    daemon: &Daemon,
    known: &Provider,
    pin: Option<Arc<SecretBytes>>,
    set: impl FnOnce(MadeHere) -> Result<T, Problem>,
) -> Result<T, Problem> {
    let failed = |error: BoundError| failure(daemon, known, &error);
    let before = before(daemon, known).map_err(failed)?;
    let Before { made, enrolled } = before.ok_or_else(|| not_told(known))?;
    let is_unattended = is_unattended(daemon, known);
    let needs_pin = enrolled.as_ref().is_some_and(|enrolled| enrolled.needs_pin);
    let pin = pin.filter(|_| needs_pin);
    if needs_pin && pin.is_none() {
        return Err(without_pin(known, BoundError::Tpm(TpmError::NeedsPin)));
    }
    match with(daemon, known, made).open(&daemon.tpm, pin.as_ref()) {
        Ok(passphrase) if is_unattended => {
            return set(MadeHere {
                passphrase,
                id: made,
                is_lost: false,
            });
        }
        Err(error @ BoundError::Tpm(TpmError::WrongPin { .. })) => return Err(without_pin(known, error)),
        Ok(_) | Err(_) => {}
    }
    let passphrase = random().map_err(|error| failed(BoundError::Memory(error)))?;
    let policy = match enrolled {
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

/// A PIN goes with an identity that the TPM has nothing to do with, and with no other.
fn without_pin(known: &Provider, error: BoundError) -> Problem {
    let name = known.provider().name();
    let what = format!(
        "provider '{name}' keeps its identity, and its PIN for the TPM: {}",
        chain(&error)
    );
    Problem::new(Code::Locked, what).next(
        Advice::BindIdentity(name.to_owned())
            .note("with its PIN")
            .or_else(bind_anew(name).note("if nobody knows that")),
    )
}

fn not_told(known: &Provider) -> Problem {
    let name = known.provider().name();
    let what = format!(
        "provider '{name}' keeps its identity: the record of what the TPM opens is damaged, and tells neither for which PCRs that is nor \
         whether with a PIN"
    );
    Problem::new(Code::Locked, what).next(bind_anew(name).note("for PCR 7 and without a PIN"))
}

/// Whether the TPM alone has what unlocks it, and does not open that now for want of a PIN or whatever else.
pub(super) fn is_shut(daemon: &Daemon, known: &Provider) -> bool {
    known.provider().status() == ProviderStatus::Locked
        && is_unattended(daemon, known)
        && of(daemon, known).open(&daemon.tpm, None).is_err()
}

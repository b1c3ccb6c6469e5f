//! The vTPM of a VM that is to be sealed. swtpm makes its state at the first start, so there is nothing to make here but the envelope.

use std::path::Path;

use super::known::{self, given_up, is_settled, named_envelope};
use super::loss::{Loss, Way};
use super::object::Leftover;
use super::take_back::{adopt, first_that_opens};
use super::{Host, NewObject};
use crate::domain::edit::VtpmEdit;
use crate::domain::{self, Domain, TpmBackend};
use crate::host::libvirt::DefinedDomain;
use crate::model::act::{Act, StepCode, Verb};
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, ObjectKind};
use crate::model::problem::Problem;
use crate::object::Present;
use crate::object::vtpm::{StateDir, StateError};
use crate::store::EnvelopeRecord;
use crate::terminal::word;
use crate::vm::accepted_losses::AcceptedLosses;
use crate::vm::forget::{Dropped, keep_aside};
use crate::vm::forgotten::Said;
use crate::vm::has_run::HasRun;

#[derive(Debug)]
pub(super) enum VtpmStep {
    Sealed(Envelope),
    /// Sealed by an earlier virtseal: libvirt deletes the state when a transient domain ends.
    Keep(Envelope),
    /// It was sealed, and the XML does not say so, or names another key.
    TakeBack(Stated<Vec<Envelope>>),
    Add,
    Encrypt,
    /// Its state is lost, and a new one is made. What is known of the old one is kept aside.
    Renew(Stated<Vec<EnvelopeRecord>>),
    /// There is nothing to do for it, as with the host's TPM, which keeps its state inside the chip.
    None,
}

/// What is known of the vTPM, and the secret that the XML names.
#[derive(Debug)]
pub(super) struct Stated<T> {
    pub(super) known: T,
    secret: Option<EnvelopeId>,
}

impl VtpmStep {
    /// What the XML gets for it, given its envelope.
    pub(super) fn edit(&self, envelope: EnvelopeId) -> Option<VtpmEdit> {
        let instead_of = match self {
            Self::Sealed(_) | Self::None => return None,
            Self::Keep(_) | Self::Add | Self::Encrypt => None,
            Self::TakeBack(stated) => stated.secret,
            Self::Renew(stated) => stated.secret,
        };
        Some(VtpmEdit { envelope, instead_of })
    }

    pub(super) fn known(&self) -> Option<&Envelope> {
        match self {
            Self::Sealed(envelope) | Self::Keep(envelope) => Some(envelope),
            Self::TakeBack(stated) => stated.known.first(),
            Self::Add | Self::Encrypt | Self::Renew(_) | Self::None => None,
        }
    }

    /// The envelopes whose keys it tries, until one opens the state.
    pub(super) fn to_open(&self) -> Vec<&Envelope> {
        match self {
            Self::TakeBack(stated) => stated.known.iter().collect(),
            _ => Vec::new(),
        }
    }

    pub(super) fn act(&self) -> Option<Act> {
        let act = match self {
            Self::Add => Verb::Add.act(StepCode::Create, "a TPM 2.0 with encrypted state"),
            Self::Encrypt => Verb::Encrypt.act(StepCode::Encrypt, "the state of the TPM"),
            Self::TakeBack(_) => Verb::Take.act(StepCode::TakeBack, "the encrypted TPM back"),
            Self::Renew(_) => Verb::Add.act(
                StepCode::Renew,
                "a new TPM 2.0 with encrypted state in place of the lost one",
            ),
            Self::Keep(_) => Verb::Have.act(
                StepCode::PersistState,
                "libvirt keep the state of the TPM (persistent_state='yes')",
            ),
            Self::Sealed(_) | Self::None => return None,
        };
        Some(act.on("vtpm"))
    }

    /// Its envelope: known, opened with what it belongs to, or new.
    pub(super) fn envelope(
        &self,
        host: &Host<'_>,
        defined: &DefinedDomain,
        provider: Option<&str>,
    ) -> Result<Option<Envelope>, Problem> {
        let leftover = match self {
            Self::None => return Ok(None),
            Self::Sealed(envelope) | Self::Keep(envelope) => return Ok(Some(envelope.clone())),
            Self::TakeBack(stated) => return open(host, defined, &stated.known).map(Some),
            Self::Add | Self::Encrypt => Leftover::SameProviders,
            Self::Renew(_) => Leftover::Unused,
        };
        let made = NewObject::find_or_make(host, defined.vm, ObjectKind::Vtpm, "", provider, leftover)?;
        Ok(Some(made.envelope.into_envelope()))
    }

    /// Drops what is known of a TPM that is lost, once that is in a file: its envelope says that there must be a state. That of the new
    /// one, which an earlier try may have made, stays.
    pub(super) fn set_lost_aside(
        &self,
        host: &Host<'_>,
        defined: &DefinedDomain,
        new: EnvelopeId,
    ) -> Result<(), Problem> {
        let Self::Renew(lost) = self else {
            return Ok(());
        };
        let mut records = lost.known.clone();
        records.retain(|record| record.envelope.id != new);
        if !records.is_empty() {
            let keystore = host.keystore;
            let dropped = Dropped {
                said: Said::Elsewhere,
                records: &records,
                damaged: Vec::new(),
            };
            keep_aside(keystore, host.host_store, defined.vm, &defined.name, dropped)?;
            for record in &records {
                keystore.forget_envelope(record)?;
            }
        }
        host.keystore.clear_vtpm_seen(defined.vm)?;
        Ok(())
    }
}

pub(super) fn plan_vtpm(host: &Host<'_>, domain: &Domain) -> Result<Way<VtpmStep>, Problem> {
    let dir = StateDir::of_domain(domain, &host.swtpm_dir)?;
    let state = dir.inspect()?;
    let backend = domain.tpm.as_ref().map(|tpm| &tpm.backend);
    let stated = match backend {
        Some(TpmBackend::Emulator { secret, .. }) => *secret,
        _ => None,
    };
    let known = known::known(host, domain.uuid, ObjectKind::Vtpm)?;
    let mut envelopes: Vec<_> = known.iter().map(|record| record.envelope.clone()).collect();
    let mut seen = envelopes.iter().any(|envelope| envelope.seen);
    let sealed = match stated {
        None => None,
        Some(id) => {
            // Only a state that is there can still need it.
            let given_up = matches!(state, Present::Absent)
                && envelopes.iter().all(|envelope| envelope.id != id)
                && given_up(host, domain.uuid, id)?.is_some();
            if let Some(named) = named_envelope(host, domain, ObjectKind::Vtpm, id)? {
                // Of a copy in the XML, which the keystore has dropped, it can only be true.
                seen |= named.seen;
                envelopes.retain(|envelope| envelope.id != id);
                if !given_up {
                    envelopes.insert(0, named);
                }
            }
            settled(host, domain, backend, id)?.filter(|_| !is_of_another_key(host, &dir, id, &known))
        }
    };
    let plain = match (stated, of_plain_xml(&domain.name, backend)?) {
        (None, VtpmStep::None) => return Ok(Way::Open(VtpmStep::None)),
        (_, step) => step,
    };
    let facts = Facts {
        state: &state,
        has_run: match seen {
            true => HasRun::Yes,
            false => HasRun::of(host, domain.uuid)?,
        },
        is_stated: stated.is_some(),
        is_known: !envelopes.is_empty(),
        is_settled: sealed.is_some(),
        accepted: host.accepted.has(AcceptedLosses::VTPM),
    };
    Ok(Way::Open(match decide(facts) {
        Decision::AsXmlHasIt => sealed.unwrap_or(plain),
        Decision::TakeBack => VtpmStep::TakeBack(Stated {
            known: envelopes,
            secret: stated,
        }),
        Decision::Renew => VtpmStep::Renew(Stated {
            known,
            secret: stated,
        }),
        Decision::Lost => return Ok(Way::Lost(Loss::vtpm(gone(&dir)))),
        Decision::Refuse(why) => return Err(why.problem(&domain.name, dir.path())),
    }))
}

/// Whether the state is seen to have another key than this one, which is not the only one that is known of the VM's TPMs.
fn is_of_another_key(host: &Host<'_>, dir: &StateDir, id: EnvelopeId, known: &[EnvelopeRecord]) -> bool {
    let named = known
        .iter()
        .find(|record| record.envelope.id == id && known.len() > 1);
    let passphrase = named.and_then(|named| host.passphrase_of(named).ok());
    passphrase.is_some_and(|passphrase| matches!(dir.open(&passphrase), Err(StateError::Closed { .. })))
}

/// Whether keystore and metadata both have the envelope that the XML names.
fn settled(
    host: &Host<'_>,
    domain: &Domain,
    backend: Option<&TpmBackend>,
    id: EnvelopeId,
) -> Result<Option<VtpmStep>, Problem> {
    let Some(record) = host.keystore.readable_envelope(id)? else {
        return Ok(None);
    };
    let keeps = matches!(
        backend,
        Some(TpmBackend::Emulator {
            persistent_state: true,
            ..
        })
    );
    let is_settled = is_settled(host, domain, id)?;
    Ok(is_settled.then_some(match keeps {
        true => VtpmStep::Sealed(record.envelope),
        false => VtpmStep::Keep(record.envelope),
    }))
}

fn gone(dir: &StateDir) -> Problem {
    let shown = dir.path().display();
    Problem::would_lose_key(format!("the state of its TPM is gone from {shown}"))
        .next(format!("restore {} from a backup", word(shown)))
}

/// What becomes of a vTPM that the XML names no key for, by the XML alone.
fn of_plain_xml(vm: &str, backend: Option<&TpmBackend>) -> Result<VtpmStep, Problem> {
    let what = match backend {
        None => return Ok(VtpmStep::Add),
        Some(TpmBackend::Passthrough) => return Ok(VtpmStep::None),
        Some(TpmBackend::Emulator { version, .. }) => match version.as_deref() {
            None | Some("2.0") => return Ok(VtpmStep::Encrypt),
            Some(version) => format!("its TPM is version {version}: only 2.0 can be sealed"),
        },
        Some(TpmBackend::External | TpmBackend::Other(_)) => {
            "its TPM is run by something else, which may keep it in plaintext".to_owned()
        }
    };
    let backend = Advice::EditXml(vm.to_owned()).within("<backend type='emulator' version='2.0'/>");
    Err(Problem::failed(what).next(backend.then(Advice::SealVm(vm.to_owned()))))
}

/// What would be lost if its state were replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WouldLose {
    Plain,
    /// Encrypted with a key that nothing here names.
    Encrypted,
}

/// What is known of a vTPM.
#[derive(Clone, Copy, Debug)]
struct Facts<'a> {
    state: &'a Present,
    has_run: HasRun,
    /// The XML names a key for it.
    is_stated: bool,
    /// There are envelopes that may open it.
    is_known: bool,
    /// The key that the XML names is one of them, here and in its metadata.
    is_settled: bool,
    /// An admin has given it up.
    accepted: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// It is sealed already, or as new as the XML says.
    AsXmlHasIt,
    TakeBack,
    Renew,
    Lost,
    Refuse(WouldLose),
}

/// A state that is missing, or whose key the XML does not name, is opened with one that is known, and made anew only where an admin
/// has given it up.
fn decide(facts: Facts<'_>) -> Decision {
    let Facts {
        is_known, is_settled, ..
    } = facts;
    let was_used = facts.has_run == HasRun::Yes && (is_known || facts.is_stated);
    match facts.state {
        Present::Plain => Decision::Refuse(WouldLose::Plain),
        Present::Encrypted(_) if is_settled => Decision::AsXmlHasIt,
        Present::Encrypted(_) if is_known => Decision::TakeBack,
        Present::Encrypted(_) => Decision::Refuse(WouldLose::Encrypted),
        // A key that nobody knows: whether it was used neither.
        Present::Absent if was_used || facts.is_stated && !is_known => match facts.accepted {
            true => Decision::Renew,
            false => Decision::Lost,
        },
        Present::Absent if facts.is_stated && !is_settled => Decision::TakeBack,
        Present::Absent => Decision::AsXmlHasIt,
    }
}

impl WouldLose {
    fn problem(self, vm: &str, dir: &Path) -> Problem {
        let (shown, dir) = (dir.display(), word(dir.display()));
        let again = || Advice::SealVm(vm.to_owned());
        let aside = |ending: &str| {
            let loss = "only if what the guest has bound to its TPM may be lost (BitLocker asks for its recovery key then), set \
                        the state aside";
            Advice::from(loss)
                .within(format!("mv {dir} {dir}.{ending}"))
                .then(again())
        };
        match self {
            Self::Plain => Problem::would_lose_key(format!(
                "its vTPM has plaintext state in {shown}, and encrypting that is not possible yet"
            ))
            .next(aside("plain")),
            Self::Encrypted => Problem::would_lose_key(format!(
                "its vTPM has encrypted state in {shown}, and no envelope here is known to open it"
            ))
            .next(
                Advice::DefineSealedXml(None)
                    .then(again())
                    .or_else(aside("sealed")),
            ),
        }
    }
}

/// Whether the domain's vTPM is sealed and has no state: as before the first start.
pub(super) fn was_never_made(host: &Host<'_>, domain: &Domain) -> Result<bool, Problem> {
    let dir = StateDir::of_domain(domain, &host.swtpm_dir)?;
    let is_sealed = domain::objects(domain)
        .iter()
        .any(|object| object.kind.is_made_at_first_start() && object.envelope().is_some());
    Ok(is_sealed && matches!(dir.inspect(), Ok(Present::Absent)))
}

/// Opens the vTPM's state with one of `envelopes`. Without a state there is nothing to open but the envelope itself: a start
/// decides whether one must be there.
fn open(host: &Host<'_>, defined: &DefinedDomain, envelopes: &[Envelope]) -> Result<Envelope, Problem> {
    // The plan has looked whether it is in libvirt's own place.
    let dir = StateDir::of(defined.vm, &host.swtpm_dir);
    first_that_opens(envelopes, |envelope| {
        adopt(host, defined, envelope, "", |passphrase| {
            dir.open(passphrase)?;
            Ok(())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::disk::ImageCopy;

    const FRESH: Facts<'_> = Facts {
        state: &Present::Absent,
        has_run: HasRun::No,
        is_stated: false,
        is_known: true,
        is_settled: false,
        accepted: false,
    };

    #[test]
    fn a_state_that_was_used_or_is_encrypted_is_never_made_anew() {
        let encrypted = Present::Encrypted(ImageCopy::None);
        for has_run in [HasRun::Yes, HasRun::No, HasRun::NotKnown] {
            // Whatever an admin has given up: there is something.
            for accepted in [true, false] {
                let facts = Facts {
                    has_run,
                    accepted,
                    ..FRESH
                };
                let of = |state, is_known| {
                    decide(Facts {
                        state,
                        is_known,
                        ..facts
                    })
                };
                assert_eq!(of(&encrypted, true), Decision::TakeBack);
                assert_eq!(of(&encrypted, false), Decision::Refuse(WouldLose::Encrypted));
                for is_known in [true, false] {
                    assert_eq!(of(&Present::Plain, is_known), Decision::Refuse(WouldLose::Plain));
                }
            }
        }
        for is_settled in [true, false] {
            let used = Facts {
                has_run: HasRun::Yes,
                is_stated: is_settled,
                is_settled,
                ..FRESH
            };
            assert_eq!(decide(used), Decision::Lost);
            let given_up = Facts {
                accepted: true,
                ..used
            };
            assert_eq!(decide(given_up), Decision::Renew);
        }
        let not_ours = Facts {
            is_stated: true,
            is_known: false,
            ..FRESH
        };
        assert_eq!(decide(not_ours), Decision::Lost);
    }

    #[test]
    fn a_state_that_never_was_is_made_by_the_first_start() {
        for has_run in [HasRun::No, HasRun::NotKnown] {
            let facts = Facts { has_run, ..FRESH };
            assert_eq!(decide(facts), Decision::AsXmlHasIt);
            let stated = Facts {
                is_stated: true,
                ..facts
            };
            assert_eq!(decide(stated), Decision::TakeBack);
            let is_settled = Facts {
                is_settled: true,
                ..stated
            };
            assert_eq!(decide(is_settled), Decision::AsXmlHasIt);
        }
        let unknown = Facts {
            has_run: HasRun::Yes,
            is_known: false,
            ..FRESH
        };
        assert_eq!(decide(unknown), Decision::AsXmlHasIt);
    }

    #[test]
    fn only_a_tpm_2_that_libvirt_runs_is_sealed() {
        let emulator = |version: Option<&str>| TpmBackend::Emulator {
            version: version.map(str::to_owned),
            secret: None,
            persistent_state: false,
            place: None,
        };
        let of = |backend: Option<TpmBackend>| of_plain_xml("a", backend.as_ref());
        assert!(matches!(of(None), Ok(VtpmStep::Add)));
        assert!(matches!(of(Some(TpmBackend::Passthrough)), Ok(VtpmStep::None)));
        for version in [None, Some("2.0")] {
            assert!(matches!(of(Some(emulator(version))), Ok(VtpmStep::Encrypt)));
        }
        for backend in [
            emulator(Some("1.2")),
            TpmBackend::External,
            TpmBackend::Other("x".to_owned()),
        ] {
            let next = of(Some(backend)).unwrap_err().advice.unwrap().to_string();
            assert!(next.starts_with("virsh edit a: "), "{next}");
        }
    }
}

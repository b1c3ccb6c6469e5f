//! The vTPM of a VM that is to be sealed. swtpm makes its state at the first start, so there is nothing to make here but the envelope.

use std::path::PathBuf;

use super::known::{self, HasRun, is_settled, named_envelope};
use super::take_back::{adopt, first_that_opens};
use super::{Host, NewObject};
use crate::domain::{self, Domain, ObjectState, TpmBackend};
use crate::host::libvirt::DefinedDomain;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, ObjectKind};
use crate::model::problem::{Code, Problem};
use crate::object::Present;
use crate::object::vtpm::StateDir;
use crate::terminal::word;

/// What becomes of it.
#[derive(Debug)]
pub(super) enum VtpmStep {
    Sealed(Envelope),
    /// Sealed by an earlier virtseal: libvirt deletes the state when a transient domain ends.
    Keep(Envelope),
    /// It was sealed, and the XML does not say so.
    TakeBack(Vec<Envelope>),
    Add,
    Encrypt,
    /// The host's TPM, which keeps its state inside the chip.
    Passthrough,
}

impl VtpmStep {
    /// Whether the XML gets anything for it.
    pub(super) fn changes_xml(&self) -> bool {
        !matches!(self, Self::Sealed(_) | Self::Passthrough)
    }

    pub(super) fn known(&self) -> Option<&Envelope> {
        match self {
            Self::Sealed(envelope) | Self::Keep(envelope) => Some(envelope),
            Self::TakeBack(envelopes) => envelopes.first(),
            Self::Add | Self::Encrypt | Self::Passthrough => None,
        }
    }

    pub(super) fn words(&self) -> Option<String> {
        let words = match self {
            Self::Add => "add a TPM 2.0 with encrypted state",
            Self::Encrypt => "encrypt the state of the TPM",
            Self::TakeBack(_) => "take the encrypted TPM back",
            Self::Keep(_) => "have libvirt keep the state of the TPM (persistent_state='yes')",
            Self::Sealed(_) | Self::Passthrough => return None,
        };
        Some(words.to_owned())
    }

    /// Its envelope: known, opened with what it belongs to, or new.
    pub(super) fn envelope(
        &self,
        host: &Host<'_>,
        defined: &DefinedDomain,
        provider: Option<&str>,
    ) -> Result<Option<Envelope>, Problem> {
        match self {
            Self::Passthrough => Ok(None),
            Self::Sealed(envelope) | Self::Keep(envelope) => Ok(Some(envelope.clone())),
            Self::TakeBack(known) => open(host, defined, known).map(Some),
            Self::Add | Self::Encrypt => {
                let made = NewObject::find_or_make(host, defined.vm, ObjectKind::Vtpm, "", provider)?;
                Ok(Some(made.envelope.into_envelope()))
            }
        }
    }
}

pub(super) fn plan_vtpm(host: &Host<'_>, domain: &Domain) -> Result<VtpmStep, Problem> {
    let dir = StateDir::of_domain(domain, &host.swtpm_dir)?;
    let state = dir.inspect()?;
    let dir = dir.path();
    let step = match domain.tpm.as_ref().map(|tpm| &tpm.backend) {
        None => VtpmStep::Add,
        Some(TpmBackend::Emulator {
            secret: Some(id),
            persistent_state,
            ..
        }) => {
            let envelope = named_envelope(host, domain, ObjectKind::Vtpm, *id)?;
            return Ok(if !is_settled(host, domain, *id)? {
                VtpmStep::TakeBack(vec![envelope])
            } else if *persistent_state {
                VtpmStep::Sealed(envelope)
            } else {
                VtpmStep::Keep(envelope)
            });
        }
        Some(TpmBackend::Emulator {
            version: Some(version),
            ..
        }) if version != "2.0" => {
            return Err(Problem::new(
                Code::Failed,
                format!("its TPM is version {version}: only 2.0 can be sealed"),
            )
            .next(Advice::EditXml(domain.name.clone()).within("<backend type='emulator' version='2.0'/>")));
        }
        Some(TpmBackend::Emulator { .. }) => VtpmStep::Encrypt,
        Some(TpmBackend::Passthrough) => return Ok(VtpmStep::Passthrough),
        Some(TpmBackend::External | TpmBackend::Other(_)) => {
            return Err(Problem::new(
                Code::Failed,
                "its TPM is run by somebody else, who may keep it in plaintext",
            )
            .next(Advice::EditXml(domain.name.clone()).within("<backend type='emulator' version='2.0'/>")));
        }
    };
    let known = known::known(host, domain.uuid, ObjectKind::Vtpm)?;
    let known: Vec<_> = known.into_iter().map(|record| record.envelope).collect();
    match state {
        Present::Absent if HasRun::of(host, domain.uuid)? == HasRun::Yes && !known.is_empty() => {
            Ok(VtpmStep::TakeBack(known))
        }
        Present::Absent => Ok(step),
        Present::Encrypted(_) if !known.is_empty() => Ok(VtpmStep::TakeBack(known)),
        Present::Plain => Err(Problem::new(
            Code::WouldLoseKey,
            format!(
                "its vTPM has plaintext state in {}, and encrypting that is not possible yet",
                dir.display()
            ),
        )
        .next(
            Advice::from(format!(
                "if the VM may get a new TPM, set the state aside: mv {0} {0}.plain",
                word(dir.display())
            ))
            .then(Advice::SealVm(domain.name.clone())),
        )),
        Present::Encrypted(_) => Err(Problem::new(
            Code::WouldLoseKey,
            format!(
                "its vTPM has encrypted state in {}, but the domain does not name its key",
                dir.display()
            ),
        )
        .next(Advice::DefineSealedXml(None))),
    }
}

/// The directory that lacks the vTPM's state, where there must be one.
pub(super) fn state_gone(host: &Host<'_>, domain: &Domain) -> Result<Option<PathBuf>, Problem> {
    let dir = StateDir::of_domain(domain, &host.swtpm_dir)?;
    let absent = matches!(dir.inspect(), Ok(Present::Absent));
    let has_run = HasRun::of(host, domain.uuid)? == HasRun::Yes;
    Ok((absent && has_run).then(|| dir.path().to_owned()))
}

/// Whether the domain's vTPM is sealed and has no state: as before the first start.
pub(super) fn was_never_made(host: &Host<'_>, domain: &Domain) -> Result<bool, Problem> {
    let dir = StateDir::of_domain(domain, &host.swtpm_dir)?;
    let is_sealed = domain::objects(domain)
        .iter()
        .any(|object| object.kind == ObjectKind::Vtpm && matches!(object.state, ObjectState::Sealed(_)));
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

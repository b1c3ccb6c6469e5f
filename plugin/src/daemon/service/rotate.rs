//! What `provider rotate` asks for: a new root key or new KEKs, and the sweep that takes the old ones out of use.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::descriptors::{passphrase_from, pin_from, wrong_fds};
use super::job;
use super::tpm::{self, tpm_failure};
use crate::api::{FindingView, JobStarted};
use crate::audit::Actor;
use crate::daemon::job_records::who_gives_way;
use crate::daemon::locks::Doing;
use crate::daemon::{Daemon, records};
use crate::job::sweep::Task;
use crate::model::advice::Advice;
use crate::model::envelope::{Envelope, EnvelopeId, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::Problem;
use crate::provider::native::{NativeError, NativeProvider};
use crate::provider::{KeyProvider, ProviderStatus};
use crate::vm::foreign;
use crate::vm::names::VmNames;
use crate::vm::visible::{Visible, VisibleCopy};

/// Retires the keys in use of a provider: a native one gets a new root key, sealed by the passphrase in `fds`; any other
/// makes new KEKs during the job that follows.
pub(super) fn rotate(
    daemon: &Daemon,
    by: Actor,
    name: &str,
    fds: Vec<OwnedFd>,
) -> Result<JobStarted, Problem> {
    let provider = daemon.recipients.find(name)?;
    let id = provider.provider().id();
    let task = Task::Rotate { provider: id };
    let looked = job::look_around(daemon, &task)?;
    let _jobs = daemon.claims.jobs(Doing::Rotate)?;
    // Before anything changes.
    who_gives_way(daemon, &task)?;
    let mut tpm_lags = None;
    if let Some(native) = provider.of_kind::<NativeProvider>().as_deref() {
        check_root_key_complete(daemon, native)?;
        let mut fds = fds.into_iter();
        let passphrase = passphrase_from(fds.next().ok_or_else(wrong_fds)?)?;
        let pin = fds.next().map(pin_from).transpose()?;
        let rotated = native
            .rotate_with_tpm(&passphrase, &daemon.tpm, pin.as_ref())
            .map_err(|error| match error {
                NativeError::Tpm(_) => tpm_failure(native, &error),
                error => error.problem(name),
            });
        crate::host::process::trim();
        records::note_provider(daemon, by, "provider-rotate", name, &rotated);
        tpm_lags = tpm::tpm_lags(daemon, by, native, rotated?);
    }
    let mut started = job::sweep(daemon, by, &task, looked)?;
    if let Some(native) = provider.of_kind::<NativeProvider>().as_deref() {
        started.warnings.extend(tpm_lags.map(FindingView::from));
        if native.status() != ProviderStatus::Ready {
            let what = format!(
                "'{name}' has root key {} and wraps nothing until that is backed up: {}. The job goes on then",
                native.generation(),
                Advice::BackUpProvider(name.to_owned())
            );
            let provider = Subject::Provider(name.to_owned());
            let unsafe_yet = Finding::warning(FindingCode::NotBackedUp, provider, what);
            started.warnings.push(unsafe_yet.into());
        }
    }
    Ok(started)
}

/// A root key made here would have the number of one that exists elsewhere, and no backup could hold both.
fn check_root_key_complete(daemon: &Daemon, native: &NativeProvider) -> Result<(), Problem> {
    let name = native.name();
    // A row that tells nothing opens nothing: the job names it among what it leaves out.
    let (records, _silent) = daemon.keystore.envelopes()?.claims();
    let lacks = |envelope: &Envelope| {
        let mut own = envelope
            .stanzas
            .iter()
            .filter(|stanza| stanza.provider == native.id());
        own.any(|stanza| native.lacks(&stanza.kek))
    };
    let lacking: BTreeMap<EnvelopeId, VmId> = records
        .into_iter()
        .filter(lacks)
        .map(|envelope| (envelope.id, envelope.vm))
        .collect();
    if lacking.is_empty() {
        let not_rotated = |failure: Problem| failure.of(format!("'{name}' is not rotated"));
        let host = daemon.host_of_vms().map_err(not_rotated)?;
        let visible = Visible::of_host(&host).map_err(not_rotated)?.copies;
        let claim = visible
            .into_iter()
            .find(|copy| lacks(&copy.envelope) && foreign::may_be_true(&host, copy));
        return claim.map_or(Ok(()), |claim| Err(claimed(native, &claim)));
    }
    let vms: Vec<VmId> = lacking.into_values().collect();
    Err(Problem::would_lose_key(format!(
            "'{name}' is not rotated: it has root key {}, and {} have keys by a later one, which is in a newer backup",
            native.generation(),
            VmNames::of_keystore(daemon.keystore.as_ref())?.objects_of_vms(&vms)
        ),
    )
    .next(Advice::from("find the newest backup").then(Advice::BackUpState).then(Advice::ForceDelete(name.to_owned())).then(Advice::RestoreProvider(name.to_owned()).note("with that backup"))))
}

/// Deleting and restoring the provider would be the way out of a true claim, and a trap if anybody made it up.
fn claimed(native: &NativeProvider, claim: &VisibleCopy) -> Problem {
    let name = native.name();
    Problem::would_lose_key(format!(
            "'{name}' is not rotated: it has root key {}, and {} claims a key by a later one, which nothing here can verify",
            native.generation(),
            claim.place
        ),
    )
    .next(format!(
        "if you have a newer backup of '{name}' than this host was given, restore that on a fresh state directory; else rotate it \
         on the host that the VM came from. If it came from none of yours, keep its dumpxml, and take its <virtseal:vm> \
            metadata out of its XML"
    ))
}

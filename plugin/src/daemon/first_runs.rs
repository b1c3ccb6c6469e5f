//! Notes that a VM has run, as [`crate::vm::first_runs`] has it. Nobody waits here for a provider or for libvirt, and nothing fails a
//! guest.

use std::time::Instant;

use super::Daemon;
use crate::domain::Domain;
use crate::model::envelope::VmId;
use crate::model::problem::{Problem, chain};
use crate::object::{Located, Present};
use crate::store::{CopyPlace, StoreError};
use crate::vm::first_runs::{HeardRun, vtpm_of};
use crate::vm::names;
use crate::vm::start::{FirstRun, KnownRun};

/// `migrate begin` or `restore begin`: the state of the vTPM comes in the stream.
pub(super) fn arriving(daemon: &Daemon, vm: &str, xml: &str) -> Result<(), Problem> {
    let vm = names::uuid_of_hook(vm)?;
    let domain = Domain::parse(xml).map_err(|error| Problem::failed(chain(&error)))?;
    if let Some(vtpm) = vtpm_of(&domain).filter(|_| domain.uuid == vm) {
        daemon.first_runs.lock().arrives(vm, vtpm, Instant::now());
    }
    Ok(())
}

/// Before a `prepare`.
pub(super) fn known_run(daemon: &Daemon, vm: VmId) -> KnownRun {
    write(daemon);
    daemon.first_runs.lock().known_run(vm)
}

/// The VM runs: swtpm has made its state, unless that is still to come from another host.
pub(super) fn note_running(daemon: &Daemon, vm: VmId, name: &str) {
    let expected = daemon.first_runs.lock().take_expected(vm);
    if expected.is_some() && has_state(daemon, vm) {
        daemon.first_runs.lock().hear(vm, name, expected);
    }
    write(daemon);
    daemon.copies_bell.ring();
    daemon.notes_bell.ring();
}

/// The VM has ended. A first start that came no further than `prepare` does not count: libvirt may be about to delete what
/// swtpm made. Of a start that this daemon knows nothing of, a state that is there tells that there was one.
pub(super) fn note_ended(daemon: &Daemon, vm: VmId, name: &str) {
    let expected = daemon.first_runs.lock().take_expected(vm);
    if expected.is_none() && is_unnoted(daemon, vm) && has_state(daemon, vm) {
        daemon.first_runs.lock().hear(vm, name, None);
    }
    write(daemon);
}

/// Writes down what was heard. What can't be written stays.
pub(super) fn write(daemon: &Daemon) {
    let heard = daemon.first_runs.lock().heard();
    for (vm, HeardRun { name, first }) in heard {
        match write_run(daemon, vm, &name, first.as_ref()) {
            Ok(()) => daemon.first_runs.lock().forget(vm),
            Err(error) => tracing::error!(
                domain = name,
                "can't record that it has run, and will try again: {}",
                chain(&error)
            ),
        }
    }
}

fn write_run(daemon: &Daemon, vm: VmId, name: &str, first: Option<&FirstRun>) -> Result<(), StoreError> {
    let keystore = &daemon.keystore;
    let known = keystore.envelopes_of(vm)?;
    // A damaged row is one, and is mended below.
    let is_noted = !matches!(keystore.vm(vm), Ok(None));
    if !is_noted && known.is_empty() {
        // Shredded meanwhile.
        return Ok(());
    }
    keystore.remember_vm(vm, name)?;
    keystore.set_vtpm_seen(vm)?;
    let Some(FirstRun { before, after }) = first else {
        return Ok(());
    };
    // One that a job has changed meanwhile learns of it at the next start, from the note.
    let record = keystore.readable_envelope(after.id)?;
    if record.is_some_and(|record| record.envelope == *before) {
        keystore.put(after, "")?;
        daemon.host_store.copy_is_behind(before, CopyPlace::Xml)?;
    }
    Ok(())
}

fn is_unnoted(daemon: &Daemon, vm: VmId) -> bool {
    let record = daemon.keystore.vm(vm);
    record.is_ok_and(|record| record.is_some_and(|record| !record.vtpm_seen))
}

fn has_state(daemon: &Daemon, vm: VmId) -> bool {
    let made = Located::made_by_start(vm, &daemon.config().swtpm_dir);
    matches!(made.inspect(), Ok(Present::Encrypted(_)))
}

//! What `virtseal vm autostart` asks for.

use crate::api::{Outcome, StepView};
use crate::audit::Actor;
use crate::daemon::{Daemon, lock, records};
use crate::host::boot::BootId;
use crate::host::libvirt::{ByLibvirt, DefinedDomain};
use crate::model::act::{Act, StepCode, Tense};
use crate::model::advice::Advice;
use crate::model::envelope::VmId;
use crate::model::problem::{Problem, chain};
use crate::model::subject::Subject;
use crate::store::Change;
use crate::vm::names::{self, KnownVm};

pub(crate) fn enable(daemon: &Daemon, by: Actor, vm: &str) -> Result<Outcome, Problem> {
    let defined = names::find_domain(&daemon.background, vm)?;
    let name = &defined.name;
    if !daemon.keystore.is_sealed(defined.vm)? {
        return Err(
            Problem::usage(format!("{name} is not sealed, so that libvirt can start it"))
                .next(Advice::AutostartByLibvirt(name.clone()).or(Advice::SealVm(name.clone()))),
        );
    }
    let boot = BootId::of_host().map_err(|error| Problem::failed(chain(&error)))?;
    let enabled = add(daemon, &defined, boot);
    records::note_vm(daemon, by, "autostart-enable", defined.vm, name, &enabled);
    enabled
}

fn add(daemon: &Daemon, defined: &DefinedDomain, boot: BootId) -> Result<Outcome, Problem> {
    let (vm, name) = (defined.vm, &defined.name);
    let mut acts = Vec::new();
    if daemon.host_store.enable_autostart(vm, boot)? == Change::Changed {
        let text = format!(
            "virtseald will start {name} with this host from the next boot on: once in each, when its providers are ready"
        );
        acts.push(StepCode::AutostartByVirtseald.told(text));
    }
    acts.extend(take_from_libvirt(daemon, defined)?);
    Ok(outcome(name, &acts))
}

pub(crate) fn disable(daemon: &Daemon, by: Actor, vm: &str) -> Result<Outcome, Problem> {
    let found = names::find_vm(&daemon.background, daemon.keystore.as_ref(), vm)?;
    let (id, name, defined) = match &found {
        KnownVm::Defined(defined) => (defined.vm, &defined.name, Some(defined)),
        KnownVm::Undefined(record) => (record.vm, &record.name, None),
    };
    let disabled = remove(daemon, id, name, defined);
    records::note_vm(daemon, by, "autostart-disable", id, name, &disabled);
    disabled
}

fn remove(
    daemon: &Daemon,
    vm: VmId,
    name: &str,
    defined: Option<&DefinedDomain>,
) -> Result<Outcome, Problem> {
    let mut acts = Vec::new();
    if forget(daemon, vm)? == Change::Changed {
        let text = format!("{name} will stay off when this host boots");
        acts.push(StepCode::NoAutostartByVirtseald.told(text));
    }
    if let Some(defined) = defined {
        acts.extend(take_from_libvirt(daemon, defined)?);
    }
    Ok(outcome(name, &acts))
}

/// A VM without keys is not to be started.
pub(super) fn end_with_its_keys(daemon: &Daemon, vm: VmId, name: &str) {
    if let Err(problem) = forget(daemon, vm) {
        tracing::error!(
            domain = name,
            "virtseald still starts it with this host: {problem}"
        );
    }
}

/// virtseald does not start it with the host any more.
fn forget(daemon: &Daemon, vm: VmId) -> Result<Change, Problem> {
    let forgotten = daemon.host_store.disable_autostart(vm)?;
    lock(&daemon.autostarts).forget(vm);
    Ok(forgotten)
}

/// A VM that is not sealed any more starts with the host as before, by libvirt.
pub(super) fn hand_to_libvirt(daemon: &Daemon, defined: &DefinedDomain) -> Result<Vec<StepView>, Problem> {
    let (vm, name) = (defined.vm, &defined.name);
    if daemon.host_store.autostart(vm)?.is_none() {
        return Ok(Vec::new());
    }
    let by_libvirt = daemon.background.set_autostart(vm, ByLibvirt::Yes);
    by_libvirt.map_err(|error| {
        let what = format!(
            "{name} is plain, and does not start with this host: {}",
            chain(&error)
        );
        Problem::failed(what).next(Advice::AutostartByLibvirt(name.clone()))
    })?;
    forget(daemon, vm)?;
    let act = StepCode::AutostartByLibvirt.told("left it to libvirt to start it with this host");
    Ok(StepView::all(&[act], Tense::Done, &Subject::Vm(name.clone())))
}

fn take_from_libvirt(daemon: &Daemon, defined: &DefinedDomain) -> Result<Option<Act>, Problem> {
    if !defined.autostart {
        return Ok(None);
    }
    let taken = daemon.background.set_autostart(defined.vm, ByLibvirt::No);
    taken.map_err(|error| {
        let what = format!("libvirt still autostarts {}: {}", defined.name, chain(&error));
        Problem::failed(what).next(Advice::Autostart(defined.name.clone()))
    })?;
    let text = "took it off libvirt's list of autostarts";
    Ok(Some(StepCode::NoAutostartByLibvirt.told(text)))
}

fn outcome(name: &str, acts: &[Act]) -> Outcome {
    Outcome {
        changed: !acts.is_empty(),
        steps: StepView::all(acts, Tense::Done, &Subject::Vm(name.to_owned())),
        ..Outcome::default()
    }
}

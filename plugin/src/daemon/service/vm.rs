//! What `virtseal vm …` asks for.

use crate::api::Outcome;
use crate::audit::Actor;
use crate::daemon::locks::Sealed;
use crate::daemon::{Daemon, records};
use crate::domain;
use crate::host::libvirt::DefinedDomain;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::store::CopyPlace;
use crate::vm::seal::{self, ConfirmedFormats, Host};
use crate::vm::{marks, names};

/// Seals a VM, or says what would be done.
pub(crate) fn seal(
    daemon: &Daemon,
    by: Actor,
    vm: &str,
    provider: Option<&str>,
    formats: &[String],
    dry_run: bool,
) -> Result<Outcome, Problem> {
    let confirmed = ConfirmedFormats::parse(formats)?;
    let (_sealing, domain) = take(daemon, vm)?;
    if !dry_run {
        daemon.take_in_copies_of(&domain);
    }
    let host = Host {
        confirmed,
        ..daemon.host_of_vms()?
    };
    let plan = seal::plan(&host, &domain)?;
    if dry_run {
        return Ok(plan.outcome(false));
    }
    let sealed = marks::while_marked(&host, &domain, || seal::seal(&host, &domain, &plan, provider));
    records::note_vm(daemon, by, "seal", domain.vm, &domain.name, &sealed);
    let made = sealed?;
    let changed = made.xml != domain.xml;
    if changed {
        daemon.background.define(&made.xml).map_err(|error| {
            made.replaced
                .after(Problem::new(
                    Code::Failed,
                    format!("{} is not redefined: {}", domain.name, chain(&error)),
                ))
                .next(Advice::SealVm(vm.to_owned()).within("it goes on from here, nothing is lost"))
        })?;
        catch_up(daemon, &made.xml)?;
    }
    daemon.note_bad_images_of(&made.xml)?;
    Ok(plan.outcome(changed))
}

/// The VM, as it is once nobody else seals it.
fn take<'a>(daemon: &'a Daemon, vm: &str) -> Result<(Sealed<'a>, DefinedDomain), Problem> {
    let id = names::find_domain(&daemon.background, vm)?.vm;
    let sealing = daemon.sealing.of(id);
    let domain = names::find_domain(&daemon.background, &id.to_string())?;
    Ok((sealing, domain))
}

/// A job may have changed an envelope between the reading of an XML and its definition: then what was defined is behind.
fn catch_up(daemon: &Daemon, xml: &str) -> Result<(), Problem> {
    let (copies, _) =
        domain::Metadata::envelopes_in(xml).map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
    for copy in copies {
        let known = daemon.keystore.readable_envelope(copy.id)?;
        if let Some(record) = known.filter(|record| record.envelope != copy) {
            // Whoever wrote the copy may have named any KEK in it.
            daemon
                .host_store
                .copy_is_behind(&record.envelope, CopyPlace::Xml)?;
        }
    }
    daemon.copies_bell.ring();
    Ok(())
}

/// Makes a VM plain again, if nothing was ever written under seal.
pub(crate) fn unseal(daemon: &Daemon, by: Actor, vm: &str, dry_run: bool) -> Result<Outcome, Problem> {
    let (_sealing, domain) = take(daemon, vm)?;
    let host = daemon.host_of_vms()?;
    if marks::is_marked_in_vain(&host, &domain)? {
        if !dry_run {
            daemon.keystore.note_plain(domain.vm)?;
        }
        return Ok(Outcome {
            changed: !dry_run,
            ..marks::unmarked()
        });
    }
    let plan = seal::plan_unseal(&host, &domain)?;
    if !dry_run {
        let unsealed = seal::unseal(&host, &plan).and_then(|replaced| {
            daemon.background.define(&plan.xml).map_err(|error| {
                replaced
                    .after(Problem::new(
                        Code::Failed,
                        format!("{} is not redefined: {}", domain.name, chain(&error)),
                    ))
                    .next(Advice::UnsealVm(vm.to_owned()).within("it goes on from here"))
            })
        });
        records::note_vm(daemon, by, "unseal", domain.vm, &domain.name, &unsealed);
        unsealed?;
        daemon.keystore.note_plain(domain.vm)?;
    }
    Ok(plan.outcome(!dry_run))
}

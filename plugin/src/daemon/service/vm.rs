//! What `virtseal vm …` asks for.

use std::os::fd::OwnedFd;

use crate::api::{Outcome, Receipt, ShredPreview};
use crate::audit::Actor;
use crate::daemon::locks::Sealed;
use crate::daemon::{Daemon, lock, paths, records};
use crate::domain::{self, Domain};
use crate::host::libvirt::DefinedDomain;
use crate::model::advice::Advice;
use crate::model::envelope::VmId;
use crate::model::problem::{Code, Problem, chain};
use crate::store::CopyPlace;
use crate::vm::adopt::{self, Formats};
use crate::vm::confirmed_formats::ConfirmedFormats;
use crate::vm::headers::Writing;
use crate::vm::host::Host;
use crate::vm::seal;
use crate::vm::shred::{self, Doomed};
use crate::vm::{foreign, forget, marks, names};

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
    let host = Host {
        confirmed,
        ..daemon.host_of_vms()?
    };
    if !dry_run {
        foreign::take_in_copies_of(&host, &domain);
    }
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
    foreign::note_bad_images_of(&host, &made.xml)?;
    daemon.copies_bell.ring();
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

/// Takes over the envelopes of a VM that came from another host, as its first start would.
pub(crate) fn adopt(daemon: &Daemon, by: Actor, vm: &str, formats: Formats) -> Result<Outcome, Problem> {
    let _sealing = lock(&daemon.sealing);
    let defined = names::find_domain(&daemon.background, vm)?;
    let domain = Domain::parse(&defined.xml)
        .map_err(|error| Problem::new(Code::Failed, format!("{}: {}", defined.name, chain(&error))))?;
    let host = Host {
        paths: paths::rule(daemon),
        ..daemon.host()
    };
    let adopted = adopt::adopt(&host, &domain, formats);
    foreign::note_bad_images_of(&host, &defined.xml)?;
    daemon.copies_bell.ring();
    daemon.jobs.ring();
    records::note_vm(daemon, by, "adopt", domain.uuid, &domain.name, &adopted);
    adopted
}

/// Takes back what [`forget()`] has kept in the file in `fds`, after each envelope was opened.
pub(crate) fn adopt_forgotten(daemon: &Daemon, by: Actor, fds: Vec<OwnedFd>) -> Result<Outcome, Problem> {
    let _sealing = lock(&daemon.sealing);
    let forgotten = forget::read(fds)?;
    let adopted = forget::adopt(&daemon.host(), &forgotten);
    daemon.copies_bell.ring();
    records::note_vm(daemon, by, "adopt", forgotten.vm.vm, &forgotten.vm.name, &adopted);
    adopted
}

/// Drops what this host knows of a VM that is not defined here, after it was kept in a file.
pub(crate) fn forget(daemon: &Daemon, by: Actor, vm: &str) -> Result<Outcome, Problem> {
    let _sealing = lock(&daemon.sealing);
    let _copying = lock(&daemon.copying);
    let (id, name) = undefined_vm(daemon, vm)?;
    let forgotten = refuse_while_a_job_concerns(daemon, id)
        .and_then(|()| forget::forget(&daemon.host_of_vms()?, id, &name));
    records::note_vm(daemon, by, "forget", id, &name, &forgotten);
    forgotten
}

fn undefined_vm(daemon: &Daemon, vm: &str) -> Result<(VmId, String), Problem> {
    match names::find_domain(&daemon.background, vm) {
        Ok(defined) => Err(Problem::new(
            Code::WouldLoseKey,
            format!(
                "{} is not forgotten: it is defined here, and needs its keys to start",
                defined.name
            ),
        )
        .next(Advice::UndefineVm(defined.name.clone()).note("if it is on another host now"))),
        Err(absent) if absent.code == Code::NotFound => {
            names::find_undefined(daemon.keystore.as_ref(), vm, Advice::ForgetVm)?
                .filter(|(id, _)| {
                    let known = daemon.keystore.envelopes_of(*id);
                    known.is_ok_and(|known| !known.is_empty()) || !matches!(daemon.keystore.vm(*id), Ok(None))
                })
                .ok_or_else(|| {
                    Problem::new(Code::NotFound, format!("virtseal knows no VM '{vm}'"))
                        .next(Advice::ListOrphans)
                })
        }
        Err(problem) => Err(problem),
    }
}

fn refuse_while_a_job_concerns(daemon: &Daemon, vm: VmId) -> Result<(), Problem> {
    let running = daemon.keystore.running_jobs()?;
    match running.iter().find(|job| job.subject.concerns(vm)) {
        None => Ok(()),
        Some(job) => Err(Problem::new(Code::Busy, format!("job {} runs", job.id.0))
            .next(Advice::WatchJob(job.id.0).or(Advice::AbortJob(job.id.0)))),
    }
}

/// What a shredding of the VM asks a word for.
pub(crate) fn preview_shred(daemon: &Daemon, vm: &str) -> Result<ShredPreview, Problem> {
    shred::preview(&daemon.host_of_vms()?, vm)
}

/// Destroys all keys of a VM that is off, if its name was `typed`. Those at a provider of a VM that is not defined here
/// stay unless it was typed again for them.
pub(crate) fn shred(
    daemon: &Daemon,
    by: Actor,
    vm: &str,
    typed: Option<&str>,
    typed_for_keks: Option<&str>,
) -> Result<Receipt, Problem> {
    let _sealing = lock(&daemon.sealing);
    let _copying = lock(&daemon.copying);
    let host = daemon.host_of_vms()?;
    let doomed = Doomed::find(&host, vm)?;
    let consent = shred::consent(&doomed.name, doomed.presence, typed, typed_for_keks)?;
    let shredded = refuse_while_a_job_concerns(daemon, doomed.vm)
        .and_then(|()| keep_off(daemon, &doomed))
        .and_then(|_kept_off| shred::shred(&host, &doomed, consent));
    records::note_vm(daemon, by, "shred", doomed.vm, &doomed.name, &shredded);
    shredded
}

/// A start that comes now waits until this is dropped, and finds no key; one that came before it makes this fail.
fn keep_off<'a>(daemon: &'a Daemon, doomed: &Doomed) -> Result<Vec<Writing<'a>>, Problem> {
    let starting = || Problem::new(Code::Busy, format!("{} is starting", doomed.name));
    let taken: Option<Vec<_>> = doomed.ids().map(|id| daemon.headers.write(id)).collect();
    let taken = taken.ok_or_else(starting)?;
    if doomed.ids().any(|id| lock(&daemon.armed).needs(id)) {
        return Err(starting());
    }
    // It may have started while this looked around.
    match daemon.background.domain(&doomed.vm.to_string()) {
        Ok(Some(defined)) if defined.active => Err(starting()),
        Ok(_) => Ok(taken),
        Err(error) => Err(names::unreachable(&error)),
    }
}

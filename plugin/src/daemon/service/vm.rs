//! What `virtseal vm …` asks for.

use std::os::fd::OwnedFd;

use super::autostart;
use crate::api::{DiskFormat, FindingView, LossPreview, Outcome, Receipt, ShredPreview, StepView};
use crate::audit::Actor;
use crate::daemon::job_records::refuse_beside_another;
use crate::daemon::locks::{Claim, Doing};
use crate::daemon::{Daemon, records};
use crate::domain::{self, Domain};
use crate::host::libvirt::DefinedDomain;
use crate::model::act::Tense;
use crate::model::advice::Advice;
use crate::model::envelope::VmId;
use crate::model::job;
use crate::model::problem::{Code, Problem, chain};
use crate::model::subject::Subject;
use crate::store::CopyPlace;
use crate::vm::accepted_losses::AcceptedLosses;
use crate::vm::adopt::{self, Formats};
use crate::vm::confirmed_formats::ConfirmedFormats;
use crate::vm::headers::Writing;
use crate::vm::host::Host;
use crate::vm::seal;
use crate::vm::shred::{self, Doomed};
use crate::vm::{foreign, forget, marks, names};

/// What an admin says of a VM that is to be sealed.
pub(crate) struct Confirmed<'a> {
    /// What disks are.
    pub(crate) formats: &'a [DiskFormat],
    /// What may be made anew: `nvram`.
    pub(crate) replace: &'a [String],
}

pub(crate) fn seal(
    daemon: &Daemon,
    by: Actor,
    vm: &str,
    provider: Option<&str>,
    by_admin: &Confirmed<'_>,
    tense: Tense,
) -> Result<Outcome, Problem> {
    let confirmed = ConfirmedFormats::of(by_admin.formats)?;
    let (_claim, domain) = take(daemon, vm, Doing::Seal)?;
    let defined = domain.xml.clone();
    let seal::WithFiles {
        domain,
        acts: named,
        not_found,
    } = seal::with_files(&daemon.background, domain)?;
    refuse_beside_jobs(daemon, &domain)?;
    let host = Host {
        confirmed,
        accepted: AcceptedLosses::of(by_admin.replace),
        ..daemon.host_of_vms()?
    };
    if tense == Tense::Done {
        foreign::take_in_copies_of(&host, &domain);
    }
    let with_named = |outcome: Outcome, tense| Outcome {
        steps: [
            StepView::all(&named, tense, &Subject::Vm(domain.name.clone())),
            outcome.steps,
        ]
        .concat(),
        ..outcome
    };
    let survey = seal::survey(&host, &domain, not_found, provider)?;
    if tense == Tense::Planned {
        let planned = survey.with_keys_tried(&host).outcome();
        return Ok(with_named(planned, Tense::Planned));
    }
    let plan = survey.ready()?;
    let sealed = marks::while_marked(&host, &domain, || seal::seal(&host, &domain, &plan, provider));
    records::note_vm(daemon, by, "seal", domain.vm, &domain.name, &sealed);
    let made = sealed?;
    let changed = made.xml != defined;
    if changed {
        daemon.background.define(&made.xml).map_err(|error| {
            made.replaced
                .after(names::not_redefined(&domain.name, &error))
                .next(Advice::SealVm(vm.to_owned()).within("it goes on from here, nothing is lost"))
        })?;
        catch_up(daemon, &made.xml)?;
    }
    foreign::note_bad_images_of(&host, &made.xml)?;
    daemon.copies_bell.ring();
    let mut outcome = with_named(plan.outcome(changed || made.moved), Tense::Done);
    outcome.warnings.extend(FindingView::all(&made.kept));
    Ok(outcome)
}

/// A job that waits may have an envelope for a disk already: a seal would make an empty image with it, which the job would take for
/// the one that it was to fill.
fn refuse_beside_jobs(daemon: &Daemon, domain: &DefinedDomain) -> Result<(), Problem> {
    let Ok(parsed) = Domain::parse(&domain.xml) else {
        // The plan says why.
        return Ok(());
    };
    for path in parsed.disks.iter().filter_map(|disk| disk.source.path()) {
        let path = path.display().to_string();
        refuse_beside_another(daemon, &job::Subject::Image { vm: domain.vm, path })?;
    }
    Ok(())
}

/// The VM, as it is once nothing else is done to it.
fn take<'a>(daemon: &'a Daemon, vm: &str, doing: Doing) -> Result<(Claim<'a>, DefinedDomain), Problem> {
    let found = names::find_domain(&daemon.background, vm)?;
    let claim = daemon.claims.vm(found.vm, &found.name, doing)?;
    let domain = names::find_domain(&daemon.background, &found.vm.to_string())?;
    Ok((claim, domain))
}

/// A job may have changed an envelope between the reading of an XML and its definition: then what was defined is behind.
fn catch_up(daemon: &Daemon, xml: &str) -> Result<(), Problem> {
    let (copies, _) = domain::Metadata::envelopes_in(xml).map_err(|error| Problem::failed(chain(&error)))?;
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

pub(crate) fn unseal(daemon: &Daemon, by: Actor, vm: &str, tense: Tense) -> Result<Outcome, Problem> {
    let (_claim, domain) = take(daemon, vm, Doing::Unseal)?;
    let host = daemon.host_of_vms()?;
    if marks::is_marked_in_vain(&host, &domain)? {
        let mut outcome = marks::unmarked(&domain.name, tense);
        if tense == Tense::Done {
            daemon.keystore.note_plain(domain.vm)?;
            outcome.steps.extend(autostart::hand_to_libvirt(daemon, &domain)?);
        }
        return Ok(outcome);
    }
    let is_plain = Domain::parse(&domain.xml).is_ok_and(|parsed| parsed.metadata.is_none());
    if is_plain && !daemon.keystore.is_sealed(domain.vm)? {
        let mut outcome = Outcome {
            result: Some(format!("{} is plain", domain.name)),
            ..Outcome::default()
        };
        if tense == Tense::Done {
            // An unsealing may have died before that.
            outcome.steps.extend(autostart::hand_to_libvirt(daemon, &domain)?);
            outcome.changed = !outcome.steps.is_empty();
        }
        return Ok(outcome);
    }
    let plan = seal::plan_unseal(&host, &domain)?;
    if tense == Tense::Done {
        let unsealed = seal::unseal(&host, &plan).and_then(|replaced| {
            daemon.background.define(&plan.xml).map_err(|error| {
                replaced
                    .after(names::not_redefined(&domain.name, &error))
                    .next(Advice::UnsealVm(vm.to_owned()).within("it goes on from here"))
            })
        });
        records::note_vm(daemon, by, "unseal", domain.vm, &domain.name, &unsealed);
        unsealed?;
        daemon.keystore.note_plain(domain.vm)?;
        let handed = autostart::hand_to_libvirt(daemon, &domain)?;
        let mut outcome = plan.outcome(Tense::Done);
        outcome.steps.extend(handed);
        return Ok(outcome);
    }
    Ok(plan.outcome(tense))
}

pub(crate) fn adopt(daemon: &Daemon, by: Actor, vm: &str, formats: Formats) -> Result<Outcome, Problem> {
    let (_claim, defined) = take(daemon, vm, Doing::Adopt)?;
    let domain = Domain::parse(&defined.xml)
        .map_err(|error| Problem::failed(format!("{}: {}", defined.name, chain(&error))))?;
    let host = Host {
        paths: daemon.path_rule(),
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
    let forgotten = forget::read(fds)?;
    let (id, name) = (forgotten.vm.vm, &forgotten.vm.name);
    let _claim = daemon.claims.vm(id, name, Doing::Adopt)?;
    let adopted = forget::adopt(&daemon.host(), &forgotten);
    daemon.copies_bell.ring();
    records::note_vm(daemon, by, "adopt", id, name, &adopted);
    adopted
}

pub(crate) fn forget(daemon: &Daemon, by: Actor, vm: &str) -> Result<Outcome, Problem> {
    let (id, name) = undefined_vm(daemon, vm)?;
    let _claim = daemon.claims.vm(id, &name, Doing::Forget)?;
    // It may have been defined meanwhile.
    undefined_vm(daemon, &id.to_string())?;
    let forgotten = refuse_while_a_job_concerns(daemon, id)
        .and_then(|()| forget::forget(&daemon.host_of_vms()?, id, &name));
    records::note_vm(daemon, by, "forget", id, &name, &forgotten);
    if forgotten.is_ok() {
        autostart::end_with_its_keys(daemon, id, &name);
    }
    forgotten
}

fn undefined_vm(daemon: &Daemon, vm: &str) -> Result<(VmId, String), Problem> {
    match names::find_domain(&daemon.background, vm) {
        Ok(defined) => Err(Problem::would_lose_key(format!(
            "{} is not forgotten: it is defined here, and needs its keys to start",
            defined.name
        ))
        .next(Advice::UndefineVm(defined.name.clone()).note("if it is on another host now"))),
        Err(absent) if absent.code == Code::NotFound => {
            names::find_undefined(daemon.keystore.as_ref(), vm, Advice::ForgetVm)?
                .filter(|(id, _)| {
                    let known = daemon.keystore.envelopes_of(*id);
                    known.is_ok_and(|known| !known.is_empty()) || !matches!(daemon.keystore.vm(*id), Ok(None))
                })
                .ok_or_else(|| {
                    Problem::not_found(format!("virtseal knows no VM '{vm}'")).next(Advice::ListOrphans)
                })
        }
        Err(problem) => Err(problem),
    }
}

fn refuse_while_a_job_concerns(daemon: &Daemon, vm: VmId) -> Result<(), Problem> {
    let running = daemon.keystore.running_jobs()?;
    match running.iter().find(|job| job.subject.concerns(vm)) {
        None => Ok(()),
        Some(job) => Err(Problem::busy(format!("job {} runs", job.id.0))
            .next(Advice::WatchJob(job.id.0).or(Advice::AbortJob(job.id.0)))),
    }
}

pub(crate) fn preview_shred(daemon: &Daemon, vm: &str) -> Result<ShredPreview, Problem> {
    shred::preview(&daemon.host_of_vms()?, vm)
}

pub(crate) fn shred(
    daemon: &Daemon,
    by: Actor,
    vm: &str,
    typed: Option<&str>,
    typed_for_keks: Option<&str>,
) -> Result<Receipt, Problem> {
    let found = Doomed::find(&daemon.host(), vm)?;
    let _claim = daemon.claims.vm(found.vm, &found.name, Doing::Shred)?;
    let host = daemon.host_of_vms()?;
    let doomed = Doomed::find(&host, &found.vm.to_string())?;
    let consent = shred::consent(&doomed.name, doomed.presence, typed, typed_for_keks)?;
    let shredded = refuse_while_a_job_concerns(daemon, doomed.vm)
        .and_then(|()| keep_off(daemon, &doomed))
        .and_then(|_kept_off| shred::shred(&host, &doomed, consent));
    records::note_vm(daemon, by, "shred", doomed.vm, &doomed.name, &shredded);
    if shredded.is_ok() {
        autostart::end_with_its_keys(daemon, doomed.vm, &doomed.name);
    }
    shredded
}

pub(crate) fn preview_nvram_reset(daemon: &Daemon, vm: &str) -> Result<LossPreview, Problem> {
    let domain = names::find_domain(&daemon.background, vm)?;
    Ok(seal::plan_reset(&daemon.host_of_vms()?, &domain)?.preview())
}

pub(crate) fn reset_nvram(
    daemon: &Daemon,
    by: Actor,
    vm: &str,
    typed: Option<&str>,
) -> Result<Outcome, Problem> {
    let (_claim, domain) = take(daemon, vm, Doing::ResetNvram)?;
    let host = daemon.host_of_vms()?;
    let plan = seal::plan_reset(&host, &domain)?;
    let reset = seal::reset(&host, &plan, typed);
    records::note_vm(daemon, by, "nvram-reset", domain.vm, &domain.name, &reset);
    reset
}

/// A start that comes now waits until this is dropped, and finds no key; one that came before it makes this fail.
fn keep_off<'a>(daemon: &'a Daemon, doomed: &Doomed) -> Result<Vec<Writing<'a>>, Problem> {
    let starting = || Problem::busy(format!("{} is starting", doomed.name));
    let taken: Option<Vec<_>> = doomed.ids().map(|id| daemon.headers.write(id)).collect();
    let taken = taken.ok_or_else(starting)?;
    if doomed.ids().any(|id| daemon.armed.needs(id)) {
        return Err(starting());
    }
    // It may have started while this looked around.
    match daemon.background.domain(&doomed.vm.to_string()) {
        Ok(Some(defined)) if defined.active => Err(starting()),
        Ok(_) => Ok(taken),
        Err(error) => Err(names::unreachable(&error)),
    }
}

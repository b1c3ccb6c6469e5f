//! What `virtseal vm snapshot …` asks for.

use crate::api::{FindingView, JobStarted, LossPreview, SnapshotAct};
use crate::audit::Actor;
use crate::daemon::locks::Doing;
use crate::daemon::{Daemon, job_records, overlays};
use crate::model::advice::Advice;
use crate::model::problem::Problem;
use crate::vm::snapshot::{self, Choices};
use crate::vm::{consent, names};

pub(super) fn preview(
    daemon: &Daemon,
    vm: &str,
    act: SnapshotAct,
    choices: Choices,
) -> Result<LossPreview, Problem> {
    let domain = names::find_domain(&daemon.background, vm)?;
    Ok(snapshot::plan(&daemon.host_of_vms()?, &domain, act)?.preview(choices))
}

/// Starts the job that does it; one that may lose something once the VM's name was `typed`.
pub(super) fn begin(
    daemon: &Daemon,
    by: Actor,
    vm: &str,
    act: SnapshotAct,
    choices: Choices,
    typed: Option<&str>,
) -> Result<JobStarted, Problem> {
    let found = names::find_domain(&daemon.background, vm)?;
    let claim = daemon.claims.vm(found.vm, &found.name, Doing::Overlays)?;
    let domain = names::find_domain(&daemon.background, &found.vm.to_string())?;
    let host = daemon.host_of_vms()?;
    let plan = snapshot::plan(&host, &domain, act)?;
    if act == SnapshotAct::Delete || choices.force {
        let vm = plan.name.clone();
        let loss = match act {
            SnapshotAct::Commit => "what was written to its sealed images by themselves would be lost",
            SnapshotAct::Delete => "what was written to its disks since the snapshot would be lost",
        };
        consent::refuse_unless_typed(&plan.name, typed, loss, || match choices.force {
            true => Advice::ForceSnapshot { vm, act },
            false => Advice::DeleteSnapshot { vm, typed: true },
        })?;
    }
    if plan.disks.is_empty() {
        return Err(
            Problem::not_found(format!("{} has no plain overlay on a sealed disk", plan.name))
                .next(Advice::ShowVm(plan.name)),
        );
    }
    let job = overlays::begin(daemon, by, &host, &plan, choices);
    // Before it is told: the job would wait for it.
    drop(claim);
    Ok(JobStarted {
        job: job_records::view(daemon, &job?)?,
        changed: true,
        warnings: FindingView::all(&plan.warnings(choices)),
    })
}

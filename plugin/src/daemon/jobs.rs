//! The thread that has jobs done.

use std::time::Instant;

use super::job_records::{note_end, words};
use super::{Daemon, overlays, records, volumes};
use crate::audit::Actor;
use crate::job::live::{AtWork, Stint};
use crate::job::record::Work;
use crate::job::runner::{Decision, decide};
use crate::job::sweep::{self, Beside, Step, Task};
use crate::model::deadlines::daemon::JOB_WITHOUT_THREAD;
use crate::model::job::{JobId, JobState};
use crate::model::problem::{Problem, chain};
use crate::store::StoreError;

/// Has jobs done for ever, each by a thread of its own. For a thread of its own.
pub(crate) fn run(daemon: &Daemon) {
    std::thread::scope(|scope| {
        loop {
            let decision = match daemon.keystore.running_jobs() {
                Ok(running) => decide(&daemon.jobs.standing(&running), Instant::now()),
                Err(error) => {
                    tracing::error!("no job can go on: {}", chain(&error));
                    Decision::default()
                }
            };
            daemon.jobs.note_in_line(&decision);
            for id in &decision.begin {
                let at_work = daemon.jobs.begin(*id);
                let id = *id;
                let thread = std::thread::Builder::new().name(format!("job {}", id.0));
                if let Err(error) = thread.spawn_scoped(scope, move || spend_time(daemon, at_work, id)) {
                    tracing::error!(%error, "no thread for job {}", id.0);
                    std::thread::sleep(JOB_WITHOUT_THREAD);
                }
            }
            daemon.jobs.wait(decision.look_again);
        }
    });
}

fn spend_time(daemon: &Daemon, at_work: AtWork<'_>, id: JobId) {
    let stint = work(daemon, &at_work, id).unwrap_or_else(|problem| {
        tracing::error!("job {} can't go on: {problem}", id.0);
        // A keystore that can't be written can't say so in the job's row either.
        Stint::Waits(Some(problem.to_string()))
    });
    at_work.end(stint);
}

fn work(daemon: &Daemon, at_work: &AtWork<'_>, id: JobId) -> Result<Stint, Problem> {
    let job = daemon.keystore.job(id)?.ok_or(StoreError::UnknownJob(id.0))?;
    if job.state != JobState::Running {
        volumes::take_back_aborted(daemon, &job);
        return Ok(Stint::Ended);
    }
    match Work::from_json(&job.task)? {
        Work::Sweep(task) => go_through(daemon, at_work, id, &task),
        Work::CreateVolume(volume) => volumes::make(daemon, at_work, &job, &volume),
        Work::Overlays(overlays) => overlays::free(daemon, at_work, &job, &overlays),
    }
}

fn go_through(daemon: &Daemon, at_work: &AtWork<'_>, id: JobId, task: &Task) -> Result<Stint, Problem> {
    let beside = Beside {
        is_leaving: &|vm| daemon.claims.is_leaving(vm),
        unfinished: &|| daemon.claims.making_since(at_work.moved(), task.subject().vm()),
    };
    loop {
        let config = daemon.config();
        match sweep::step(
            daemon.keystore.as_ref(),
            &daemon.recipients,
            beside,
            task,
            id,
            config.batch_size,
        )? {
            Step::Worked(job) => {
                at_work.note(job.seen);
                daemon.copies_bell.ring();
                if !config.interval.is_zero() {
                    return Ok(Stint::Rests(config.interval));
                }
            }
            Step::Waits(_) => return Ok(Stint::Waits(None)),
            Step::Ended(job) => {
                if job.state != JobState::Aborted {
                    records::note_command(daemon, Actor::Virtseald, "job-end", &words(daemon, &job), &Ok(()));
                }
                note_end(&job);
                return Ok(Stint::Ended);
            }
        }
    }
}

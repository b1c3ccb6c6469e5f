//! The thread that has jobs done, and what is told of them.

use std::time::{Duration, Instant};

use super::Daemon;
use super::records;
use super::service::volume;
use crate::api::pages::{self, PAGE};
use crate::api::{JobProblem, JobState, JobView, Unit};
use crate::audit::Actor;
use crate::job::live::{AtWork, Stint};
use crate::job::record::{self, Work};
use crate::job::runner::{Decision, decide};
use crate::job::sweep::{self, Step, Task};
use crate::model::envelope::ObjectKind;
use crate::model::job::{JobId, Subject};
use crate::model::problem::{Problem, chain};
use crate::store::{JobRecord, StoreError};

/// How many envelopes left behind are shown with a job.
const SHOWN: u32 = 20;
/// How long a thread that could not be had is not asked for again.
const NO_THREAD: Duration = Duration::from_secs(1);

/// Has jobs done for ever, each by a thread of its own. For a thread of its own.
pub fn run(daemon: &Daemon) {
    std::thread::scope(|scope| {
        loop {
            let decision = match daemon.keystore.running_jobs() {
                Ok(running) => decide(&daemon.jobs.standing(&running), Instant::now()),
                Err(error) => {
                    tracing::error!("jobs stand still: {}", chain(&error));
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
                    std::thread::sleep(NO_THREAD);
                }
            }
            daemon.jobs.wait(decision.look_again);
        }
    });
}

fn spend_time(daemon: &Daemon, at_work: AtWork<'_>, id: JobId) {
    let stint = work(daemon, &at_work, id).unwrap_or_else(|problem| {
        tracing::error!("job {} stands still: {problem}", id.0);
        // A keystore that can't be written can't say so in the job's row either.
        Stint::Waits(Some(problem.to_string()))
    });
    at_work.end(stint);
}

fn work(daemon: &Daemon, at_work: &AtWork<'_>, id: JobId) -> Result<Stint, Problem> {
    let job = daemon.keystore.job(id)?.ok_or(StoreError::UnknownJob(id.0))?;
    if job.state != JobState::Running {
        return Ok(Stint::Ended);
    }
    match Work::from_json(&job.task)? {
        Work::Sweep(task) => go_through(daemon, at_work, id, &task),
        Work::CreateVolume(volume) => volume::make(daemon, at_work, &job, &volume),
    }
}

fn go_through(daemon: &Daemon, at_work: &AtWork<'_>, id: JobId, task: &Task) -> Result<Stint, Problem> {
    loop {
        let config = daemon.config();
        match sweep::step(
            daemon.keystore.as_ref(),
            &daemon.recipients,
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

/// What it held is given back, and the log knows.
pub(super) fn note_end(job: &JobRecord) {
    tracing::info!(
        job = job.id.0,
        state = job.state.as_str(),
        changed = job.changed,
        "ended"
    );
    crate::host::process::trim();
}

/// What a job does.
pub(super) fn words(daemon: &Daemon, job: &JobRecord) -> String {
    match Work::from_json(&job.task) {
        Ok(work) => work.words(|id| daemon.recipients.name_of(id)),
        Err(_) => "of another version".to_owned(),
    }
}

/// All that is told of a job.
pub(super) fn view(daemon: &Daemon, job: &JobRecord) -> Result<JobView, Problem> {
    let left = match job.left {
        0 => Vec::new(),
        _ => daemon.keystore.left_behind(job.id, SHOWN)?,
    };
    let reasons = left
        .iter()
        .map(|left| format!("envelope {}: {}", left.envelope, left.reason));
    let seen = match job.state {
        JobState::Running => daemon.jobs.seen(job.id, job.total),
        _ => Default::default(),
    };
    let problem = (job.state == JobState::Failed).then(|| record::problem_from_json(&job.failure));
    let noted = (!job.waiting.is_empty()).then(|| job.waiting.clone());
    Ok(JobView {
        id: job.id.0,
        kind: Work::from_json(&job.task).ok().map(|work| work.kind()),
        task: words(daemon, job),
        vm: job.subject.vm().map(|vm| vm.to_string()),
        path: job.subject.path().map(str::to_owned),
        state: job.state,
        unit: job.subject.unit(),
        total: number(job.total),
        seen: number(match job.subject.unit() {
            Unit::Bytes => seen.done.unwrap_or(job.seen),
            Unit::Envelopes => job.seen,
        }),
        changed: number(job.changed),
        left: number(job.left),
        per_second: seen.pace.map(|pace| number(pace.per_second)),
        seconds_left: seen.pace.map(|pace| number(pace.left.as_secs())),
        waiting: seen
            .waits_for
            .or(noted)
            .filter(|_| job.state == JobState::Running),
        reasons: pages::cut(reasons.collect(), PAGE / 2),
        problem: problem.map(|problem| JobProblem {
            code: problem.code as i64,
            message: problem.message,
            next: problem.advice.map(|advice| advice.to_string()),
        }),
        envelope: made(daemon, job)?,
        started: job.created,
        updated: job.updated,
    })
}

/// The envelope of the image that a job has made.
fn made(daemon: &Daemon, job: &JobRecord) -> Result<Option<String>, StoreError> {
    let (JobState::Done, Subject::Image { vm, path }) = (job.state, &job.subject) else {
        return Ok(None);
    };
    let records = daemon.keystore.envelopes_of(*vm)?.sound;
    let found = records
        .into_iter()
        .rfind(|record| record.envelope.kind == ObjectKind::Disk && record.location == *path);
    Ok(found.map(|record| record.envelope.id.to_string()))
}

pub(super) fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

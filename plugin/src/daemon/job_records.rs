//! What the records of jobs tell: to who asks for one, and to who would begin another.

use std::time::{Duration, UNIX_EPOCH};

use super::Daemon;
use crate::api::pages::{self, PAGE};
use crate::api::{JobState, JobView, Unit};
use crate::host::local_time::rfc3339;
use crate::job::record::{self, Work};
use crate::job::sweep::Task;
use crate::model::advice::Advice;
use crate::model::deadlines::image::ENDS;
use crate::model::envelope::ObjectKind;
use crate::model::job::{JobId, Subject};
use crate::model::problem::Problem;
use crate::store::{JobRecord, StoreError};

/// How many envelopes left behind are shown with a job.
const SHOWN: u32 = 20;

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
        JobState::Running | JobState::Aborted => daemon.jobs.seen(job.id, job.total),
        _ => Default::default(),
    };
    let noted = (!job.waiting.is_empty()).then(|| job.waiting.clone());
    let runs = job.state == JobState::Running;
    let (done, pace) = (seen.done.filter(|_| runs), seen.pace.filter(|_| runs));
    let waiting = match job.state {
        JobState::Running => seen.waits_for.or(noted),
        // Long ago, and its thread is still at it.
        JobState::Aborted if seen.ending.is_some_and(|ending| ending >= ENDS) => {
            let storage = "storage that does not answer".to_owned();
            Some(format!("aborting: {}", seen.waits_for.unwrap_or(storage)))
        }
        _ => None,
    };
    Ok(JobView {
        id: job.id.0,
        kind: Work::from_json(&job.task).ok().map(|work| work.kind().into()),
        task: words(daemon, job),
        vm: job.subject.vm().map(|vm| vm.to_string()),
        path: job.subject.path().map(str::to_owned),
        state: job.state.into(),
        unit: job.subject.unit().into(),
        total: number(job.total),
        seen: number(match job.subject.unit() {
            Unit::Bytes => done.unwrap_or(job.seen),
            Unit::Envelopes => job.seen,
        }),
        changed: number(job.changed),
        left: number(job.left),
        per_second: pace.map(|pace| number(pace.per_second)),
        seconds_left: pace.map(|pace| number(pace.left.as_secs())),
        waiting,
        reasons: pages::cut(reasons.collect(), PAGE / 2),
        problem: (job.state == JobState::Failed).then(|| record::problem_from_json(&job.failure)),
        envelope: made(daemon, job)?,
        started: time(job.created),
        updated: time(job.updated),
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

/// Of seconds since 1970.
fn time(seconds: i64) -> String {
    rfc3339(UNIX_EPOCH + Duration::from_secs(seconds.max(0).unsigned_abs()))
}

pub(super) fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Before anything is made for a job that could not be kept.
pub(super) fn refuse_beside_another(daemon: &Daemon, subject: &Subject) -> Result<(), Problem> {
    let running = daemon.keystore.running_jobs()?;
    match running.iter().find(|job| job.subject.excludes(subject)) {
        Some(job) => Err(beside_another(job.id.0, subject)),
        None => Ok(()),
    }
}

/// The same of a sweep. Those that wait while `task` could be done give way to it: these.
pub(super) fn who_gives_way(daemon: &Daemon, task: &Task) -> Result<Vec<JobId>, Problem> {
    let subject = task.subject();
    let can_work = task
        .wraps()
        .into_iter()
        .all(|provider| daemon.recipients.cannot_wrap(provider).is_none());
    let mut give_way = Vec::new();
    for job in daemon.keystore.running_jobs()? {
        let is_sweep = matches!(Work::from_json(&job.task), Ok(Work::Sweep(_)));
        match job.subject.excludes(&subject) {
            true if can_work && is_sweep && !job.waiting.is_empty() => give_way.push(job.id),
            true => return Err(beside_another(job.id.0, &subject)),
            false => {}
        }
    }
    Ok(give_way)
}

pub(super) fn excluded(error: StoreError, subject: &Subject) -> Problem {
    match error {
        StoreError::JobRunning(id) => beside_another(id, subject),
        error => error.into(),
    }
}

fn beside_another(id: i64, subject: &Subject) -> Problem {
    let why = match subject.path() {
        Some(path) => format!("job {id} works on {path}"),
        None => format!("job {id} runs, and one runs at a time over the same envelopes"),
    };
    Problem::busy(why).next(Advice::WatchJob(id).or(Advice::AbortJob(id)))
}

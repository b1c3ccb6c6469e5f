//! Work that outlives its command.

use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration};

use super::super::document::{Answer, JobChanged, JobShown};
use super::super::out::{line, table};
use super::Printer;
use crate::api::{JobState, JobView, Jobs, Unit};
use crate::model::advice::Advice;
use crate::model::problem::Problem;

impl Printer {
    pub(in crate::cli) fn jobs(&self, jobs: Jobs) -> Result<(), Problem> {
        if self.json {
            return self.tell(Answer::Jobs(jobs));
        }
        let rows = jobs.jobs.iter().map(|job| {
            vec![
                job.id.to_string(),
                job.task.clone(),
                job.state.to_string(),
                progress(job),
                job.changed.to_string(),
                job.left.to_string(),
            ]
        });
        table(&["JOB", "TASK", "STATE", "DONE", "CHANGED", "LEFT"], rows)?;
        for job in &jobs.jobs {
            if let Some(waiting) = &job.waiting {
                line(&format!("job {} waits: {waiting}", job.id))?;
            }
            if let Some(problem) = &job.problem {
                line(&format!(
                    "job {} failed: {}",
                    job.id,
                    Problem::from(problem.clone())
                ))?;
            }
            if job.state == JobState::Incomplete.into() {
                line(&format!(
                    "job {} left {} envelopes behind; why: {}",
                    job.id,
                    job.left,
                    Advice::WatchJob(job.id)
                ))?;
            }
        }
        if jobs.stale_copies == 0 {
            return Ok(());
        }
        line("")?;
        line(&format!("Outdated copies of envelopes ({}):", jobs.stale_copies))?;
        let rows = jobs.copies.iter().map(|copy| {
            let reason = if copy.reason.is_empty() { "-" } else { &copy.reason };
            vec![
                copy.vm.clone(),
                copy.place.to_string(),
                copy.envelope.clone(),
                reason.to_owned(),
            ]
        });
        table(&["VM", "COPY IN", "ENVELOPE", "WHY"], rows)
    }

    /// One that was only looked at.
    pub(in crate::cli) fn job(&self, job: JobView) -> Result<(), Problem> {
        let text = told(&job);
        self.show(Answer::Job(JobShown { job }), std::iter::once(text.as_str()))
    }

    /// One that the command has started or stopped.
    pub(in crate::cli) fn job_changed(&self, job: JobView, changed: bool) -> Result<(), Problem> {
        let text = told(&job);
        let changed = JobChanged {
            job,
            changed,
            warnings: Vec::new(),
        };
        self.show(Answer::JobChanged(changed), std::iter::once(text.as_str()))
    }
}

fn told(job: &JobView) -> String {
    let changed = match job.unit.known() {
        Some(Unit::Envelopes) => format!(" envelopes seen, {} changed, {} left", job.changed, job.left),
        _ => String::new(),
    };
    format!(
        "Job {} ({}): {}, {}{changed}",
        job.id,
        job.task,
        job.state,
        progress(job)
    )
}

/// How far a job is, how fast it goes and how long it will take, as far as that can be told.
pub(in crate::cli) fn progress(job: &JobView) -> String {
    let amount = |count: i64| match job.unit.known() {
        Some(Unit::Bytes) => HumanBytes(count.unsigned_abs()).to_string(),
        _ => count.to_string(),
    };
    let pace = job.per_second.map(|rate| format!(", {}/s", amount(rate)));
    let time = |seconds: i64| HumanDuration(Duration::from_secs(seconds.unsigned_abs()));
    let left = job
        .seconds_left
        .map(|seconds| format!(", {} left", time(seconds)));
    format!(
        "{} of {}{}{}",
        amount(job.seen),
        amount(job.total),
        pace.unwrap_or_default(),
        left.unwrap_or_default()
    )
}

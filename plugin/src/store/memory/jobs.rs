//! The jobs of the store in memory.

use std::collections::BTreeMap;

use super::{Memory, State, sound};
use crate::model::envelope::{Envelope, EnvelopeId, Stanza};
use crate::model::job::{JobId, JobState, Subject, Unit};
use crate::store::damage::Rows;
use crate::store::error::StoreError;
use crate::store::job_records::{JobRecord, LeftBehind, NewJob, Pass, Verdict};
use crate::store::records::{EnvelopeRecord, RetiredKek};
use crate::store::shared::Jobs;
use crate::store::sqlite::database::now;

#[derive(Clone, Debug)]
pub(super) struct Job {
    record: JobRecord,
    pub(super) left: BTreeMap<EnvelopeId, LeftBehind>,
}

fn came_meanwhile(envelope: EnvelopeId) -> LeftBehind {
    LeftBehind {
        envelope,
        reason: "it came here meanwhile".to_owned(),
        again: true,
    }
}

fn made_by<'a>(old: &'a Envelope, new: &'a Envelope) -> impl Iterator<Item = &'a Stanza> {
    new.stanzas.iter().filter(|stanza| !old.stanzas.contains(stanza))
}

impl State {
    pub(super) fn show_running_sweeps(&mut self, envelope: &Envelope) {
        let place = self.place(envelope.id).unwrap_or(0);
        for job in &mut self.jobs {
            let has_passed = job.record.pass == Pass::Left || place <= cursor(&job.record);
            if job.record.state == JobState::Running && covers(&job.record.subject, envelope) && has_passed {
                job.left.insert(envelope.id, came_meanwhile(envelope.id));
            }
        }
    }

    fn job(&mut self, id: JobId) -> Result<&mut Job, StoreError> {
        let mut jobs = self.jobs.iter_mut();
        jobs.find(|job| job.record.id == id)
            .ok_or(StoreError::UnknownJob(id.0))
    }

    fn refuse_excluded(&self, subject: &Subject) -> Result<(), StoreError> {
        let mut running = self
            .jobs
            .iter()
            .map(|job| &job.record)
            .filter(|job| job.state == JobState::Running);
        match running.find(|job| job.subject.excludes(subject)) {
            Some(job) => Err(StoreError::JobRunning(job.id.0)),
            None => Ok(()),
        }
    }

    fn units(&self, subject: &Subject, given: u64) -> u64 {
        match subject.unit() {
            Unit::Envelopes => {
                let envelopes = self.envelopes.values();
                envelopes
                    .filter(|record| covers(subject, &record.envelope))
                    .count() as u64
            }
            Unit::Bytes => given,
        }
    }
}

fn cursor(job: &JobRecord) -> i64 {
    job.cursor.parse().unwrap_or(0)
}

/// Whether a sweep goes through `envelope`.
fn covers(subject: &Subject, envelope: &Envelope) -> bool {
    subject.path().is_none() && subject.vm().is_none_or(|vm| vm == envelope.vm)
}

impl Job {
    fn now(&self) -> JobRecord {
        JobRecord {
            left: self.left.len() as u64,
            ..self.record.clone()
        }
    }

    fn begin(&mut self, total: u64, left: &[LeftBehind]) {
        self.left = left.iter().map(|left| (left.envelope, left.clone())).collect();
        self.record = JobRecord {
            state: JobState::Running,
            pass: Pass::All,
            cursor: String::new(),
            total,
            seen: 0,
            changed: 0,
            waiting: String::new(),
            failure: String::new(),
            updated: now(),
            ..self.record.clone()
        };
    }

    fn is_running(&self) -> bool {
        self.record.state == JobState::Running
    }
}

impl Jobs for Memory {
    fn insert_job(&self, new: &NewJob<'_>) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            state.refuse_excluded(new.subject)?;
            let total = state.units(new.subject, new.total);
            let record = JobRecord {
                id: JobId(state.jobs.len() as i64 + 1),
                subject: new.subject.clone(),
                task: new.task.to_owned(),
                state: JobState::Running,
                pass: Pass::All,
                cursor: String::new(),
                total,
                seen: 0,
                changed: 0,
                left: 0,
                waiting: String::new(),
                failure: String::new(),
                created: now(),
                updated: now(),
            };
            let left = BTreeMap::new();
            let mut job = Job { record, left };
            job.begin(total, new.left);
            state.jobs.push(job.clone());
            Ok(job.now())
        })
    }

    fn resume_job(&self, job: JobId, left: &[LeftBehind]) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let ended = state.job(job)?.record.clone();
            state.refuse_excluded(&ended.subject)?;
            let total = state.units(&ended.subject, ended.total);
            let job = state.job(job)?;
            job.begin(total, left);
            Ok(job.now())
        })
    }

    fn running_jobs(&self) -> Result<Vec<JobRecord>, StoreError> {
        Ok(self.read(|state| {
            state
                .jobs
                .iter()
                .filter(|job| job.is_running())
                .map(Job::now)
                .collect()
        }))
    }

    fn job(&self, id: JobId) -> Result<Option<JobRecord>, StoreError> {
        Ok(self.read(|state| state.jobs.iter().find(|job| job.record.id == id).map(Job::now)))
    }

    fn jobs(&self, most: u32) -> Result<Rows<JobRecord>, StoreError> {
        let skipped = |jobs: usize| jobs.saturating_sub(most as usize);
        Ok(sound(self.read(|state| {
            state
                .jobs
                .iter()
                .skip(skipped(state.jobs.len()))
                .map(Job::now)
                .collect()
        })))
    }

    fn left_behind(&self, job: JobId, most: u32) -> Result<Vec<LeftBehind>, StoreError> {
        self.write(|state| {
            Ok(state
                .job(job)?
                .left
                .values()
                .take(most as usize)
                .cloned()
                .collect())
        })
    }

    fn next_of_job(&self, job: &JobRecord, most: u32) -> Result<Rows<EnvelopeRecord>, StoreError> {
        self.write(|state| {
            let left = state.job(job.id)?.left.clone();
            let is_next = |record: &EnvelopeRecord| {
                let left = left.get(&record.envelope.id).map(|left| left.again);
                covers(&job.subject, &record.envelope)
                    && match job.pass {
                        Pass::All => left != Some(false),
                        Pass::Left => left == Some(true),
                    }
            };
            let later = state.envelopes.range(cursor(job) + 1..).map(|(_, record)| record);
            Ok(sound(
                later
                    .filter(|record| is_next(record))
                    .take(most as usize)
                    .cloned()
                    .collect(),
            ))
        })
    }

    fn commit_batch(&self, job: JobId, verdicts: &[Verdict]) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            if !state.job(job)?.is_running() {
                return Ok(state.job(job)?.now());
            }
            let mut changed = 0;
            for verdict in verdicts {
                let (id, left) = match verdict {
                    Verdict::Unchanged(id) => (*id, None),
                    Verdict::Left(left) => (left.envelope, Some(left.clone())),
                    Verdict::Damaged(_) => unreachable!("no row in memory is damaged"),
                    Verdict::Replace(old, new) if state.refuse_deleted(made_by(old, new)).is_err() => {
                        let reason = "a provider was deleted".to_owned();
                        let (envelope, again) = (old.id, true);
                        (
                            envelope,
                            Some(LeftBehind {
                                envelope,
                                reason,
                                again,
                            }),
                        )
                    }
                    Verdict::Replace(old, new) => match state.known(old.id) {
                        Ok(record) if record.envelope == **old => {
                            record.envelope = new.clone().into_envelope();
                            state.retire(&RetiredKek::between(old, new));
                            changed += 1;
                            (old.id, None)
                        }
                        _ => {
                            let reason = "it changed meanwhile".to_owned();
                            let (envelope, again) = (old.id, true);
                            (
                                old.id,
                                Some(LeftBehind {
                                    envelope,
                                    reason,
                                    again,
                                }),
                            )
                        }
                    },
                };
                let place = state.place(id).unwrap_or(0);
                let job = state.job(job)?;
                match left {
                    Some(left) => job.left.insert(id, left),
                    None => job.left.remove(&id),
                };
                job.record.cursor = cursor(&job.record).max(place).to_string();
            }
            let job = state.job(job)?;
            if job.record.pass == Pass::All {
                job.record.seen += verdicts.len() as u64;
            }
            job.record.total = job.record.total.max(job.record.seen);
            job.record.changed += changed;
            job.record.waiting.clear();
            Ok(job.now())
        })
    }

    fn end_pass(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let known: BTreeMap<_, _> = state
                .envelopes
                .iter()
                .map(|(place, record)| (record.envelope.id, *place))
                .collect();
            let envelopes: Vec<_> = state
                .envelopes
                .values()
                .map(|record| record.envelope.clone())
                .collect();
            let job = state.job(job)?;
            if !job.is_running() {
                return Ok(job.now());
            }
            let behind = |envelope: &&Envelope| {
                covers(&job.record.subject, envelope) && known[&envelope.id] > cursor(&job.record)
            };
            if job.record.pass == Pass::All {
                for envelope in envelopes.iter().filter(behind) {
                    job.left
                        .entry(envelope.id)
                        .or_insert_with(|| came_meanwhile(envelope.id));
                }
            }
            job.left.retain(|id, _| known.contains_key(id));
            job.record.state = match (job.left.values().any(|left| left.again), job.left.is_empty()) {
                (true, _) => JobState::Running,
                (false, false) => JobState::Incomplete,
                (false, true) => JobState::Done,
            };
            (job.record.pass, job.record.cursor) = (Pass::Left, String::new());
            job.record.waiting.clear();
            Ok(job.now())
        })
    }

    fn job_waits(&self, job: JobId, waiting: &str) -> Result<(), StoreError> {
        self.write(|state| {
            if let Ok(job) = state.job(job)
                && job.is_running()
            {
                job.record.waiting = waiting.to_owned();
            }
            Ok(())
        })
    }

    fn end_waiting(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let envelopes: Vec<_> = state
                .envelopes
                .iter()
                .map(|(place, record)| (*place, record.envelope.clone()))
                .collect();
            let job = state.job(job)?;
            if !job.is_running() || job.record.waiting.is_empty() {
                return Ok(job.now());
            }
            let behind = |(place, envelope): &&(_, Envelope)| {
                covers(&job.record.subject, envelope) && *place > cursor(&job.record)
            };
            if job.record.pass == Pass::All {
                for (_, envelope) in envelopes.iter().filter(behind) {
                    job.left.entry(envelope.id).or_insert_with(|| LeftBehind {
                        envelope: envelope.id,
                        reason: job.record.waiting.clone(),
                        again: true,
                    });
                }
            }
            job.record.state = JobState::Incomplete;
            job.record.waiting.clear();
            Ok(job.now())
        })
    }

    fn end_job(&self, job: JobId, failure: Option<&str>) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let job = state.job(job)?;
            let (is_running, was_aborted) = (job.is_running(), job.record.state == JobState::Aborted);
            match failure {
                None if is_running || was_aborted => {
                    (job.record.state, job.record.seen) = (JobState::Done, job.record.total);
                }
                Some(failure) if is_running => {
                    (job.record.state, job.record.failure) = (JobState::Failed, failure.to_owned());
                }
                None | Some(_) => {}
            }
            Ok(job.now())
        })
    }

    fn abort_job(&self, job: JobId) -> Result<JobRecord, StoreError> {
        self.write(|state| {
            let job = state.job(job)?;
            if job.is_running() {
                job.record.state = JobState::Aborted;
                job.record.waiting.clear();
            }
            Ok(job.now())
        })
    }
}

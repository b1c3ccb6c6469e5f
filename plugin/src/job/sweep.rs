//! Sweeps over the envelopes: rotate, rekey, move, add and remove a recipient.
//!
//! ```text
//!   start ──► running ──┬─ a batch: unwrap, wrap, unwrap and compare, then one transaction ─┐
//!               ▲  ▲    └───────────────────────────────────────────────────────────────────┘
//!               │  └── waits: the provider that wraps is locked, not backed up, unreachable
//!               └───── waits: envelopes were left behind that may open later
//!             ──► done | incomplete (some can't be opened by anyone, it gave way to another or waited too long) | aborted
//! ```
//!
//! The DEK stays, so running VMs do not notice and images keep their data. A batch, the generation of each envelope in it
//! and the place of the job change in one transaction of the keystore: a daemon that is killed goes on from there. An old
//! stanza leaves the keystore only in the transaction that brings the verified new one; copies that travel follow
//! (`job/copies.rs`), and no KEK is destroyed here.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::model::advice::Advice;
use crate::model::deadlines::job::GIVES_UP;
use crate::model::envelope::{Envelope, ProviderId, VmId};
use crate::model::finding::{self, Finding, FindingCode};
use crate::model::job::{JobId, JobKind, JobState, Subject};
use crate::model::problem::Problem;
use crate::recipients::{Recipients, Rewrap, RewrapTarget, Rewrapped};
use crate::store::{EnvelopeRecord, EnvelopeStore, JobRecord, LeftBehind, NewJob, Rows, StoreError, Verdict};

/// What a job does to every envelope that it concerns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Task {
    /// Replaces the stanzas of a provider by ones of a newer KEK.
    Rotate { provider: ProviderId },
    /// Replaces all stanzas by ones of these providers.
    Rekey {
        /// The providers, in the order of the new stanzas.
        to: Vec<ProviderId>,
        /// Only the envelopes of this VM.
        vm: Option<VmId>,
    },
    /// Replaces the stanzas of a provider by those of another.
    Move {
        from: ProviderId,
        to: ProviderId,
        /// Only the envelopes of this VM.
        vm: Option<VmId>,
    },
    /// Adds a stanza where the provider has none.
    AddRecipient { provider: ProviderId },
    /// Removes the stanzas of a provider where another one opens the envelope.
    RemoveRecipient { provider: ProviderId },
}

/// What a task makes of one envelope.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Decision {
    /// It is none of its business, or as it should be.
    Nothing,
    /// The stanzas that it should have.
    Targets(Vec<RewrapTarget>),
    /// Not to be done, and why.
    Refused(&'static str),
}

impl Task {
    /// Whether it is how an admin decides which of two versions of an envelope counts: that of the keystore.
    pub(crate) fn decides_conflicts(&self) -> bool {
        matches!(self, Self::Rekey { vm: Some(_), .. })
    }

    pub(crate) fn kind(&self) -> JobKind {
        match self {
            Self::Rotate { .. } => JobKind::Rotate,
            Self::Rekey { .. } => JobKind::Rekey,
            Self::Move { .. } => JobKind::Move,
            Self::AddRecipient { .. } => JobKind::AddRecipient,
            Self::RemoveRecipient { .. } => JobKind::RemoveRecipient,
        }
    }

    pub(crate) fn subject(&self) -> Subject {
        match self {
            Self::Rekey { vm: Some(vm), .. } | Self::Move { vm: Some(vm), .. } => Subject::EnvelopesOf(*vm),
            _ => Subject::AllEnvelopes,
        }
    }

    /// Starts it, without these envelopes.
    ///
    /// # Errors
    /// [`StoreError::JobRunning`] while another one is about the same envelopes.
    pub(crate) fn start(
        &self,
        keystore: &dyn EnvelopeStore,
        left: &[LeftBehind],
    ) -> Result<JobRecord, StoreError> {
        keystore.insert_job(&NewJob {
            subject: &self.subject(),
            task: &self.to_json(),
            total: 0,
            left,
        })
    }

    /// Its JSON form, for the keystore.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a task holds only ids")
    }

    pub(crate) fn wraps(&self) -> Vec<ProviderId> {
        match self {
            Self::Rotate { provider } | Self::AddRecipient { provider } => vec![*provider],
            Self::Rekey { to, .. } => to.clone(),
            Self::Move { to, .. } => vec![*to],
            Self::RemoveRecipient { .. } => Vec::new(),
        }
    }

    /// The providers that it is about.
    pub(crate) fn names(&self) -> Vec<ProviderId> {
        let mut names = self.wraps();
        match self {
            Self::Move { from, .. } => names.push(*from),
            Self::RemoveRecipient { provider } => names.push(*provider),
            Self::Rotate { .. } | Self::Rekey { .. } | Self::AddRecipient { .. } => {}
        }
        names
    }

    pub(crate) fn words(&self, name: impl Fn(ProviderId) -> String) -> String {
        let of = |vm: &Option<VmId>| vm.map_or_else(String::new, |vm| format!(" (VM {vm})"));
        match self {
            Self::Rotate { provider } => format!("rotate '{}'", name(*provider)),
            Self::Rekey { to, vm } => {
                let names: Vec<_> = to.iter().map(|to| format!("'{}'", name(*to))).collect();
                format!("rekey onto {}{}", names.join(" and "), of(vm))
            }
            Self::Move { from, to, vm } => {
                format!("move from '{}' to '{}'{}", name(*from), name(*to), of(vm))
            }
            Self::AddRecipient { provider } => format!("add recipient '{}'", name(*provider)),
            Self::RemoveRecipient { provider } => format!("remove recipient '{}'", name(*provider)),
        }
    }

    /// What to tell where new envelopes, which go to the providers of `policy`, do not ask what it does to the others.
    pub(crate) fn warning(
        &self,
        policy: &[ProviderId],
        name: impl Fn(ProviderId) -> String,
    ) -> Option<Finding> {
        let differ = |provider: ProviderId, what: String| {
            Finding::warning(
                FindingCode::NewKeysDiffer,
                finding::Subject::Provider(name(provider)),
                what,
            )
        };
        let leaves = match self {
            Self::Move { from, .. } => *from,
            Self::RemoveRecipient { provider } => *provider,
            Self::AddRecipient { provider } if !policy.contains(provider) => {
                let what = format!(
                    "new VMs do not get a stanza of '{}': add it to recipients in virtseald.yaml, then reload virtseald",
                    name(*provider)
                );
                return Some(differ(*provider, what));
            }
            Self::Rotate { .. } | Self::Rekey { .. } | Self::AddRecipient { .. } => return None,
        };
        policy.contains(&leaves).then(|| {
            let what = format!("new VMs still go to '{}'", name(leaves));
            let other = Advice::MakeDefault("OTHER".into());
            differ(leaves, what).next(other.or("change recipients in virtseald.yaml"))
        })
    }

    fn decide(&self, envelope: &Envelope) -> Decision {
        let has = |provider: &ProviderId| envelope.stanzas.iter().any(|s| s.provider == *provider);
        match self {
            Self::Rotate { provider } if has(provider) => {
                replaced(envelope, *provider, RewrapTarget::Rotate(*provider))
            }
            Self::Move { from, to, vm } if has(from) && is_of(envelope, vm) && from != to => {
                replaced(envelope, *from, RewrapTarget::Wrap(*to))
            }
            Self::Rekey { to, vm: None } => {
                Decision::Targets(to.iter().copied().map(RewrapTarget::Wrap).collect())
            }
            // A later generation in any case: that ends a conflict.
            Self::Rekey { to, vm: Some(vm) } if envelope.vm == *vm => {
                Decision::Targets(to.iter().copied().map(RewrapTarget::Anew).collect())
            }
            Self::AddRecipient { provider } if !has(provider) => {
                let kept = (0..envelope.stanzas.len()).map(RewrapTarget::Keep);
                Decision::Targets(kept.chain([RewrapTarget::Wrap(*provider)]).collect())
            }
            Self::RemoveRecipient { provider } if has(provider) => {
                let others = envelope.stanzas.iter().enumerate();
                let kept: Vec<_> = others
                    .filter(|(_, stanza)| stanza.provider != *provider)
                    .map(|(at, _)| RewrapTarget::Keep(at))
                    .collect();
                if kept.is_empty() {
                    Decision::Refused("no other provider opens it")
                } else {
                    Decision::Targets(kept)
                }
            }
            Self::Rotate { .. }
            | Self::Move { .. }
            | Self::Rekey { .. }
            | Self::AddRecipient { .. }
            | Self::RemoveRecipient { .. } => Decision::Nothing,
        }
    }

    /// Whether it would take away the last stanza of this envelope.
    pub(crate) fn would_close(&self, envelope: &Envelope) -> bool {
        matches!(self.decide(envelope), Decision::Refused(_))
    }
}

fn is_of(envelope: &Envelope, vm: &Option<VmId>) -> bool {
    vm.is_none_or(|vm| vm == envelope.vm)
}

/// `target` in the place of the first stanza of `provider`; no other of that provider, nor of the one that wraps, stays.
fn replaced(envelope: &Envelope, provider: ProviderId, target: RewrapTarget) -> Decision {
    let wraps = match target {
        RewrapTarget::Wrap(to) | RewrapTarget::Anew(to) | RewrapTarget::Rotate(to) => to,
        RewrapTarget::Keep(_) => provider,
    };
    let mut targets = Vec::with_capacity(envelope.stanzas.len());
    let mut placed = false;
    for (at, stanza) in envelope.stanzas.iter().enumerate() {
        if stanza.provider != provider && stanza.provider != wraps {
            targets.push(RewrapTarget::Keep(at));
        } else if !std::mem::replace(&mut placed, true) {
            targets.push(target);
        }
    }
    Decision::Targets(targets)
}

/// What a step of a job has led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// A batch was done; there may be more.
    Worked(JobRecord),
    /// Nothing can be done until something changes, as the record's `waiting` says.
    Waits(JobRecord),
    /// The job is through.
    Ended(JobRecord),
}

/// What is done beside a sweep to VMs whose envelopes it goes through.
#[derive(Clone, Copy)]
pub(crate) struct Beside<'a> {
    /// Whether the keys of a VM are going: nothing is made for it. Asked after the job has its row, which whoever takes keys looks
    /// for after it has the VM: so one of the two sees the other.
    pub(crate) is_leaving: &'a dyn Fn(VmId) -> bool,
    /// What was under way when the sweep began, and may still come to an envelope that it must see.
    pub(crate) unfinished: &'a dyn Fn() -> Option<String>,
}

#[cfg(test)]
impl Beside<'static> {
    pub(crate) const NOTHING: Self = Self {
        is_leaving: &|_| false,
        unfinished: &|| None,
    };
}

/// Does the next batch of a sweep.
///
/// # Errors
/// When the keystore fails; the job stays where it is.
pub(crate) fn step(
    keystore: &dyn EnvelopeStore,
    recipients: &Recipients,
    beside: Beside<'_>,
    task: &Task,
    id: JobId,
    batch_size: u32,
) -> Result<Step, Problem> {
    let job = &keystore.job(id)?.ok_or(StoreError::UnknownJob(id.0))?;
    if job.state != JobState::Running {
        return Ok(Step::Ended(job.clone()));
    }
    if let Some(failure) = task.wraps().into_iter().find_map(|id| recipients.cannot_wrap(id)) {
        return waits(keystore, job, &failure.to_string());
    }
    let batch = keystore.next_of_job(job, batch_size)?;
    if batch.sound.is_empty() && batch.damaged.is_empty() {
        if let Some(unfinished) = (beside.unfinished)() {
            return waits(keystore, job, &unfinished);
        }
        let ended = keystore.end_pass(job.id)?;
        return match ended.state {
            JobState::Running => waits(keystore, &ended, &what_is_left(keystore, &ended)?),
            _ => Ok(Step::Ended(ended)),
        };
    }
    match work(recipients, beside, task, batch) {
        Ok(verdicts) => {
            let job = keystore.commit_batch(job.id, &verdicts)?;
            Ok(match job.state {
                JobState::Running => Step::Worked(job),
                _ => Step::Ended(job),
            })
        }
        Err(failure) => waits(keystore, job, &failure.to_string()),
    }
}

fn waits(keystore: &dyn EnvelopeStore, job: &JobRecord, waiting: &str) -> Result<Step, Problem> {
    waits_at(SystemTime::now(), keystore, job, waiting)
}

fn waits_at(
    now: SystemTime,
    keystore: &dyn EnvelopeStore,
    job: &JobRecord,
    waiting: &str,
) -> Result<Step, Problem> {
    keystore.job_waits(job.id, waiting)?;
    let job = keystore.job(job.id)?.unwrap_or_else(|| job.clone());
    match gives_up(&job, now) {
        true => Ok(Step::Ended(keystore.end_waiting(job.id)?)),
        false => Ok(Step::Waits(job)),
    }
}

/// Whether it has waited for the same for too long.
fn gives_up(job: &JobRecord, now: SystemTime) -> bool {
    let since = UNIX_EPOCH + Duration::from_secs(job.updated.max(0).unsigned_abs());
    now.duration_since(since).is_ok_and(|waited| waited > GIVES_UP)
}

fn what_is_left(keystore: &dyn EnvelopeStore, job: &JobRecord) -> Result<String, Problem> {
    let left = keystore.left_behind(job.id, 100)?;
    let reason = left
        .iter()
        .find(|left| left.again)
        .map(|left| left.reason.as_str());
    Ok(format!(
        "{} envelopes are left: {}",
        job.left,
        reason.unwrap_or("they changed meanwhile")
    ))
}

fn work(
    recipients: &Recipients,
    beside: Beside<'_>,
    task: &Task,
    batch: Rows<EnvelopeRecord>,
) -> Result<Vec<Verdict>, Problem> {
    let mut verdicts: Vec<_> = batch.damaged.into_iter().map(Verdict::Damaged).collect();
    let mut wanted = Vec::with_capacity(batch.sound.len());
    for record in batch.sound {
        let envelope = &record.envelope;
        match task.decide(envelope) {
            Decision::Targets(_) if (beside.is_leaving)(envelope.vm) => {
                verdicts.push(Verdict::Left(LeftBehind {
                    envelope: envelope.id,
                    reason: "its VM is being shredded or forgotten".to_owned(),
                    again: true,
                }));
            }
            Decision::Nothing => verdicts.push(Verdict::Unchanged(envelope.id)),
            Decision::Refused(reason) => verdicts.push(Verdict::Left(LeftBehind {
                envelope: envelope.id,
                reason: reason.to_owned(),
                again: false,
            })),
            Decision::Targets(targets) => wanted.push(Rewrap { record, targets }),
        }
    }
    let made = recipients.rewrap(&wanted)?;
    for (rewrap, rewrapped) in wanted.into_iter().zip(made) {
        let id = rewrap.record.envelope.id;
        verdicts.push(match rewrapped {
            Rewrapped::Unchanged => Verdict::Unchanged(id),
            Rewrapped::Changed(next) => Verdict::Replace(Box::new(rewrap.record.envelope), next),
            Rewrapped::Left { reason, again } => Verdict::Left(LeftBehind {
                envelope: id,
                reason,
                again,
            }),
        });
    }
    Ok(verdicts)
}

#[cfg(test)]
mod tests;

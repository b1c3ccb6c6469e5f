//! What `provider rekey`, `move`, `recipients`, `vm rekey` and `virtseal jobs` ask for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::broken;
use super::volume;
use crate::api::pages::{self, PAGE};
use crate::api::{CopyView, JobRequest, JobStarted, JobView, Jobs, SweepKind};
use crate::audit::Actor;
use crate::daemon::jobs::{number, view, words};
use crate::daemon::{Daemon, lock, records};
use crate::job::record::Work;
use crate::job::sweep::Task;
use crate::model::advice::Advice;
use crate::model::envelope::{ProviderId, VmId};
use crate::model::job::{JobId, JobState, Subject};
use crate::model::problem::{Code, Problem};
use crate::store::{CopyPlace, JobRecord, LeftBehind, StoreError};
use crate::vm::foreign;
use crate::vm::names::{self, VmNames};
use crate::vm::status::damaged;

/// How many jobs `virtseal jobs` shows.
const RECENT: u32 = 20;
/// How long a job that changes all the time is not looked at again.
const LOOK: Duration = Duration::from_millis(200);
/// How long one that does not change is not: that is how a listener who left is noticed.
const IDLE: Duration = Duration::from_secs(2);

/// What somebody who watches a job has seen of it.
#[derive(Debug)]
pub(in crate::daemon) struct Look {
    at: Instant,
    job: JobView,
}

/// What was seen of each job that is watched.
pub(in crate::daemon) type Looks = tokio::sync::Mutex<BTreeMap<JobId, Look>>;

/// Starts a sweep.
pub(super) fn start(daemon: &Daemon, by: Actor, request: &JobRequest) -> Result<JobStarted, Problem> {
    // Nobody deletes a provider, shreds a VM or redefines one in between.
    let _sealing = lock(&daemon.sealing);
    let task = task(daemon, request)?;
    sweep(daemon, by, &task)
}

/// Starts a job once more that has ended otherwise than done.
pub(super) fn resume(daemon: &Daemon, by: Actor, id: i64) -> Result<JobStarted, Problem> {
    let job = daemon.keystore.job(JobId(id))?.ok_or_else(|| unknown(id))?;
    match job.state {
        JobState::Incomplete | JobState::Failed | JobState::Aborted => {}
        JobState::Running => {
            return Err(Problem::new(Code::Busy, format!("job {id} runs")).next(Advice::WatchJob(id)));
        }
        JobState::Done => {
            return Err(Problem::new(Code::Usage, format!("job {id} is done")).next(Advice::ListJobs));
        }
    }
    let resumed = match Work::from_json(&job.task)? {
        Work::Sweep(task) => {
            let _sealing = lock(&daemon.sealing);
            begin(daemon, by, &task, |left| daemon.keystore.resume_job(job.id, left))
        }
        Work::CreateVolume(volume) => {
            volume::check_again(&volume)?;
            let resumed = daemon
                .keystore
                .resume_job(job.id, &[])
                .map_err(|error| excluded(error, &job.subject));
            records::note_command(daemon, by, "job-start", &words(daemon, &job), &resumed);
            daemon.jobs.ring();
            resumed.and_then(|job| {
                Ok(JobStarted {
                    job: view(daemon, &job)?,
                    warnings: Vec::new(),
                })
            })
        }
    };
    // Who watches it from now on is not shown how it had ended.
    daemon.watched.blocking_lock().remove(&job.id);
    resumed
}

/// Starts one while nobody seals.
pub(super) fn sweep(daemon: &Daemon, by: Actor, task: &Task) -> Result<JobStarted, Problem> {
    begin(daemon, by, task, |left| {
        task.start(daemon.keystore.as_ref(), left)
    })
}

fn begin(
    daemon: &Daemon,
    by: Actor,
    task: &Task,
    insert: impl FnOnce(&[LeftBehind]) -> Result<JobRecord, StoreError>,
) -> Result<JobStarted, Problem> {
    refuse_beside_another(daemon, &task.subject())?;
    let mut rivals = Vec::new();
    let foreign = daemon
        .host_of_vms()
        .and_then(|host| foreign::adopt_foreign_envelopes(&host));
    daemon.copies_bell.ring();
    let unseen = foreign.map(|travelling| {
        if !task.decides_conflicts() {
            rivals = travelling.rivals;
        }
        travelling.unreadable
    });
    if let Task::RemoveRecipient { provider } = task {
        refuse_to_close(daemon, task, *provider)?;
    }
    let inserted = insert(&rivals).map_err(|error| excluded(error, &task.subject()));
    let words = task.words(|id| daemon.recipients.name_of(id));
    records::note_command(daemon, by, "job-start", &words, &inserted);
    let job = inserted?;
    daemon.jobs.ring();
    let policy = daemon.recipients.policy().ok();
    let warning = policy.and_then(|policy| {
        let policy: Vec<_> = policy.iter().map(|provider| provider.provider().id()).collect();
        task.warning(&policy, |id| daemon.recipients.name_of(id))
    });
    let mut warnings: Vec<_> = warning.into_iter().collect();
    let damaged = damaged::records(daemon.keystore.as_ref(), &daemon.host_store).into_iter();
    warnings.extend(damaged.map(|damaged| format!("left out: {damaged}")));
    match unseen {
        Ok(unreadable) => warnings.extend(unreadable.iter().map(|what| format!("left out: {what}"))),
        Err(unseen) => warnings.push(format!(
            "VMs that came to this host and have not started here yet are left out: {}",
            unseen.message
        )),
    }
    Ok(JobStarted {
        job: view(daemon, &job)?,
        warnings,
    })
}

/// Before anything is made for a job that could not be kept.
pub(super) fn refuse_beside_another(daemon: &Daemon, subject: &Subject) -> Result<(), Problem> {
    let running = daemon.keystore.running_jobs()?;
    match running.iter().find(|job| job.subject.excludes(subject)) {
        Some(job) => Err(beside_another(job.id.0, subject)),
        None => Ok(()),
    }
}

pub(super) fn excluded(error: StoreError, subject: &Subject) -> Problem {
    match error {
        StoreError::JobRunning(id) => beside_another(id, subject),
        error => error.into(),
    }
}

fn beside_another(id: i64, subject: &Subject) -> Problem {
    let why = match subject.path() {
        Some(path) => format!("{path} is being made by job {id}"),
        None => format!("job {id} runs, and one runs at a time over the same envelopes"),
    };
    Problem::new(Code::Busy, why).next(Advice::WatchJob(id).or(Advice::AbortJob(id)))
}

/// Nothing may be left that no provider opens.
fn refuse_to_close(daemon: &Daemon, task: &Task, provider: ProviderId) -> Result<(), Problem> {
    let mut closed: Vec<VmId> = Vec::new();
    daemon.keystore.each_envelope(|record| {
        if task.would_close(&record.envelope) {
            closed.push(record.envelope.vm);
        }
    })?;
    if closed.is_empty() {
        return Ok(());
    }
    let name = daemon.recipients.name_of(provider);
    Err(Problem::new(
        Code::WouldLoseKey,
        format!(
            "'{name}' stays a recipient: {} can be opened by nobody else",
            VmNames::of_keystore(daemon.keystore.as_ref())?.objects_of_vms(&closed)
        ),
    )
    .next(
        Advice::MoveProvider {
            from: name.to_owned(),
            to: "OTHER".into(),
        }
        .or(Advice::AddRecipient("OTHER".into())),
    ))
}

fn task(daemon: &Daemon, request: &JobRequest) -> Result<Task, Problem> {
    let named = |name: &Option<String>| provider_id(daemon, name.as_deref().unwrap_or_default());
    let vm = request.vm.as_deref();
    let vm = vm.map(|vm| names::vm_id(&daemon.background, vm)).transpose()?;
    match request.kind {
        SweepKind::Rekey => {
            let policy = daemon.recipients.policy()?;
            let to = policy.iter().map(|provider| provider.provider().id()).collect();
            Ok(Task::Rekey { to, vm })
        }
        SweepKind::Move => {
            let (from, to) = (named(&request.provider)?, named(&request.to)?);
            if from == to {
                return Err(Problem::new(
                    Code::Usage,
                    "a move is from one provider to another",
                ));
            }
            Ok(Task::Move { from, to, vm })
        }
        SweepKind::AddRecipient => Ok(Task::AddRecipient {
            provider: named(&request.provider)?,
        }),
        SweepKind::RemoveRecipient => Ok(Task::RemoveRecipient {
            provider: named(&request.provider)?,
        }),
    }
}

/// A provider of this host, or one that was deleted here.
fn provider_id(daemon: &Daemon, name: &str) -> Result<ProviderId, Problem> {
    match daemon.recipients.find(name) {
        Ok(provider) => Ok(provider.provider().id()),
        Err(unknown) => {
            let deleted = daemon.keystore.deleted_providers()?.sound;
            let found = deleted
                .iter()
                .find(|deleted| deleted.name == name || name.parse() == Ok(deleted.id));
            found.map(|deleted| deleted.id).ok_or_else(|| unknown.into())
        }
    }
}

/// The last jobs, and what is behind.
pub(super) fn list(daemon: &Daemon) -> Result<Jobs, Problem> {
    let jobs = daemon.keystore.jobs(RECENT)?.sound;
    let names = VmNames::of_keystore(daemon.keystore.as_ref())?;
    let mut copies = Vec::new();
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        for copy in daemon.host_store.stale_copies(place, None, 100)? {
            copies.push(CopyView {
                vm: names.of(copy.vm),
                envelope: copy.envelope.to_string(),
                place: place.as_str().to_owned(),
                reason: copy.reason,
            });
        }
    }
    let mut views = Vec::with_capacity(jobs.len());
    for job in &jobs {
        let mut view = view(daemon, job)?;
        view.reasons = pages::cut(view.reasons, PAGE / 2 / RECENT as usize);
        views.push(view);
    }
    let room = PAGE.saturating_sub(pages::size_of(&views));
    Ok(Jobs {
        jobs: views,
        stale_copies: number(daemon.host_store.count_stale_copies()?),
        copies: pages::cut(copies, room),
    })
}

/// Reports a job, or the only one that runs, whenever it has changed, until it ends or nobody listens. Whoever watches sleeps until
/// then; the keystore is read by `workers`, for all who watch the same job together.
pub(super) async fn watch(
    daemon: Arc<Daemon>,
    id: Option<i64>,
    workers: &Handle,
    report: impl AsyncFn(JobView, bool) -> bool,
) -> Result<(), Problem> {
    let id = find_watched(&daemon, id, workers).await?;
    let mut changes = daemon.jobs.subscribe(id);
    loop {
        changes.borrow_and_update();
        let job = look(&daemon, id, workers).await?;
        let ended = job.state != JobState::Running;
        if !report(job, ended).await || ended {
            return Ok(());
        }
        // What was seen before a change is too old to be shown for it when this has passed.
        let _ = tokio::time::timeout(IDLE, changes.changed()).await;
        tokio::time::sleep(LOOK).await;
    }
}

/// Of all who begin to watch, one at a time asks.
async fn find_watched(daemon: &Arc<Daemon>, id: Option<i64>, workers: &Handle) -> Result<JobId, Problem> {
    let _alone = daemon.watched.lock().await;
    let asked = Arc::clone(daemon);
    let found = workers.spawn_blocking(move || job_id(&asked, id)).await;
    found.map_err(|error| broken(&error))?
}

/// The job as it was less than [`LOOK`] ago. One watcher looks, the others see what it saw.
async fn look(daemon: &Arc<Daemon>, id: JobId, workers: &Handle) -> Result<JobView, Problem> {
    let mut looks = daemon.watched.lock().await;
    if let Some(look) = looks.get(&id).filter(|look| look.at.elapsed() < LOOK) {
        return Ok(look.job.clone());
    }
    looks.retain(|_, look| look.at.elapsed() < LOOK);
    let asked = Arc::clone(daemon);
    let at = Instant::now();
    let looked = workers.spawn_blocking(move || {
        let job = asked.keystore.job(id)?.ok_or_else(|| unknown(id.0))?;
        view(&asked, &job)
    });
    let job = looked.await.map_err(|error| broken(&error))??;
    let look = Look { at, job: job.clone() };
    looks.insert(id, look);
    Ok(job)
}

/// Ends a job, or the only one that runs, where it is.
pub(super) fn abort(daemon: &Daemon, by: Actor, id: Option<i64>) -> Result<JobView, Problem> {
    let aborted = daemon.keystore.abort_job(job_id(daemon, id)?)?;
    // Whoever has it in hand takes back what it has begun.
    if !daemon.jobs.stop(aborted.id) && aborted.state == JobState::Aborted {
        volume::take_back_unmade(daemon, &aborted.subject);
    }
    records::note_command(daemon, by, "job-abort", &words(daemon, &aborted), &Ok(()));
    view(daemon, &aborted)
}

fn job_id(daemon: &Daemon, id: Option<i64>) -> Result<JobId, Problem> {
    if let Some(id) = id {
        return Ok(daemon.keystore.job(JobId(id))?.ok_or_else(|| unknown(id))?.id);
    }
    let running = daemon.keystore.running_jobs()?;
    match running.as_slice() {
        [] => Err(Problem::new(Code::NotFound, "no job runs").next(Advice::ListJobs)),
        [job] => Ok(job.id),
        several => {
            let ids: Vec<_> = several.iter().map(|job| job.id.0.to_string()).collect();
            Err(
                Problem::new(Code::Usage, format!("{} jobs run: {}", ids.len(), ids.join(", ")))
                    .next(Advice::ListJobs.then("the same command with the number of one")),
            )
        }
    }
}

fn unknown(id: i64) -> Problem {
    Problem::new(Code::NotFound, format!("there is no job {id}")).next(Advice::ListJobs)
}

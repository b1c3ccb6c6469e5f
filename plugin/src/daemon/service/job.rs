//! What `provider rekey`, `move`, `recipients`, `vm rekey` and `virtseal jobs` ask for.

use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;

use super::broken;
use crate::api::pages::{self, PAGE};
use crate::api::{CopyView, FindingView, JobRequest, JobStarted, JobView, Jobs, SweepKind};
use crate::audit::Actor;
use crate::daemon::job_records::{excluded, note_end, number, view, who_gives_way, words};
use crate::daemon::locks::Doing;
use crate::daemon::{Daemon, records, volumes};
use crate::job::record::Work;
use crate::job::sweep::Task;
use crate::model::advice::Advice;
use crate::model::deadlines::daemon::CLAIM;
use crate::model::deadlines::job::{LOOK, UNCHANGED};
use crate::model::envelope::{ProviderId, VmId};
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::job::{JobId, JobState};
use crate::model::problem::Problem;
use crate::store::{CopyPlace, JobRecord, LeftBehind, StoreError};
use crate::vm::foreign;
use crate::vm::names::{self, KnownVm, VmNames};
use crate::vm::status::damaged;

/// How many jobs `virtseal jobs` shows.
const RECENT: u32 = 20;

pub(super) fn start(daemon: &Daemon, by: Actor, request: &JobRequest) -> Result<JobStarted, Problem> {
    let task = task(daemon, request)?;
    let looked = look_around(daemon, &task)?;
    let _jobs = daemon.claims.jobs(Doing::Begin)?;
    sweep(daemon, by, &task, looked)
}

pub(super) fn resume(daemon: &Daemon, by: Actor, id: i64) -> Result<JobStarted, Problem> {
    let job = daemon.keystore.job(JobId(id))?.ok_or_else(|| unknown(id))?;
    match job.state {
        JobState::Incomplete | JobState::Failed | JobState::Aborted => {}
        // It goes on, or has come to its end.
        JobState::Running | JobState::Done => {
            return Ok(JobStarted {
                job: view(daemon, &job)?,
                changed: false,
                warnings: Vec::new(),
            });
        }
    }
    let resumed = match Work::from_json(&job.task)? {
        Work::Sweep(task) => {
            let looked = look_around(daemon, &task)?;
            let _jobs = daemon.claims.jobs(Doing::Begin)?;
            begin(daemon, by, &task, looked, |left| {
                daemon.keystore.resume_job(job.id, left)
            })
        }
        Work::Overlays(_) => begin_again(daemon, by, &job, ()),
        Work::CreateVolume(volume) => {
            // Not before who had it in hand has ended: that ends the job.
            let claim = volumes::claim(daemon, &volume.path)?;
            volumes::check_again(&volume)?;
            begin_again(daemon, by, &job, claim)
        }
    };
    // Who watches it from now on is not shown how it had ended.
    daemon.watched.blocking_lock().remove(&job.id);
    resumed
}

/// One that is about images. What is `held` for it is let go before it is told.
fn begin_again<T>(daemon: &Daemon, by: Actor, job: &JobRecord, held: T) -> Result<JobStarted, Problem> {
    let resumed = daemon
        .keystore
        .resume_job(job.id, &[])
        .map_err(|error| excluded(error, &job.subject));
    drop(held);
    records::note_command(daemon, by, "job-start", &words(daemon, job), &resumed);
    daemon.jobs.ring();
    Ok(JobStarted {
        job: view(daemon, &resumed?)?,
        changed: true,
        warnings: Vec::new(),
    })
}

/// What came to this host with its VMs, as a sweep finds it.
pub(super) struct Looked {
    rivals: Vec<LeftBehind>,
    left_out: Vec<Problem>,
    /// Sweeps that wait, and end for this one.
    give_way: Vec<JobId>,
}

/// Has the keystore learn of what came with VMs, one after the other, unless such a sweep can't begin. What is being done to a VM
/// makes neither this nor another VM wait for long: an envelope that comes of it is seen before the sweep ends.
pub(super) fn look_around(daemon: &Daemon, task: &Task) -> Result<Looked, Problem> {
    let give_way = who_gives_way(daemon, task)?;
    let deadline = Instant::now() + CLAIM;
    let claim = |vm| daemon.claims.vm_until(vm, Doing::Look, deadline);
    let found = daemon
        .host_of_vms()
        .and_then(|host| foreign::adopt_foreign_envelopes(&host, claim));
    daemon.copies_bell.ring();
    let (mut rivals, left_out) = match found {
        Ok(found) => (found.rivals, found.left_out),
        Err(unseen) => {
            let left_out = "VMs that came to this host and have not started here yet";
            (Vec::new(), vec![Problem::failed(unseen.message).of(left_out)])
        }
    };
    if task.decides_conflicts() {
        rivals.clear();
    }
    Ok(Looked {
        rivals,
        left_out,
        give_way,
    })
}

/// Starts one while no other begins, and no provider goes.
pub(super) fn sweep(daemon: &Daemon, by: Actor, task: &Task, looked: Looked) -> Result<JobStarted, Problem> {
    begin(daemon, by, task, looked, |left| {
        task.start(daemon.keystore.as_ref(), left)
    })
}

fn begin(
    daemon: &Daemon,
    by: Actor,
    task: &Task,
    looked: Looked,
    insert: impl FnOnce(&[LeftBehind]) -> Result<JobRecord, StoreError>,
) -> Result<JobStarted, Problem> {
    if let Task::RemoveRecipient { provider } = task {
        refuse_to_close(daemon, task, *provider)?;
    }
    let mut warnings = Vec::new();
    for id in &looked.give_way {
        let ended = daemon.keystore.end_waiting(*id)?;
        if ended.state == JobState::Incomplete {
            note_end(&ended);
            records::note_command(daemon, by, "job-end", &words(daemon, &ended), &Ok(()));
            let left = ended.left;
            let what = format!("job {}, which waited, has ended with {left} envelopes left", id.0);
            let gave_way = Finding::warning(FindingCode::JobGaveWay, Subject::Job(id.0), what);
            warnings.push(gave_way.next(Advice::ResumeJob(id.0)));
        }
    }
    let inserted = insert(&looked.rivals).map_err(|error| excluded(error, &task.subject()));
    let doing = task.words(|id| daemon.recipients.name_of(id));
    records::note_command(daemon, by, "job-start", &doing, &inserted);
    let job = inserted?;
    daemon.jobs.ring();
    let policy = daemon.recipients.policy().ok();
    let warning = policy.and_then(|policy| {
        let policy: Vec<_> = policy.iter().map(|provider| provider.provider().id()).collect();
        task.warning(&policy, |id| daemon.recipients.name_of(id))
    });
    warnings.extend(warning);
    let damaged = damaged::records(daemon.keystore.as_ref(), &daemon.host_store).into_iter();
    warnings.extend(damaged.map(|damaged| Finding {
        what: format!("left out: {}", damaged.what),
        ..damaged
    }));
    warnings.extend(looked.left_out.into_iter().map(|problem| {
        let subject = problem.subject.as_deref().cloned().unwrap_or(Subject::Host);
        Finding::beside(FindingCode::LeftOut, subject, problem.of("left out"))
    }));
    Ok(JobStarted {
        job: view(daemon, &job)?,
        changed: true,
        warnings: FindingView::all(&warnings),
    })
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
    Err(Problem::would_lose_key(format!(
        "'{name}' stays a recipient: {} can be opened by nobody else",
        VmNames::of_keystore(daemon.keystore.as_ref())?.objects_of_vms(&closed)
    ))
    .next(
        Advice::MoveProvider {
            from: name.to_owned(),
            to: "OTHER".into(),
        }
        .or(Advice::AddRecipient("OTHER".into())),
    ))
}

/// One that is not defined here may have envelopes.
fn known_vm(daemon: &Daemon, asked: &str) -> Result<VmId, Problem> {
    if let Ok(id) = asked.parse() {
        return Ok(id);
    }
    let found = names::find_vm(&daemon.background, daemon.keystore.as_ref(), asked)?;
    Ok(match found {
        KnownVm::Defined(defined) => defined.vm,
        KnownVm::Undefined(record) => record.vm,
    })
}

fn task(daemon: &Daemon, request: &JobRequest) -> Result<Task, Problem> {
    let named = |name: &Option<String>| provider_id(daemon, name.as_deref().unwrap_or_default());
    let vm = request.vm.as_deref();
    let vm = vm.map(|vm| known_vm(daemon, vm)).transpose()?;
    match request.kind {
        SweepKind::Rekey => {
            let policy = daemon.recipients.policy()?;
            let to = policy.iter().map(|provider| provider.provider().id()).collect();
            Ok(Task::Rekey { to, vm })
        }
        SweepKind::Move => {
            let (from, to) = (named(&request.provider)?, named(&request.to)?);
            if from == to {
                return Err(Problem::usage("a move is from one provider to another"));
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

pub(super) fn list(daemon: &Daemon) -> Result<Jobs, Problem> {
    let jobs = daemon.keystore.jobs(RECENT)?.sound;
    let names = VmNames::of_keystore(daemon.keystore.as_ref())?;
    let mut copies = Vec::new();
    for place in [CopyPlace::Xml, CopyPlace::Image] {
        for copy in daemon.host_store.stale_copies(place, None, 100)? {
            let Some(record) = daemon.keystore.readable_envelope(copy.envelope)? else {
                continue;
            };
            copies.push(CopyView {
                vm: names.of(record.envelope.vm),
                envelope: copy.envelope.to_string(),
                place: place.into(),
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
        let ended = job.state != JobState::Running.into();
        if !report(job, ended).await || ended {
            return Ok(());
        }
        // What was seen before a change is too old to be shown for it when this has passed.
        let _ = tokio::time::timeout(UNCHANGED, changes.changed()).await;
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
    looks.retain(|_, (at, _)| at.elapsed() < LOOK);
    if let Some((_, job)) = looks.get(&id) {
        return Ok(job.clone());
    }
    let asked = Arc::clone(daemon);
    let at = Instant::now();
    let looked = workers.spawn_blocking(move || {
        let job = asked.keystore.job(id)?.ok_or_else(|| unknown(id.0))?;
        view(&asked, &job)
    });
    let job = looked.await.map_err(|error| broken(&error))??;
    looks.insert(id, (at, job.clone()));
    Ok(job)
}

pub(super) fn abort(daemon: &Daemon, by: Actor, id: Option<i64>) -> Result<JobView, Problem> {
    let aborted = daemon.keystore.abort_job(job_id(daemon, id)?)?;
    // Whoever has it in hand takes back what it has begun.
    if !daemon.jobs.stop(aborted.id) && aborted.state == JobState::Aborted {
        volumes::take_back_unmade(daemon, &aborted.subject);
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
        [] => Err(Problem::not_found("no job runs").next(Advice::ListJobs)),
        [job] => Ok(job.id),
        several => {
            let ids: Vec<_> = several.iter().map(|job| job.id.0.to_string()).collect();
            Err(
                Problem::usage(format!("{} jobs run: {}", ids.len(), ids.join(", ")))
                    .next(Advice::ListJobs.then("the same command with the number of one")),
            )
        }
    }
}

fn unknown(id: i64) -> Problem {
    Problem::not_found(format!("there is no job {id}")).next(Advice::ListJobs)
}

//! What `provider rotate`, `rekey`, `move`, `recipients` and `virtseal jobs` ask for, and the thread that does it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use super::service::descriptors::{passphrase_from, pin_from, wrong_fds};
use super::service::provider::native_failure;
use super::service::tpm::{self, tpm_failure};
use super::visible::VisibleCopy;
use super::{Daemon, lock, records};
use crate::api::pages::{self, PAGE};
use crate::api::{CopyView, JobRequest, JobStarted, JobView, Jobs};
use crate::audit::Actor;
use crate::job::sweep::{self, Step, Task};
use crate::model::envelope::{Envelope, EnvelopeId, ProviderId, VmId};
use crate::model::job::{JobId, JobState, Subject};
use crate::model::problem::{Code, Problem};
use crate::provider::native::{NativeError, NativeProvider};
use crate::provider::{KeyProvider, ProviderStatus};
use crate::recipients::Provider;
use crate::store::{CopyPlace, JobRecord, StoreError};
use crate::vm::names;
use crate::vm::names::VmNames;
use crate::vm::status::damaged;

/// How many jobs `virtseal jobs` shows.
const RECENT: u32 = 20;
/// How many envelopes left behind are shown with a job.
const SHOWN: u32 = 20;
/// How often a watched job is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// A job that waits is tried again after this time, and after twice that, up to the limit.
const PATIENCE: std::ops::Range<Duration> = Duration::from_secs(1)..Duration::from_secs(60);

/// What somebody who watches a job has seen of it.
#[derive(Debug)]
pub(super) struct Look {
    at: Instant,
    job: JobView,
    ended: bool,
}

/// What was seen of each job that is watched.
pub(super) type Looks = tokio::sync::Mutex<BTreeMap<JobId, Look>>;

impl Daemon {
    /// Does jobs for ever. For a thread of its own.
    pub fn run_jobs(&self) {
        let (mut patience, mut turn) = (PATIENCE.start, 0_usize);
        loop {
            let config = self.config();
            let running = self.keystore.running_jobs().unwrap_or_default();
            // In turn: one that waits holds up no other.
            turn = turn.wrapping_add(1);
            let stepped = match running.get(turn % running.len().max(1)) {
                None => Ok(None),
                Some(job) => {
                    let stepped = sweep::step(
                        self.keystore.as_ref(),
                        &self.recipients,
                        job.id,
                        config.batch_size,
                    );
                    self.note_stalled(job.id, stepped.as_ref().err());
                    stepped.map(Some)
                }
            };
            let pause = match stepped {
                Ok(Some(Step::Worked(_))) => {
                    self.copies_bell.ring();
                    patience = PATIENCE.start;
                    config.interval
                }
                Ok(Some(Step::Ended(job))) => {
                    tracing::info!(
                        job = job.id.0,
                        state = job.state.as_str(),
                        changed = job.changed,
                        "ended"
                    );
                    records::note_command(self, Actor::Virtseald, "job-end", &self.words(&job), &Ok(()));
                    crate::host::process::trim();
                    Duration::ZERO
                }
                Ok(Some(Step::Waits(_))) | Err(_) => {
                    if let Err(failure) = &stepped {
                        tracing::error!("the job stands still: {failure}");
                    }
                    patience = (patience * 2).min(PATIENCE.end);
                    patience
                }
                Ok(None) => PATIENCE.end,
            };
            if !pause.is_zero() {
                self.jobs_bell.wait(pause);
            }
        }
    }

    /// A keystore that can't be written can't say so in the job's record either.
    fn note_stalled(&self, id: JobId, failure: Option<&Problem>) {
        *lock(&self.stalled) = failure.map(|failure| (id, failure.to_string()));
    }

    /// What a job waits for, if it does.
    fn waiting(&self, job: &JobRecord) -> Option<String> {
        let stalled = lock(&self.stalled).clone();
        let stalled = stalled.filter(|(id, _)| *id == job.id && job.state == JobState::Running);
        let noted = (!job.waiting.is_empty()).then(|| job.waiting.clone());
        stalled.map(|(_, why)| why).or(noted)
    }

    /// Starts a job.
    pub fn start_job(&self, by: Actor, request: &JobRequest) -> Result<JobStarted, Problem> {
        // Nobody deletes a provider, shreds a VM or redefines one in between.
        let _sealing = lock(&self.sealing);
        let task = self.task(request)?;
        self.start(by, &task)
    }

    /// Retires the keys in use of a provider: a native one gets a new root key, sealed by the passphrase in `fds`; any other
    /// makes new KEKs during the job that follows.
    pub fn rotate_provider(&self, by: Actor, name: &str, fds: Vec<OwnedFd>) -> Result<JobStarted, Problem> {
        let _sealing = lock(&self.sealing);
        let known = self.recipients.find(name)?;
        // Before anything changes.
        self.refuse_second_job(&Subject::AllEnvelopes)?;
        let mut tpm_lags = None;
        if let Provider::Native(native) = &known {
            self.check_root_key_complete(native)?;
            let mut fds = fds.into_iter();
            let passphrase = passphrase_from(fds.next().ok_or_else(wrong_fds)?)?;
            let pin = fds.next().map(pin_from).transpose()?;
            let rotated = native
                .rotate_with_tpm(&passphrase, &self.tpm, pin.as_ref())
                .map_err(|error| match error {
                    NativeError::Tpm(_) => tpm_failure(native, &error),
                    error => native_failure(name, &error),
                });
            crate::host::process::trim();
            records::note_provider(self, by, "provider-rotate", name, &rotated);
            tpm_lags = tpm::tpm_lags(self, by, native, rotated?);
        }
        let provider = known.provider().id();
        let mut started = self.start(by, &Task::Rotate { provider })?;
        if let Provider::Native(native) = &known {
            started.warnings.extend(tpm_lags);
            if native.status() != ProviderStatus::Ready {
                started.warnings.push(format!(
                    "'{name}' has root key {} and wraps nothing until that is backed up: virtseal provider backup {name} \
                     --output FILE. The job goes on then",
                    native.generation()
                ));
            }
        }
        Ok(started)
    }

    /// A root key made here would have the number of one that exists elsewhere, and no backup could hold both.
    fn check_root_key_complete(&self, native: &NativeProvider) -> Result<(), Problem> {
        let name = native.name();
        // A row that tells nothing may have what a later root key has made.
        let records = self.keystore.envelopes()?.claims()?;
        let lacks = |envelope: &Envelope| {
            let mut own = envelope
                .stanzas
                .iter()
                .filter(|stanza| stanza.provider == native.id());
            own.any(|stanza| native.lacks(&stanza.kek))
        };
        let lacking: BTreeMap<EnvelopeId, VmId> = records
            .into_iter()
            .filter(lacks)
            .map(|envelope| (envelope.id, envelope.vm))
            .collect();
        if lacking.is_empty() {
            // Without libvirt, at least what is known here.
            let visible = self.visible_copies().unwrap_or_default().copies;
            let claim = visible
                .into_iter()
                .find(|copy| lacks(&copy.envelope) && self.may_be_true(copy));
            return claim.map_or(Ok(()), |claim| Err(claimed(native, &claim)));
        }
        let vms: Vec<VmId> = lacking.into_values().collect();
        Err(Problem::new(
            Code::WouldLoseKey,
            format!(
                "'{name}' is not rotated: it has root key {}, and {} have keys by a later one, which is in a newer backup",
                native.generation(),
                VmNames::of_keystore(self.keystore.as_ref())?.objects_of_vms(&vms)
            ),
        )
        .next(format!(
            "find the newest backup; then virtseal state backup -o FILE, virtseal provider delete {name} --force and virtseal \
             provider restore {name} -i with that backup"
        )))
    }

    fn start(&self, by: Actor, task: &Task) -> Result<JobStarted, Problem> {
        self.refuse_second_job(&task.subject())?;
        let mut rivals = Vec::new();
        let unseen = self.adopt_foreign_envelopes().map(|travelling| {
            if !task.decides_conflicts() {
                rivals = travelling.rivals;
            }
            travelling.unreadable
        });
        if let Task::RemoveRecipient { provider } = task {
            self.refuse_to_close(task, *provider)?;
        }
        let inserted = task
            .start(self.keystore.as_ref(), &rivals)
            .map_err(|error| match error {
                StoreError::JobRunning(id) => second_job(id),
                error => error.into(),
            });
        let words = task.words(|id| self.name_of(id));
        records::note_command(self, by, "job-start", &words, &inserted);
        let job = inserted?;
        self.jobs_bell.ring();
        let mut warnings = self.warnings_of_task(task);
        let damaged = damaged::records(self.keystore.as_ref(), &self.host_store).into_iter();
        warnings.extend(damaged.map(|damaged| format!("left out: {damaged}")));
        match unseen {
            Ok(unreadable) => warnings.extend(unreadable.iter().map(|what| format!("left out: {what}"))),
            Err(unseen) => warnings.push(format!(
                "VMs that came to this host and have not started here yet are left out: {}",
                unseen.message
            )),
        }
        Ok(JobStarted {
            job: self.job_view(&job)?,
            warnings,
        })
    }

    fn refuse_second_job(&self, subject: &Subject) -> Result<(), Problem> {
        let running = self.keystore.running_jobs()?;
        match running.iter().find(|job| job.subject.excludes(subject)) {
            Some(job) => Err(second_job(job.id.0)),
            None => Ok(()),
        }
    }

    /// Nothing may be left that no provider opens.
    fn refuse_to_close(&self, task: &Task, provider: ProviderId) -> Result<(), Problem> {
        let mut closed: Vec<VmId> = Vec::new();
        self.keystore.each_envelope(|record| {
            if task.would_close(&record.envelope) {
                closed.push(record.envelope.vm);
            }
        })?;
        if closed.is_empty() {
            return Ok(());
        }
        let name = self.name_of(provider);
        Err(Problem::new(
            Code::WouldLoseKey,
            format!(
                "'{name}' stays a recipient: {} can be opened by nobody else",
                VmNames::of_keystore(self.keystore.as_ref())?.objects_of_vms(&closed)
            ),
        )
        .next(format!(
            "virtseal provider move {name} OTHER, or virtseal provider recipients add OTHER"
        )))
    }

    fn task(&self, request: &JobRequest) -> Result<Task, Problem> {
        let named = |name: &Option<String>| {
            let name = name.as_deref().unwrap_or_default();
            self.provider_id(name)
        };
        let vm = request
            .vm
            .as_deref()
            .map(|vm| names::vm_id(&self.background, vm))
            .transpose()?;
        match request.kind.as_str() {
            "rekey" => {
                let policy = self.recipients.policy()?;
                let to = policy.iter().map(|known| known.provider().id()).collect();
                Ok(Task::Rekey { to, vm })
            }
            "move" => {
                let (from, to) = (named(&request.provider)?, named(&request.to)?);
                if from == to {
                    return Err(Problem::new(
                        Code::Usage,
                        "a move is from one provider to another",
                    ));
                }
                Ok(Task::Move { from, to, vm })
            }
            "add-recipient" => Ok(Task::AddRecipient {
                provider: named(&request.provider)?,
            }),
            "remove-recipient" => Ok(Task::RemoveRecipient {
                provider: named(&request.provider)?,
            }),
            other => Err(Problem::new(
                Code::Usage,
                format!("there is no kind of job called '{other}'"),
            )),
        }
    }

    /// A provider of this host, or one that was deleted here.
    fn provider_id(&self, name: &str) -> Result<ProviderId, Problem> {
        match self.recipients.find(name) {
            Ok(known) => Ok(known.provider().id()),
            Err(unknown) => {
                let deleted = self.keystore.deleted_providers()?.sound;
                let found = deleted
                    .iter()
                    .find(|deleted| deleted.name == name || name.parse() == Ok(deleted.id));
                found.map(|deleted| deleted.id).ok_or_else(|| unknown.into())
            }
        }
    }

    /// A provider's name, also after it was deleted.
    pub(super) fn name_of(&self, id: ProviderId) -> String {
        if let Some(known) = self.recipients.by_id(id) {
            return known.provider().name().to_owned();
        }
        let deleted = self.keystore.deleted_providers().map(|rows| rows.sound);
        let found = deleted.into_iter().flatten().find(|deleted| deleted.id == id);
        found.map_or_else(|| id.to_string(), |deleted| deleted.name)
    }

    /// New envelopes do not ask what a job did to the others.
    fn warnings_of_task(&self, task: &Task) -> Vec<String> {
        let Ok(policy) = self.recipients.policy() else {
            return Vec::new();
        };
        let policy: Vec<_> = policy.iter().map(|known| known.provider().id()).collect();
        let leaves = match task {
            Task::Move { from, .. } => Some(*from),
            Task::RemoveRecipient { provider } => Some(*provider),
            Task::AddRecipient { provider } if !policy.contains(provider) => {
                return vec![format!(
                    "new VMs do not get a stanza of '{}': add it to recipients in virtseald.yaml, then reload virtseald",
                    self.name_of(*provider)
                )];
            }
            Task::Rotate { .. } | Task::Rekey { .. } | Task::AddRecipient { .. } => None,
        };
        let still = leaves.filter(|id| policy.contains(id));
        let advise = |id| {
            format!(
                "new VMs still go to '{}': virtseal provider default OTHER, or change recipients in virtseald.yaml",
                self.name_of(id)
            )
        };
        still.map(advise).into_iter().collect()
    }

    /// The last jobs, and what is behind.
    pub fn jobs(&self) -> Result<Jobs, Problem> {
        let jobs = self.keystore.jobs(RECENT)?.sound;
        let names = VmNames::of_keystore(self.keystore.as_ref())?;
        let mut copies = Vec::new();
        for place in [CopyPlace::Xml, CopyPlace::Image] {
            for copy in self.host_store.stale_copies(place, None, 100)? {
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
            let mut view = self.job_view(job)?;
            view.reasons = pages::cut(view.reasons, PAGE / 2 / RECENT as usize);
            views.push(view);
        }
        let room = PAGE.saturating_sub(pages::size_of(&views));
        Ok(Jobs {
            jobs: views,
            stale_copies: number(self.host_store.count_stale_copies()?),
            copies: pages::cut(copies, room),
        })
    }

    /// Reports a job, or the one that runs, whenever it has changed, until it ends or nobody listens. The keystore is read
    /// by `workers`, for all who watch the same job together.
    pub async fn watch_job(
        self: Arc<Self>,
        id: Option<i64>,
        workers: &Handle,
        report: impl AsyncFn(JobView, bool) -> bool,
    ) -> Result<(), Problem> {
        let id = self.find_watched(id, workers).await?;
        let (mut last, mut told) = (None, Instant::now());
        loop {
            let (job, ended) = self.look_at_job(id, workers).await?;
            // Now and then also without news: that is how a listener who left is noticed.
            if ended || last.as_ref() != Some(&job) || told.elapsed() > 10 * LOOK {
                if !report(job.clone(), ended).await || ended {
                    return Ok(());
                }
                last = Some(job);
                told = Instant::now();
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Of all who begin to watch, one at a time asks.
    async fn find_watched(self: &Arc<Self>, id: Option<i64>, workers: &Handle) -> Result<JobId, Problem> {
        let _alone = self.watched.lock().await;
        let daemon = Arc::clone(self);
        let found = workers.spawn_blocking(move || daemon.job_id(id)).await;
        found.map_err(|error| broken(&error))?
    }

    /// The job as it was less than [`LOOK`] ago, and whether it has ended. One watcher looks, the others see what it saw.
    async fn look_at_job(self: &Arc<Self>, id: JobId, workers: &Handle) -> Result<(JobView, bool), Problem> {
        let mut looks = self.watched.lock().await;
        if let Some(look) = looks.get(&id).filter(|look| look.at.elapsed() < LOOK) {
            return Ok((look.job.clone(), look.ended));
        }
        looks.retain(|_, look| look.at.elapsed() < LOOK);
        let daemon = Arc::clone(self);
        let looked = workers.spawn_blocking(move || {
            let job = daemon.keystore.job(id)?.ok_or(StoreError::UnknownJob(id.0))?;
            Ok::<_, Problem>((daemon.job_view(&job)?, job.state != JobState::Running))
        });
        let (job, ended) = looked.await.map_err(|error| broken(&error))??;
        let look = Look {
            at: Instant::now(),
            job: job.clone(),
            ended,
        };
        looks.insert(id, look);
        Ok((job, ended))
    }

    /// Ends a job, or the one that runs, where it is.
    pub fn abort_job(&self, by: Actor, id: Option<i64>) -> Result<JobView, Problem> {
        let aborted = self.keystore.abort_job(self.job_id(id)?)?;
        records::note_command(self, by, "job-abort", &self.words(&aborted), &Ok(()));
        self.jobs_bell.ring();
        self.job_view(&aborted)
    }

    fn job_id(&self, id: Option<i64>) -> Result<JobId, Problem> {
        let found = match id {
            Some(id) => self.keystore.job(JobId(id))?,
            None => self.keystore.running_jobs()?.into_iter().next(),
        };
        found.map(|job| job.id).ok_or_else(|| {
            let what = id.map_or_else(|| "no job runs".to_owned(), |id| format!("there is no job {id}"));
            Problem::new(Code::NotFound, what).next("virtseal jobs")
        })
    }

    fn words(&self, job: &JobRecord) -> String {
        match Task::from_json(&job.task) {
            Ok(task) => task.words(|id| self.name_of(id)),
            Err(_) => "of another version".to_owned(),
        }
    }

    fn job_view(&self, job: &JobRecord) -> Result<JobView, Problem> {
        let left = match job.left {
            0 => Vec::new(),
            _ => self.keystore.left_behind(job.id, SHOWN)?,
        };
        let reasons = left
            .iter()
            .map(|left| format!("envelope {}: {}", left.envelope, left.reason));
        Ok(JobView {
            id: job.id.0,
            task: self.words(job),
            state: job.state.as_str().to_owned(),
            total: number(job.total),
            seen: number(job.seen),
            changed: number(job.changed),
            left: number(job.left),
            waiting: self.waiting(job),
            reasons: pages::cut(reasons.collect(), PAGE / 2),
            started: job.created,
            updated: job.updated,
        })
    }
}

fn broken(error: &tokio::task::JoinError) -> Problem {
    Problem::new(Code::Failed, format!("virtseald failed: {error}"))
        .next("see its log: journalctl -u virtseald")
}

/// Deleting and restoring the provider would be the way out of a true claim, and a trap if anybody made it up.
fn claimed(native: &NativeProvider, claim: &VisibleCopy) -> Problem {
    let name = native.name();
    Problem::new(
        Code::WouldLoseKey,
        format!(
            "'{name}' is not rotated: it has root key {}, and {} claims a key by a later one, which nothing here can verify",
            native.generation(),
            claim.place
        ),
    )
    .next(format!(
        "if you have a newer backup of '{name}' than this host was given, restore that on a fresh state directory; else rotate it \
         on the host that the VM came from. If it came from none of yours, keep its virsh dumpxml, and take its <virtseal:vm> \
         metadata out (virsh edit)"
    ))
}

fn second_job(id: i64) -> Problem {
    Problem::new(Code::Busy, format!("job {id} runs, and one runs at a time"))
        .next(format!("virtseal jobs watch {id}, or virtseal jobs abort {id}"))
}

fn number(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

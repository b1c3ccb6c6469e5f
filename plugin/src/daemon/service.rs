//! The Varlink services: `io.virtseal.Lifecycle` for the hook, `io.virtseal.Host` for the CLI.
//!
//! A method checks who calls, and has a worker thread of [`Pools`] do what it is for: a function in the file of its group. So
//! readers never have the threads of a start, and `provider lock` waits for nobody.

#![expect(missing_docs, reason = "the service macro makes public items without any")]

pub mod cache;
pub(super) mod descriptors;
pub(super) mod job;
pub mod provider;
pub(super) mod provider_view;
mod rotate;
mod state;
mod status;
pub mod tpm;
mod trust;
mod vm;
pub(super) mod volume;

use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::Stream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::{JoinError, spawn_local};
use zlink::{Reply, service};

use super::caller::Caller;
use super::gate::Pass;
use super::glance::Age;
use super::pools::Pools;
use super::state::Daemon;
use super::{HookPolicy, first_runs, records};
use crate::api::{
    AuditLines, AuditVerified, BackupMade, CertificateView, CopyView, FindingView, HostError, HostStatus,
    IdentityParts, IdentitySet, JobKind, JobProblem, JobReport, JobRequest, JobStarted, JobState, JobView,
    Jobs, LifecycleError, NewKey, ObjectStanding, ObjectView, OrphanEnvelope, OrphanKek, Orphans, Outcome,
    PersistRequest, PersistView, ProviderView, Providers, Receipt, ReceiptLine, ServerView, Servers,
    Severity, ShredPreview, SigningRequestMade, SweepKind, TpmEnrolled, TpmRemoved, TpmRequest, TpmView,
    Unit, VmPower, VmState, VmView, Vms, VolumeCreated, VolumeRequest,
};
use crate::audit::Actor;
use crate::domain::Domain;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::vm::adopt::Formats;
use crate::vm::share::Sharing;
use crate::vm::start::Deadline;

/// The other end of one connection, and what serves it.
pub struct Service {
    pub(super) daemon: Arc<Daemon>,
    pub(super) pools: Pools,
    pub(super) caller: Caller,
    pub(super) actor: Actor,
    /// Root's connection, to be asked whether anybody is still there.
    pub(super) peer: Option<Arc<OwnedFd>>,
    /// What bounds the calls of others.
    pub(super) pass: Option<Arc<Pass>>,
}

impl Service {
    /// Shows something, to root and to those who may read.
    async fn show<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Daemon) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        let workers = match self.caller {
            Caller::Admin => &self.pools.admin,
            Caller::Reader | Caller::Stranger => &self.pools.watch,
        };
        self.run(workers, Caller::Reader, work).await
    }

    /// Changes something, for root alone.
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Daemon, Actor) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        self.change_on(&self.pools.admin, work).await
    }

    async fn change_on<T: Send + 'static>(
        &self,
        workers: &Handle,
        work: impl FnOnce(&Daemon, Actor) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        let by = self.actor;
        let work = move |daemon: &Daemon| {
            let done = work(daemon, by);
            daemon.glances.expire();
            done
        };
        self.run(workers, Caller::Admin, work).await
    }

    async fn run<T: Send + 'static>(
        &self,
        workers: &Handle,
        needed: Caller,
        work: impl FnOnce(&Daemon) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        self.caller.may(needed)?;
        let _turn = match &self.pass {
            Some(pass) => Some(pass.turn().await?),
            None => None,
        };
        self.daemon.note_call();
        let daemon = Arc::clone(&self.daemon);
        let done = workers.spawn_blocking(move || work(&daemon)).await;
        Ok(done.map_err(|error| broken(&error))??)
    }

    /// How old what it is shown may be: further pages are those of the first one.
    fn age(&self, after: Option<&str>) -> Age {
        match (self.caller, after) {
            (Caller::Admin, None) => Age::Now,
            _ => Age::Lately,
        }
    }

    /// Runs `work` for a hook, with its deadline; `subject` names the VM if that passes.
    async fn hook<T: Send + 'static>(
        &self,
        subject: impl FnOnce() -> String,
        work: impl FnOnce(&Daemon, Actor, &Deadline) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, LifecycleError> {
        let time = self.daemon.hook_deadline();
        let deadline = match &self.peer {
            Some(peer) => Deadline::after(time).or_hangup_of(Arc::clone(peer)),
            None => Deadline::after(time),
        };
        let run = self.change_on(&self.pools.hook, move |daemon, by| work(daemon, by, &deadline));
        let outcome = match tokio::time::timeout(time, run).await {
            Ok(outcome) => outcome.map_err(Problem::from),
            Err(_) => Err(self.daemon.deadline_passed(time).of(subject())),
        };
        outcome.map_err(|failure| LifecycleError::Refused {
            message: failure.to_string(),
        })
    }
}

#[service(
    vendor = "virtseal",
    product = "virtseald",
    version = env!("CARGO_PKG_VERSION"),
    url = ""
)]
impl Service {
    /// A VM is about to start: arms its DEKs, or refuses.
    #[zlink(interface = "io.virtseal.Lifecycle")]
    async fn prepare(&self, xml: String, require_sealed: Option<bool>) -> Result<(), LifecycleError> {
        let copy = xml.clone();
        let subject =
            || Domain::parse(&xml).map_or_else(|_| "the VM".into(), |domain| domain.name) + " stays off";
        let policy = match require_sealed {
            Some(true) => HookPolicy::RequireSealed,
            Some(false) | None => HookPolicy::Any,
        };
        self.hook(subject, move |daemon, by, deadline| {
            daemon.prepare(by, &copy, policy, deadline)
        })
        .await
    }

    /// A VM runs: disarms its DEKs.
    async fn started(&self, vm: String, name: String) -> Result<(), LifecycleError> {
        let subject = name.clone();
        self.hook(|| subject, move |daemon, _, _| daemon.started(&vm, &name))
            .await
    }

    /// A VM is about to start with a state that comes from another host, or from a saved image.
    async fn arriving(&self, vm: String, name: String, xml: Option<String>) -> Result<(), LifecycleError> {
        self.hook(
            || name,
            move |daemon, _, _| first_runs::arriving(daemon, &vm, &xml.unwrap_or_default()),
        )
        .await
    }

    /// The hook has refused a VM by what it knows itself.
    async fn refused(&self, vm: Option<String>, name: String, reason: String) -> Result<(), LifecycleError> {
        let subject = name.clone();
        self.hook(
            || subject,
            move |daemon, by, _| {
                records::note_refused(daemon, by, vm.as_deref(), &name, &reason);
                Ok(())
            },
        )
        .await
    }

    /// A VM is gone, or its start has failed: disarms what is still armed.
    async fn released(&self, vm: String, name: String) -> Result<(), LifecycleError> {
        let subject = name.clone();
        self.hook(|| subject, move |daemon, _, _| daemon.released(&vm, &name))
            .await
    }

    #[zlink(
        interface = "io.virtseal.Host",
        types = [
            ProviderView, PersistView, PersistRequest, TpmView, TpmRequest, CertificateView, ServerView, IdentityParts, NewKey, ObjectStanding, ObjectView, Severity, FindingView, VmPower, VmState, VmView, VolumeRequest,
            JobRequest, SweepKind, JobView, JobKind, JobState, JobProblem, Unit, CopyView, OrphanEnvelope, OrphanKek, ReceiptLine
        ]
    )]
    async fn status(&self, after: Option<String>) -> Result<HostStatus, HostError> {
        let age = self.age(after.as_deref());
        self.show(move |daemon| status::status(daemon, age, after.as_deref()))
            .await
    }

    async fn vm_status(&self, vm: Option<String>, after: Option<String>) -> Result<Vms, HostError> {
        let age = self.age(after.as_deref());
        let work = move |daemon: &Daemon| status::vm_status(daemon, vm.as_deref(), age, after.as_deref());
        self.show(work).await
    }

    async fn seal_vm(
        &self,
        vm: String,
        provider: Option<String>,
        formats: Option<Vec<String>>,
        dry_run: bool,
    ) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| {
            vm::seal(
                daemon,
                by,
                &vm,
                provider.as_deref(),
                &formats.unwrap_or_default(),
                dry_run,
            )
        })
        .await
    }

    async fn adopt_vm(&self, vm: String, format_1: bool) -> Result<Outcome, HostError> {
        let formats = if format_1 {
            Formats::Format1Too
        } else {
            Formats::WithMac
        };
        self.change(move |daemon, by| vm::adopt(daemon, by, &vm, formats))
            .await
    }

    async fn unseal_vm(&self, vm: String, dry_run: bool) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| vm::unseal(daemon, by, &vm, dry_run))
            .await
    }

    async fn share_volume(&self, path: String, vm: String) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| volume::share(daemon, by, &path, &vm, Sharing::With))
            .await
    }

    async fn unshare_volume(&self, path: String, vm: String) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| volume::share(daemon, by, &path, &vm, Sharing::Without))
            .await
    }

    async fn create_volume(&self, request: VolumeRequest) -> Result<VolumeCreated, HostError> {
        self.change(move |daemon, by| volume::create(daemon, by, &request))
            .await
    }

    async fn list_providers(&self) -> Result<Providers, HostError> {
        self.show(provider_view::list).await
    }

    async fn add_provider(
        &self,
        name: String,
        kind: String,
        settings: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.change(move |daemon, by| provider::add(daemon, by, &name, &kind, &settings, fds))
            .await
    }

    async fn set_provider_cache(
        &self,
        name: String,
        policy: String,
        persist: Option<PersistRequest>,
    ) -> Result<Providers, HostError> {
        self.change(move |daemon, by| cache::set(daemon, by, &name, &policy, persist.as_ref()))
            .await
    }

    async fn set_default_provider(&self, name: String) -> Result<(), HostError> {
        self.change(move |daemon, by| provider::set_default(daemon, by, &name))
            .await
    }

    async fn lock_provider(&self, name: String) -> Result<(), HostError> {
        let work = move |daemon: &Daemon, by| provider::lock(daemon, by, &name);
        self.change_on(&self.pools.lock, work).await
    }

    async fn unlock_provider(&self, name: String, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<(), HostError> {
        self.change(move |daemon, by| provider::unlock(daemon, by, &name, fds))
            .await
    }

    async fn unlock_provider_by_tpm(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<(), HostError> {
        self.change(move |daemon, by| tpm::unlock(daemon, by, &name, fds))
            .await
    }

    async fn enroll_tpm(
        &self,
        name: String,
        request: TpmRequest,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<TpmEnrolled, HostError> {
        self.change(move |daemon, by| tpm::enroll(daemon, by, &name, &request, fds))
            .await
    }

    async fn remove_tpm(&self, name: String) -> Result<TpmRemoved, HostError> {
        self.change(move |daemon, by| tpm::remove(daemon, by, &name).map(|removed| TpmRemoved { removed }))
            .await
    }

    async fn backup_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<BackupMade, HostError> {
        self.change(move |daemon, _| provider::backup(daemon, &name, fds))
            .await
    }

    async fn confirm_backup(&self, name: String, generation: i64) -> Result<(), HostError> {
        self.change(move |daemon, by| provider::confirm_backup(daemon, by, &name, generation))
            .await
    }

    async fn restore_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.change(move |daemon, by| provider::restore(daemon, by, &name, fds))
            .await
    }

    async fn set_provider_identity(
        &self,
        name: String,
        parts: IdentityParts,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<IdentitySet, HostError> {
        self.change(move |daemon, by| trust::set_identity(daemon, by, &name, &parts, fds))
            .await
    }

    async fn provider_signing_request(
        &self,
        name: String,
        new: Option<NewKey>,
    ) -> Result<SigningRequestMade, HostError> {
        self.change(move |daemon, by| trust::signing_request(daemon, by, &name, new.as_ref()))
            .await
    }

    async fn provider_servers(&self, name: String) -> Result<Servers, HostError> {
        self.show(move |daemon| trust::servers(daemon, &name)).await
    }

    async fn trust_provider(
        &self,
        name: String,
        fingerprints: Vec<String>,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.change(move |daemon, by| trust::trust(daemon, by, &name, &fingerprints, fds))
            .await
    }

    async fn start_job(&self, request: JobRequest) -> Result<JobStarted, HostError> {
        self.change(move |daemon, by| job::start(daemon, by, &request))
            .await
    }

    async fn rotate_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<JobStarted, HostError> {
        self.change(move |daemon, by| rotate::rotate(daemon, by, &name, fds))
            .await
    }

    async fn list_jobs(&self) -> Result<Jobs, HostError> {
        self.show(job::list).await
    }

    #[zlink(more)]
    async fn watch_job(
        &self,
        more: bool,
        id: Option<i64>,
    ) -> impl Stream<Item = Result<Reply<JobReport>, HostError>> + Unpin + use<> {
        let (sender, receiver) = mpsc::channel(1);
        let allowed = self.caller.may(Caller::Reader);
        // One of them at a time, whoever and however many watch.
        let workers = self.pools.admin.clone();
        let daemon = Arc::clone(&self.daemon);
        spawn_local(async move {
            let report = async |job: JobView, last: bool| {
                let reply = Reply::new(Some(JobReport { job })).set_continues(Some(!last));
                let wanted = more || last;
                !sender.is_closed() && (!wanted || sender.send(Ok(reply)).await.is_ok())
            };
            let watched = match allowed {
                Ok(()) => job::watch(daemon, id, &workers, report).await,
                Err(denied) => Err(denied),
            };
            if let Err(failure) = watched {
                // Nobody is left to be told when this fails.
                let _ = sender.send(Err(failure.into())).await;
            }
        });
        Replies(receiver)
    }

    async fn abort_job(&self, id: Option<i64>) -> Result<JobReport, HostError> {
        self.change(move |daemon, by| job::abort(daemon, by, id).map(|job| JobReport { job }))
            .await
    }

    async fn resume_job(&self, id: i64) -> Result<JobStarted, HostError> {
        self.change(move |daemon, by| job::resume(daemon, by, id)).await
    }

    async fn delete_provider(&self, name: String, typed: Option<String>) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| provider::delete(daemon, by, &name, typed.as_deref()))
            .await
    }

    async fn orphans(&self, after: Option<String>) -> Result<Orphans, HostError> {
        let age = self.age(after.as_deref());
        self.show(move |daemon| provider::orphans(daemon, age, after.as_deref()))
            .await
    }

    async fn preview_shred(&self, vm: String) -> Result<ShredPreview, HostError> {
        self.change(move |daemon, _| vm::preview_shred(daemon, &vm)).await
    }

    async fn shred_vm(
        &self,
        vm: String,
        typed: Option<String>,
        typed_for_keks: Option<String>,
    ) -> Result<Receipt, HostError> {
        self.change(move |daemon, by| vm::shred(daemon, by, &vm, typed.as_deref(), typed_for_keks.as_deref()))
            .await
    }

    async fn backup_state(&self, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| state::backup(daemon, by, fds))
            .await
    }

    async fn forget_vm(&self, vm: String) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| vm::forget(daemon, by, &vm)).await
    }

    async fn adopt_forgotten(&self, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<Outcome, HostError> {
        self.change(move |daemon, by| vm::adopt_forgotten(daemon, by, fds))
            .await
    }

    async fn show_audit(&self, records: i64, before: Option<i64>) -> Result<AuditLines, HostError> {
        self.show(move |daemon| records::show(daemon, records, before))
            .await
    }

    async fn verify_audit(&self) -> Result<AuditVerified, HostError> {
        self.show(records::verify).await
    }
}

/// The replies of a call that takes long.
struct Replies<T>(mpsc::Receiver<Result<Reply<T>, HostError>>);

impl<T> Stream for Replies<T> {
    type Item = Result<Reply<T>, HostError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

fn broken(error: &JoinError) -> Problem {
    Problem::new(Code::Failed, format!("virtseald failed: {error}"))
        .next(Advice::from("see its log").within(Advice::Journal))
}

//! The Varlink services: `io.virtseal.Lifecycle` for the hook, `io.virtseal.Host` for the CLI.
//!
//! Every connection has a conversation of its own, so one that waits never holds up another. Who calls is known from
//! the kernel (SO_PEERCRED): root may change things, the group may read. The work itself blocks and runs on worker
//! threads: those of [`Pools`], so that readers never have those of a start.

#![expect(missing_docs, reason = "the service macro makes public items without any")]

mod channel;
mod closer;
mod conversation;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use nix::unistd::{Gid, Uid};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use zlink::{Reply, service};

use super::caller::{self, Caller};
use super::gate::{Gate, Pass};
use crate::api::{
    AuditLines, AuditVerified, BackupMade, CertificateView, CopyView, HostError, HostStatus, IdentityParts,
    IdentitySet, JobReport, JobRequest, JobStarted, JobView, Jobs, LifecycleError, NewKey, ObjectView,
    OrphanEnvelope, OrphanKek, Orphans, Outcome, PersistRequest, PersistView, ProviderView, Providers,
    Receipt, ReceiptLine, ServerView, Servers, ShredPreview, SigningRequestMade, TpmEnrolled, TpmRemoved,
    TpmRequest, TpmView, VmView, Vms, VolumeProgress, VolumeRequest,
};
use crate::daemon::first_runs;
use crate::daemon::glance::{self, Age};
use crate::daemon::pools::Pools;
use crate::daemon::{Daemon, Formats, HookPolicy, Sharing, on_behalf_of};
use crate::domain::Domain;
use crate::model::problem::{Code, Problem};
use crate::vm::start::Deadline;
use channel::{Channel, Sender};
use closer::Closer;

/// What every connection is served with.
#[derive(Clone)]
pub struct Server {
    daemon: Arc<Daemon>,
    pools: Pools,
    gate: Arc<Gate>,
    closer: Closer,
}

/// A connection of somebody who is not root, on its way to the thread that serves readers.
pub struct Visitor {
    stream: std::os::unix::net::UnixStream,
    uid: Uid,
    gid: Gid,
    pass: Arc<Pass>,
    /// What its first call is told, if there are too many.
    refusal: Option<Problem>,
}

impl Server {
    /// Serves connections with the workers of these pools.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn new(daemon: Arc<Daemon>, pools: Pools) -> io::Result<Self> {
        Ok(Self {
            daemon,
            pools,
            gate: Arc::default(),
            closer: Closer::start()?,
        })
    }

    /// Accepts root's connections at the hook's socket for ever. Must run inside a `LocalSet`.
    pub async fn serve_hook(self, listener: StdListener) {
        let turn_away = |_, uid: Uid, _| tracing::warn!(%uid, "turned away from the hook's socket");
        self.accept(listener, turn_away).await;
    }

    /// Accepts connections at the other socket for ever, and sends those that are not root's to `visitors`. Must run inside
    /// a `LocalSet`.
    pub async fn serve_main(self, listener: StdListener, visitors: mpsc::UnboundedSender<Visitor>) {
        let server = self.clone();
        let receive = move |stream: UnixStream, uid, gid| {
            let Ok(stream) = stream.into_std() else { return };
            let (pass, refusal) = server.gate.enter(uid);
            let Some(pass) = pass else {
                return server.turn_away(stream, refusal);
            };
            let visitor = Visitor {
                stream,
                uid,
                gid,
                pass: Arc::new(pass),
                refusal,
            };
            // Nobody is served any more when this fails.
            let _ = visitors.send(visitor);
        };
        self.accept(listener, receive).await;
    }

    /// Serves those who are not root for ever. Must run inside a `LocalSet`.
    pub async fn serve_visitors(self, mut visitors: mpsc::UnboundedReceiver<Visitor>) {
        while let Some(visitor) = visitors.recv().await {
            spawn_local(self.clone().serve_visitor(visitor));
        }
    }

    async fn accept(&self, listener: StdListener, others: impl Fn(UnixStream, Uid, Gid)) {
        let listener = listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener));
        let listener = match listener {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(%error, "a socket can't be used"),
        };
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match caller::peer(&stream) {
                    Ok((uid, _)) if caller::is_admin(uid) => {
                        spawn_local(self.clone().serve_admin(stream, uid));
                    }
                    Ok((uid, gid)) => others(stream, uid, gid),
                    Err(error) => tracing::debug!(%error, "can't tell who connected"),
                },
                Err(error) => {
                    // Out of descriptors, most likely: give the others time to end.
                    tracing::warn!(%error, "can't accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    async fn serve_admin(self, stream: UnixStream, uid: Uid) {
        let Ok(peer) = stream.as_fd().try_clone_to_owned() else {
            return;
        };
        let mut service = Service {
            daemon: self.daemon,
            pools: self.pools,
            caller: Caller::Admin,
            uid,
            peer: Some(Arc::new(peer)),
            pass: None,
        };
        serve_one(Channel::new(stream, Sender::Admin), &mut service).await;
    }

    async fn serve_visitor(self, visitor: Visitor) {
        let Visitor { stream, uid, gid, .. } = visitor;
        let groups = caller::peer_groups(&stream).unwrap_or_default();
        let Ok(stream) = UnixStream::from_std(stream) else {
            return;
        };
        let sender = Sender::Reader(self.closer, Some(Arc::clone(&visitor.pass)));
        let mut channel = Channel::new(stream, sender);
        if let Some(failure) = visitor.refusal {
            // It may not ask, or not listen.
            let _ = conversation::refuse(&mut channel, failure).await;
            return;
        }
        let daemon = Arc::clone(&self.daemon);
        let group = self.pools.watch.spawn_blocking(move || daemon.reader_group());
        let group = group.await.unwrap_or_default();
        let mut service = Service {
            daemon: self.daemon,
            pools: self.pools,
            caller: Caller::of(uid, std::iter::once(gid).chain(groups), || group),
            uid,
            peer: None,
            pass: Some(visitor.pass),
        };
        serve_one(channel, &mut service).await;
    }

    /// Says why, if that can be said at once.
    fn turn_away(&self, stream: std::os::unix::net::UnixStream, refusal: Option<Problem>) {
        if let Some(bytes) = refusal.and_then(|failure| conversation::failure(failure).ok()) {
            let _ = nix::sys::socket::send(
                std::os::fd::AsRawFd::as_raw_fd(&stream),
                &bytes,
                nix::sys::socket::MsgFlags::MSG_DONTWAIT | nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
            );
        }
        self.closer.close(stream.into(), None);
    }
}

async fn serve_one(mut channel: Channel, service: &mut Service) {
    if let Err(fault) = conversation::converse(&mut channel, service).await {
        tracing::debug!(uid = %service.uid, "connection ended: {}", crate::model::problem::chain(&fault));
        conversation::explain(&mut channel, &fault).await;
    }
}

struct Service {
    daemon: Arc<Daemon>,
    pools: Pools,
    caller: Caller,
    /// Who it is, for the audit log.
    uid: Uid,
    /// Root's connection, to be asked whether anybody is still there.
    peer: Option<Arc<OwnedFd>>,
    /// What bounds the calls of others.
    pass: Option<Arc<Pass>>,
}

impl Service {
    /// Runs `work` on a worker thread, if the caller may.
    async fn run<T: Send + 'static>(
        &self,
        needed: Caller,
        work: impl FnOnce(&Daemon) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, HostError> {
        let workers = match self.caller {
            Caller::Admin => &self.pools.admin,
            Caller::Reader | Caller::Stranger => &self.pools.watch,
        };
        self.run_on(workers, needed, work).await
    }

    async fn run_on<T: Send + 'static>(
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
        let (daemon, uid) = (Arc::clone(&self.daemon), self.uid.as_raw());
        let work = move || {
            let done = on_behalf_of(uid, || work(&daemon));
            if needed == Caller::Admin {
                glance::expire(&daemon);
            }
            done
        };
        match workers.spawn_blocking(work).await {
            Ok(result) => result.map_err(HostError::from),
            Err(error) => Err(Problem::new(Code::Failed, format!("virtseald failed: {error}"))
                .next("see its log: journalctl -u virtseald")
                .into()),
        }
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
        work: impl FnOnce(&Daemon, &Deadline) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, LifecycleError> {
        let time = self.daemon.hook_deadline();
        let deadline = match &self.peer {
            Some(peer) => Deadline::after(time).or_hangup_of(Arc::clone(peer)),
            None => Deadline::after(time),
        };
        let run = self.run_on(&self.pools.hook, Caller::Admin, move |daemon| {
            work(daemon, &deadline)
        });
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
        self.hook(subject, move |daemon, deadline| {
            daemon.prepare(&copy, policy, deadline)
        })
        .await
    }

    /// A VM runs: disarms its DEKs.
    async fn started(&self, vm: String, name: String) -> Result<(), LifecycleError> {
        let subject = name.clone();
        self.hook(|| subject, move |daemon, _| daemon.started(&vm, &name))
            .await
    }

    /// A VM is about to start with a state that comes from another host, or from a saved image.
    async fn arriving(&self, vm: String, name: String, xml: Option<String>) -> Result<(), LifecycleError> {
        self.hook(
            || name,
            move |daemon, _| first_runs::arriving(daemon, &vm, &xml.unwrap_or_default()),
        )
        .await
    }

    /// The hook has refused a VM by what it knows itself.
    async fn refused(&self, vm: Option<String>, name: String, reason: String) -> Result<(), LifecycleError> {
        let subject = name.clone();
        self.hook(
            || subject,
            move |daemon, _| {
                daemon.audit_refused(vm.as_deref(), &name, &reason);
                Ok(())
            },
        )
        .await
    }

    /// A VM is gone, or its start has failed: disarms what is still armed.
    async fn released(&self, vm: String, name: String) -> Result<(), LifecycleError> {
        let subject = name.clone();
        self.hook(|| subject, move |daemon, _| daemon.released(&vm, &name))
            .await
    }

    #[zlink(
        interface = "io.virtseal.Host",
        types = [
            ProviderView, PersistView, PersistRequest, TpmView, TpmRequest, CertificateView, ServerView, IdentityParts, NewKey, ObjectView, VmView, VolumeRequest,
            JobRequest, JobView, CopyView, OrphanEnvelope, OrphanKek, ReceiptLine
        ]
    )]
    async fn status(&self, after: Option<String>) -> Result<HostStatus, HostError> {
        let age = self.age(after.as_deref());
        self.run(Caller::Reader, move |daemon| daemon.status(age, after.as_deref()))
            .await
    }

    async fn vm_status(&self, vm: Option<String>, after: Option<String>) -> Result<Vms, HostError> {
        let age = self.age(after.as_deref());
        let work = move |daemon: &Daemon| daemon.vm_status(vm.as_deref(), age, after.as_deref());
        self.run(Caller::Reader, work).await
    }

    async fn seal_vm(
        &self,
        vm: String,
        provider: Option<String>,
        formats: Option<Vec<String>>,
        dry_run: bool,
    ) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.seal_vm(&vm, provider.as_deref(), &formats.unwrap_or_default(), dry_run)
        })
        .await
    }

    async fn adopt_vm(&self, vm: String, format_1: bool) -> Result<Outcome, HostError> {
        let formats = if format_1 {
            Formats::Format1Too
        } else {
            Formats::WithMac
        };
        self.run(Caller::Admin, move |daemon| daemon.adopt_vm(&vm, formats))
            .await
    }

    async fn unseal_vm(&self, vm: String, dry_run: bool) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.unseal_vm(&vm, dry_run))
            .await
    }

    async fn share_volume(&self, path: String, vm: String) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.share_volume(&path, &vm, Sharing::With)
        })
        .await
    }

    async fn unshare_volume(&self, path: String, vm: String) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.share_volume(&path, &vm, Sharing::Without)
        })
        .await
    }

    #[zlink(more)]
    async fn create_volume(
        &self,
        more: bool,
        request: VolumeRequest,
    ) -> impl Stream<Item = Result<Reply<VolumeProgress>, HostError>> + Unpin + use<> {
        let (sender, receiver) = mpsc::channel(8);
        let (daemon, uid) = (Arc::clone(&self.daemon), self.uid.as_raw());
        let allowed = self.caller.may(Caller::Admin);
        self.pools.admin.spawn_blocking(move || {
            // A client that went away ends the work: `report` says so.
            let report = |step: VolumeProgress| {
                let last = step.envelope.is_some();
                let reply = Reply::new(Some(step)).set_continues(Some(!last));
                let wanted = more || last;
                !wanted || sender.blocking_send(Ok(reply)).is_ok()
            };
            let create = || daemon.create_volume(&request, report);
            let created = allowed.and_then(|()| on_behalf_of(uid, create));
            glance::expire(&daemon);
            if let Err(failure) = created {
                // Nobody is left to be told when this fails.
                let _ = sender.blocking_send(Err(failure.into()));
            }
        });
        Replies(receiver)
    }

    async fn list_providers(&self) -> Result<Providers, HostError> {
        self.run(Caller::Reader, Daemon::providers).await
    }

    async fn add_provider(
        &self,
        name: String,
        kind: String,
        settings: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.add_provider(&name, &kind, &settings, fds)
        })
        .await
    }

    async fn set_provider_cache(
        &self,
        name: String,
        policy: String,
        persist: Option<PersistRequest>,
    ) -> Result<Providers, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.set_provider_cache(&name, &policy, persist.as_ref())
        })
        .await
    }

    async fn set_default_provider(&self, name: String) -> Result<(), HostError> {
        self.run(Caller::Admin, move |daemon| daemon.set_default_provider(&name))
            .await
    }

    async fn lock_provider(&self, name: String) -> Result<(), HostError> {
        let work = move |daemon: &Daemon| daemon.lock_provider(&name);
        self.run_on(&self.pools.lock, Caller::Admin, work).await
    }

    async fn unlock_provider(&self, name: String, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<(), HostError> {
        self.run(Caller::Admin, move |daemon| daemon.unlock_provider(&name, fds))
            .await
    }

    async fn unlock_provider_by_tpm(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<(), HostError> {
        self.run(Caller::Admin, move |daemon| daemon.unlock_by_tpm(&name, fds))
            .await
    }

    async fn enroll_tpm(
        &self,
        name: String,
        request: TpmRequest,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<TpmEnrolled, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.enroll_tpm(&name, &request, fds)
        })
        .await
    }

    async fn remove_tpm(&self, name: String) -> Result<TpmRemoved, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.remove_tpm(&name).map(|removed| TpmRemoved { removed })
        })
        .await
    }

    async fn backup_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<BackupMade, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.backup_provider(&name, fds))
            .await
    }

    async fn confirm_backup(&self, name: String, generation: i64) -> Result<(), HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.confirm_backup(&name, generation)
        })
        .await
    }

    async fn restore_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.restore_provider(&name, fds))
            .await
    }

    async fn set_provider_identity(
        &self,
        name: String,
        parts: IdentityParts,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<IdentitySet, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.set_provider_identity(&name, &parts, fds)
        })
        .await
    }

    async fn provider_signing_request(
        &self,
        name: String,
        new: Option<NewKey>,
    ) -> Result<SigningRequestMade, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.provider_signing_request(&name, new.as_ref())
        })
        .await
    }

    async fn provider_servers(&self, name: String) -> Result<Servers, HostError> {
        self.run(Caller::Reader, move |daemon| daemon.provider_servers(&name))
            .await
    }

    async fn trust_provider(
        &self,
        name: String,
        fingerprints: Vec<String>,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.trust_provider(&name, &fingerprints, fds)
        })
        .await
    }

    async fn start_job(&self, request: JobRequest) -> Result<JobStarted, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.start_job(&request))
            .await
    }

    async fn rotate_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<JobStarted, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.rotate_provider(&name, fds))
            .await
    }

    async fn list_jobs(&self) -> Result<Jobs, HostError> {
        self.run(Caller::Reader, Daemon::jobs).await
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
                Ok(()) => daemon.watch_job(id, &workers, report).await,
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
        self.run(Caller::Admin, move |daemon| {
            daemon.abort_job(id).map(|job| JobReport { job })
        })
        .await
    }

    async fn delete_provider(&self, name: String, typed: Option<String>) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.delete_provider(&name, typed.as_deref())
        })
        .await
    }

    async fn orphans(&self, after: Option<String>) -> Result<Orphans, HostError> {
        let age = self.age(after.as_deref());
        self.run(Caller::Reader, move |daemon| {
            daemon.orphans(age, after.as_deref())
        })
        .await
    }

    async fn preview_shred(&self, vm: String) -> Result<ShredPreview, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.preview_shred(&vm))
            .await
    }

    async fn shred_vm(
        &self,
        vm: String,
        typed: Option<String>,
        typed_for_keks: Option<String>,
    ) -> Result<Receipt, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.shred_vm(&vm, typed.as_deref(), typed_for_keks.as_deref())
        })
        .await
    }

    async fn backup_state(&self, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.backup_state(fds))
            .await
    }

    async fn forget_vm(&self, vm: String) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.forget_vm(&vm)).await
    }

    async fn adopt_forgotten(&self, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.adopt_forgotten(fds))
            .await
    }

    async fn show_audit(&self, records: i64, before: Option<i64>) -> Result<AuditLines, HostError> {
        self.run(Caller::Reader, move |daemon| daemon.show_audit(records, before))
            .await
    }

    async fn verify_audit(&self) -> Result<AuditVerified, HostError> {
        self.run(Caller::Reader, Daemon::verify_audit).await
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

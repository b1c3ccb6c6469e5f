//! The Varlink services: `io.virtseal.Lifecycle` for the hook, `io.virtseal.Host` for the CLI.
//!
//! Every connection has a server of its own, so one that waits never holds up another. Who calls is known from
//! the kernel (SO_PEERCRED): root may change things, the group may read. The work itself blocks and runs on
//! worker threads.

#![expect(missing_docs, reason = "the service macro makes public items without any")]

use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use nix::unistd::{Gid, Uid};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use zlink::service;
use zlink::tokio::unix;
use zlink::{Connection, Reply, Server};

use crate::api::{
    AuditLines, AuditVerified, BackupMade, CertificateView, CopyView, HostError, HostStatus, IdentityParts,
    IdentitySet, JobReport, JobRequest, JobStarted, JobView, Jobs, LifecycleError, NewKey, ObjectView,
    OrphanEnvelope, OrphanKek, Orphans, Outcome, PersistRequest, PersistView, ProviderView, Providers,
    Receipt, ReceiptLine, ServerView, Servers, SigningRequestMade, TpmEnrolled, TpmRemoved, VmView, Vms,
    VolumeProgress, VolumeRequest,
};
use crate::daemon::{Daemon, on_behalf_of};
use crate::domain::Domain;
use crate::failure::{Code, Failure};
use crate::lifecycle::Deadline;

/// Which socket a connection came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entrance {
    /// Root's alone, for starts.
    Hook,
    /// For everybody who may ask; an old hook.conf names it too.
    Main,
}

/// Accepts connections for ever. Must run inside a `LocalSet`.
pub async fn serve(listener: std::os::unix::net::UnixListener, entrance: Entrance, daemon: Arc<Daemon>) {
    let listener = listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener));
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, ?entrance, "its socket can't be used"),
    };
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::task::spawn_local(serve_one(stream, entrance, Arc::clone(&daemon)));
            }
            Err(error) => {
                // Out of descriptors, most likely: give the others time to end.
                tracing::warn!(%error, "can't accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_one(stream: UnixStream, entrance: Entrance, daemon: Arc<Daemon>) {
    let Ok(peer) = stream.as_fd().try_clone_to_owned() else {
        return;
    };
    let Ok(socket) = unix::Stream::try_from(stream) else {
        return;
    };
    let mut connection = Connection::new(socket);
    let (caller, uid) = match connection.peer_credentials().await {
        Ok(credentials) => {
            let uid = Uid::from_raw(credentials.unix_user_id().as_raw());
            let groups = std::iter::once(credentials.unix_primary_group_id())
                .chain(credentials.unix_supplementary_group_ids().iter().copied())
                .map(|gid| Gid::from_raw(gid.as_raw()));
            (Caller::of(uid, groups, || daemon.reader_group()), uid)
        }
        Err(error) => {
            // It has hung up already, as probes do.
            tracing::debug!(%error, "can't tell who connected");
            return;
        }
    };
    if entrance == Entrance::Hook && caller != Caller::Admin {
        return tracing::warn!(uid = uid.as_raw(), "turned away from the hook's socket");
    }
    let accepted = Accepted(Some(connection), false);
    if let Err(error) = Server::new(
        accepted,
        Service {
            daemon,
            caller,
            uid,
            peer: Arc::new(peer),
        },
    )
    .run()
    .await
    {
        tracing::debug!(%error, "connection ended");
    }
}

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Caller {
    Admin,
    Reader,
    Stranger,
}

impl Caller {
    /// Looks the readers' group up only for those it matters to: that can take longer than a hook's whole call.
    fn of(uid: Uid, mut groups: impl Iterator<Item = Gid>, readers: impl FnOnce() -> Option<Gid>) -> Self {
        if uid.is_root() || uid == Uid::effective() {
            return Self::Admin;
        }
        match readers() {
            Some(readers) if groups.any(|gid| gid == readers) => Self::Reader,
            _ => Self::Stranger,
        }
    }

    fn may(self, needed: Self) -> Result<(), Failure> {
        match (self, needed) {
            (Self::Admin, _) | (Self::Reader, Self::Reader) => Ok(()),
            _ => Err(Failure::new(Code::Denied, "only root may do this").next("run it as root, with sudo")),
        }
    }
}

/// Hands one connection to its server, then no more.
#[derive(Debug)]
struct Accepted(Option<Connection<unix::Stream>>, bool);

impl zlink::Listener for Accepted {
    type Socket = unix::Stream;

    async fn accept(&mut self) -> zlink::Result<Option<Connection<Self::Socket>>> {
        if let Some(connection) = self.0.take() {
            return Ok(Some(connection));
        }
        if !std::mem::replace(&mut self.1, true) {
            return Ok(None);
        }
        std::future::pending().await
    }
}

struct Service {
    daemon: Arc<Daemon>,
    caller: Caller,
    /// Who it is, for the audit log.
    uid: Uid,
    /// The connection, to be asked whether anybody is still there.
    peer: Arc<OwnedFd>,
}

impl Service {
    /// Runs `work` on a worker thread, if the caller may.
    async fn run<T: Send + 'static>(
        &self,
        needed: Caller,
        work: impl FnOnce(&Daemon) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, HostError> {
        self.caller.may(needed)?;
        self.daemon.note_call();
        let (daemon, uid) = (Arc::clone(&self.daemon), self.uid.as_raw());
        match tokio::task::spawn_blocking(move || on_behalf_of(uid, || work(&daemon))).await {
            Ok(result) => result.map_err(HostError::from),
            Err(error) => Err(Failure::new(Code::Failed, format!("virtseald failed: {error}"))
                .next("see its log: journalctl -u virtseald")
                .into()),
        }
    }

    /// Runs `work` for a hook, with its deadline; `subject` names the VM if that passes.
    async fn hook<T: Send + 'static>(
        &self,
        subject: impl FnOnce() -> String,
        work: impl FnOnce(&Daemon, &Deadline) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, LifecycleError> {
        let time = self.daemon.hook_deadline();
        let deadline = Deadline::after(time).or_hangup_of(Arc::clone(&self.peer));
        let run = self.run(Caller::Admin, move |daemon| work(daemon, &deadline));
        let outcome = match tokio::time::timeout(time, run).await {
            Ok(outcome) => outcome.map_err(Failure::from),
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
    async fn prepare(&self, xml: String) -> Result<(), LifecycleError> {
        let copy = xml.clone();
        let subject =
            || Domain::parse(&xml).map_or_else(|_| "the VM".into(), |domain| domain.name) + " stays off";
        self.hook(subject, move |daemon, deadline| daemon.prepare(&copy, deadline))
            .await
    }

    /// A VM runs: disarms its DEKs.
    async fn started(&self, vm: String, name: String) -> Result<(), LifecycleError> {
        let subject = name.clone();
        self.hook(|| subject, move |daemon, _| daemon.started(&vm, &name))
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
            ProviderView, PersistView, PersistRequest, CertificateView, ServerView, IdentityParts, NewKey, ObjectView, VmView, VolumeRequest,
            JobRequest, JobView, CopyView, OrphanEnvelope, OrphanKek, ReceiptLine
        ]
    )]
    async fn status(&self) -> Result<HostStatus, HostError> {
        self.run(Caller::Reader, Daemon::status).await
    }

    async fn vm_status(&self, vm: Option<String>) -> Result<Vms, HostError> {
        self.run(Caller::Reader, move |daemon| daemon.vm_status(vm.as_deref()))
            .await
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

    async fn unseal_vm(&self, vm: String, dry_run: bool) -> Result<Outcome, HostError> {
        self.run(Caller::Admin, move |daemon| daemon.unseal_vm(&vm, dry_run))
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
        tokio::task::spawn_blocking(move || {
            // A client that went away ends the work: `report` says so.
            let report = |step: VolumeProgress| {
                let last = step.envelope.is_some();
                let reply = Reply::new(Some(step)).set_continues(Some(!last));
                let wanted = more || last;
                !wanted || sender.blocking_send(Ok(reply)).is_ok()
            };
            let create = || daemon.create_volume(&request, report);
            if let Err(failure) = allowed.and_then(|()| on_behalf_of(uid, create)) {
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
        self.run(Caller::Admin, move |daemon| daemon.lock_provider(&name))
            .await
    }

    async fn unlock_provider(&self, name: String, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<(), HostError> {
        self.run(Caller::Admin, move |daemon| daemon.unlock_provider(&name, fds))
            .await
    }

    async fn unlock_provider_by_tpm(&self, name: String) -> Result<(), HostError> {
        self.run(Caller::Admin, move |daemon| daemon.unlock_by_tpm(&name))
            .await
    }

    async fn enroll_tpm(&self, name: String, pcrs: Option<String>) -> Result<TpmEnrolled, HostError> {
        self.run(Caller::Admin, move |daemon| {
            let pcrs = daemon.enroll_tpm(&name, pcrs.as_deref())?;
            Ok(TpmEnrolled {
                pcrs: pcrs.to_string(),
            })
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
        let (sender, receiver) = mpsc::channel(8);
        let daemon = Arc::clone(&self.daemon);
        let allowed = self.caller.may(Caller::Reader);
        tokio::task::spawn_blocking(move || {
            let report = |job: JobView, last: bool| {
                let reply = Reply::new(Some(JobReport { job })).set_continues(Some(!last));
                let wanted = more || last;
                !sender.is_closed() && (!wanted || sender.blocking_send(Ok(reply)).is_ok())
            };
            if let Err(failure) = allowed.and_then(|()| daemon.watch_job(id, report)) {
                // Nobody is left to be told when this fails.
                let _ = sender.blocking_send(Err(failure.into()));
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

    async fn orphans(&self) -> Result<Orphans, HostError> {
        self.run(Caller::Reader, Daemon::orphans).await
    }

    async fn shred_vm(&self, vm: String, typed: Option<String>) -> Result<Receipt, HostError> {
        self.run(Caller::Admin, move |daemon| {
            daemon.shred_vm(&vm, typed.as_deref())
        })
        .await
    }

    async fn show_audit(&self, records: i64) -> Result<AuditLines, HostError> {
        self.run(Caller::Reader, move |daemon| daemon.show_audit(records))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_changes_the_group_reads_others_nothing() {
        let group = Some(Gid::from_raw(77));
        let of = |uid, gid| Caller::of(Uid::from_raw(uid), std::iter::once(Gid::from_raw(gid)), || group);
        assert_eq!(of(0, 0), Caller::Admin);
        assert_eq!(of(54321, 77), Caller::Reader);
        assert_eq!(of(54321, 78), Caller::Stranger);
        assert!(Caller::Reader.may(Caller::Reader).is_ok());
        assert_eq!(Caller::Reader.may(Caller::Admin).unwrap_err().code, Code::Denied);
        assert_eq!(
            Caller::Stranger.may(Caller::Reader).unwrap_err().code,
            Code::Denied
        );
        assert_eq!(
            Caller::of(Uid::from_raw(54321), std::iter::once(Gid::from_raw(0)), || None),
            Caller::Stranger
        );
    }
}

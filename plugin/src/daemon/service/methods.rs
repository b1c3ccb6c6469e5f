//! What the two services are asked, and what answers.

use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::Stream;
use tokio::sync::mpsc;
use tokio::task::spawn_local;
use zlink::idl::Interface;
use zlink::{Reply, service};

use super::{
    Service, autostart, cache, job, provider, provider_view, rotate, settings, snapshot, state, status, tpm,
    trust, vm, volume,
};
use crate::api::{
    AuditLines, AuditVerified, BackupMade, CertificateView, Changed, CopyView, CredentialKind, DefaultSet,
    DetailView, DiskFormat, FindingView, HostError, HostStatus, IdentityParts, IdentitySet, ImageStructure,
    JobKind, JobReport, JobRequest, JobStarted, JobState, JobView, Jobs, KekOrigin, KeystoreCopy,
    LibvirtState, LifecycleError, LossPreview, NewKey, ObjectStanding, ObjectView, ObstacleView,
    OrphanEnvelope, OrphanKek, Orphans, Outcome, PersistRequest, PersistView, PersistedBy, ProblemView,
    ProviderKind, ProviderState, ProviderView, Providers, ProvidersChanged, Receipt, ReceiptLine, ServerView,
    Servers, SettingAssigned, SettingView, SettingsRequest, SettingsSet, Severity, ShredPreview,
    SigningRequestMade, SnapshotAct, StartOutlook, StartView, StepView, SubjectKind, SubjectView, SweepKind,
    TpmEnrolled, TpmRequest, TpmView, Unit, VmAutostart, VmPower, VmState, VmView, Vms, VolumeChecked,
    VolumeCreated, VolumeRequest,
};
use crate::daemon::caller::Caller;
use crate::daemon::state::Daemon;
use crate::daemon::{HookPolicy, first_runs, records};
use crate::domain::{DeclaredFormat, Domain};
use crate::model::act::{StepCode, Tense};
use crate::model::cache_policy::CachePolicy;
use crate::model::envelope::{CopyPlace, ObjectKind};
use crate::model::finding::FindingCode;
use crate::model::subject::Subject;
use crate::vm::adopt::Formats;
use crate::vm::share::Sharing;
use crate::vm::snapshot::Choices;

/// What the CLI calls, as it is described to whoever asks for a description.
pub(in crate::daemon) fn host_interface() -> &'static Interface<'static> {
    __Service_INTERFACE_1
}

#[service(
    vendor = "virtseal",
    product = "virtseald",
    version = env!("CARGO_PKG_VERSION"),
    url = ""
)]
impl Service {
    /// A VM is about to start: arms its DEKs, or refuses. `master_key_on_disk` says why QEMU's master key is not kept off the disk.
    #[zlink(interface = "io.virtseal.Lifecycle")]
    async fn prepare(
        &self,
        xml: String,
        require_sealed: Option<bool>,
        master_key_on_disk: Option<String>,
    ) -> Result<(), LifecycleError> {
        let copy = xml.clone();
        let subject =
            || Domain::parse(&xml).map_or_else(|_| "the VM".into(), |domain| domain.name) + " stays off";
        let policy = match require_sealed {
            Some(true) => HookPolicy::RequireSealed,
            Some(false) | None => HookPolicy::Any,
        };
        self.hook(subject, move |daemon, by, deadline| {
            daemon.prepare(by, &copy, policy, master_key_on_disk.as_deref(), deadline)
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
            LibvirtState, ProviderView, ProviderKind, ProviderState, CredentialKind, SettingView, DetailView, SettingAssigned, SettingsRequest, PersistView, PersistedBy, PersistRequest, TpmView, TpmRequest, CertificateView, ServerView, IdentityParts, NewKey, ObjectStanding, ObjectView, Severity, SubjectKind, SubjectView, FindingCode, FindingView, StepCode, StepView, StartOutlook, StartView, VmAutostart, VmPower, VmState, VmView, VolumeRequest, DeclaredFormat, DiskFormat, KeystoreCopy, ImageStructure,
            JobRequest, SweepKind, SnapshotAct, JobView, JobKind, JobState, ProblemView, ObstacleView, Unit, CopyView, CopyPlace, OrphanEnvelope, ObjectKind, OrphanKek, KekOrigin, ReceiptLine
        ]
    )]
    async fn status(&self, after: Option<String>) -> Result<HostStatus, HostError> {
        let (age, room) = (self.age(after.as_deref()), self.room());
        self.show(None, move |daemon| {
            status::status(daemon, age, after.as_deref(), room)
        })
        .await
    }

    async fn vm_status(&self, vm: Option<String>, after: Option<String>) -> Result<Vms, HostError> {
        let (age, room) = (self.age(after.as_deref()), self.room());
        let about = vm.clone().map(Subject::Vm);
        let work =
            move |daemon: &Daemon| status::vm_status(daemon, vm.as_deref(), age, after.as_deref(), room);
        self.show(about, work).await
    }

    async fn seal_vm(
        &self,
        vm: String,
        provider: Option<String>,
        formats: Option<Vec<DiskFormat>>,
        replace: Option<Vec<String>>,
        dry_run: bool,
    ) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            let confirmed = vm::Confirmed {
                formats: &formats.unwrap_or_default(),
                replace: &replace.unwrap_or_default(),
            };
            vm::seal(
                daemon,
                by,
                &vm,
                provider.as_deref(),
                &confirmed,
                tense_of(dry_run),
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
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            vm::adopt(daemon, by, &vm, formats)
        })
        .await
    }

    async fn unseal_vm(&self, vm: String, dry_run: bool) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            vm::unseal(daemon, by, &vm, tense_of(dry_run))
        })
        .await
    }

    async fn enable_autostart(&self, vm: String) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            autostart::enable(daemon, by, &vm)
        })
        .await
    }

    async fn disable_autostart(&self, vm: String) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            autostart::disable(daemon, by, &vm)
        })
        .await
    }

    async fn share_volume(&self, path: String, vm: String) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Image(path.clone())), move |daemon, by| {
            volume::share(daemon, by, &path, &vm, Sharing::With)
        })
        .await
    }

    async fn unshare_volume(&self, path: String, vm: String) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Image(path.clone())), move |daemon, by| {
            volume::share(daemon, by, &path, &vm, Sharing::Without)
        })
        .await
    }

    async fn forget_volume(&self, volume: String, typed: Option<String>) -> Result<Outcome, HostError> {
        let about = (volume.starts_with('/')).then(|| Subject::Image(volume.clone()));
        self.change(about, move |daemon, by| {
            volume::forget(daemon, by, &volume, typed.as_deref())
        })
        .await
    }

    async fn adopt_volume(&self, path: String) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Image(path.clone())), move |daemon, by| {
            volume::adopt(daemon, by, &path)
        })
        .await
    }

    async fn check_volume(&self, path: String) -> Result<VolumeChecked, HostError> {
        let about = Some(Subject::Image(path.clone()));
        self.change(about, move |daemon, _| volume::check(daemon, &path))
            .await
    }

    async fn resize_volume(
        &self,
        path: String,
        size: u64,
        typed: Option<String>,
    ) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Image(path.clone())), move |daemon, by| {
            volume::resize(daemon, by, &path, size, typed.as_deref())
        })
        .await
    }

    async fn create_volume(&self, request: VolumeRequest) -> Result<VolumeCreated, HostError> {
        self.change(Some(Subject::Image(request.path.clone())), move |daemon, by| {
            volume::create(daemon, by, &request)
        })
        .await
    }

    async fn list_providers(&self) -> Result<Providers, HostError> {
        self.show(None, provider_view::list).await
    }

    async fn add_provider(
        &self,
        name: String,
        kind: ProviderKind,
        settings: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            provider::add(daemon, by, &name, kind, &settings, fds)
        })
        .await
    }

    async fn set_provider_cache(
        &self,
        name: String,
        policy: CachePolicy,
        persist: Option<PersistRequest>,
    ) -> Result<ProvidersChanged, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            cache::set(daemon, by, &name, policy, persist.as_ref())
        })
        .await
    }

    async fn set_provider(
        &self,
        name: String,
        request: SettingsRequest,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<SettingsSet, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            settings::set(daemon, by, &name, &request, fds)
        })
        .await
    }

    async fn set_default_provider(&self, name: String) -> Result<DefaultSet, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            provider::set_default(daemon, by, &name)
        })
        .await
    }

    async fn lock_provider(&self, name: String) -> Result<Changed, HostError> {
        let about = Some(Subject::Provider(name.clone()));
        let work = move |daemon: &Daemon, by| provider::lock(daemon, by, &name);
        self.change_on(&self.pools.lock, about, work).await
    }

    async fn unlock_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Changed, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            provider::unlock(daemon, by, &name, fds)
        })
        .await
    }

    async fn unlock_provider_by_tpm(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Changed, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            provider::unlock_by_tpm(daemon, by, &name, fds)
        })
        .await
    }

    async fn enroll_tpm(
        &self,
        name: String,
        request: TpmRequest,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<TpmEnrolled, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            tpm::enroll(daemon, by, &name, &request, fds)
        })
        .await
    }

    async fn remove_tpm(&self, name: String) -> Result<Changed, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            tpm::remove(daemon, by, &name)
        })
        .await
    }

    async fn backup_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<BackupMade, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, _| {
            provider::backup(daemon, &name, fds)
        })
        .await
    }

    async fn confirm_backup(&self, name: String, generation: i64) -> Result<(), HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            provider::confirm_backup(daemon, by, &name, generation)
        })
        .await
    }

    async fn restore_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<Providers, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            provider::restore(daemon, by, &name, fds)
        })
        .await
    }

    async fn set_provider_identity(
        &self,
        name: String,
        parts: IdentityParts,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<IdentitySet, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            trust::set_identity(daemon, by, &name, &parts, fds)
        })
        .await
    }

    async fn provider_signing_request(
        &self,
        name: String,
        new: Option<NewKey>,
    ) -> Result<SigningRequestMade, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            trust::signing_request(daemon, by, &name, new.as_ref())
        })
        .await
    }

    async fn provider_servers(&self, name: String) -> Result<Servers, HostError> {
        self.show(Some(Subject::Provider(name.clone())), move |daemon| {
            trust::servers(daemon, &name)
        })
        .await
    }

    async fn trust_provider(
        &self,
        name: String,
        fingerprints: Vec<String>,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<ProvidersChanged, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            trust::trust(daemon, by, &name, &fingerprints, fds)
        })
        .await
    }

    async fn start_job(&self, request: JobRequest) -> Result<JobStarted, HostError> {
        self.change(about(&request), move |daemon, by| {
            job::start(daemon, by, &request)
        })
        .await
    }

    async fn rotate_provider(
        &self,
        name: String,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> Result<JobStarted, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            rotate::rotate(daemon, by, &name, fds)
        })
        .await
    }

    async fn list_jobs(&self) -> Result<Jobs, HostError> {
        self.show(None, job::list).await
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
                let failure = match id {
                    Some(id) => failure.about(Subject::Job(id)),
                    None => failure,
                };
                let _ = sender.send(Err(failure.into())).await;
            }
        });
        Replies(receiver)
    }

    async fn abort_job(&self, id: Option<i64>) -> Result<JobReport, HostError> {
        self.change(id.map(Subject::Job), move |daemon, by| {
            job::abort(daemon, by, id).map(|job| JobReport { job })
        })
        .await
    }

    async fn resume_job(&self, id: i64) -> Result<JobStarted, HostError> {
        self.change(Some(Subject::Job(id)), move |daemon, by| {
            job::resume(daemon, by, id)
        })
        .await
    }

    async fn delete_provider(&self, name: String, typed: Option<String>) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Provider(name.clone())), move |daemon, by| {
            provider::delete(daemon, by, &name, typed.as_deref())
        })
        .await
    }

    async fn orphans(&self, after: Option<String>) -> Result<Orphans, HostError> {
        let age = self.age(after.as_deref());
        self.show(None, move |daemon| {
            provider::orphans(daemon, age, after.as_deref())
        })
        .await
    }

    async fn preview_shred(&self, vm: String) -> Result<ShredPreview, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, _| {
            vm::preview_shred(daemon, &vm)
        })
        .await
    }

    async fn shred_vm(
        &self,
        vm: String,
        typed: Option<String>,
        typed_for_keks: Option<String>,
    ) -> Result<Receipt, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            vm::shred(daemon, by, &vm, typed.as_deref(), typed_for_keks.as_deref())
        })
        .await
    }

    async fn preview_nvram_reset(&self, vm: String) -> Result<LossPreview, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, _| {
            vm::preview_nvram_reset(daemon, &vm)
        })
        .await
    }

    async fn reset_nvram(&self, vm: String, typed: Option<String>) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            vm::reset_nvram(daemon, by, &vm, typed.as_deref())
        })
        .await
    }

    async fn preview_snapshot(
        &self,
        vm: String,
        act: SnapshotAct,
        keep: bool,
        force: Option<bool>,
    ) -> Result<LossPreview, HostError> {
        let force = force.unwrap_or_default();
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, _| {
            snapshot::preview(daemon, &vm, act, Choices { keep, force })
        })
        .await
    }

    async fn begin_snapshot(
        &self,
        vm: String,
        act: SnapshotAct,
        keep: bool,
        force: Option<bool>,
        typed: Option<String>,
    ) -> Result<JobStarted, HostError> {
        let force = force.unwrap_or_default();
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            snapshot::begin(daemon, by, &vm, act, Choices { keep, force }, typed.as_deref())
        })
        .await
    }

    async fn backup_state(&self, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Host), move |daemon, by| {
            state::backup(daemon, by, fds)
        })
        .await
    }

    async fn forget_vm(&self, vm: String) -> Result<Outcome, HostError> {
        self.change(Some(Subject::Vm(vm.clone())), move |daemon, by| {
            vm::forget(daemon, by, &vm)
        })
        .await
    }

    async fn adopt_forgotten(&self, #[zlink(fds)] fds: Vec<OwnedFd>) -> Result<Outcome, HostError> {
        self.change(None, move |daemon, by| vm::adopt_forgotten(daemon, by, fds))
            .await
    }

    async fn show_audit(&self, records: i64, before: Option<i64>) -> Result<AuditLines, HostError> {
        self.show(Some(Subject::Host), move |daemon| {
            records::show(daemon, records, before)
        })
        .await
    }

    async fn verify_audit(&self) -> Result<AuditVerified, HostError> {
        self.show(Some(Subject::Host), records::verify).await
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

/// What a job that is not there yet would be about.
fn tense_of(dry_run: bool) -> Tense {
    if dry_run { Tense::Planned } else { Tense::Done }
}

fn about(request: &JobRequest) -> Option<Subject> {
    let vm = request.vm.clone().map(Subject::Vm);
    vm.or_else(|| request.provider.clone().map(Subject::Provider))
}

//! What travels over the socket between virtseald and its clients: the types of the Varlink interface
//! `io.virtseal.Host`, and the proxy that the CLI calls.
//!
//! No type here holds a key. Passphrases and backups travel as file descriptors beside a call.

mod finding;
mod job;
mod outcome;
pub(crate) mod pages;
mod problem;
mod provider;
mod trust;
mod vm;
mod volume;
mod word;

use std::os::fd::OwnedFd;

use futures_util::Stream;
use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, ReplyError as IntrospectError, Type};
use zlink::{ReplyError, proxy};

use crate::model::cache_policy::CachePolicy;
use crate::model::problem::Problem;

pub(crate) use crate::model::finding::Severity;
pub(crate) use finding::FindingView;
pub(crate) use job::{
    CopyView, JobKind, JobReport, JobRequest, JobStarted, JobState, JobView, Jobs, SnapshotAct, SweepKind,
    Unit, VolumeCreated, VolumeRequest,
};
pub(crate) use outcome::{LossPreview, ObstacleView, Outcome, StepView};
pub(crate) use problem::{ProblemView, SubjectKind, SubjectView, of_another_version};
pub(crate) use provider::{
    BackupMade, Changed, CredentialKind, DefaultSet, DetailView, KekOrigin, OrphanEnvelope, OrphanKek,
    Orphans, PersistRequest, PersistView, PersistedBy, ProviderKind, ProviderState, ProviderView, Providers,
    ProvidersChanged, SettingAssigned, SettingView, SettingsRequest, SettingsSet, TpmEnrolled, TpmRequest,
    TpmView,
};
pub(crate) use trust::{
    CertificateView, IdentityParts, IdentitySet, NewKey, ServerView, Servers, SigningRequestMade,
};
pub(crate) use vm::{
    DiskFormat, ObjectStanding, ObjectView, Receipt, ReceiptLine, ShredPreview, StartOutlook, StartView,
    VmAutostart, VmPower, VmState, VmView, Vms,
};
pub(crate) use volume::{ImageStructure, KeystoreCopy, VolumeChecked};
pub(crate) use word::{OrNewer, words};

/// Whether virtseald has its connection to libvirt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum LibvirtState {
    Connected,
    NotConnected,
}

/// Reply of `virtseal status`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct HostStatus {
    /// Of virtseald.
    pub version: String,
    pub libvirt: OrNewer<LibvirtState>,
    /// Why it is not connected.
    pub libvirt_problem: Option<String>,
    pub libvirt_uri: String,
    pub providers: Vec<ProviderView>,
    /// The sealed VMs, or a page of them.
    pub vms: Vec<VmView>,
    /// What to ask for the VMs after these, if there are more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(skip))]
    pub next_vms: Option<String>,
    /// How many secrets are in libvirt at this moment.
    pub armed: i64,
    /// What was found wrong with the audit log since virtseald started.
    pub audit: Option<String>,
    /// What the admin should know of this host: records of the keystore that can't be read, settings that name what is not here.
    pub warnings: Vec<FindingView>,
}

/// Reply of `audit show`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub(crate) struct AuditLines {
    /// JSON, a record a line, the oldest first.
    pub lines: Vec<String>,
    /// What to ask for those before these, if there are any.
    pub before: Option<i64>,
}

/// Reply of `audit verify`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct AuditVerified {
    /// How many records the chain holds.
    pub records: i64,
    /// SHA-256 of the last one, in hex: kept elsewhere, it shows later that nothing before it was rewritten.
    pub head: String,
}

/// Why a method of `io.virtseal.Host` failed.
#[derive(Clone, Debug, PartialEq, ReplyError, IntrospectError)]
#[zlink(interface = "io.virtseal.Host")]
pub(crate) enum HostError {
    /// See [`Problem`].
    Failed {
        /// The exit code that the CLI should end with.
        code: i64,
        /// What happened, and to which object.
        message: String,
        /// What it is about, where that is one thing.
        object: Option<Box<SubjectView>>,
        /// The next command to run.
        next: Option<String>,
    },
}

impl From<Problem> for HostError {
    fn from(failure: Problem) -> Self {
        let ProblemView {
            code,
            message,
            object,
            next,
        } = ProblemView::from(&failure);
        Self::Failed {
            code,
            message,
            object,
            next,
        }
    }
}

impl From<HostError> for Problem {
    fn from(error: HostError) -> Self {
        let HostError::Failed {
            code,
            message,
            object,
            next,
        } = error;
        ProblemView {
            code,
            message,
            object,
            next,
        }
        .into()
    }
}

/// Why a start is refused.
#[derive(Clone, Debug, PartialEq, ReplyError, IntrospectError)]
#[zlink(interface = "io.virtseal.Lifecycle")]
pub(crate) enum LifecycleError {
    /// One line: the VM, the object, the provider, the reason and the next command.
    Refused {
        /// That line.
        message: String,
    },
}

/// `io.virtseal.Host`, as the CLI calls it.
#[proxy("io.virtseal.Host")]
pub(crate) trait HostProxy {
    /// Everything at a glance, at most two seconds old; `after` is what the page before has in `next_vms`.
    async fn status(&mut self, after: Option<&str>) -> zlink::Result<Result<HostStatus, HostError>>;
    /// The objects of one VM as it is now, or those of all sealed ones as `status` has them.
    async fn vm_status(
        &mut self,
        vm: Option<&str>,
        after: Option<&str>,
    ) -> zlink::Result<Result<Vms, HostError>>;
    /// Seals a defined, stopped VM. `formats` confirms what its XML declares of disks. `replace` names what may be made
    /// anew because it is lost: `nvram`, `vtpm`, the target of a disk.
    async fn seal_vm(
        &mut self,
        vm: &str,
        provider: Option<&str>,
        formats: Option<&[DiskFormat]>,
        replace: Option<&[String]>,
        dry_run: bool,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// Makes a VM plain again that never ran sealed.
    async fn unseal_vm(&mut self, vm: &str, dry_run: bool) -> zlink::Result<Result<Outcome, HostError>>;
    /// Takes over the envelopes that came with a VM; those of format 1 only if told so.
    async fn adopt_vm(&mut self, vm: &str, format_1: bool) -> zlink::Result<Result<Outcome, HostError>>;
    /// Starts a sealed VM with the host, in libvirt's place.
    async fn enable_autostart(&mut self, vm: &str) -> zlink::Result<Result<Outcome, HostError>>;
    /// Leaves it off then.
    async fn disable_autostart(&mut self, vm: &str) -> zlink::Result<Result<Outcome, HostError>>;
    /// Lets a VM have the volume at `path`, which is another's.
    async fn share_volume(&mut self, path: &str, vm: &str) -> zlink::Result<Result<Outcome, HostError>>;
    /// Takes that back.
    async fn unshare_volume(&mut self, path: &str, vm: &str) -> zlink::Result<Result<Outcome, HostError>>;
    /// Drops the envelope of a volume, named by its path or the envelope's UUID, whose image is gone; of another one only if the
    /// name of its VM was `typed`. A file brings it back.
    async fn forget_volume(
        &mut self,
        volume: &str,
        typed: Option<&str>,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// Takes over the envelope of an image that this host does not know.
    async fn adopt_volume(&mut self, path: &str) -> zlink::Result<Result<Outcome, HostError>>;
    /// Whether an image is whole, opens, and carries what the keystore has.
    async fn check_volume(&mut self, path: &str) -> zlink::Result<Result<VolumeChecked, HostError>>;
    /// Gives a volume another size in bytes, of a VM that runs too; a smaller one only if the name of its VM was `typed`.
    async fn resize_volume(
        &mut self,
        path: &str,
        size: u64,
        typed: Option<&str>,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// Makes an encrypted volume, or starts the job that makes one with the data of another image.
    async fn create_volume(
        &mut self,
        request: &VolumeRequest,
    ) -> zlink::Result<Result<VolumeCreated, HostError>>;
    async fn list_providers(&mut self) -> zlink::Result<Result<Providers, HostError>>;
    /// Adds a provider; `settings` is the JSON of what its kind needs to know, never a secret; `fds` holds its
    /// passphrase or PIN.
    async fn add_provider(
        &mut self,
        name: &str,
        kind: ProviderKind,
        settings: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<Providers, HostError>>;
    /// Keeps its KEKs in memory for that long: none, until-lock, or a time such as 4h; and on disk, sealed by the TPM, if there
    /// is a `persist`. What was on disk goes.
    async fn set_provider_cache(
        &mut self,
        name: &str,
        policy: CachePolicy,
        persist: Option<PersistRequest>,
    ) -> zlink::Result<Result<ProvidersChanged, HostError>>;
    /// Has it work by other settings, once they were tried; `fds` holds what to log in with then, if that changes.
    async fn set_provider(
        &mut self,
        name: &str,
        request: &SettingsRequest,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<SettingsSet, HostError>>;
    /// Makes new envelopes go to this provider.
    async fn set_default_provider(&mut self, name: &str) -> zlink::Result<Result<DefaultSet, HostError>>;
    /// Purges its keys from memory.
    async fn lock_provider(&mut self, name: &str) -> zlink::Result<Result<Changed, HostError>>;
    /// Unlocks it; `fds` holds what it asks for, if anything.
    async fn unlock_provider(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<Changed, HostError>>;
    /// Unlocks it by the TPM of this host; `fds` holds the PIN, if it needs one.
    async fn unlock_provider_by_tpm(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<Changed, HostError>>;
    /// Lets the TPM of this host open it; `fds` holds the PIN that it is to ask for, if any.
    async fn enroll_tpm(
        &mut self,
        name: &str,
        request: &TpmRequest,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<TpmEnrolled, HostError>>;
    /// Takes that away again.
    async fn remove_tpm(&mut self, name: &str) -> zlink::Result<Result<Changed, HostError>>;
    /// Writes a backup to the first of `fds`, encrypted with the passphrase in the second if there is one.
    async fn backup_provider(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<BackupMade, HostError>>;
    /// Says that the backup is safely on disk.
    async fn confirm_backup(&mut self, name: &str, generation: i64) -> zlink::Result<Result<(), HostError>>;
    /// Restores a provider; `fds` holds the backup, the new passphrase, and the backup's own if it has one.
    async fn restore_provider(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<Providers, HostError>>;
    /// How this host shows itself to the provider's servers from now on.
    async fn set_provider_identity(
        &mut self,
        name: &str,
        parts: &IdentityParts,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<IdentitySet, HostError>>;
    /// The signing request that waits for its certificate; makes one if there is none, or with `new`.
    async fn provider_signing_request(
        &mut self,
        name: &str,
        new: Option<&NewKey>,
    ) -> zlink::Result<Result<SigningRequestMade, HostError>>;
    /// The certificates that the provider's servers show now.
    async fn provider_servers(&mut self, name: &str) -> zlink::Result<Result<Servers, HostError>>;
    /// Trusts servers with one of these SHA-256 fingerprints or, without any, signed by the CA in `fds`.
    async fn trust_provider(
        &mut self,
        name: &str,
        fingerprints: &[String],
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<ProvidersChanged, HostError>>;
    /// Starts a sweep.
    async fn start_job(&mut self, request: &JobRequest) -> zlink::Result<Result<JobStarted, HostError>>;
    /// Retires the keys in use of a provider and starts the job that leaves them; `fds` holds the passphrase of a native one.
    async fn rotate_provider(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<JobStarted, HostError>>;
    /// The last jobs, and the copies that are behind.
    async fn list_jobs(&mut self) -> zlink::Result<Result<Jobs, HostError>>;
    /// Follows a job, or the only one that runs, until it ends.
    #[zlink(more)]
    async fn watch_job(
        &mut self,
        id: Option<i64>,
    ) -> zlink::Result<impl Stream<Item = zlink::Result<Result<JobReport, HostError>>>>;
    /// Ends a job, or the only one that runs, where it is.
    async fn abort_job(&mut self, id: Option<i64>) -> zlink::Result<Result<JobReport, HostError>>;
    /// Starts a job that has ended once more.
    async fn resume_job(&mut self, id: i64) -> zlink::Result<Result<JobStarted, HostError>>;
    /// Deletes a provider that nothing needs, or one whose name was typed.
    async fn delete_provider(
        &mut self,
        name: &str,
        typed: Option<&str>,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// Envelopes and KEKs that no VM uses; `after` is what the page before has in `next`.
    async fn orphans(&mut self, after: Option<&str>) -> zlink::Result<Result<Orphans, HostError>>;
    /// What `reset_nvram` asks a word for. Changes nothing.
    async fn preview_nvram_reset(&mut self, vm: &str) -> zlink::Result<Result<LossPreview, HostError>>;
    /// Makes the UEFI variables of a VM anew whose name was `typed`; a copy of the old ones stays.
    async fn reset_nvram(
        &mut self,
        vm: &str,
        typed: Option<&str>,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// What `begin_snapshot` asks a word for. Changes nothing.
    async fn preview_snapshot(
        &mut self,
        vm: &str,
        act: SnapshotAct,
        keep: bool,
        force: Option<bool>,
    ) -> zlink::Result<Result<LossPreview, HostError>>;
    /// Starts the job that ends the plain overlays of a VM; one that may lose something only if its name was `typed`. They are to
    /// `keep` their files or not; `force` does it where nobody knows which image is newer.
    async fn begin_snapshot(
        &mut self,
        vm: &str,
        act: SnapshotAct,
        keep: bool,
        force: Option<bool>,
        typed: Option<&str>,
    ) -> zlink::Result<Result<JobStarted, HostError>>;
    /// What `shred_vm` asks a word for. Changes nothing.
    async fn preview_shred(&mut self, vm: &str) -> zlink::Result<Result<ShredPreview, HostError>>;
    /// Destroys all keys of a VM whose name was typed; those at a provider of one that is not defined here only if it was typed
    /// for them, too.
    async fn shred_vm(
        &mut self,
        vm: &str,
        typed: Option<&str>,
        typed_for_keks: Option<&str>,
    ) -> zlink::Result<Result<Receipt, HostError>>;
    /// Writes a backup of the whole state to the first of `fds`, encrypted by the passphrase in the second.
    async fn backup_state(
        &mut self,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// Drops the records of a VM that is not defined here, after they were kept in a file.
    async fn forget_vm(&mut self, vm: &str) -> zlink::Result<Result<Outcome, HostError>>;
    /// Takes back what is in the file in `fds`.
    async fn adopt_forgotten(
        &mut self,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// The last records of the audit log, or the last of those `before` the ones that the page before has.
    async fn show_audit(
        &mut self,
        records: i64,
        before: Option<i64>,
    ) -> zlink::Result<Result<AuditLines, HostError>>;
    /// Checks the audit log's chain.
    async fn verify_audit(&mut self) -> zlink::Result<Result<AuditVerified, HostError>>;
}

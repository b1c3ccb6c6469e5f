//! What travels over the socket between virtseald and its clients: the types of the Varlink interface
//! `io.virtseal.Host`, and the proxy that the CLI calls.
//!
//! No type here holds a key. Passphrases and backups travel as file descriptors beside a call.

use std::os::fd::OwnedFd;

use futures_util::Stream;
use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, ReplyError as IntrospectError, Type};
use zlink::{ReplyError, proxy};

use crate::failure::{Code, Failure};

/// A key provider, as `virtseal provider show` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ProviderView {
    /// Its name on this host.
    pub name: String,
    /// Its UUID, the same on every host.
    pub id: String,
    /// `native`, …
    pub kind: String,
    /// NotTrusted, NotBackedUp, Locked, Unreachable, Degraded or Ready.
    pub state: String,
    /// Why, where there is more to say than the state does.
    pub reason: Option<String>,
    /// Since when it has been in this state, as far as virtseald has seen: RFC 3339, UTC.
    pub since: String,
    /// When its server or token last did as asked: RFC 3339, UTC. None if it has not since virtseald started, or if there
    /// is neither.
    pub last_answer: Option<String>,
    /// What is about to go wrong, such as a certificate that ends within 30 days.
    pub warnings: Vec<String>,
    /// How long KEKs are kept in memory, in case its servers don't answer: none, until-lock, or a time such as 24h. None
    /// where no KEK ever comes to this host.
    pub cache: Option<String>,
    /// How many are kept now.
    pub cached_keks: i64,
    /// Whether new envelopes go to it.
    pub is_default: bool,
    /// How many envelopes it has a stanza in.
    pub envelopes: i64,
    /// What unlocks it on this host, as far as the daemon can tell without asking anybody.
    pub unlocked_by: Vec<String>,
}

/// Reply with providers.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Providers {
    /// In the order of their names.
    pub providers: Vec<ProviderView>,
}

/// A certificate, as `virtseal provider trust` shows it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct CertificateView {
    /// Distinguished name.
    pub subject: String,
    /// Distinguished name of who signed it.
    pub issuer: String,
    /// DNS names and IP addresses that it is for.
    pub names: Vec<String>,
    /// SHA-256 of the DER form, in hex with colons.
    pub sha256: String,
    /// When it ends.
    pub not_after: String,
    /// How many days from now that is; negative once it has expired.
    pub days_left: i64,
}

/// What one server of a provider shows.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ServerView {
    /// `HOST:PORT`.
    pub endpoint: String,
    /// The server's own certificate first; empty if there is a problem.
    pub chain: Vec<CertificateView>,
    /// Why it shows none.
    pub problem: Option<String>,
}

/// Reply with what all servers of a provider show.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Servers {
    /// In the order of the provider's endpoints.
    pub servers: Vec<ServerView>,
}

/// What comes with a new identity; the file descriptors are in the order of these fields, the certificate first.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct IdentityParts {
    /// A private key in a file of its own.
    pub key: bool,
    /// The user name, if a password follows.
    pub user: Option<String>,
    /// A passphrase that seals the private key.
    pub seal: bool,
}

/// Reply of `provider identity`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct IdentitySet {
    /// The client's certificate.
    pub certificate: CertificateView,
    /// The provider after it has asked its servers.
    pub provider: ProviderView,
}

/// A new private key.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct NewKey {
    /// RSA with 3072 bits instead of NIST P-256.
    pub rsa: bool,
    /// The common name to ask for; the host's name without one.
    pub common_name: Option<String>,
}

/// Reply of `provider csr`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct SigningRequestMade {
    /// PKCS #10, in PEM.
    pub pem: String,
}

/// One object of a VM, as `virtseal vm status` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ObjectView {
    /// `disk vda`, `vtpm`, `nvram`.
    pub object: String,
    /// sealed, plain, or what is wrong.
    pub state: String,
    /// The image or state file.
    pub path: Option<String>,
    /// The envelope's UUID.
    pub envelope: Option<String>,
    /// The envelope's generation.
    pub generation: Option<i64>,
    /// The providers that can open it.
    pub providers: Vec<String>,
}

/// A VM, as `virtseal vm status` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct VmView {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: String,
    /// The provider without which one of its objects does not open.
    pub hangs_on: Option<String>,
    /// running, off, or undefined (known to virtseal only).
    pub power: String,
    /// sealed, plain, mixed, or undefined.
    pub state: String,
    /// Its objects.
    pub objects: Vec<ObjectView>,
}

/// Reply with VMs.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Vms {
    /// In the order of their names.
    pub vms: Vec<VmView>,
}

/// Reply of `virtseal status`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct HostStatus {
    /// Of virtseald.
    pub version: String,
    /// connected, or why not.
    pub libvirt: String,
    /// The URI of that libvirt.
    pub libvirt_uri: String,
    /// All providers.
    pub providers: Vec<ProviderView>,
    /// The sealed VMs.
    pub vms: Vec<VmView>,
    /// How many secrets are in libvirt at this moment.
    pub armed: i64,
}

/// Reply of `vm seal` and `vm unseal`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Outcome {
    /// What was done, or would be.
    pub steps: Vec<String>,
    /// What the admin should know besides.
    pub warnings: Vec<String>,
    /// Whether anything changed.
    pub changed: bool,
}

/// What a new volume should be.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct VolumeRequest {
    /// Where; absolute.
    pub path: String,
    /// Its virtual size in bytes; may be left out where `from` or `backing` has one.
    pub size: Option<u64>,
    /// The VM that it is for: name or UUID.
    pub vm: String,
    /// qcow2 cluster size in bytes.
    pub cluster_size: Option<u64>,
    /// The image below it; absolute.
    pub backing: Option<String>,
    /// That image's format.
    pub backing_format: Option<String>,
    /// The image to fill it from; absolute.
    pub from: Option<String>,
    /// Another provider than the default one.
    pub provider: Option<String>,
}

/// A step towards a volume; the last one has the envelope.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct VolumeProgress {
    /// 0 to 100.
    pub percent: f64,
    /// The envelope's UUID, once it is active.
    pub envelope: Option<String>,
    /// The virtual size in bytes.
    pub size: Option<u64>,
}

/// A job to start.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct JobRequest {
    /// rotate, rekey, move, add-recipient or remove-recipient.
    pub kind: String,
    /// The provider that it is about; for a move, the one to move from.
    pub provider: Option<String>,
    /// For a move, the provider to move to.
    pub to: Option<String>,
    /// Only the envelopes of this VM, for rekey and move: name or UUID.
    pub vm: Option<String>,
}

/// A sweep over the envelopes, as `virtseal jobs` prints it.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct JobView {
    /// Its number.
    pub id: i64,
    /// What it does, in words.
    pub task: String,
    /// running, done, incomplete or aborted.
    pub state: String,
    /// How many envelopes there were when it began.
    pub total: i64,
    /// How many of them it has seen.
    pub seen: i64,
    /// How many of them it has changed.
    pub changed: i64,
    /// How many of them it could not change.
    pub left: i64,
    /// What it waits for, while it does.
    pub waiting: Option<String>,
    /// Why it could not change some of them, an envelope a line.
    pub reasons: Vec<String>,
    /// When it was started, in seconds since 1970.
    pub started: i64,
    /// When it last changed, in seconds since 1970.
    pub updated: i64,
}

/// How a job stands.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct JobReport {
    /// The job.
    pub job: JobView,
}

/// A job that was started.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct JobStarted {
    /// The job.
    pub job: JobView,
    /// What the admin should know besides.
    pub warnings: Vec<String>,
}

/// A copy of an envelope that is behind the keystore's.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct CopyView {
    /// The VM.
    pub vm: String,
    /// The envelope's UUID.
    pub envelope: String,
    /// xml or image.
    pub place: String,
    /// Why it could not follow yet; empty if nobody has tried.
    pub reason: String,
}

/// Reply of `virtseal jobs`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Jobs {
    /// The last ones, oldest first.
    pub jobs: Vec<JobView>,
    /// How many copies are behind.
    pub stale_copies: i64,
    /// The first hundred of each place.
    pub copies: Vec<CopyView>,
}

/// An envelope that no VM uses.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct OrphanEnvelope {
    /// The envelope's UUID.
    pub envelope: String,
    /// Its VM's name, or UUID if no name is known.
    pub vm: String,
    /// disk, vtpm or nvram.
    pub kind: String,
    /// Where its object was.
    pub path: Option<String>,
    /// Whether there is still something.
    pub present: bool,
    /// The providers that open it.
    pub providers: Vec<String>,
}

/// A KEK that no VM's envelope needs.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct OrphanKek {
    /// Its provider.
    pub provider: String,
    /// Its name there.
    pub kek: String,
    /// How many envelopes without a VM need it.
    pub envelopes: i64,
    /// How many copies that are behind need it.
    pub copies: i64,
}

/// Reply of `provider orphans`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Orphans {
    /// Envelopes whose VM is not defined.
    pub envelopes: Vec<OrphanEnvelope>,
    /// The KEKs that only these, or copies that are behind, need.
    pub keks: Vec<OrphanKek>,
}

/// One thing that `vm shred` came to.
#[derive(Clone, Debug, Serialize, Deserialize, CustomType)]
pub struct ReceiptLine {
    /// The KEK, image, XML or record.
    pub what: String,
    /// Whether it is gone.
    pub destroyed: bool,
    /// What was seen.
    pub observed: String,
}

/// Reply of `vm shred`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct Receipt {
    /// The VM.
    pub vm: String,
    /// What was destroyed, and what was not.
    pub lines: Vec<ReceiptLine>,
    /// What may survive elsewhere.
    pub survives: Vec<String>,
}

/// Reply of `provider tpm --remove`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct TpmRemoved {
    /// Whether there was anything to remove.
    pub removed: bool,
}

/// Which root generation a backup holds.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct BackupMade {
    /// For `ConfirmBackup`, once the file is safe on disk.
    pub generation: i64,
}

/// Reply of `audit show`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct AuditLines {
    /// JSON, a record a line.
    pub lines: Vec<String>,
}

/// Reply of `audit verify`.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
pub struct AuditVerified {
    /// How many records the chain holds.
    pub records: i64,
    /// SHA-256 of the last one, in hex: kept elsewhere, it shows later that nothing before it was rewritten.
    pub head: String,
}

/// Why a method of `io.virtseal.Host` failed.
#[derive(Clone, Debug, PartialEq, ReplyError, IntrospectError)]
#[zlink(interface = "io.virtseal.Host")]
pub enum HostError {
    /// See [`Failure`].
    Failed {
        /// The exit code that the CLI should end with.
        code: i64,
        /// What happened, and to which object.
        message: String,
        /// The next command to run.
        next: Option<String>,
    },
}

impl From<Failure> for HostError {
    fn from(failure: Failure) -> Self {
        Self::Failed {
            code: failure.code as i64,
            message: failure.message,
            next: failure.next,
        }
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        let HostError::Failed { code, message, next } = error;
        Self {
            code: Code::from_number(code),
            message,
            next,
        }
    }
}

/// Why a start is refused.
#[derive(Clone, Debug, PartialEq, ReplyError, IntrospectError)]
#[zlink(interface = "io.virtseal.Lifecycle")]
pub enum LifecycleError {
    /// One line: the VM, the object, the provider, the reason and the next command.
    Refused {
        /// That line.
        message: String,
    },
}

/// `io.virtseal.Host`, as the CLI calls it.
#[proxy("io.virtseal.Host")]
pub trait HostProxy {
    /// Everything at a glance.
    async fn status(&mut self) -> zlink::Result<Result<HostStatus, HostError>>;
    /// The objects of one VM, or of all sealed ones.
    async fn vm_status(&mut self, vm: Option<&str>) -> zlink::Result<Result<Vms, HostError>>;
    /// Seals a defined, stopped VM.
    async fn seal_vm(
        &mut self,
        vm: &str,
        provider: Option<&str>,
        dry_run: bool,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// Makes a VM plain again that never ran sealed.
    async fn unseal_vm(&mut self, vm: &str, dry_run: bool) -> zlink::Result<Result<Outcome, HostError>>;
    /// Makes an encrypted volume, and fills it.
    #[zlink(more)]
    async fn create_volume(
        &mut self,
        request: &VolumeRequest,
    ) -> zlink::Result<impl Stream<Item = zlink::Result<Result<VolumeProgress, HostError>>>>;
    /// All providers.
    async fn list_providers(&mut self) -> zlink::Result<Result<Providers, HostError>>;
    /// Adds a provider; `settings` is the JSON of what its kind needs to know, never a secret; `fds` holds its
    /// passphrase or PIN.
    async fn add_provider(
        &mut self,
        name: &str,
        kind: &str,
        settings: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<Providers, HostError>>;
    /// Keeps its KEKs in memory for that long: none, until-lock, or a time such as 4h.
    async fn set_provider_cache(
        &mut self,
        name: &str,
        policy: &str,
    ) -> zlink::Result<Result<Providers, HostError>>;
    /// Makes new envelopes go to this provider.
    async fn set_default_provider(&mut self, name: &str) -> zlink::Result<Result<(), HostError>>;
    /// Purges its keys from memory.
    async fn lock_provider(&mut self, name: &str) -> zlink::Result<Result<(), HostError>>;
    /// Unlocks it; `fds` holds its passphrase.
    async fn unlock_provider(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<(), HostError>>;
    /// Unlocks it by the TPM of this host.
    async fn unlock_provider_by_tpm(&mut self, name: &str) -> zlink::Result<Result<(), HostError>>;
    /// Lets the TPM of this host open it while these PCRs (7, if none are given) are what they are now.
    async fn enroll_tpm(&mut self, name: &str, pcrs: Option<&str>) -> zlink::Result<Result<(), HostError>>;
    /// Takes that away again.
    async fn remove_tpm(&mut self, name: &str) -> zlink::Result<Result<TpmRemoved, HostError>>;
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
    ) -> zlink::Result<Result<Providers, HostError>>;
    /// Starts a job.
    async fn start_job(&mut self, request: &JobRequest) -> zlink::Result<Result<JobStarted, HostError>>;
    /// Retires the keys in use of a provider and starts the job that leaves them; `fds` holds the passphrase of a native one.
    async fn rotate_provider(
        &mut self,
        name: &str,
        #[zlink(fds)] fds: Vec<OwnedFd>,
    ) -> zlink::Result<Result<JobStarted, HostError>>;
    /// The last jobs, and the copies that are behind.
    async fn list_jobs(&mut self) -> zlink::Result<Result<Jobs, HostError>>;
    /// Follows a job, or the one that runs, until it ends.
    #[zlink(more)]
    async fn watch_job(
        &mut self,
        id: Option<i64>,
    ) -> zlink::Result<impl Stream<Item = zlink::Result<Result<JobReport, HostError>>>>;
    /// Ends a job, or the one that runs, where it is.
    async fn abort_job(&mut self, id: Option<i64>) -> zlink::Result<Result<JobReport, HostError>>;
    /// Deletes a provider that nothing needs, or one whose name was typed.
    async fn delete_provider(
        &mut self,
        name: &str,
        typed: Option<&str>,
    ) -> zlink::Result<Result<Outcome, HostError>>;
    /// Envelopes and KEKs that no VM uses.
    async fn orphans(&mut self) -> zlink::Result<Result<Orphans, HostError>>;
    /// Destroys all keys of a VM whose name was typed.
    async fn shred_vm(&mut self, vm: &str, typed: Option<&str>) -> zlink::Result<Result<Receipt, HostError>>;
    /// The last records of the audit log.
    async fn show_audit(&mut self, records: i64) -> zlink::Result<Result<AuditLines, HostError>>;
    /// Checks the audit log's chain.
    async fn verify_audit(&mut self) -> zlink::Result<Result<AuditVerified, HostError>>;
}

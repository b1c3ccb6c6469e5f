//! The daemon's state, and what each method of the Varlink services does with it.
//!
//! Everything here blocks and runs on worker threads; [`crate::daemon::listener`] is the asynchronous edge. The answer to
//! a hook is ready before its deadline or not at all: a start that nobody waits for any more arms nothing.

mod adopt;
mod bell;
mod caller;
mod copies;
mod deletion;
mod first_runs;
mod forget;
mod gate;
pub mod glance;
mod headers;
mod jobs;
pub mod listener;
pub mod overdue;
mod paths;
pub mod pools;
mod records;
mod running;
mod saved;
mod service;
mod sharing;
mod shred;
pub mod sockets;
mod status;
mod visible;
mod volumes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Group};

use crate::api::Outcome;
use crate::audit::AuditLog;
use crate::config::Config;
use crate::domain::{self, Domain, ObjectState};
use crate::host::libvirt::{Arming, Libvirt, LibvirtError};
use crate::host::permitted::PathRule;
use crate::host::tpm::Tpm;
use crate::model::envelope::{EnvelopeId, VmId};
use crate::model::job::JobId;
use crate::model::problem::{Code, Problem, chain};
use crate::object::OpenedHeaders;
use crate::object::disk;
use crate::recipients::Recipients;
use crate::store::{CopyPlace, EnvelopeStore, HostStore, Stores};
use crate::terminal::word;
use crate::vm::first_runs::{FirstRuns, vtpm_of};
use crate::vm::seal::{self, ConfirmedFormats, Host};
use crate::vm::start::{self, ArmedSecrets, Deadline, Opened, Prepared, StartContext};
use crate::vm::status::settings::{self, ReaderGroup};
use crate::vm::{marks, names};
use bell::Bell;
use headers::Headers;

pub use adopt::Formats;
pub use records::on_behalf_of;
pub use service::tpm::{CREDENTIAL, TpmUnlock, Tried};
pub use sharing::Sharing;

/// The part of a hook's deadline after which a libvirt that says nothing is taken to be autostarting.
const LIBVIRT_SHARE: f64 = 0.3;

/// What hook.conf wants of every VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookPolicy {
    /// Nothing: plain VMs start.
    Any,
    /// `require_sealed`. The mark of a sealed VM is not enough: something of it must be.
    RequireSealed,
}

/// Everything that the daemon holds.
pub struct Daemon {
    config: RwLock<Config>,
    keystore: Arc<dyn EnvelopeStore>,
    host_store: HostStore,
    recipients: Recipients,
    libvirt: Arc<Libvirt>,
    /// A connection of its own for what no hook waits for: a call that hangs there holds up no start.
    background: Arc<Libvirt>,
    /// And one on which libvirt tells what is done to running VMs.
    events: Libvirt,
    /// The storage pools, for starts that need them.
    storage_pools: Arc<paths::StoragePools>,
    /// Of this host, for providers that it unlocks, and caches that it keeps.
    tpm: Arc<Tpm>,
    audit: AuditLog,
    opened_headers: OpenedHeaders,
    armed: Mutex<ArmedSecrets>,
    /// Held while a secret that other VMs may need too is defined or undefined.
    shared: Mutex<()>,
    /// How many calls there were.
    calls: AtomicU64,
    /// Held while a VM is sealed or a volume made: two at once would make two envelopes for one object.
    sealing: Mutex<()>,
    /// The images that `volume create` makes now.
    making: Mutex<BTreeSet<String>>,
    /// Which image headers are being rewritten, and which must not be.
    headers: Headers,
    /// Rung when a job may have something to do.
    jobs_bell: Bell,
    /// Why the job that runs stands still, where its own record can't be written.
    stalled: Mutex<Option<(JobId, String)>>,
    /// What those who ask for the status are shown.
    glances: glance::Glances,
    /// What those who page through the orphans are shown.
    orphans: deletion::Seen,
    /// What those who watch jobs have seen.
    watched: jobs::Looks,
    /// Rung when a copy of an envelope may have to follow, or can.
    copies_bell: Bell,
    /// Rung when a start was armed.
    arms_bell: Bell,
    looks: overdue::Looks,
    /// VMs that have started or ended, and that nobody has looked at since.
    changed_vms: Mutex<BTreeSet<VmId>>,
    /// What is to be noted of starts.
    first_runs: Mutex<FirstRuns>,
    /// What is done to VMs while they run.
    running: Arc<running::Running>,
    /// Held while copies are brought up to date, and while all of a VM go: one that was read before must not be put back.
    copying: Mutex<()>,
}

impl Daemon {
    /// Opens keystore and audit log; all providers start locked. Waits for nothing.
    pub fn open(config: Config) -> Result<Self, Problem> {
        let dir = &config.state_dir;
        let stores = Stores::open(dir)?;
        let recipients = Recipients::open(&stores, config.provider_deadline)
            .map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
        recipients.set_recipients(config.recipients.clone());
        let Stores { keystore, host_store } = stores;
        let headers = Headers::interrupted(host_store.journaled_headers()?.sound);
        recipients.set_probe_interval(config.probe_interval);
        let audit = Self::open_audit(&host_store, dir)?;
        Ok(Self {
            libvirt: Arc::new(Libvirt::new(&config.libvirt_uri)),
            background: Arc::new(Libvirt::new(&config.libvirt_uri)),
            events: Libvirt::new(&config.libvirt_uri),
            storage_pools: Arc::default(),
            tpm: Arc::new(Tpm::new(config.tpm.clone(), Tpm::DEADLINE)),
            config: RwLock::new(config),
            keystore,
            host_store,
            recipients,
            audit,
            opened_headers: OpenedHeaders::default(),
            armed: Mutex::default(),
            shared: Mutex::default(),
            sealing: Mutex::default(),
            making: Mutex::default(),
            calls: AtomicU64::default(),
            headers,
            jobs_bell: Bell::default(),
            stalled: Mutex::default(),
            glances: glance::Glances::default(),
            orphans: deletion::Seen::default(),
            watched: jobs::Looks::default(),
            copies_bell: Bell::default(),
            arms_bell: Bell::default(),
            looks: overdue::Looks::default(),
            changed_vms: Mutex::default(),
            first_runs: Mutex::default(),
            running: Arc::default(),
            copying: Mutex::default(),
        })
    }

    /// Takes a new configuration over, as far as a running daemon can. Says what it can't.
    pub fn reload(&self, new: Config) -> Vec<&'static str> {
        let mut config = self.config.write().unwrap_or_else(PoisonError::into_inner);
        let fixed = [
            ("socket", config.socket != new.socket),
            ("hook_socket", config.hook_socket != new.hook_socket),
            ("socket_group", config.socket_group != new.socket_group),
            ("state_dir", config.state_dir != new.state_dir),
            ("libvirt_uri", config.libvirt_uri != new.libvirt_uri),
            ("tpm", config.tpm != new.tpm),
            ("log", config.log != new.log),
        ];
        self.recipients.set_deadline(new.provider_deadline);
        self.recipients.set_recipients(new.recipients.clone());
        self.recipients.set_probe_interval(new.probe_interval);
        *config = Config {
            socket: config.socket.clone(),
            hook_socket: config.hook_socket.clone(),
            socket_group: config.socket_group.clone(),
            state_dir: config.state_dir.clone(),
            libvirt_uri: config.libvirt_uri.clone(),
            tpm: config.tpm.clone(),
            log: config.log.clone(),
            ..new
        };
        fixed
            .into_iter()
            .filter(|(_, differs)| *differs)
            .map(|(key, _)| key)
            .collect()
    }

    fn config(&self) -> Config {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that somebody has called.
    pub fn note_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// How many calls there were: as long as it stays the same, there is nothing to do.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// The group that may read, if it exists.
    #[must_use]
    pub fn reader_group(&self) -> Option<Gid> {
        Group::from_name(&self.config().socket_group)
            .ok()
            .flatten()
            .map(|group| group.gid)
    }

    /// What the settings name and this host does not have, one line for each.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let group = match self.reader_group() {
            Some(_) => ReaderGroup::Exists,
            None => ReaderGroup::Missing,
        };
        settings::warnings(&self.config(), |name| self.recipients.find(name).is_ok(), group)
    }

    /// How long a hook's call may take: a little less than the hook waits, so that the reason reaches the user.
    #[must_use]
    pub fn hook_deadline(&self) -> Duration {
        self.config().hook_deadline.mul_f64(0.9)
    }

    /// What a hook is told when time is up.
    #[must_use]
    pub fn deadline_passed(&self, waited: Duration) -> Problem {
        let libvirt = if self.libvirt.is_connected() {
            ""
        } else {
            ": libvirt does not answer"
        };
        Problem::new(
            Code::Unreachable,
            format!("no decision within {:.1} s{libvirt}", waited.as_secs_f64()),
        )
        .next("virtseal status")
    }

    /// `prepare begin`: arms all keys of the VM, or none.
    pub fn prepare(&self, xml: &str, policy: HookPolicy, deadline: &Deadline) -> Result<(), Problem> {
        let domain = Domain::parse(xml).map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
        let decided = self.decide(&domain, xml, policy, deadline);
        self.audit_start(&domain, &decided);
        match &decided {
            Ok(objects) => tracing::info!(domain = domain.name, objects, op = "prepare", "armed"),
            Err(failure) => tracing::warn!(domain = domain.name, op = "prepare", "refused: {failure}"),
        }
        decided.map(drop)
    }

    /// A sealed VM may name its own secrets, in the places where they are looked for, and those of disks that are shared with
    /// it; libvirt finds any other one in more places than [`crate::vm::start::prepare`] reads.
    fn refuse_secrets_of_others(&self, domain: &Domain, xml: &str, opened: &[Opened]) -> Result<(), Problem> {
        let named = domain::named_secrets(xml).map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
        let others = named
            .into_iter()
            .filter(|id| opened.iter().all(|object| object.envelope != *id));
        for id in others {
            let known = self.keystore.envelope(id)?;
            if let Some(owner) = known
                .map(|known| known.envelope.vm)
                .filter(|vm| *vm != domain.uuid)
            {
                let why = format!("it names secret {id}, which is that of VM {owner}");
                return Err(Problem::new(Code::Denied, why)
                    .of(format!("{} stays off", domain.name))
                    .next(format!(
                        "virsh edit {}: a VM has secrets of its own",
                        word(&domain.name)
                    )));
            }
        }
        Ok(())
    }

    fn decide(
        &self,
        domain: &Domain,
        xml: &str,
        policy: HookPolicy,
        deadline: &Deadline,
    ) -> Result<usize, Problem> {
        let context = StartContext {
            keystore: self.keystore.as_ref(),
            host_store: &self.host_store,
            recipients: &self.recipients,
            opened_headers: &self.opened_headers,
            swtpm_dir: self.config().swtpm_dir,
            paths: paths::rule_of_start(self, domain)?,
            policy: self.config().policy.of(domain),
            run: first_runs::known_run(self, domain.uuid),
            state_source: lock(&self.first_runs).state_source(domain.uuid, vtpm_of(domain), Instant::now()),
        };
        // Until the VM is armed: from then on that keeps its headers as they are.
        let _held = self.headers.hold(envelopes_of(domain), deadline);
        let Prepared { opened, first_run } = start::prepare(&context, domain)?;
        if opened.is_empty() && policy == HookPolicy::RequireSealed {
            return Err(nothing_sealed(domain));
        }
        self.refuse_secrets_of_others(domain, xml, &opened)?;
        // Who else may have what is armed is seen by this alone.
        self.host_store
            .ensure_hook_index()
            .map_err(|error| Problem::from(error).of(format!("{} stays off", domain.name)))?;
        let patience = self.config().hook_deadline.mul_f64(LIBVIRT_SHARE);
        self.libvirt
            .reach(patience)
            .map_err(|error| unreachable_libvirt(domain, &error))?;
        let count = opened.len();
        lock(&self.first_runs).expect(domain.uuid, first_run);
        self.arm(domain, opened, deadline)
            .inspect_err(|_| lock(&self.first_runs).expect(domain.uuid, None))?;
        Ok(count)
    }

    /// Arms unless nobody waits any more: the hook has given up then, and its `release end` may have passed.
    fn arm(&self, domain: &Domain, opened: Vec<Opened>, deadline: &Deadline) -> Result<(), Problem> {
        let too_late = || {
            Problem::new(
                Code::Unreachable,
                format!("{} stays off: nobody waits for its start any more", domain.name),
            )
            .next("virtseal status")
        };
        if deadline.has_passed() {
            return Err(too_late());
        }
        let shareable = opened.iter().any(|object| object.shareable);
        let _shared = shareable.then(|| lock(&self.shared));
        let envelopes: Vec<_> = opened.iter().map(|object| object.envelope).collect();
        lock(&self.armed).arm(domain.uuid, envelopes.iter().copied());
        self.arms_bell.ring();
        let secrets: Vec<_> = opened.into_iter().map(|object| arming(domain, object)).collect();
        let armed = self
            .libvirt
            .arm(&secrets)
            .map_err(|error| unreachable_libvirt(domain, &error));
        let failed = match armed {
            Ok(()) if !deadline.has_passed() => return Ok(()),
            Ok(()) => too_late(),
            Err(failure) => failure,
        };
        self.take_back(domain, envelopes);
        Err(failed)
    }

    /// Undefines what no other VM needs, also where `release end` came meanwhile: it may have found less than what
    /// there is now.
    fn take_back(&self, domain: &Domain, mut envelopes: Vec<EnvelopeId>) {
        let mut arms = lock(&self.armed);
        let _ = arms.disarm(domain.uuid);
        envelopes.retain(|envelope| !arms.needs(*envelope));
        drop(arms);
        if let Err(error) = self.libvirt.disarm(&envelopes) {
            tracing::error!(domain = domain.name, "{}", chain(&error));
        }
    }

    /// `started begin`: QEMU and swtpm have the keys, libvirt needs them no more.
    pub fn started(&self, vm: &str, name: &str) -> Result<(), Problem> {
        saved::look_later(self, vm);
        let disarmed = self.disarm(vm, name);
        if let Ok(vm) = vm_id(vm) {
            first_runs::note_running(self, vm, name);
        }
        disarmed
    }

    /// `release end`: whatever happened, nothing stays armed.
    pub fn released(&self, vm: &str, name: &str) -> Result<(), Problem> {
        let disarmed = self.disarm(vm, name);
        saved::look_later(self, vm);
        if let Ok(vm) = vm_id(vm) {
            first_runs::note_ended(self, vm, name);
        }
        // Its images can follow what was rewrapped while it ran.
        self.copies_bell.ring();
        disarmed
    }

    fn disarm(&self, vm: &str, name: &str) -> Result<(), Problem> {
        let vm = vm_id(vm)?;
        let _shared = lock(&self.shared);
        let unused = lock(&self.armed).disarm(vm);
        self.libvirt.disarm(&unused).map_err(|error| {
            // Remembered, so that `release end` or the next start tries again.
            lock(&self.armed).arm(vm, unused.iter().copied());
            tracing::error!(domain = name, op = "disarm", "{}", chain(&error));
            Problem::new(Code::Unreachable, chain(&error))
        })
    }

    /// Undefines the secrets that a daemon before this one left in libvirt. Connects when it has to.
    ///
    /// Only what this keystore knows: another virtseald may be starting a VM of its own on the same libvirt.
    pub fn sweep(&self) -> Result<usize, LibvirtError> {
        let armed = self.libvirt.armed()?;
        let _shared = lock(&self.shared);
        // Held until they are gone: a start that needs one of them again defines it after that.
        let arms = lock(&self.armed);
        let left: Vec<EnvelopeId> = armed
            .into_iter()
            .filter(|envelope| match self.keystore.envelope(*envelope) {
                Ok(known) => known.is_some(),
                Err(error) => error.is_of_row(),
            })
            .filter(|envelope| !arms.needs(*envelope))
            .collect();
        self.libvirt.disarm(&left)?;
        Ok(left.len())
    }

    /// Removes what killed daemons left half-made beside the images that this host knows.
    pub fn sweep_temporaries(&self) {
        let Ok(records) = self.keystore.envelopes() else {
            return;
        };
        let locations = records.sound.iter().map(|record| Path::new(&record.location));
        // One image of each directory.
        let images: BTreeMap<_, _> = locations
            .filter_map(|location| Some((location.parent()?, location)))
            .collect();
        for image in images
            .into_values()
            .filter_map(|image| paths::known_place(self, image).ok())
        {
            match disk::sweep_temporaries(&image) {
                Ok(removed) => removed
                    .iter()
                    .for_each(|path| tracing::info!(path = %path.display(), "removed a leftover")),
                Err(error) => tracing::warn!("{}", chain(&error)),
            }
        }
    }

    /// Connects to libvirt unless it is connected. Says whether this is a new connection.
    pub fn connect(&self) -> Result<bool, LibvirtError> {
        self.libvirt.connect()
    }

    /// Locks every provider: no key is left in memory.
    pub fn lock_all(&self) {
        self.recipients.lock_all();
    }

    /// Brings what was changed last to where a copy of the files finds it: threads that go on keep all of this open.
    pub fn end(&self) {
        self.end_audit();
        if let Err(error) = self.host_store.settle() {
            tracing::warn!("changes stay in the write-ahead log: {}", chain(&error));
        }
    }

    /// Seals a VM, or says what would be done.
    pub fn seal_vm(
        &self,
        vm: &str,
        provider: Option<&str>,
        formats: &[String],
        dry_run: bool,
    ) -> Result<Outcome, Problem> {
        let confirmed = ConfirmedFormats::parse(formats)?;
        let _sealing = lock(&self.sealing);
        let domain = names::find_domain(&self.background, vm)?;
        if !dry_run {
            self.take_in_copies_of(&domain);
        }
        let host = Host {
            confirmed,
            ..self.host_of_vms()?
        };
        let plan = seal::plan(&host, &domain)?;
        if dry_run {
            return Ok(plan.outcome(false));
        }
        let sealed = marks::while_marked(&host, &domain, || seal::seal(&host, &domain, &plan, provider));
        self.audit_vm("seal", domain.vm, &domain.name, &sealed);
        let made = sealed?;
        let changed = made.xml != domain.xml;
        if changed {
            self.background.define(&made.xml).map_err(|error| {
                made.replaced
                    .after(Problem::new(
                        Code::Failed,
                        format!("{} is not redefined: {}", domain.name, chain(&error)),
                    ))
                    .next(format!(
                        "virtseal vm seal {}: it goes on from here, nothing is lost",
                        word(vm)
                    ))
            })?;
            self.catch_up(&made.xml)?;
        }
        self.note_bad_images_of(&made.xml)?;
        Ok(plan.outcome(changed))
    }

    /// A job may have changed an envelope between the reading of an XML and its definition: then what was defined is behind.
    fn catch_up(&self, xml: &str) -> Result<(), Problem> {
        let (copies, _) =
            domain::Metadata::envelopes_in(xml).map_err(|error| Problem::new(Code::Failed, chain(&error)))?;
        for copy in copies {
            let known = self.keystore.readable_envelope(copy.id)?;
            if let Some(record) = known.filter(|record| record.envelope != copy) {
                // Whoever wrote the copy may have named any KEK in it.
                self.host_store.copy_is_behind(&record.envelope, CopyPlace::Xml)?;
            }
        }
        self.copies_bell.ring();
        Ok(())
    }

    /// Makes a VM plain again, if nothing was ever written under seal.
    pub fn unseal_vm(&self, vm: &str, dry_run: bool) -> Result<Outcome, Problem> {
        let _sealing = lock(&self.sealing);
        let domain = names::find_domain(&self.background, vm)?;
        let host = self.host_of_vms()?;
        if marks::is_marked_in_vain(&host, &domain)? {
            if !dry_run {
                self.keystore.note_plain(domain.vm)?;
            }
            let changed = !dry_run;
            return Ok(Outcome {
                changed,
                ..marks::unmarked()
            });
        }
        let plan = seal::plan_unseal(&host, &domain)?;
        if !dry_run {
            let unsealed = seal::unseal(&host, &plan).and_then(|replaced| {
                self.background.define(&plan.xml).map_err(|error| {
                    replaced
                        .after(Problem::new(
                            Code::Failed,
                            format!("{} is not redefined: {}", domain.name, chain(&error)),
                        ))
                        .next(format!("virtseal vm unseal {}: it goes on from here", word(vm)))
                })
            });
            self.audit_vm("unseal", domain.vm, &domain.name, &unsealed);
            unsealed?;
            self.keystore.note_plain(domain.vm)?;
        }
        Ok(plan.outcome(!dry_run))
    }

    fn host(&self) -> Host<'_> {
        let config = self.config();
        Host {
            keystore: self.keystore.as_ref(),
            recipients: &self.recipients,
            paths: PathRule::of(&config),
            swtpm_dir: config.swtpm_dir,
            nvram_dir: config.nvram_dir,
            confirmed: ConfirmedFormats::default(),
            policies: config.policy,
            kept: Vec::new(),
        }
    }

    /// With what libvirt knows of all VMs and storage pools, for what acts on files that domain XML names.
    fn host_of_vms(&self) -> Result<Host<'_>, Problem> {
        let kept = self
            .background
            .every_xml()
            .map_err(|error| names::unreachable(&error))?;
        Ok(Host {
            paths: paths::rule(self),
            kept,
            ..self.host()
        })
    }
}

/// As the hook names a VM.
fn vm_id(uuid: &str) -> Result<VmId, Problem> {
    uuid.parse()
        .map_err(|error| Problem::from_error(Code::Usage, format!("'{uuid}' is not a VM's UUID"), &error))
}

fn envelopes_of(domain: &Domain) -> Vec<EnvelopeId> {
    let sealed = domain::objects(domain)
        .into_iter()
        .filter_map(|object| match object.state {
            ObjectState::Sealed(envelope) => Some(envelope),
            ObjectState::Plain | ObjectState::Unsupported(_) => None,
        });
    sealed.collect()
}

fn arming(domain: &Domain, object: Opened) -> Arming {
    Arming {
        envelope: object.envelope,
        kind: object.kind,
        description: format!("virtseal: {} of {}", object.label, domain.name),
        passphrase: object.passphrase,
    }
}

fn nothing_sealed(domain: &Domain) -> Problem {
    let name = &domain.name;
    let why = "it is marked as sealed, nothing of it is, and hook.conf has require_sealed = true";
    Problem::new(Code::Denied, why)
        .of(format!("{name} stays off"))
        .next(format!(
            "virtseal vm status {0}, then give it a disk or a TPM and virtseal vm seal {0}",
            word(name)
        ))
}

fn unreachable_libvirt(domain: &Domain, error: &LibvirtError) -> Problem {
    let name = &domain.name;
    let failure = Problem::new(Code::Unreachable, format!("{name} stays off: {}", chain(error)));
    match error {
        LibvirtError::Silent { .. } => failure.next(format!(
            "virsh autostart --disable {0}, then virsh start {0}",
            word(name)
        )),
        LibvirtError::Usurped { .. } => failure.next(
            "keep others from defining secrets: SECURITY.md, \"Write access to secrets\"; then copy the data to a new disk in the guest",
        ),
        _ => failure.next("virtseal status"),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that a panic could leave half-done is kept behind these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

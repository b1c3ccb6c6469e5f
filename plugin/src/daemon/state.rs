//! What the daemon holds, and how it is opened and configured anew.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Instant, SystemTime};

use nix::unistd::{Gid, Group};

use super::bell::Bell;
use super::first_unlocks::FirstUnlocks;
use super::heard::Running;
use super::late::Late;
use super::locks::{self, Claims};
use super::ordered::Ordered;
use super::settling::Settling;
use super::storage_pools::StoragePools;
use super::{audit_log, glance};
use crate::api::{JobView, Orphans};
use crate::audit::AuditLog;
use crate::config::Config;
use crate::host::boot::BootId;
use crate::host::libvirt::{Background, StartConnection};
use crate::host::permitted::PathRule;
use crate::host::tpm::Tpm;
use crate::job::live::Live;
use crate::model::deadlines;
use crate::model::envelope::{ProviderId, VmId};
use crate::model::finding::Finding;
use crate::model::job::JobId;
use crate::model::problem::{Problem, chain};
use crate::object::{Inspected, OpenedHeaders};
use crate::recipients::Recipients;
use crate::store::{EnvelopeStore, HostStore, Stores};
use crate::vm::accepted_losses::AcceptedLosses;
use crate::vm::autostart::Attempts;
use crate::vm::confirmed_formats::ConfirmedFormats;
use crate::vm::first_runs::FirstRuns;
use crate::vm::headers::Headers;
use crate::vm::host::Host;
use crate::vm::names;
use crate::vm::start::ArmedSecrets;
use crate::vm::status::settings::{self, ReaderGroup};

/// Everything that the daemon holds.
pub(crate) struct Daemon {
    pub(super) config: RwLock<Config>,
    pub(super) keystore: Arc<dyn EnvelopeStore>,
    pub(super) host_store: HostStore,
    pub(super) recipients: Recipients,
    pub(super) libvirt: Arc<StartConnection>,
    pub(super) background: Arc<Background>,
    /// And one on which libvirt tells what is done to running VMs.
    pub(super) events: Background,
    /// The storage pools, for starts that need them.
    pub(super) storage_pools: Arc<StoragePools>,
    /// Of this host, for providers that it unlocks, and caches that it keeps.
    pub(super) tpm: Arc<Tpm>,
    /// Why it did not unlock a provider that it has the credential of.
    pub(super) tpm_reasons: Mutex<BTreeMap<ProviderId, String>>,
    pub(super) audit: AuditLog,
    pub(super) opened_headers: OpenedHeaders,
    /// What the status has found in files.
    pub(super) inspected: Arc<Inspected>,
    pub(super) armed: ArmedSecrets,
    pub(super) calls: AtomicU64,
    pub(super) claims: Claims,
    /// The images that are made now, for `volume create`.
    pub(super) making: Mutex<BTreeSet<String>>,
    /// Which image headers are being rewritten, and which must not be.
    pub(super) headers: Headers,
    /// The jobs that run; rung when one may have something to do.
    pub(super) jobs: Live,
    /// What those who ask for the status are shown.
    pub(super) glances: glance::Glances,
    /// What those who page through the orphans are shown.
    pub(super) orphans: glance::OneLook<Orphans>,
    /// What those who watch jobs have seen, and when.
    pub(super) watched: tokio::sync::Mutex<BTreeMap<JobId, (Instant, JobView)>>,
    /// Rung when a copy of an envelope may have to follow, or can.
    pub(super) copies_bell: Bell,
    /// What copies wait for no more.
    pub(super) late: Late,
    /// Rung when something is to be noted that a hook has told.
    pub(super) notes_bell: Bell,
    /// Whether libvirt is being asked which VMs were saved to a file.
    pub(super) asks_of_saved: AtomicBool,
    /// Rung when a start was armed.
    pub(super) arms_bell: Bell,
    /// The VMs that libvirt is being asked about.
    pub(super) looks: Mutex<BTreeSet<VmId>>,
    /// VMs that have started or ended, and that nobody has looked at since.
    pub(super) changed_vms: Ordered<BTreeSet<VmId>>,
    /// The boot that this is; what starts once in each does not, where the kernel does not tell it.
    pub(super) boot: Option<BootId>,
    /// What has become of VMs that are to start with this host.
    pub(super) autostarts: Mutex<Attempts>,
    /// Whether credentials and the TPM are being tried.
    pub(super) first_unlocks: FirstUnlocks,
    /// What is to be noted of starts.
    pub(super) first_runs: Ordered<FirstRuns>,
    /// What starts have opened elsewhere than the keystore has it.
    pub(super) moved: Mutex<Settling>,
    /// What is done to VMs while they run.
    pub(super) running: Arc<Running>,
    /// The VMs that the hook has asked about since this daemon began, and that have not ended since.
    pub(super) prepared: Mutex<BTreeSet<VmId>>,
    pub(super) opened: Instant,
    pub(super) hook_heard: Mutex<Option<SystemTime>>,
}

impl Daemon {
    /// Opens keystore and audit log; all providers start locked. Waits for nothing.
    pub(crate) fn open(config: Config) -> Result<Self, Problem> {
        let dir = &config.state_dir;
        let stores = Stores::open(dir)?;
        let recipients = Recipients::open(&stores, config.provider_deadline)
            .map_err(|error| Problem::failed(chain(&error)))?;
        recipients.set_recipients(config.recipients.clone());
        let Stores { keystore, host_store } = stores;
        let headers = Headers::interrupted(host_store.journaled_headers()?.sound);
        recipients.set_probe_interval(config.probe_interval);
        let audit = audit_log::open(&host_store, dir)?;
        Ok(Self {
            libvirt: Arc::new(StartConnection::new(&config.libvirt_uri)),
            background: Arc::new(Background::new(&config.libvirt_uri)),
            events: Background::new(&config.libvirt_uri),
            storage_pools: Arc::default(),
            tpm: Arc::new(Tpm::new(config.tpm.clone(), deadlines::tpm::CALL)),
            tpm_reasons: Mutex::default(),
            config: RwLock::new(config),
            keystore,
            host_store,
            recipients,
            audit,
            opened_headers: OpenedHeaders::default(),
            inspected: Arc::default(),
            armed: ArmedSecrets::default(),
            claims: Claims::default(),
            making: Mutex::default(),
            calls: AtomicU64::default(),
            headers,
            jobs: Live::default(),
            glances: glance::Glances::default(),
            orphans: glance::OneLook::default(),
            watched: tokio::sync::Mutex::default(),
            copies_bell: Bell::default(),
            late: Late::default(),
            notes_bell: Bell::default(),
            asks_of_saved: AtomicBool::default(),
            arms_bell: Bell::default(),
            looks: Mutex::default(),
            changed_vms: locks::value("changed VMs"),
            boot: BootId::of_host()
                .inspect_err(|error| tracing::error!("no VM is started with this host: {}", chain(error)))
                .ok(),
            autostarts: Mutex::default(),
            first_unlocks: FirstUnlocks::default(),
            first_runs: locks::value("first runs"),
            moved: Mutex::default(),
            running: Arc::default(),
            prepared: Mutex::default(),
            opened: Instant::now(),
            hook_heard: Mutex::default(),
        })
    }

    /// Takes a new configuration over, as far as a running daemon can. Says what it can't.
    pub(crate) fn reload(&self, new: Config) -> Vec<&'static str> {
        self.recipients.set_deadline(new.provider_deadline);
        self.recipients.set_recipients(new.recipients.clone());
        self.recipients.set_probe_interval(new.probe_interval);
        let mut config = self.config.write().unwrap_or_else(PoisonError::into_inner);
        config.reload(new)
    }

    pub(super) fn config(&self) -> Config {
        self.config.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn note_call(&self) {
        self.calls.fetch_add(1, Ordering::Relaxed);
    }

    /// How many calls there were: as long as it stays the same, there is nothing to do.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// The group that may read, if it exists.
    pub(crate) fn reader_group(&self) -> Option<Gid> {
        Group::from_name(&self.config().socket_group)
            .ok()
            .flatten()
            .map(|group| group.gid)
    }

    /// What the settings name and this host does not have.
    pub(crate) fn warnings(&self) -> Vec<Finding> {
        let group = match self.reader_group() {
            Some(_) => ReaderGroup::Exists,
            None => ReaderGroup::Missing,
        };
        settings::warnings(&self.config(), |name| self.recipients.find(name).is_ok(), group)
    }

    /// Locks every provider: no key is left in memory.
    pub(crate) fn lock_all(&self) {
        self.recipients.lock_all();
    }

    /// Brings what was changed last to where a copy of the files finds it: threads that go on keep all of this open.
    pub(crate) fn end(&self) {
        audit_log::end(&self.audit, &self.host_store);
        if let Err(error) = self.host_store.settle() {
            tracing::warn!(
                "a copy of the keystore's file alone may lack the last changes: {}",
                chain(&error)
            );
        }
    }

    pub(super) fn host(&self) -> Host<'_> {
        let config = self.config();
        Host {
            keystore: self.keystore.as_ref(),
            recipients: &self.recipients,
            paths: config.path_rule(),
            swtpm_dir: config.swtpm_dir,
            nvram_dir: config.nvram_dir,
            confirmed: ConfirmedFormats::default(),
            accepted: AcceptedLosses::default(),
            policies: config.policy,
            host_store: &self.host_store,
            libvirt: &self.background,
            opened_headers: &self.opened_headers,
            kept: Vec::new(),
        }
    }

    /// What the settings permit, and the storage pools that are active. Asks libvirt on the background connection, for a while; as
    /// long as that does not say, pools permit nothing. A pool that somebody is starting or refreshing keeps libvirt from telling
    /// of any, for as long as its storage takes.
    pub(super) fn path_rule(&self) -> PathRule {
        let rule = self.config().path_rule();
        self.storage_pools
            .added_to(rule, &self.background, deadlines::libvirt::POOLS)
    }

    /// With what libvirt knows of all VMs and storage pools, for what acts on files that domain XML names.
    pub(super) fn host_of_vms(&self) -> Result<Host<'_>, Problem> {
        let kept = self
            .background
            .every_xml()
            .map_err(|error| names::unreachable(&error))?;
        Ok(Host {
            paths: self.path_rule(),
            kept,
            ..self.host()
        })
    }
}

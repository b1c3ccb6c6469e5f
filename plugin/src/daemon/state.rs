//! What the daemon holds, and how it is opened and configured anew.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use nix::unistd::{Gid, Group};

use super::bell::Bell;
use super::heard::Running;
use super::locks::{self, Sealing};
use super::ordered::Ordered;
use super::service::job;
use super::storage_pools::StoragePools;
use super::{glance, paths, records};
use crate::api::Orphans;
use crate::audit::AuditLog;
use crate::config::Config;
use crate::host::libvirt::{Background, LibvirtError, StartConnection};
use crate::host::permitted::PathRule;
use crate::host::tpm::Tpm;
use crate::job::live::Live;
use crate::model::envelope::VmId;
use crate::model::finding::Finding;
use crate::model::problem::{Code, Problem, chain};
use crate::object::OpenedHeaders;
use crate::recipients::Recipients;
use crate::store::{EnvelopeStore, HostStore, Stores};
use crate::vm::confirmed_formats::ConfirmedFormats;
use crate::vm::first_runs::FirstRuns;
use crate::vm::headers::Headers;
use crate::vm::host::Host;
use crate::vm::names;
use crate::vm::start::{ArmedSecrets, Moved};
use crate::vm::status::settings::{self, ReaderGroup};

/// Everything that the daemon holds.
pub struct Daemon {
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
    pub(super) audit: AuditLog,
    pub(super) opened_headers: OpenedHeaders,
    pub(super) armed: Ordered<ArmedSecrets>,
    pub(super) shared: Ordered<()>,
    /// How many calls there were.
    pub(super) calls: AtomicU64,
    pub(super) sealing: Sealing,
    /// The images that are made now, for `volume create`.
    pub(super) making: Mutex<BTreeSet<String>>,
    /// Which image headers are being rewritten, and which must not be.
    pub(super) headers: Headers,
    /// The jobs that run; rung when one may have something to do.
    pub(super) jobs: Live,
    /// What those who ask for the status are shown.
    pub(super) glances: glance::Glances,
    /// What those who page through the orphans are shown.
    pub(super) orphans: Mutex<Option<(Instant, Arc<Orphans>)>>,
    /// What those who watch jobs have seen.
    pub(super) watched: job::Looks,
    /// Rung when a copy of an envelope may have to follow, or can.
    pub(super) copies_bell: Bell,
    /// Rung when a start was armed.
    pub(super) arms_bell: Bell,
    /// The VMs that libvirt is being asked about.
    pub(super) looks: Mutex<BTreeSet<VmId>>,
    /// VMs that have started or ended, and that nobody has looked at since.
    pub(super) changed_vms: Ordered<BTreeSet<VmId>>,
    /// What is to be noted of starts.
    pub(super) first_runs: Ordered<FirstRuns>,
    /// What starts have opened elsewhere than the keystore has it.
    pub(super) moved: Mutex<Vec<Moved>>,
    /// What is done to VMs while they run.
    pub(super) running: Arc<Running>,
    pub(super) copying: Ordered<()>,
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
        let audit = records::open(&host_store, dir)?;
        Ok(Self {
            libvirt: Arc::new(StartConnection::new(&config.libvirt_uri)),
            background: Arc::new(Background::new(&config.libvirt_uri)),
            events: Background::new(&config.libvirt_uri),
            storage_pools: Arc::default(),
            tpm: Arc::new(Tpm::new(config.tpm.clone(), Tpm::DEADLINE)),
            config: RwLock::new(config),
            keystore,
            host_store,
            recipients,
            audit,
            opened_headers: OpenedHeaders::default(),
            armed: Ordered::new(locks::ARMED, ArmedSecrets::default()),
            shared: Ordered::new(locks::SHARED, ()),
            sealing: Sealing::default(),
            making: Mutex::default(),
            calls: AtomicU64::default(),
            headers,
            jobs: Live::default(),
            glances: glance::Glances::default(),
            orphans: Mutex::default(),
            watched: job::Looks::default(),
            copies_bell: Bell::default(),
            arms_bell: Bell::default(),
            looks: Mutex::default(),
            changed_vms: locks::value("changed VMs"),
            first_runs: locks::value("first runs"),
            moved: Mutex::default(),
            running: Arc::default(),
            copying: Ordered::new(locks::COPYING, ()),
        })
    }

    /// Takes a new configuration over, as far as a running daemon can. Says what it can't.
    pub fn reload(&self, new: Config) -> Vec<&'static str> {
        self.recipients.set_deadline(new.provider_deadline);
        self.recipients.set_recipients(new.recipients.clone());
        self.recipients.set_probe_interval(new.probe_interval);
        let mut config = self.config.write().unwrap_or_else(PoisonError::into_inner);
        config.reload(new)
    }

    pub(super) fn config(&self) -> Config {
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

    /// What the settings name and this host does not have.
    #[must_use]
    pub fn warnings(&self) -> Vec<Finding> {
        let group = match self.reader_group() {
            Some(_) => ReaderGroup::Exists,
            None => ReaderGroup::Missing,
        };
        settings::warnings(&self.config(), |name| self.recipients.find(name).is_ok(), group)
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
        records::end(self);
        if let Err(error) = self.host_store.settle() {
            tracing::warn!("changes stay in the write-ahead log: {}", chain(&error));
        }
    }

    pub(super) fn host(&self) -> Host<'_> {
        let config = self.config();
        Host {
            keystore: self.keystore.as_ref(),
            recipients: &self.recipients,
            paths: PathRule::of(&config),
            swtpm_dir: config.swtpm_dir,
            nvram_dir: config.nvram_dir,
            confirmed: ConfirmedFormats::default(),
            policies: config.policy,
            host_store: &self.host_store,
            libvirt: &self.background,
            opened_headers: &self.opened_headers,
            kept: Vec::new(),
        }
    }

    /// With what libvirt knows of all VMs and storage pools, for what acts on files that domain XML names.
    pub(super) fn host_of_vms(&self) -> Result<Host<'_>, Problem> {
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

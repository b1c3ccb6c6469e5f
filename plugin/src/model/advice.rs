//! What leads out of a problem, as a value: refusals, findings and jobs carry it, and `crate::advice` makes the command of it.

use std::borrow::Cow;
use std::path::PathBuf;

use super::cache_policy::CachePolicy;
use super::envelope::ProviderId;
use super::job::SnapshotAct;

/// What to do next. Names and paths are as they are: they are quoted where the command is written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Advice {
    /// What no command does: restoring a file, say. Names no command of virtseal, virsh or systemctl.
    Words(Cow<'static, str>),
    /// Two steps, or a step and what to know of it.
    Joined(Box<Self>, Link, Box<Self>),

    // The host and its jobs.
    ShowStatus,
    ListJobs,
    VerifyAudit,
    WatchJob(i64),
    AbortJob(i64),
    AbortTheJob,
    ResumeJob(i64),
    BackUpState,
    RestoreState,
    /// Over what this host of that name has, from this file.
    RestoreStateOver {
        host: String,
        from: PathBuf,
    },
    Journal,
    StartDaemon,
    /// With its sockets, as after a restored state.
    StartAll,
    /// Its sockets would start it again.
    StopAll,
    RestartDaemon,
    ReloadDaemon,
    ShowDaemon,
    /// After it has failed again and again, when systemd starts it no more by itself.
    StartAnew,
    CheckSettings,
    RestartLibvirtd,
    /// The daemon of that name.
    ReloadLibvirtd(&'static str),
    Upgrade,
    RunAsRoot,

    // Providers, by name.
    ListProviders,
    AddNative,
    AddProviderHelp(Option<&'static str>),
    ShowProvider(String),
    /// Other settings that nobody tries first.
    SetUntried(String),
    UnlockProvider(String),
    UnlockByTpm(String),
    UnlockByFile(String),
    UnlockByPin(String),
    LockProvider(String),
    BackUpProvider(String),
    RestoreProvider(String),
    RestoreProviderFrom(String, PathBuf),
    AddAgain {
        kind: String,
        name: String,
        id: ProviderId,
    },
    /// A provider that this host has never had: only native ones have a backup of their own.
    BringBack {
        name: String,
        id: ProviderId,
    },
    RotateProvider(String),
    MoveProvider {
        from: String,
        to: String,
    },
    MakeDefault(String),
    DeleteProvider(String),
    ForceDelete(String),
    AddRecipient(String),
    RemoveRecipient(String),
    ListOrphans,
    CacheInMemory(String),
    CacheOnDisk {
        name: String,
        policy: CachePolicy,
        options: String,
    },
    EnrollTpm {
        name: String,
        options: Cow<'static, str>,
    },
    TrustProvider(String),
    TrustCa(String),
    SetIdentity(String),
    EncryptIdentity(String),
    /// By the TPM, so that it unlocks by itself.
    BindIdentity(String),
    RequestCertificate(String),
    RequestNewCertificate(String),
    /// Let this host trust who signed the server's certificate.
    TrustSigner(String),
    /// Unlock it with another client certificate.
    OtherCertificate(String),
    /// Do without a client certificate, or log in by one.
    LogInByCertificate(String),
    /// What stands for an identity and trust with a transit provider.
    TransitTrust(String),
    /// Get a new PIN from the token's security officer.
    NewPin(String),
    /// Log in once by another tool, as the last try is never ours.
    LogInElsewhere(String),
    /// `vault operator unseal`, or OpenBao's, at the server.
    UnsealServer,
    /// Get a KEK back from where this provider keeps it.
    RestoreKek(String),

    // VMs, by name or UUID.
    SealVm(String),
    /// Make these anew, which are lost.
    SealReplacing {
        vm: String,
        objects: Vec<String>,
    },
    /// Say what sealing it takes, and all that stands in the way.
    PlanSeal(String),
    SealDeclared {
        vm: String,
        disk: String,
    },
    UnsealVm(String),
    AdoptVm(String),
    AdoptFormat1(String),
    AdoptFrom(PathBuf),
    ShowVm(String),
    ShowVms,
    RekeyVm(String),
    ForgetVm(String),
    /// Have virtseald start it with the host, and not libvirt.
    Autostart(String),
    ShredVm(String),
    ShredAsTyped(String),
    CommitSnapshot(String),
    /// As [`Advice::ResetNvram`].
    DeleteSnapshot {
        vm: String,
        typed: bool,
    },
    /// With its name as the word for what may be lost.
    ForceSnapshot {
        vm: String,
        act: SnapshotAct,
    },
    /// With its name as the word for the loss, if it is to be `typed`.
    ResetNvram {
        vm: String,
        typed: bool,
    },
    /// Get an envelope of this VM back as it was.
    RestoreEnvelope(String),

    // Volumes.
    ShowVolume(PathBuf),
    /// By its path or the UUID of its envelope.
    ForgetVolume(String),
    ForceForgetVolume(String),
    AdoptVolume(PathBuf),
    CheckVolume(PathBuf),
    /// In bytes.
    ResizeVolume {
        path: PathBuf,
        size: u64,
    },
    /// The same, with the loss of data.
    ShrinkVolume {
        path: PathBuf,
        size: u64,
    },
    CreateVolume {
        path: PathBuf,
        vm: String,
    },
    CreateVolumeFrom {
        path: PathBuf,
        from: PathBuf,
        vm: String,
    },
    ShareVolume {
        path: PathBuf,
        vm: String,
    },

    // What libvirt does.
    ListDomains,
    EditXml(String),
    DefineXml,
    /// From a dumpxml of this VM that has its metadata.
    DefineSealedXml(Option<String>),
    StartVm(String),
    ShutDownVm(String),
    ResumeVm(String),
    UndefineVm(String),
    RenameVm(String),
    /// Of a VM that is not sealed.
    AutostartByLibvirt(String),
    DropSavedState(String),
    /// What `virsh save` has written, whoever knows where.
    RestoreSaved,
    ShowLibvirtd,
    DetachDisk {
        vm: String,
        disk: String,
    },
    ListSnapshots(String),
    /// libvirt's record of it: what it has laid over disks stays.
    ForgetSnapshot {
        vm: String,
        snapshot: String,
    },
    StartPool(String),
    RefreshPool(String),
    AbortBlockJob {
        vm: String,
        disk: String,
    },
    AbortDomainJob(String),
}

/// What stands between two parts of an advice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Link {
    Then,
    Or,
    /// One of both, where a comma would mislead.
    OrElse,
    /// Another thing.
    Also,
    /// What to do within the first.
    Within,
    /// When to do the first, or what it does.
    Note,
}

impl Advice {
    /// The daemon's settings, where the package puts them.
    pub(crate) const SETTINGS: &str = "/etc/virtseal/virtseald.yaml";

    pub(crate) fn then(self, next: impl Into<Self>) -> Self {
        self.joined(Link::Then, next)
    }

    pub(crate) fn or(self, other: impl Into<Self>) -> Self {
        self.joined(Link::Or, other)
    }

    /// This; or `other`, which may be several steps.
    pub(crate) fn or_else(self, other: impl Into<Self>) -> Self {
        self.joined(Link::OrElse, other)
    }

    pub(crate) fn also(self, more: impl Into<Self>) -> Self {
        self.joined(Link::Also, more)
    }

    /// This: `what` to do in there, or what it does.
    pub(crate) fn within(self, what: impl Into<Self>) -> Self {
        self.joined(Link::Within, what)
    }

    /// This, with a note such as "if it is on another host".
    pub(crate) fn note(self, note: impl Into<Self>) -> Self {
        self.joined(Link::Note, note)
    }

    fn joined(self, link: Link, other: impl Into<Self>) -> Self {
        Self::Joined(Box::new(self), link, Box::new(other.into()))
    }
}

impl From<&'static str> for Advice {
    fn from(words: &'static str) -> Self {
        Self::Words(words.into())
    }
}

impl From<String> for Advice {
    fn from(words: String) -> Self {
        Self::Words(words.into())
    }
}

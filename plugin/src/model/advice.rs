//! What leads out of a problem, as a value: refusals, findings and jobs carry it, and `crate::advice` makes the command of it.

use std::borrow::Cow;
use std::path::PathBuf;

use super::envelope::ProviderId;

/// What to do next. Names and paths are as they are: they are quoted where the command is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Advice {
    /// What no command does: restoring a file, say. Names no command of virtseal, virsh or systemctl.
    Words(Cow<'static, str>),
    /// Two steps, or a step and what to know of it.
    Joined(Box<Self>, Link, Box<Self>),

    // The host and its jobs.
    ShowStatus,
    ListJobs,
    WatchJob(i64),
    AbortJob(i64),
    AbortTheJob,
    BackUpState,
    RestoreState,
    Journal,
    StartDaemon,
    RestartDaemon,
    ReloadDaemon,
    ShowDaemon,
    RestartLibvirtd,
    Upgrade,
    RunAsRoot,

    // Providers, by name.
    ListProviders,
    AddNative,
    AddProviderHelp(Option<&'static str>),
    ShowProvider(String),
    UnlockProvider(String),
    UnlockByTpm(String),
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
        policy: String,
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
    ShredVm(String),
    ShredAsTyped(String),
    /// Get an envelope of this VM back as it was.
    RestoreEnvelope(String),

    // Volumes.
    ShowVolume(PathBuf),
    CreateVolume {
        path: PathBuf,
        vm: String,
    },
    CreateVolumeOfSize {
        path: PathBuf,
        vm: String,
    },
    CreateVolumeFrom {
        path: PathBuf,
        from: PathBuf,
        vm: Option<String>,
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
    UndefineVm(String),
    RenameVm(String),
    NoAutostart(String),
    DropSavedState(String),
    DetachDisk {
        vm: String,
        disk: String,
    },
    ListSnapshots(String),
    AbortBlockJob,
    AbortDomainJob,
}

/// What stands between two parts of an advice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// One after the other.
    Then,
    /// One of both.
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
    /// This, then `next`.
    #[must_use]
    pub fn then(self, next: impl Into<Self>) -> Self {
        self.joined(Link::Then, next)
    }

    /// This, or `other`.
    #[must_use]
    pub fn or(self, other: impl Into<Self>) -> Self {
        self.joined(Link::Or, other)
    }

    /// This; or `other`, which may be several steps.
    #[must_use]
    pub fn or_else(self, other: impl Into<Self>) -> Self {
        self.joined(Link::OrElse, other)
    }

    /// This; `more`.
    #[must_use]
    pub fn also(self, more: impl Into<Self>) -> Self {
        self.joined(Link::Also, more)
    }

    /// This: `what` to do in there, or what it does.
    #[must_use]
    pub fn within(self, what: impl Into<Self>) -> Self {
        self.joined(Link::Within, what)
    }

    /// This, with a note such as "if it is on another host".
    #[must_use]
    pub fn note(self, note: impl Into<Self>) -> Self {
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

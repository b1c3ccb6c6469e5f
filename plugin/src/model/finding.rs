//! What is wrong, or about to be, as a value: status shows it as a warning, and doctor, metrics and reports tell the same of the same
//! thing.

use std::fmt;

use serde::{Deserialize, Serialize};
use zlink::introspect::CustomType;

use super::advice::Advice;
use super::problem::Problem;
use crate::terminal::unadvised;

pub(crate) use super::subject::Subject;

/// What is wrong, as a word for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum FindingCode {
    // The host.
    /// Nothing is known of VMs.
    LibvirtUnreachable,
    /// libvirt has no hook of virtseal.
    HookMissing,
    /// libvirtd runs since before the hook was installed.
    HookNotLoaded,
    /// A VM was started past the hook.
    HookNotCalled,
    /// `recipients` names a provider that is not here.
    RecipientMissing,
    /// `socket_group` names a group that is not here.
    GroupMissing,
    /// The keystore can't be read.
    KeystoreUnreadable,
    /// A record of the keystore can't be read.
    RecordDamaged,

    // VMs.
    /// Its XML can't be read.
    XmlUnreadable,
    /// It was sealed, and its XML does not say so.
    NotInXml,
    /// What it has at this moment can't be seen.
    LiveUnknown,
    /// Its next start is refused, for what its XML has.
    StartRefused,
    /// A plain overlay lies over a sealed disk.
    Overlaid,
    /// Something is allowed, or under way, that is not encrypted.
    Plaintext,
    /// A sealed image is opened as if it were raw.
    SealedAsRaw,
    /// Plaintext was written, or may have been, while it ran.
    PlaintextWritten,
    /// Its memory is in a file.
    MemorySaved,
    /// QEMU's master key is on the disk while it runs.
    MasterKeyOnDisk,
    /// libvirt may delete the state of its vTPM.
    VtpmNotPersistent,
    /// virtseald starts it once a provider is ready.
    AutostartWaits,
    /// virtseald has begun to start it, long ago.
    AutostartSlow,
    /// virtseald could not start it.
    AutostartFailed,
    /// libvirt is to start it with the host, and can't.
    AutostartByLibvirt,
    /// More was found than is listed.
    Shortened,

    // Copies of envelopes, and images.
    /// A copy can't be read.
    CopyUnreadable,
    /// An image carries the envelope of another object.
    CopyOfAnother,
    /// A copy claims a later generation than the keystore has.
    CopyNewer,
    /// Two versions have the same generation.
    CopyConflict,
    /// The XML has an envelope of format 1 that this host does not know.
    CopyUnknown,
    /// An image opens, and this host does not know it.
    ImageUnknown,
    /// Clusters of an image are used by nothing.
    ImageLeaks,
    /// The tables of an image are damaged.
    ImageCorrupt,

    // Providers.
    /// A certificate has expired, or does soon.
    CertificateEnds,
    /// What a provider was unlocked with ends soon.
    CredentialEnds,
    /// Its server can't do what its settings ask for.
    ModeUnsupported,
    /// No key of it is kept for a reboot.
    NothingPersisted,
    /// Its server opens nothing until it is unsealed.
    ServerSealed,
    /// A KEK does not open what it has wrapped.
    KekRefused,
    /// Nothing can be sealed for it now.
    CannotWrap,
    /// Its newest root key is in no backup.
    NotBackedUp,
    /// A backup holds its root key in the clear.
    BackupUnencrypted,
    /// A passphrase can be guessed.
    PassphraseShort,
    /// The TPM has not got its newest root key.
    TpmStale,
    /// PCR 7 is the same whatever boots.
    SecureBootOff,
    /// Whether it is can't be told.
    SecureBootUnknown,
    /// Nothing has been measured into a PCR.
    PcrUnmeasured,
    /// A PCR changes with updates.
    PcrUnsteady,
    /// Without a PIN, the PCRs are all that the TPM asks for.
    PinMissing,

    // Jobs.
    /// It waits for something.
    JobWaits,
    /// It has ended so that another one begins.
    JobGaveWay,
    /// New keys go to other providers than a job leaves the old ones with.
    NewKeysDiffer,
    /// A job has not seen what is there.
    LeftOut,

    // What a shredding can't reach.
    /// Backups and snapshots.
    BackupsStay,
    /// Copies on other hosts.
    CopiesElsewhere,
    /// Blocks that the storage has remapped.
    BlocksRemapped,

    // What a command leaves.
    /// Its keys stay as they are.
    KeysStay,
    /// The vTPM stays, and its state will be plain.
    VtpmStays,
    /// What was in plaintext can still be read on the disk, or is in a file.
    PlaintextStays,
    /// The guest does not use the room that a volume has got.
    GuestToGrow,
    /// What was on a disk is lost.
    DataLost,
    /// UEFI variables are lost.
    VariablesLost,
    /// What a TPM opens only with the UEFI variables as they were is lost.
    BoundToVariablesLost,
    /// The image is a copy of a volume, which stays where it is.
    IsCopy,
    /// The keystore has a later version than the one that came.
    CopyOlder,
    /// A copy is not what a holder of the key wrote.
    CopyUnverified,
    /// The keystore has not learnt where an image is now.
    PathNotNoted,
    /// A file brings back what was dropped.
    KeptAside,
    /// Objects open with a provider only that is gone.
    ObjectsLocked,
    /// An image that was forgotten opens with it alone.
    NeededIfFound,
    /// A VM has a volume until it ends.
    InUse,
    /// An older copy of an envelope still lets a VM have a volume.
    SharedByCopies,
}

/// How much it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum Severity {
    /// It works, and something is to be known or done.
    Warning,
    /// A VM stays off, a key can't be read, plaintext was written, or something is lost.
    Critical,
}

/// Something that an admin should know of, without having asked.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Finding {
    pub code: FindingCode,
    pub severity: Severity,
    pub subject: Subject,
    /// What is wrong, with what it is about; without a full stop.
    pub what: String,
    pub advice: Option<Advice>,
}

impl Finding {
    /// Something to know or to do.
    pub(crate) fn warning(code: FindingCode, subject: Subject, what: impl Into<String>) -> Self {
        let what = what.into();
        Self {
            code,
            severity: Severity::Warning,
            subject,
            what,
            advice: None,
        }
    }

    /// A problem that keeps a command from nothing.
    pub(crate) fn beside(code: FindingCode, subject: Subject, problem: Problem) -> Self {
        Self {
            advice: problem.advice,
            ..Self::warning(code, subject, problem.message)
        }
    }

    /// Something that does not work, or plaintext that was written.
    pub(crate) fn critical(code: FindingCode, subject: Subject, what: impl Into<String>) -> Self {
        Self {
            severity: Severity::Critical,
            ..Self::warning(code, subject, what)
        }
    }

    /// A problem that nobody has asked for.
    pub(crate) fn of(code: FindingCode, subject: Subject, problem: Problem) -> Self {
        Self {
            advice: problem.advice,
            ..Self::critical(code, subject, problem.message)
        }
    }

    pub(crate) fn next(mut self, advice: impl Into<Advice>) -> Self {
        self.advice = Some(advice.into());
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&unadvised(&self.what))?;
        match &self.advice {
            Some(advice) => write!(f, ". Next: {advice}"),
            None => Ok(()),
        }
    }
}

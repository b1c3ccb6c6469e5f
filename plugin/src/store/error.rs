//! Why the keystore refuses, and what to do next.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use thiserror::Error;

use crate::host::file_error::FileError;
use crate::model::advice::Advice;
use crate::model::envelope::{EnvelopeError, EnvelopeId, Generation, ProviderId, VmId};
use crate::model::problem::{Code, Problem, chain};

/// What a backend says of itself.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why the keystore can't be opened, read or changed.
#[derive(Debug, Error)]
pub(crate) enum StoreError {
    #[error("another virtseald (pid {}) uses {}: stop it, or choose another state_dir", .holder.map_or("unknown".to_owned(), |pid| pid.to_string()), .dir.display())]
    InUse {
        dir: PathBuf,
        /// Its pid, as it wrote it down.
        holder: Option<u32>,
    },
    /// The file is not a keystore, or not a whole one.
    #[error("the keystore {} is damaged; it was not changed", .path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        source: Cause,
    },
    #[error(
        "the keystore {} was made by a later virtseal (schema {found}, this one knows up to {known})", .path.display()
    )]
    TooNew {
        path: PathBuf,
        found: i64,
        /// The highest schema that this version knows.
        known: i64,
    },
    #[error("no space left for the keystore {}: free some on that file system and try again", .path.display())]
    DiskFull {
        path: PathBuf,
        #[source]
        source: Cause,
    },
    #[error(
        "the keystore {} can't be written: check its owner, its mode and whether the file system is mounted \
         read-only", .path.display()
    )]
    ReadOnly {
        path: PathBuf,
        #[source]
        source: Cause,
    },
    /// A program other than a daemon holds a lock on the file.
    #[error(
        "the keystore {} is held by another program (fuser names it): end it and try again", .path.display()
    )]
    Busy {
        path: PathBuf,
        #[source]
        source: Cause,
    },
    #[error("the keystore {} failed", .path.display())]
    Backend {
        path: PathBuf,
        #[source]
        source: Cause,
    },
    /// A file or a directory can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A row holds something that no virtseal wrote.
    #[error("the keystore's record of envelope {id} is damaged")]
    DamagedRecord {
        id: EnvelopeId,
        #[source]
        source: EnvelopeError,
    },
    #[error("the keystore's record {row} is damaged: {why}")]
    Inconsistent { row: String, why: String },
    #[error(
        "two different versions of envelope {id} have generation {generation}: one of them was not made by \
         virtseal, and none was changed"
    )]
    Conflict {
        id: EnvelopeId,
        /// The generation of both.
        generation: Generation,
    },
    #[error(
        "envelope {id} belongs to {known} in the keystore and to {offered} in the copy: the copy is refused"
    )]
    OtherObject {
        id: EnvelopeId,
        /// VM and kind in the keystore.
        known: String,
        /// VM and kind in the refused copy.
        offered: String,
    },
    /// A generation that no sequence of changes reaches.
    #[error("envelope {id} claims generation {generation}, which no virtseal made: the copy is refused")]
    GenerationTooHigh { id: EnvelopeId, generation: Generation },
    #[error("envelope {0} is in the keystore already")]
    EnvelopeExists(EnvelopeId),
    #[error("envelope {0} is not in the keystore")]
    UnknownEnvelope(EnvelopeId),
    #[error("VM {0} is not in the keystore")]
    UnknownVm(VmId),
    #[error("key provider {0} is not in the keystore")]
    UnknownProvider(ProviderId),
    #[error("the settings of provider '{0}' have changed meanwhile")]
    SettingsChanged(String),
    /// An envelope that was made meanwhile has a stanza of it.
    #[error("an envelope needs key provider {0} since just now")]
    ProviderNeeded(ProviderId),
    /// Nothing is to be wrapped by it any more.
    #[error("key provider {0} was deleted meanwhile")]
    ProviderDeleted(ProviderId),
    #[error("job {0} runs, and is about the same")]
    JobRunning(i64),
    #[error("there is no job {0}")]
    UnknownJob(i64),
    #[error("there is a key provider called {0:?} already: choose another name")]
    ProviderNameTaken(String),
    #[error("key provider {id} is on this host already, called {name:?}")]
    ProviderExists { id: ProviderId, name: String },
}

impl StoreError {
    /// What who holds a lock file has written into it.
    pub(crate) fn pid_in(lock: &mut File) -> Option<u32> {
        let mut text = String::new();
        lock.take(20).read_to_string(&mut text).ok()?;
        text.trim().parse().ok()
    }

    /// Whether it is about one row, and says nothing of the others.
    pub(crate) fn is_of_row(&self) -> bool {
        matches!(self, Self::DamagedRecord { .. } | Self::Inconsistent { .. })
    }

    /// What leads out, where that is not said by the error itself.
    pub(crate) fn advice(&self) -> Option<Advice> {
        Some(match self {
            Self::Damaged { .. } => Advice::from("keep a copy of its directory")
                .then(Advice::RestoreState)
                .also(
                    "without a backup, move the file away: sealed VMs are adopted again from their domain XML once their \
                     providers are restored",
                ),
            Self::InUse { .. } => Advice::ShowDaemon,
            Self::TooNew { .. } => Advice::Upgrade,
            Self::ProviderNeeded(_) | Self::ProviderDeleted(_) | Self::SettingsChanged(_) => {
                Advice::from("the same command again")
            }
            Self::ProviderExists { name, .. } => Advice::ShowProvider(name.clone()),
            error if error.is_of_row() => {
                Advice::ShowStatus.note("which names each damaged record and its way out")
            }
            _ => return None,
        })
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        Self::from(&error)
    }
}

impl From<&StoreError> for Problem {
    fn from(error: &StoreError) -> Self {
        let code = match error {
            StoreError::ProviderNameTaken(_) | StoreError::ProviderExists { .. } => Code::Exists,
            _ => Code::Failed,
        };
        Self::new(code, chain(error)).advised(error.advice())
    }
}

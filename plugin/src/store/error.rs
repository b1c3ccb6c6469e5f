//! Why the keystore refuses, and what to do next.

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
pub enum StoreError {
    /// Another process holds the state directory.
    #[error("another virtseald ({holder}) uses {}: stop it, or choose another state_dir", .dir.display())]
    InUse {
        /// The state directory.
        dir: PathBuf,
        /// Its pid, as it wrote it down.
        holder: String,
    },
    /// The file is not a keystore, or not a whole one.
    #[error("the keystore {} is damaged; it was not changed", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the backend says.
        #[source]
        source: Cause,
    },
    /// Written by a later version.
    #[error(
        "the keystore {} was made by a later virtseal (schema {found}, this one knows up to {known})", .path.display()
    )]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: i64,
        /// The highest schema that this version knows.
        known: i64,
    },
    /// No space left.
    #[error("no space left for the keystore {}: free some on that file system and try again", .path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
        /// What the backend says.
        #[source]
        source: Cause,
    },
    /// Not writable.
    #[error(
        "the keystore {} can't be written: check its owner, its mode and whether the file system is mounted \
         read-only", .path.display()
    )]
    ReadOnly {
        /// The file.
        path: PathBuf,
        /// What the backend says.
        #[source]
        source: Cause,
    },
    /// A program other than a daemon holds a lock on the file.
    #[error(
        "the keystore {} is held by another program (fuser names it): end it and try again", .path.display()
    )]
    Busy {
        /// The file.
        path: PathBuf,
        /// What the backend says.
        #[source]
        source: Cause,
    },
    /// Any other failure of SQLite.
    #[error("the keystore {} failed", .path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What the backend says.
        #[source]
        source: Cause,
    },
    /// A file or a directory can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A row holds something that no virtseal wrote.
    #[error("the keystore's record of envelope {id} is damaged")]
    DamagedRecord {
        /// The row.
        id: EnvelopeId,
        /// What is wrong with it.
        #[source]
        source: EnvelopeError,
    },
    /// A row whose columns contradict each other.
    #[error("the keystore's record {row} is damaged: {why}")]
    Inconsistent {
        /// The row.
        row: String,
        /// What is wrong with it.
        why: String,
    },
    /// Two different envelopes claim the same place.
    #[error(
        "two different versions of envelope {id} have generation {generation}: one of them was not made by \
         virtseal, and none was changed"
    )]
    Conflict {
        /// The envelope.
        id: EnvelopeId,
        /// The generation of both.
        generation: Generation,
    },
    /// An envelope changed what it is for.
    #[error(
        "envelope {id} belongs to {known} in the keystore and to {offered} in the copy: the copy is refused"
    )]
    OtherObject {
        /// The envelope.
        id: EnvelopeId,
        /// VM and kind in the keystore.
        known: String,
        /// VM and kind in the refused copy.
        offered: String,
    },
    /// A generation that no sequence of changes reaches.
    #[error("envelope {id} claims generation {generation}, which no virtseal made: the copy is refused")]
    GenerationTooHigh {
        /// The envelope.
        id: EnvelopeId,
        /// The generation.
        generation: Generation,
    },
    /// The envelope exists already.
    #[error("envelope {0} is in the keystore already")]
    EnvelopeExists(EnvelopeId),
    /// There is no such envelope.
    #[error("envelope {0} is not in the keystore")]
    UnknownEnvelope(EnvelopeId),
    /// There is no such VM.
    #[error("VM {0} is not in the keystore")]
    UnknownVm(VmId),
    /// There is no such provider.
    #[error("key provider {0} is not in the keystore")]
    UnknownProvider(ProviderId),
    /// A job about the same runs already.
    #[error("job {0} runs, and is about the same")]
    JobRunning(i64),
    /// There is no such job.
    #[error("there is no job {0}")]
    UnknownJob(i64),
    /// The name is in use.
    #[error("there is a key provider called {0:?} already: choose another name")]
    ProviderNameTaken(String),
    /// The provider exists already.
    #[error("key provider {id} is on this host already, called {name:?}")]
    ProviderExists {
        /// The provider.
        id: ProviderId,
        /// Its name here.
        name: String,
    },
}

impl StoreError {
    /// Whether it is about one row, and says nothing of the others.
    #[must_use]
    pub fn is_of_row(&self) -> bool {
        matches!(self, Self::DamagedRecord { .. } | Self::Inconsistent { .. })
    }

    /// What leads out, where that is not said by the error itself.
    #[must_use]
    pub fn advice(&self) -> Option<Advice> {
        Some(match self {
            Self::Damaged { .. } => Advice::from("keep a copy of its directory")
                .then(Advice::RestoreState)
                .also(
                    "without a backup, move the file away: sealed VMs are adopted again from their domain XML once their \
                     providers are restored",
                ),
            Self::TooNew { .. } => Advice::Upgrade,
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
        Self::new(Code::Failed, chain(error)).advised(error.advice())
    }
}

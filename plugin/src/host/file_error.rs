//! Why a file of root's can't be used, in the same words for whoever keeps some.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::model::advice::Advice;
use crate::terminal::word;

/// What was tried with a file or a directory, and why it failed.
#[derive(Debug, Error)]
#[error("can't {action} {}", .path.display())]
pub(crate) struct FileError {
    action: &'static str,
    path: PathBuf,
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// What is missing is a directory on the way, where the file itself was to be made or has been seen.
    pub(crate) fn advice(&self) -> Option<Advice> {
        let directory = self.path.parent()?;
        (self.source.kind() == io::ErrorKind::NotFound).then(|| {
            let next = format!(
                "ls -ld {}, and mount or make what is missing",
                word(directory.display())
            );
            next.into()
        })
    }

    /// Of `action`, such as `read`, on `path`.
    pub(crate) fn of(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

//! Why a file of root's can't be used, in the same words for whoever keeps some.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

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
    /// Of `action`, such as `read`, on `path`.
    pub(crate) fn of(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

//! Files that are complete and wait for their name: what can fail has been done, and nothing has been replaced.

use super::error::VolumeError;
use super::lock::ImageLock;
use super::staging::Staged;

/// A file that is on stable storage without a name, and what it will replace.
#[derive(Debug)]
pub struct Prepared {
    staged: Staged,
    replaced: Option<ImageLock>,
}

impl Prepared {
    /// `staged` is written and synced.
    pub(super) fn new(staged: Staged, replaced: Option<ImageLock>) -> Self {
        Self { staged, replaced }
    }

    /// Gives it its name. What it replaces is given back: keep hold of it for as long as anyone may still open it.
    ///
    /// # Errors
    /// [`VolumeError::Exists`], or [`VolumeError::Changed`] when the file to be replaced is another by now. That is still there then,
    /// except when only the last fsync of the directory failed.
    pub fn publish(self) -> Result<Option<ImageLock>, VolumeError> {
        let expected = self.replaced.as_ref().map(ImageLock::id);
        self.staged.publish(expected)?.sync()?;
        Ok(self.replaced)
    }
}

//! Files that are complete and wait for their name: what can fail has been done, and nothing has been replaced.

use super::error::VolumeError;
use super::lock::ImageLock;
use super::staging::{Staged, Step};

/// A file that is on stable storage without a name, and what it will replace.
#[derive(Debug)]
pub(crate) struct Prepared {
    staged: Staged,
    replaced: Option<ImageLock>,
}

impl Prepared {
    /// `staged` is written and synced.
    pub(in crate::object) fn new(staged: Staged, replaced: Option<ImageLock>) -> Self {
        Self { staged, replaced }
    }

    /// A file that `write` fills, to take the place of `replaced` with its owner and mode.
    pub(in crate::object) fn over(
        replaced: ImageLock,
        write: impl FnOnce(&Staged, &ImageLock) -> Result<(), VolumeError>,
    ) -> Result<Self, VolumeError> {
        let staged = Staged::beside(replaced.place())?;
        write(&staged, &replaced)?;
        staged.take_after(&replaced)?;
        staged.sync()?;
        Ok(Self::new(staged, Some(replaced)))
    }

    /// Gives it its name. What it replaces is given back: keep hold of it for as long as anyone may still open it.
    ///
    /// # Errors
    /// [`VolumeError::Exists`], or [`VolumeError::Changed`] when the file to be replaced is another by now. That is still there then,
    /// except when only the last fsync of the directory failed.
    pub(crate) fn publish(self) -> Result<Option<ImageLock>, VolumeError> {
        self.publish_watched(|_| {})
    }

    /// [`Self::publish`], telling `watch` of every step: for tests that stop there.
    pub(crate) fn publish_watched(
        self,
        mut watch: impl FnMut(Step),
    ) -> Result<Option<ImageLock>, VolumeError> {
        let expected = self.replaced.as_ref().map(ImageLock::id);
        let published = self.staged.publish(expected)?;
        watch(Step::Published);
        published.sync()?;
        watch(Step::Durable);
        Ok(self.replaced)
    }
}

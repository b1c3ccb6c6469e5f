//! Which file an image is.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

/// Which file, and which state of it, was inspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl From<&Metadata> for FileId {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

impl FileId {
    /// The file itself, whatever state it is in.
    pub(crate) fn inode(&self) -> (u64, u64) {
        (self.device, self.inode)
    }
}

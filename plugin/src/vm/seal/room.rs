//! Whether there is room for new files beside those that are to be replaced: an act that fails for that, fails late.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{AccessFlags, access};

use crate::host::permitted::PermittedPath;
use crate::model::problem::Problem;
use crate::terminal::word;

/// A new file of at most so many bytes at a place.
pub(super) struct NewFile<'a> {
    pub(super) place: &'a PermittedPath,
    pub(super) bytes: u64,
}

/// Why there is no room for some: a directory that can't be written, or no space in it.
pub(super) fn without_room<'a>(files: impl Iterator<Item = NewFile<'a>>) -> Vec<Problem> {
    let mut needed: BTreeMap<PathBuf, (u64, &PermittedPath)> = BTreeMap::new();
    for file in files {
        let directory = file.place.shown().parent().map(PathBuf::from).unwrap_or_default();
        needed.entry(directory).or_insert((0, file.place)).0 += file.bytes;
    }
    needed
        .into_iter()
        .filter_map(|(directory, (bytes, place))| refuse_full(&directory, bytes, place).err())
        .collect()
}

fn refuse_full(directory: &Path, bytes: u64, place: &PermittedPath) -> Result<(), Problem> {
    let shown = directory.display();
    let handle = place.directory_handle();
    let said = |what: String| Problem::failed(what);
    let space = statvfs(&handle).map_err(|error| said(format!("can't look at {shown}: {error}")))?;
    if space.flags().contains(FsFlags::ST_RDONLY) {
        return Err(
            said(format!("{shown} is on a file system that is mounted read-only")).next(format!(
                "findmnt --target {}, and mount it writable",
                word(directory.display())
            )),
        );
    }
    access(&handle, AccessFlags::W_OK).map_err(|error| {
        said(format!("can't write to {shown}: {error}")).next(format!("ls -ld {}", word(directory.display())))
    })?;
    // What root may use, too.
    let free = space.blocks_free().saturating_mul(space.fragment_size());
    if free < bytes {
        return Err(said(format!(
            "{shown} has {} KiB free, and the new files in it need {} KiB",
            free >> 10,
            bytes >> 10
        ))
        .next(format!("df -h {}, and make room", word(directory.display()))));
    }
    Ok(())
}

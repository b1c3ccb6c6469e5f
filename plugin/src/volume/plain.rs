//! Plain files in the place of encrypted ones that hold nothing.

use std::ops::ControlFlow;
use std::path::Path;

use super::error::{Attempt, VolumeError};
use super::held::Held;
use super::qemu_img::{qemu_img, run};
use super::size::Bytes;
use super::staging::Staged;

/// Puts an empty qcow2 image of `size` in the place of `replaced`.
///
/// # Errors
/// [`VolumeError`]; the old image is still there then, except when only the last fsync of the directory failed.
pub fn empty_over(replaced: &Held, size: Bytes) -> Result<(), VolumeError> {
    put_over(replaced, |staged, name| {
        let mut command = qemu_img(&["create", "-q", "-f", "qcow2"]);
        command.arg(name).arg(size.0.to_string());
        // An empty image has no progress to stop at.
        run(command, &[], replaced.path(), |_| ControlFlow::Continue(())).map(drop)?;
        staged.sync()
    })
}

/// Puts a copy of `source` in the place of `replaced`.
///
/// # Errors
/// [`VolumeError`]; the old file is still there then, except when only the last fsync of the directory failed.
pub fn copy_over(replaced: &Held, source: &Path) -> Result<(), VolumeError> {
    put_over(replaced, |staged, _| {
        let mut from = std::fs::File::open(source).attempt("open", source)?;
        std::io::copy(&mut from, &mut staged.file()).attempt("copy", source)?;
        staged.sync()
    })
}

fn put_over(
    replaced: &Held,
    write: impl FnOnce(&Staged, &Path) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    let staged = Staged::named_beside(replaced.path())?;
    let name = staged.name().expect("it was made with a name");
    staged.take_after(replaced)?;
    write(&staged, name)?;
    staged.publish(Some(replaced.id()))?.sync()
}

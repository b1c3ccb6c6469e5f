//! The images that an image rests on.

use std::collections::HashSet;
use std::path::{Component, Path, PathBuf};

use super::error::VolumeError;
use super::file_id::FileId;
use super::open::Image;
use crate::host::permitted::PermittedPath;
use crate::model::image_format::Format;

/// libvirt's own limit.
const DEEPEST: usize = 200;

/// One image of a backing chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    pub path: PathBuf,
    pub file_id: FileId,
    /// What it is to QEMU: the format that the layer above declares.
    pub format: Format,
    pub encrypted: bool,
}

/// The images that `top` rests on, itself first, as far as they can be followed; and why not further: the errors of
/// [`inspect`](super::inspect) for a layer, and [`VolumeError::Chain`] for a loop, a missing file, more than 200 layers, or a backing file
/// that is no local file. Formats are those that the images declare; a guest can write any header into a disk that is declared raw.
/// Each layer is named by the one above, so `permit` decides whether it is looked at.
pub(crate) fn known_layers(
    top: &PermittedPath,
    permit: impl Fn(&Path) -> Result<PermittedPath, VolumeError>,
) -> (Vec<Layer>, Option<VolumeError>) {
    let mut layers = Vec::new();
    let followed = follow_chain(top, permit, &mut layers);
    (layers, followed.err())
}

fn follow_chain(
    top: &PermittedPath,
    permit: impl Fn(&Path) -> Result<PermittedPath, VolumeError>,
    layers: &mut Vec<Layer>,
) -> Result<(), VolumeError> {
    let broken = |reason| VolumeError::Chain {
        path: top.shown().to_owned(),
        reason,
    };
    let mut seen = HashSet::new();
    let mut next = Some((top.clone(), None));
    while let Some((layer, declared)) = next {
        let shown = layer.shown().display();
        let image = Image::open_as(&layer, declared.as_deref()).map_err(|error| match error {
            VolumeError::NotFound(_) if !layers.is_empty() => {
                broken(format!("include {shown}, which does not exist"))
            }
            error => error,
        })?;
        if !seen.insert(image.file_id().inode()) {
            return Err(broken(format!("form a loop at {shown}")));
        }
        if layers.len() == DEEPEST {
            return Err(broken(format!("are more than {DEEPEST} deep")));
        }
        let format = image.format()?;
        layers.push(Layer {
            path: image.path().to_owned(),
            file_id: image.file_id(),
            format,
            encrypted: format.is_encrypted(),
        });
        next = match image.qcow2().and_then(|header| header.backing.as_ref()) {
            Some(backing) => {
                let local = local_file_name(&backing.name).ok_or_else(|| {
                    broken(format!("include `{}`, which is not a local file", backing.name))
                })?;
                let directory = image.path().parent().unwrap_or(Path::new(""));
                Some((permit(&joined(directory, local))?, backing.format.clone()))
            }
            None => None,
        };
    }
    Ok(())
}

/// `..` in the name is taken by its word, as nobody's links are followed.
fn joined(directory: &Path, name: &str) -> PathBuf {
    let mut path = PathBuf::new();
    for part in directory.join(name).components() {
        match part {
            Component::ParentDir if path.has_root() || path.file_name().is_some() => drop(path.pop()),
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    path
}

/// The path that QEMU would open for the name of a backing file; `None` for other protocols and for JSON.
pub(super) fn local_file_name(name: &str) -> Option<&str> {
    let local = name.strip_prefix("file:").unwrap_or(name);
    let before_slash = local.split('/').next().unwrap_or_default();
    (!before_slash.contains(':') && !local.is_empty()).then_some(local)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_name_counts_from_the_directory_of_the_image() {
        for (name, joined_to) in [
            ("../b/./c", "/a/b/c"),
            ("../../../c", "/c"),
            ("/x", "/x"),
            ("c", "/a/d/c"),
        ] {
            assert_eq!(joined(Path::new("/a/d"), name), Path::new(joined_to), "{name}");
        }
    }

    #[test]
    fn names_of_backing_files() {
        assert_eq!(local_file_name("base.qcow2"), Some("base.qcow2"));
        assert_eq!(local_file_name("/a/b:c"), Some("/a/b:c"));
        assert_eq!(local_file_name("file:base"), Some("base"));
        for other in ["nbd://host/x", "json:{}", "b:c", "", "file:"] {
            assert_eq!(local_file_name(other), None, "{other}");
        }
    }
}

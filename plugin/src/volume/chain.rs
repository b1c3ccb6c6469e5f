//! The images that an image rests on.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::error::VolumeError;
use super::open::{Format, Image};

/// libvirt's own limit.
const DEEPEST: usize = 200;

/// One image of a backing chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Layer {
    /// The file.
    pub path: PathBuf,
    /// What it is to QEMU: the format that the layer above declares.
    pub format: Format,
    /// Whether its data is encrypted.
    pub encrypted: bool,
}

/// The images that `path` rests on, itself first. Formats are those that the images declare; a guest can write any
/// header into a disk that is declared raw.
///
/// # Errors
/// Those of [`inspect`](super::inspect) for every layer, and [`VolumeError::Chain`] for a loop, a missing file, more than 200
/// layers, or a backing file that is no local file.
pub fn backing_chain(path: &Path) -> Result<Vec<Layer>, VolumeError> {
    let mut layers = Vec::new();
    let mut seen = HashSet::new();
    let mut next = Some((path.to_owned(), None));
    while let Some((layer, declared)) = next {
        let broken = |reason| VolumeError::Chain {
            path: path.to_owned(),
            reason,
        };
        let image = Image::open_as(&layer, declared.as_deref()).map_err(|error| match error {
            VolumeError::NotFound(missing) if !layers.is_empty() => {
                broken(format!("include {}, which does not exist", missing.display()))
            }
            error => error,
        })?;
        if !seen.insert(image.file_id().inode()) {
            return Err(broken(format!("form a loop at {}", layer.display())));
        }
        if layers.len() == DEEPEST {
            return Err(broken(format!("are more than {DEEPEST} deep")));
        }
        let format = image.format()?;
        layers.push(Layer {
            path: image.path().to_owned(),
            format,
            encrypted: format.is_encrypted(),
        });
        next = backing_of(&image, path)?;
    }
    Ok(layers)
}

/// Path and declared format of the backing file; `top` is for messages.
fn backing_of(image: &Image, top: &Path) -> Result<Option<(PathBuf, Option<String>)>, VolumeError> {
    let Some(backing) = image.qcow2().and_then(|header| header.backing.as_ref()) else {
        return Ok(None);
    };
    let local = local_file_name(&backing.name).ok_or_else(|| VolumeError::Chain {
        path: top.to_owned(),
        reason: format!("include `{}`, which is no local file", backing.name),
    })?;
    let directory = image.path().parent().unwrap_or(Path::new(""));
    Ok(Some((directory.join(local), backing.format.clone())))
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
    fn names_of_backing_files() {
        assert_eq!(local_file_name("base.qcow2"), Some("base.qcow2"));
        assert_eq!(local_file_name("/a/b:c"), Some("/a/b:c"));
        assert_eq!(local_file_name("file:base"), Some("base"));
        for other in ["nbd://host/x", "json:{}", "b:c", "", "file:"] {
            assert_eq!(local_file_name(other), None, "{other}");
        }
    }
}

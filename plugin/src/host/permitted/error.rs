//! Why root does not act at a path, and what leads out of that.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::terminal::word;

/// Why root does not act at a path.
#[derive(Debug, Error)]
pub(crate) enum PathError {
    /// Relative, or with `..` in it.
    #[error("{} is not a plain absolute path", .0.display())]
    Odd(PathBuf),
    /// In no directory that is permitted. Says nothing of what is there.
    #[error(
        "{} is named by others than root, and is neither in a directory of libvirt nor in an active storage pool nor in image_dirs",
        path.display()
    )]
    Outside {
        path: PathBuf,
        /// Its directory, as it is named.
        directory: PathBuf,
        image_dirs: Vec<PathBuf>,
    },
    /// In one of them, and not for everybody to read.
    #[error("{} is not for everybody to read, and in no directory of image_dirs", path.display())]
    Private { path: PathBuf, image_dirs: Vec<PathBuf> },
    #[error("{} is in virtseal's own directory", .0.display())]
    OfVirtseal(PathBuf),
    #[error(
        "{} leads through the link {}, which others than root can change",
        path.display(), link.display()
    )]
    Link {
        path: PathBuf,
        link: PathBuf,
        /// Where it leads now, as it says itself.
        target: PathBuf,
    },
    /// A file with another name, in a directory that others can write.
    #[error("{} is a hard link: the file has other names as well", .0.display())]
    HardLink(PathBuf),
    #[error("{} leads through too many links", .0.display())]
    Loop(PathBuf),
    /// A directory is not there, or is none.
    #[error("can't reach {}", at.display())]
    Io {
        at: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl PathError {
    /// A directory on the way is not there.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

impl From<PathError> for Problem {
    fn from(error: PathError) -> Self {
        let said = chain(&error);
        let edit = |what: String| Advice::EditXml("VM".into()).within(what);
        match error {
            PathError::Outside {
                directory,
                image_dirs,
                ..
            } => Self::new(Code::Denied, said).next(line_to_add(image_dirs, directory)),
            PathError::Private { path, image_dirs } => {
                let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
                Self::new(Code::Denied, said).next(line_to_add(image_dirs, directory))
            }
            PathError::Link { path, target, .. } => Self::new(Code::Denied, said).next(
                edit(format!(
                    "name the file itself instead of {} (the link says {})",
                    word(path.display()),
                    word(target.display())
                ))
                .or("have root make the link where root alone can write"),
            ),
            PathError::HardLink(path) => {
                let copy = word(format!("{}.copy", path.display()));
                Self::new(Code::Denied, said).next(
                    Advice::from(format!("cp --sparse=always {} {copy}", word(path.display())))
                        .then(edit(format!("name {copy}"))),
                )
            }
            PathError::Odd(_) | PathError::Loop(_) => {
                Self::new(Code::Denied, said).next(edit("name the file by its absolute path".into()))
            }
            PathError::OfVirtseal(_) => {
                Self::new(Code::Denied, said).next(edit("name a file of its own".into()))
            }
            PathError::Io { ref at, ref source } if source.kind() == io::ErrorKind::NotFound => {
                let next = format!("ls -ld {}, and mount or make what is missing", word(at.display()));
                Self::new(Code::NotFound, format!("{} does not exist", at.display())).next(next)
            }
            PathError::Io { .. } => Self::new(Code::Failed, said),
        }
    }
}

fn line_to_add(mut image_dirs: Vec<PathBuf>, directory: PathBuf) -> Advice {
    image_dirs.push(directory);
    let dirs: Vec<_> = image_dirs.iter().map(|dir| yaml_word(dir)).collect();
    Advice::from(format!(
        "if that directory is for files of VMs, put the line `image_dirs: [{}]` into {}",
        dirs.join(", "),
        Advice::SETTINGS
    ))
    .then(Advice::ReloadDaemon)
}

/// A path in a flow sequence of YAML.
fn yaml_word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-".contains(c);
    if text.chars().all(is_plain) {
        return text;
    }
    serde_json::Value::String(text).to_string()
}

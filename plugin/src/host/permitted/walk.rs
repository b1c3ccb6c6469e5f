//! The walk from `/` to a path, each directory opened below the one before it.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat};

use super::{PathError, PermittedPath};

/// Linux follows as many.
const MAX_LINKS: usize = 40;

/// A directory that permits something.
#[derive(Clone, Debug)]
pub(super) struct Ground {
    /// Without links.
    pub(super) path: PathBuf,
    pub(super) reach: Reach,
}

/// How far it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// What is in it.
    Directly,
    /// And in the directories in it.
    Below,
}

/// Whether the keystore has a path for an object of the same VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    No,
    ToTheKeystore,
}

/// A directory that was walked into.
#[derive(Debug)]
pub(super) struct Step {
    pub(super) fd: Arc<OwnedFd>,
    /// Without links.
    pub(super) path: PathBuf,
    /// It, and all above it.
    pub(super) is_roots: bool,
    pub(super) grant: Option<Reach>,
}

/// How a walk ended.
#[derive(Clone, Debug, Default)]
pub(super) struct Walked {
    /// From `/` to where the walk went last, never empty.
    pub(super) steps: Vec<Arc<Step>>,
    /// The last component; none for `/`.
    pub(super) name: Option<OsString>,
    /// What has that name.
    pub(super) found: Option<FileStat>,
    /// A link of root's in a permitted directory was followed.
    pub(super) is_granted: bool,
}

impl Walked {
    pub(super) fn directory(&self) -> &Step {
        self.steps.last().expect("a walk begins with /")
    }

    pub(super) fn is_granted(&self) -> bool {
        self.is_granted || self.steps.last().is_some_and(|step| step.grant.is_some())
    }

    pub(super) fn into_permitted(mut self, path: &Path) -> Result<PermittedPath, PathError> {
        let is_linked = |found: FileStat| is_kind(&found, libc::S_IFREG) && found.st_nlink > 1;
        if !self.directory().is_roots && self.found.is_some_and(is_linked) {
            return Err(PathError::HardLink(path.to_owned()));
        }
        let directory = self.steps.pop().expect("a walk begins with /");
        Ok(PermittedPath {
            directory: Arc::clone(&directory.fd),
            name: self.name.ok_or_else(|| PathError::Odd(path.to_owned()))?,
            shown: path.to_owned(),
        })
    }
}

/// The directories that walks have led to last: who looks at many files in them goes there once, and they are judged as they were found
/// then. Not for longer than one look.
#[derive(Clone, Debug, Default)]
pub(super) struct Trail(Arc<Mutex<VecDeque<Reached>>>);

/// Of several threads, each with images and variables. Each is held open.
const TRAIL: usize = 8;

#[derive(Clone, Debug)]
struct Reached {
    /// As it was written.
    directory: PathBuf,
    known: Known,
    walked: Walked,
    links: usize,
}

impl Trail {
    /// How walks for the same get to this directory, if one of the last ones did.
    fn to(&self, directory: &Path, known: Known) -> Option<Reached> {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |last: &&Reached| last.known == known && last.directory == directory;
        last.iter().find(is_it).cloned()
    }

    fn leads(&self, reached: Reached) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.truncate(TRAIL - 1);
        last.push_front(reached);
    }
}

/// Where a directory that somebody has configured really is.
pub(super) fn physical(path: &Path) -> Result<PathBuf, PathError> {
    let walked = walk_anywhere(path)?;
    let directory = walked.directory().path.clone();
    match (walked.name, walked.found) {
        (None, _) => Ok(directory),
        (Some(name), Some(_)) => Ok(directory.join(name)),
        (Some(name), None) => Err(PathError::Io {
            at: directory.join(name),
            source: io::ErrorKind::NotFound.into(),
        }),
    }
}

/// To what root has named, or libvirt.
pub(super) fn walk_anywhere(path: &Path) -> Result<Walked, PathError> {
    Walk::new(&[], Known::ToTheKeystore)
        .to(path)
        .map_err(|stopped| stopped.why)
}

/// Why a walk ended before its last component.
pub(super) struct Stopped {
    pub(super) why: PathError,
    /// Whether what it came to was permitted, so that it may be told.
    pub(super) is_granted: bool,
}

/// Goes from `/` to the directory of a path, component by component, each opened below the one before it.
pub(super) struct Walk<'a> {
    grounds: &'a [Ground],
    known: Known,
    trail: Option<&'a Trail>,
    /// So far; without steps until it has begun.
    walked: Walked,
    links: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(grounds: &'a [Ground], known: Known) -> Self {
        Self {
            grounds,
            known,
            trail: None,
            walked: Walked::default(),
            links: 0,
        }
    }

    /// From where an earlier one has led, with the same grounds.
    pub(super) fn along(self, trail: Option<&'a Trail>) -> Self {
        Self { trail, ..self }
    }

    pub(super) fn to(mut self, path: &Path) -> Result<Walked, Stopped> {
        match self.go(path) {
            Ok(()) => Ok(self.walked),
            Err(why) => Err(Stopped {
                why,
                is_granted: self.walked.is_granted(),
            }),
        }
    }

    /// As far as the last component, which is not entered.
    fn go(&mut self, path: &Path) -> Result<(), PathError> {
        if !is_plain(path) {
            return Err(PathError::Odd(path.to_owned()));
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut trail = self.trail.zip(path.parent());
        let mut ahead = match trail.and_then(|(trail, directory)| trail.to(directory, self.known)) {
            Some(reached) => {
                (self.walked, self.links, trail) = (reached.walked, reached.links, None);
                path.file_name().map(OsStr::to_owned).into_iter().collect()
            }
            None => {
                let root = open("/", flags, Mode::empty()).map_err(|errno| io_at(Path::new("/"), errno))?;
                let found = fstat(&root).map_err(|errno| io_at(Path::new("/"), errno))?;
                self.enter(root, "/".into(), &found);
                parts(path)
            }
        };
        while let Some(part) = ahead.pop_front() {
            if ahead.is_empty()
                && let Some((trail, directory)) = trail.take()
            {
                trail.leads(Reached {
                    directory: directory.to_owned(),
                    known: self.known,
                    walked: self.walked.clone(),
                    links: self.links,
                });
            }
            if part == ".." {
                let above = self.walked.steps.len() - 1;
                self.walked.steps.truncate(above.max(1));
                continue;
            }
            let here = self.walked.directory();
            let at = here.path.join(&part);
            if !self.may_look_below(here) {
                return Err(io_at(&at, Errno::EACCES));
            }
            let is_last = ahead.is_empty();
            let fd = match openat(&here.fd, part.as_os_str(), flags, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::ENOENT) if is_last => {
                    self.walked.name = Some(part);
                    return Ok(());
                }
                Err(errno) => return Err(io_at(&at, errno)),
            };
            let found = fstat(&fd).map_err(|errno| io_at(&at, errno))?;
            if is_kind(&found, libc::S_IFLNK) {
                let target = PathBuf::from(readlinkat(&fd, "").map_err(|errno| io_at(&at, errno))?);
                let mut then = self.follow(path, at, target, &found)?;
                then.append(&mut ahead);
                ahead = then;
            } else if is_last {
                self.walked.name = Some(part);
                self.walked.found = Some(found);
                return Ok(());
            } else {
                self.enter(fd, at, &found);
            }
        }
        Ok(())
    }

    /// In a directory of others nothing is looked at in vain: it may be a file system of theirs, which answers when they like.
    fn may_look_below(&self, here: &Step) -> bool {
        self.known == Known::ToTheKeystore
            || self.walked.is_granted
            || here.is_roots
            || here.grant.is_some()
            || self
                .grounds
                .iter()
                .any(|ground| ground.path.starts_with(&here.path))
    }

    fn enter(&mut self, fd: OwnedFd, path: PathBuf, found: &FileStat) {
        let above = self.walked.steps.last();
        let inherited = above
            .and_then(|step| step.grant)
            .filter(|reach| *reach == Reach::Below);
        let own = self.grounds.iter().filter(|ground| ground.path == path);
        let step = Step {
            is_roots: above.is_none_or(|step| step.is_roots) && only_root_writes(found),
            grant: inherited.or(own.map(|ground| ground.reach).max()),
            path,
            fd: Arc::new(fd),
        };
        self.walked.steps.push(Arc::new(step));
    }

    /// What a link leads to, from the directory on where the walk is then.
    fn follow(
        &mut self,
        path: &Path,
        link: PathBuf,
        target: PathBuf,
        found: &FileStat,
    ) -> Result<VecDeque<OsString>, PathError> {
        let here = self.walked.directory();
        if !here.is_roots || found.st_uid != 0 {
            let path = path.to_owned();
            return Err(PathError::Link { path, link, target });
        }
        let is_granted = here.grant.is_some();
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(PathError::Loop(path.to_owned()));
        }
        self.walked.is_granted |= is_granted;
        if target.is_absolute() {
            self.walked.steps.truncate(1);
        }
        Ok(parts(&target))
    }
}

pub(super) fn is_kind(found: &FileStat, kind: libc::mode_t) -> bool {
    found.st_mode & libc::S_IFMT == kind
}

fn io_at(at: &Path, errno: Errno) -> PathError {
    PathError::Io {
        at: at.to_owned(),
        source: errno.into(),
    }
}

/// Absolute, and without `..`.
pub(super) fn is_plain(path: &Path) -> bool {
    let is_plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute() && path.components().all(is_plain) && !path.as_os_str().as_bytes().contains(&0)
}

fn parts(path: &Path) -> VecDeque<OsString> {
    let named = path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name),
        Component::ParentDir => Some(OsStr::new("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    });
    named.map(OsStr::to_owned).collect()
}

/// Where there is an access control list, the bits of the group bound what it gives to anybody.
fn only_root_writes(found: &FileStat) -> bool {
    found.st_uid == 0 && found.st_mode & 0o022 == 0
}

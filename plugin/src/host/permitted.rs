//! Paths that other people have written, and the only way by which root acts at them or reads there.
//!
//! Domain XML, image headers and whatever was taken from them name files, and never choose one for root: what reads a header, writes,
//! renames, removes or takes over a file, or puts its content into a VM, wants a [`PermittedPath`]. A [`PathRule`] makes one of a path
//! - in a directory of libvirt's own, in an active storage pool (`pool.rs`), or in `image_dirs` ([`PathRule::permit`]), or
//! - that the keystore knows as that of this VM's object ([`PathRule::permit_known`]),
//!
//! after a walk from `/` in which a link is followed only where it belongs to root and every directory on the way can be written by
//! root alone: LVM's `/dev/vg/lv` passes, a link that a user planted does not. What comes out holds the directory open, so nothing
//! that happens to the path afterwards leads elsewhere. What root names on a command line is [`PermittedPath::named_by_root`].
//!
//! Of what is outside nothing is told, not even whether it is there: each such path is refused in the same words, and nothing of it is
//! opened. A walk does not enter a directory that others can change, unless something that is permitted is below it.

mod pool;

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use thiserror::Error;

use crate::config::Config;
use crate::host::libvirt::StoragePool;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::terminal::word;
use pool::QemuIds;

/// Linux follows as many.
const MAX_LINKS: usize = 40;
/// Where firmware comes with its templates.
const FIRMWARE: [&str; 3] = ["/usr/share", "/usr/local/share", "/usr/lib"];

/// A name in a directory that is held open.
#[derive(Clone, Debug)]
pub struct PermittedPath {
    directory: Arc<OwnedFd>,
    name: OsString,
    shown: PathBuf,
    /// Whether others than root can change what is in the directory, or which one it is.
    is_exposed: bool,
}

impl PermittedPath {
    /// What root has named, in a command or in a setting: links are followed as ever, once.
    ///
    /// # Errors
    /// When there is no such directory.
    pub fn named_by_root(path: &Path) -> io::Result<Self> {
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let name = target.file_name().ok_or(io::ErrorKind::IsADirectory)?.to_owned();
        let directory = match target.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self {
            directory: Arc::new(open(directory, flags, Mode::empty())?),
            name,
            shown: path.to_owned(),
            is_exposed: false,
        })
    }

    /// For messages, and for what is kept: the path as it was given. Not to be opened.
    #[must_use]
    pub fn shown(&self) -> &Path {
        &self.shown
    }

    /// Reaches the name through the open directory, whatever has become of the path. Of this process only.
    #[must_use]
    pub fn handle(&self) -> PathBuf {
        self.directory_handle().join(&self.name)
    }

    /// Reaches the directory.
    #[must_use]
    pub fn directory_handle(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.directory.as_raw_fd()).into()
    }

    /// What has the name now; a link is not followed.
    ///
    /// # Errors
    /// Those of `lstat`.
    pub fn metadata(&self) -> io::Result<Metadata> {
        fs::symlink_metadata(self.handle())
    }

    /// Whether the name is taken.
    #[must_use]
    pub fn exists(&self) -> bool {
        !matches!(self.metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound)
    }

    /// Opens the file, which is a regular one or a block device: opening anything else may wait for somebody, or have effects. It is
    /// taken hold of before that is looked at, so nothing can come in its place; a link that came meanwhile is an error.
    ///
    /// # Errors
    /// Those of `open`, and `InvalidInput` for anything else.
    pub fn open(&self, options: &mut OpenOptions) -> io::Result<File> {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let held = openat(&self.directory, self.name.as_os_str(), flags, Mode::empty())?;
        match fstat(&held)?.st_mode & libc::S_IFMT {
            libc::S_IFREG | libc::S_IFBLK => {}
            libc::S_IFLNK => return Err(Errno::ELOOP.into()),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
        options
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/self/fd/{}", held.as_raw_fd()))
    }

    /// Whether others than root can put something else there at any time.
    #[must_use]
    pub fn is_exposed(&self) -> bool {
        self.is_exposed
    }
}

/// Where root acts at paths that others have written.
#[derive(Clone, Debug, Default)]
pub struct PathRule {
    /// libvirt's own.
    own: Vec<PathBuf>,
    image_dirs: Vec<PathBuf>,
    pools: Vec<StoragePool>,
    /// Nothing in it belongs to a VM.
    state_dir: PathBuf,
    /// What all of that is on this host: looked at once, when it is first asked for.
    grounds: OnceLock<Vec<Ground>>,
    /// Where the state directory really is, looked at once too.
    state: OnceLock<Option<PathBuf>>,
}

/// A directory that permits something.
#[derive(Clone, Debug)]
struct Ground {
    /// Without links.
    path: PathBuf,
    reach: Reach,
}

/// How far it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// What is in it.
    Directly,
    /// And in the directories in it.
    Below,
}

impl PathRule {
    /// Where libvirt keeps images that nobody has put elsewhere.
    pub const IMAGES: &str = "/var/lib/libvirt/images";

    /// What the configuration permits.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        Self {
            own: vec![
                Self::IMAGES.into(),
                config.nvram_dir.clone(),
                config.swtpm_dir.clone(),
            ],
            image_dirs: config.image_dirs.clone(),
            state_dir: config.state_dir.clone(),
            ..Self::default()
        }
    }

    /// And the volumes of active storage pools.
    #[must_use]
    pub fn with_pools(mut self, pools: Vec<StoragePool>) -> Self {
        self.pools = pools;
        self.grounds = OnceLock::new();
        self
    }

    /// A path in one of the directories.
    ///
    /// # Errors
    /// [`PathError`]; one outside of them is told which setting permits it.
    pub fn permit(&self, path: &Path) -> Result<PermittedPath, PathError> {
        self.judge(path, Known::No)
    }

    /// A path in one of the directories, or one that the keystore has for an object of the same VM. Who replaces what is there must
    /// have opened it with that object's key.
    ///
    /// # Errors
    /// As [`Self::permit`].
    pub fn permit_known(
        &self,
        path: &Path,
        mut known: impl Iterator<Item = impl AsRef<Path>>,
    ) -> Result<PermittedPath, PathError> {
        let is_known = known.any(|known| known.as_ref() == path);
        self.judge(path, if is_known { Known::ToTheKeystore } else { Known::No })
    }

    /// A template of UEFI variables, which root puts into a VM: one that came with the host's firmware or that the host's settings
    /// name, one that anybody may read, or one in a directory of `image_dirs`.
    ///
    /// # Errors
    /// As [`Self::permit`].
    pub fn permit_template(&self, path: &Path, of_host: &[PathBuf]) -> Result<PermittedPath, PathError> {
        if of_host.iter().any(|named| named == path) {
            return walk_anywhere(path)?.into_permitted(path);
        }
        let firmware = Self {
            own: FIRMWARE.iter().map(PathBuf::from).collect(),
            ..Self::default()
        };
        let is_public = |place: &PermittedPath| place.metadata().is_ok_and(|found| found.mode() & 0o004 != 0);
        let is_harmless = |place: &PermittedPath| !place.exists() || is_public(place);
        if let Some(place) = firmware.permit(path).ok().filter(is_harmless) {
            return Ok(place);
        }
        let place = self.permit(path)?;
        let named = Self {
            image_dirs: self.image_dirs.clone(),
            ..Self::default()
        };
        if is_harmless(&place) || named.permit(path).is_ok() {
            return Ok(place);
        }
        Err(PathError::Private {
            path: path.to_owned(),
            image_dirs: self.image_dirs.clone(),
        })
    }

    fn judge(&self, path: &Path, known: Known) -> Result<PermittedPath, PathError> {
        if !is_plain(path) || path.file_name().is_none() {
            return Err(PathError::Odd(path.to_owned()));
        }
        let has_state = self.state_dir.is_absolute();
        if has_state && path.starts_with(&self.state_dir) {
            return Err(PathError::OfVirtseal(path.to_owned()));
        }
        let walked = match Walk::new(self.grounds(), known).to(path) {
            Ok(walked) if known == Known::ToTheKeystore || walked.is_granted() => walked,
            Err(stopped) if known == Known::ToTheKeystore || stopped.is_granted => return Err(stopped.why),
            Ok(_) | Err(_) => return Err(self.outside(path)),
        };
        let state = self.state.get_or_init(|| physical(&self.state_dir).ok());
        let in_state = |dir: &PathBuf| walked.directory().path.starts_with(dir);
        if has_state && state.as_ref().is_some_and(in_state) {
            return Err(PathError::OfVirtseal(path.to_owned()));
        }
        walked.into_permitted(path)
    }

    /// The same for whatever is there or is not. Only of a directory that root has named itself it is told why that permits nothing.
    fn outside(&self, path: &Path) -> PathError {
        let mut named = self.own.iter().chain(&self.image_dirs);
        let unusable = named.find_map(|dir| path.starts_with(dir).then(|| physical(dir).err()).flatten());
        unusable.unwrap_or_else(|| PathError::Outside {
            path: path.to_owned(),
            directory: path.parent().unwrap_or(path).to_owned(),
            image_dirs: self.image_dirs.clone(),
        })
    }

    /// Where the directories really are; one that is not there, or is reached through a link that others can change, permits nothing.
    fn grounds(&self) -> &[Ground] {
        self.grounds.get_or_init(|| {
            let below = |path| Ground {
                path,
                reach: Reach::Below,
            };
            let named = self.own.iter().chain(&self.image_dirs);
            let mut grounds: Vec<_> = named.filter_map(|dir| physical(dir).ok()).map(below).collect();
            if !self.pools.is_empty() {
                let qemu = QemuIds::of_this_host();
                let pools = self.pools.iter().filter(|pool| pool::opens(pool, &qemu));
                let directly = |path| Ground {
                    path,
                    reach: Reach::Directly,
                };
                grounds.extend(pools.filter_map(|pool| physical(&pool.path).ok()).map(directly));
            }
            grounds
        })
    }
}

/// Whether the keystore has a path for an object of the same VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    No,
    ToTheKeystore,
}

/// Why root does not act at a path.
#[derive(Debug, Error)]
pub enum PathError {
    /// Relative, or with `..` in it.
    #[error("{} is no plain absolute path", .0.display())]
    Odd(PathBuf),
    /// In no directory that is permitted. Says nothing of what is there.
    #[error(
        "{} is named by others than root, and is neither in a directory of libvirt nor in an active storage pool nor in image_dirs",
        path.display()
    )]
    Outside {
        /// The path.
        path: PathBuf,
        /// Its directory, as it is named.
        directory: PathBuf,
        /// What is permitted now.
        image_dirs: Vec<PathBuf>,
    },
    /// In one of them, and not for everybody to read.
    #[error("{} is not for everybody to read, and in no directory of image_dirs", path.display())]
    Private {
        /// The path.
        path: PathBuf,
        /// What is permitted now.
        image_dirs: Vec<PathBuf>,
    },
    /// In the state directory.
    #[error("{} is in virtseal's own directory", .0.display())]
    OfVirtseal(PathBuf),
    /// A link that root does not follow.
    #[error(
        "{} leads through the link {}, which others than root can change",
        path.display(), link.display()
    )]
    Link {
        /// The path.
        path: PathBuf,
        /// The link.
        link: PathBuf,
        /// Where it leads now, as it says itself.
        target: PathBuf,
    },
    /// A file with another name, in a directory that others can write.
    #[error("{} is a hard link: the file has other names as well", .0.display())]
    HardLink(PathBuf),
    /// Links without end.
    #[error("{} leads through too many links", .0.display())]
    Loop(PathBuf),
    /// A directory is not there, or is none.
    #[error("can't reach {}", at.display())]
    Io {
        /// What can't be reached.
        at: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl PathError {
    /// A directory on the way is not there.
    #[must_use]
    pub fn is_missing(&self) -> bool {
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
        Config::DEFAULT_PATH
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

/// A directory that was walked into.
struct Step {
    fd: OwnedFd,
    /// Without links.
    path: PathBuf,
    /// It, and all above it.
    is_roots: bool,
    grant: Option<Reach>,
}

/// How a walk ended.
struct Walked {
    /// From `/` to where the walk went last, never empty.
    steps: Vec<Step>,
    /// The last component; none for `/`.
    name: Option<OsString>,
    /// What has that name.
    found: Option<FileStat>,
    /// A link of root's in a permitted directory was followed.
    is_granted: bool,
}

impl Walked {
    fn directory(&self) -> &Step {
        self.steps.last().expect("a walk begins with /")
    }

    fn is_granted(&self) -> bool {
        self.is_granted || self.directory().grant.is_some()
    }

    fn into_permitted(mut self, path: &Path) -> Result<PermittedPath, PathError> {
        let is_exposed = !self.directory().is_roots;
        let is_file = |found: &FileStat| found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits();
        if is_exposed
            && self
                .found
                .is_some_and(|found| is_file(&found) && found.st_nlink > 1)
        {
            return Err(PathError::HardLink(path.to_owned()));
        }
        let directory = self.steps.pop().expect("a walk begins with /");
        Ok(PermittedPath {
            directory: Arc::new(directory.fd),
            name: self.name.ok_or_else(|| PathError::Odd(path.to_owned()))?,
            shown: path.to_owned(),
            is_exposed,
        })
    }
}

/// Where a directory that somebody has configured really is.
fn physical(path: &Path) -> Result<PathBuf, PathError> {
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
fn walk_anywhere(path: &Path) -> Result<Walked, PathError> {
    Walk::new(&[], Known::ToTheKeystore)
        .to(path)
        .map_err(|stopped| stopped.why)
}

/// Why a walk ended before its last component.
struct Stopped {
    why: PathError,
    /// Whether what it came to was permitted, so that it may be told.
    is_granted: bool,
}

/// Goes from `/` to the directory of a path, component by component, each opened below the one before it.
struct Walk<'a> {
    grounds: &'a [Ground],
    known: Known,
    /// From `/` on, never empty once it has begun.
    steps: Vec<Step>,
    links: usize,
    /// A link of root's in a permitted directory was followed.
    is_granted: bool,
}

impl<'a> Walk<'a> {
    fn new(grounds: &'a [Ground], known: Known) -> Self {
        Self {
            grounds,
            known,
            steps: Vec::new(),
            links: 0,
            is_granted: false,
        }
    }

    fn to(mut self, path: &Path) -> Result<Walked, Stopped> {
        match self.go(path) {
            Ok((name, found)) => Ok(Walked {
                steps: self.steps,
                name,
                found,
                is_granted: self.is_granted,
            }),
            Err(why) => Err(Stopped {
                why,
                is_granted: self.is_granted || self.steps.last().is_some_and(|step| step.grant.is_some()),
            }),
        }
    }

    /// The last component, which is not entered, and what has that name.
    fn go(&mut self, path: &Path) -> Result<(Option<OsString>, Option<FileStat>), PathError> {
        if !is_plain(path) {
            return Err(PathError::Odd(path.to_owned()));
        }
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let root = open("/", flags, Mode::empty()).map_err(|errno| io_at(Path::new("/"), errno))?;
        let found = fstat(&root).map_err(|errno| io_at(Path::new("/"), errno))?;
        self.enter(root, "/".into(), &found);
        let mut ahead = parts(path);
        while let Some(part) = ahead.pop_front() {
            if part == ".." {
                self.steps.truncate((self.steps.len() - 1).max(1));
                continue;
            }
            let here = self.steps.last().expect("a walk begins with /");
            let at = here.path.join(&part);
            if !self.may_look_below(here) {
                return Err(io_at(&at, Errno::EACCES));
            }
            let is_last = ahead.is_empty();
            let fd = match openat(&here.fd, part.as_os_str(), flags, Mode::empty()) {
                Ok(fd) => fd,
                Err(Errno::ENOENT) if is_last => return Ok((Some(part), None)),
                Err(errno) => return Err(io_at(&at, errno)),
            };
            let found = fstat(&fd).map_err(|errno| io_at(&at, errno))?;
            if found.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFLNK.bits() {
                let target = PathBuf::from(readlinkat(&fd, "").map_err(|errno| io_at(&at, errno))?);
                let mut then = self.follow(path, at, target, &found)?;
                then.append(&mut ahead);
                ahead = then;
            } else if is_last {
                return Ok((Some(part), Some(found)));
            } else {
                self.enter(fd, at, &found);
            }
        }
        Ok((None, None))
    }

    /// In a directory of others nothing is looked at in vain: it may be a file system of theirs, which answers when they like.
    fn may_look_below(&self, here: &Step) -> bool {
        self.known == Known::ToTheKeystore
            || self.is_granted
            || here.is_roots
            || here.grant.is_some()
            || self
                .grounds
                .iter()
                .any(|ground| ground.path.starts_with(&here.path))
    }

    fn enter(&mut self, fd: OwnedFd, path: PathBuf, found: &FileStat) {
        let above = self.steps.last();
        let inherited = above
            .and_then(|step| step.grant)
            .filter(|reach| *reach == Reach::Below);
        let own = self.grounds.iter().filter(|ground| ground.path == path);
        let own = own
            .map(|ground| ground.reach)
            .max_by_key(|reach| *reach == Reach::Below);
        let step = Step {
            is_roots: above.is_none_or(|step| step.is_roots) && only_root_writes(found),
            grant: inherited.or(own),
            path,
            fd,
        };
        self.steps.push(step);
    }

    /// What a link leads to, from the directory on where the walk is then.
    fn follow(
        &mut self,
        path: &Path,
        link: PathBuf,
        target: PathBuf,
        found: &FileStat,
    ) -> Result<VecDeque<OsString>, PathError> {
        let here = self.steps.last().expect("a walk begins with /");
        if !here.is_roots || found.st_uid != 0 {
            let path = path.to_owned();
            return Err(PathError::Link { path, link, target });
        }
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(PathError::Loop(path.to_owned()));
        }
        self.is_granted |= here.grant.is_some();
        if target.is_absolute() {
            self.steps.truncate(1);
        }
        Ok(parts(&target))
    }
}

fn io_at(at: &Path, errno: Errno) -> PathError {
    PathError::Io {
        at: at.to_owned(),
        source: errno.into(),
    }
}

/// Absolute, and without `..`.
fn is_plain(path: &Path) -> bool {
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

#[cfg(test)]
mod tests;

//! The sockets that virtseald listens on: the one for everybody who may ask, and one for root's hook alone.
//!
//! systemd opens them, or virtseald does. A directory that exists stays as it is: who made it private had a reason.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{UnixAddr, getsockname};
use nix::unistd::Group;
use thiserror::Error;

use crate::config::Config;
use crate::host::file_error::FileError;

/// What `FileDescriptorName=` calls the hook's socket.
const HOOK: &str = "hook";

/// The sockets, listening.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// For root and the group that may read.
    pub main: UnixListener,
    /// For root: nobody else can get in the way of a start there.
    pub hook: UnixListener,
}

impl Sockets {
    /// Takes what systemd has opened, and opens the rest.
    pub(crate) fn open(config: &Config) -> Result<Self, SocketError> {
        let inherited: Vec<_> = sd_notify::listen_fds_with_names()
            .map(Iterator::collect)
            .unwrap_or_default();
        let (mut main, mut hook) = (None, None);
        for (fd, name) in inherited {
            let place = match role(fd, &name, config) {
                Role::Hook => &mut hook,
                Role::Main => &mut main,
            };
            // SAFETY: systemd passes the descriptor to this process, and nothing else here has taken it.
            let listener = UnixListener::from(unsafe { OwnedFd::from_raw_fd(fd) });
            if place.replace(listener).is_some() {
                return Err(SocketError::Twice);
            }
        }
        if main.is_none() {
            refuse_taken(&config.socket)?;
        }
        // The hook's first: who sees the other one may rely on it.
        let hook = hook.map_or_else(|| bind(&config.hook_socket(), Access::Root), Ok)?;
        let readers = || Access::Group(&config.socket_group);
        let main = main.map_or_else(|| bind(&config.socket, readers()), Ok)?;
        Ok(Self { main, hook })
    }
}

/// Why there is no socket.
#[derive(Debug, Error)]
pub(crate) enum SocketError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    #[error("another virtseald listens on {}: give each its own socket and hook_socket", .0.display())]
    InUse(PathBuf),
    #[error(
        "systemd passed more sockets than one for everybody and one called '{HOOK}': see virtseald.socket and \
         virtseald-hook.socket"
    )]
    Twice,
}

enum Role {
    Main,
    Hook,
}

/// By the name that the unit gives it, or by its address where nobody gave it one.
fn role(fd: RawFd, name: &str, config: &Config) -> Role {
    // SAFETY: it is open for as long as this call: systemd passed it, and nothing here has closed it.
    let listener = unsafe { BorrowedFd::borrow_raw(fd) };
    let address = getsockname::<UnixAddr>(listener.as_raw_fd());
    let is_hook = address.is_ok_and(|address| address.path() == Some(&config.hook_socket()));
    if name == HOOK || is_hook {
        Role::Hook
    } else {
        Role::Main
    }
}

/// Who may connect.
#[derive(Clone, Copy)]
enum Access<'a> {
    Root,
    /// Root and the members of this group; root alone where there is no such group.
    Group(&'a str),
}

fn bind(path: &Path, access: Access<'_>) -> Result<UnixListener, SocketError> {
    if let Some(parent) = path.parent() {
        make_directory(parent).map_err(FileError::of("make", parent))?;
    }
    if refuse_taken(path)? == Place::Left {
        fs::remove_file(path).map_err(FileError::of("remove the old", path))?;
    }
    // Under our umask: nobody else gets in before it has its mode.
    let listener = UnixListener::bind(path).map_err(FileError::of("listen on", path))?;
    let group = match access {
        Access::Root => None,
        Access::Group(name) => Group::from_name(name).ok().flatten(),
    };
    if let Some(group) = &group {
        nix::unistd::chown(path, None, Some(group.gid))
            .map_err(|errno| FileError::of("set the group of", path)(errno.into()))?;
    }
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(FileError::of("set the mode of", path))?;
    Ok(listener)
}

/// What is at the path of a socket.
#[derive(PartialEq)]
enum Place {
    Free,
    /// By a daemon that was killed.
    Left,
}

fn refuse_taken(path: &Path) -> Result<Place, SocketError> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) if UnixStream::connect(path).is_ok() => Err(SocketError::InUse(path.to_owned())),
        Ok(_) => Ok(Place::Left),
        Err(_) => Ok(Place::Free),
    }
}

/// Makes what is missing of the path, open to all whatever our umask is; what is there is not touched.
fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_directory(parent)?;
    }
    match DirBuilder::new().mode(0o755).create(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(0o755)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn config(socket: &Path) -> Config {
        Config {
            socket: socket.to_owned(),
            socket_group: "no such group".to_owned(),
            ..Config::default()
        }
    }

    #[test]
    fn a_directory_that_exists_keeps_its_mode() {
        for kept in [0o700, 0o750, 0o711, 0o1777] {
            let directory = tempfile::tempdir().unwrap();
            fs::set_permissions(directory.path(), Permissions::from_mode(kept)).unwrap();
            let sockets = Sockets::open(&config(&directory.path().join("virtseald.sock"))).unwrap();
            assert_eq!(mode(directory.path()), kept, "{kept:o}");
            drop(sockets);
            // Nor does one above it change, or the one that is made in it later on.
            Sockets::open(&config(&directory.path().join("new/deep/virtseald.sock"))).unwrap();
            assert_eq!(mode(directory.path()), kept, "{kept:o}");
            for made in ["new", "new/deep"] {
                assert_eq!(mode(&directory.path().join(made)), 0o755, "{made}");
            }
        }
    }

    #[test]
    fn each_socket_has_its_own_mode_and_only_root_gets_at_the_hooks() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(&directory.path().join("virtseald.sock"));
        config.socket_group = Group::from_gid(nix::unistd::getegid()).unwrap().unwrap().name;
        let _sockets = Sockets::open(&config).unwrap();
        assert_eq!(mode(&directory.path().join("virtseald.sock")), 0o660);
        assert_eq!(mode(&directory.path().join("hook.sock")), 0o600);
    }

    #[test]
    fn sockets_of_another_daemon_and_other_files_are_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("virtseald.sock");
        let first = Sockets::open(&config(&path)).unwrap();
        assert!(matches!(
            Sockets::open(&config(&path)),
            Err(SocketError::InUse(_))
        ));
        // What a daemon leaves behind that was killed is replaced.
        drop(first);
        let _second = Sockets::open(&config(&path)).unwrap();
        let file = directory.path().join("hook2.sock");
        fs::write(&file, "x").unwrap();
        let other = Config {
            hook_socket: Some(file.clone()),
            ..config(&directory.path().join("other.sock"))
        };
        assert!(matches!(Sockets::open(&other), Err(SocketError::NotASocket(_))));
        assert_eq!(fs::read(&file).unwrap(), b"x");
    }

    #[test]
    fn daemons_in_one_directory_have_hook_sockets_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let _sockets: Vec<_> = ["virtseald.sock", "second.sock", "third"]
            .into_iter()
            .map(|name| Sockets::open(&config(&directory.path().join(name))).unwrap())
            .collect();
        for hook in ["hook.sock", "second-hook.sock", "third-hook"] {
            UnixStream::connect(directory.path().join(hook)).unwrap();
        }
    }
}

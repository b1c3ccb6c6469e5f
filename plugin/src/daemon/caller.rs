//! Who calls, as the kernel knows it (unix(7), SO_PEERCRED and SO_PEERGROUPS).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::sys::socket::{getsockopt, sockopt};
use nix::unistd::{Gid, Uid};

use crate::model::advice::Advice;
use crate::model::problem::Problem;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    Admin,
    Reader,
    Stranger,
}

impl Caller {
    /// Looks the readers' group up only for those it matters to: that can take longer than a hook's whole call.
    pub(super) fn of(
        uid: Uid,
        mut groups: impl Iterator<Item = Gid>,
        readers: impl FnOnce() -> Option<Gid>,
    ) -> Self {
        if is_admin(uid) {
            return Self::Admin;
        }
        match readers() {
            Some(readers) if groups.any(|gid| gid == readers) => Self::Reader,
            _ => Self::Stranger,
        }
    }

    pub(super) fn may(self, needed: Self) -> Result<(), Problem> {
        match (self, needed) {
            (Self::Admin, _) | (Self::Reader, Self::Reader) => Ok(()),
            _ => Err(Problem::denied("only root may do this").next(Advice::RunAsRoot)),
        }
    }
}

/// Whether this user may do everything.
pub(super) fn is_admin(uid: Uid) -> bool {
    uid.is_root() || uid == Uid::effective()
}

/// The user at the other end of a socket, and its first group.
pub(super) fn peer(socket: &impl AsFd) -> io::Result<(Uid, Gid)> {
    let peer = getsockopt(socket, sockopt::PeerCredentials)?;
    Ok((Uid::from_raw(peer.uid()), Gid::from_raw(peer.gid())))
}

/// The other groups of the process at the other end.
pub(super) fn peer_groups(socket: &impl AsFd) -> io::Result<Vec<Gid>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let mut length = libc::socklen_t::try_from(size_of_val(&groups[..])).map_err(io::Error::other)?;
        // SAFETY: the kernel writes at most `length` bytes into the buffer, which has that many.
        let outcome = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<libc::gid_t>();
        if outcome == 0 {
            groups.truncate(count);
            return Ok(groups.into_iter().map(Gid::from_raw).collect());
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) {
            return Err(error);
        }
        groups.resize(count.max(groups.len() + 1), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::problem::Code;

    #[test]
    fn root_changes_the_group_reads_others_nothing() {
        let group = Some(Gid::from_raw(77));
        let of = |uid, gid| Caller::of(Uid::from_raw(uid), std::iter::once(Gid::from_raw(gid)), || group);
        assert_eq!(of(0, 0), Caller::Admin);
        assert_eq!(of(54321, 77), Caller::Reader);
        assert_eq!(of(54321, 78), Caller::Stranger);
        assert!(Caller::Reader.may(Caller::Reader).is_ok());
        assert_eq!(Caller::Reader.may(Caller::Admin).unwrap_err().code, Code::Denied);
        assert_eq!(
            Caller::Stranger.may(Caller::Reader).unwrap_err().code,
            Code::Denied
        );
        assert_eq!(
            Caller::of(Uid::from_raw(54321), std::iter::once(Gid::from_raw(0)), || None),
            Caller::Stranger
        );
    }

    #[test]
    fn the_kernel_says_who_is_there() {
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert_eq!(peer(&ours).unwrap(), (Uid::effective(), Gid::effective()));
        let mut own: Vec<_> = nix::unistd::getgroups().unwrap();
        let mut found = peer_groups(&ours).unwrap();
        own.sort_by_key(|gid| gid.as_raw());
        found.sort_by_key(|gid| gid.as_raw());
        assert_eq!(found, own);
    }
}

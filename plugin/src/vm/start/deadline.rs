//! Until when an answer is of use to the one who asked.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Over at a moment, or as soon as the caller is gone.
///
/// The moment alone is not enough: a daemon that was stopped, or whose host slept, finds requests in its socket
/// whose hooks gave up long ago, and keys armed for them would stay in libvirt.
#[derive(Clone, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    caller: Option<Arc<OwnedFd>>,
}

impl Deadline {
    pub(crate) fn after(time: Duration) -> Self {
        Self {
            at: Instant::now() + time,
            caller: None,
        }
    }

    /// Also over when the other end of this socket is closed.
    #[must_use]
    pub(crate) fn or_hangup_of(self, caller: Arc<OwnedFd>) -> Self {
        Self {
            caller: Some(caller),
            ..self
        }
    }

    /// Whether nobody waits any more.
    pub(crate) fn has_passed(&self) -> bool {
        Instant::now() >= self.at || self.caller.as_deref().is_some_and(has_hung_up)
    }
}

fn has_hung_up(caller: &OwnedFd) -> bool {
    let mut caller = [PollFd::new(caller.as_fd(), PollFlags::empty())];
    // A poll that fails proves nothing; the moment still counts.
    poll(&mut caller, PollTimeout::ZERO).is_ok()
        && caller[0]
            .revents()
            .is_some_and(|found| found.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn passes_with_time() {
        assert!(Deadline::after(Duration::ZERO).has_passed());
        assert!(!Deadline::after(Duration::from_secs(60)).has_passed());
    }

    #[test]
    fn passes_when_the_caller_hangs_up() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let deadline = Deadline::after(Duration::from_secs(60)).or_hangup_of(Arc::new(ours.into()));
        assert!(!deadline.has_passed());
        drop(theirs);
        assert!(deadline.has_passed());
    }
}

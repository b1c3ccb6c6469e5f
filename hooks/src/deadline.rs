//! One deadline for everything that may wait.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// For a start: the default of `deadline` in hook.conf, and what holds until that is read. virtseald has the same for its
/// `hook_deadline`.
pub(crate) const START: Duration = Duration::from_secs(10);
/// For messages that nothing waits for.
pub(crate) const NOTICE: Duration = Duration::from_secs(2);
/// For the report of a refusal, which the user waits for.
pub(crate) const REPORT: Duration = Duration::from_millis(500);
/// After a deadline: what waits on a descriptor ends by itself, and says more of why.
pub(crate) const GRACE: Duration = Duration::from_millis(300);
/// How long to leave a full listen queue alone.
pub(crate) const QUEUE_PAUSE: Duration = Duration::from_millis(5);

#[derive(Clone, Copy)]
pub(crate) struct Deadline {
    start: Instant,
    length: Duration,
}

/// The deadline has passed.
#[derive(Debug)]
pub(crate) struct Elapsed;

impl Deadline {
    pub(crate) fn started_now() -> Self {
        Self {
            start: Instant::now(),
            length: Duration::ZERO,
        }
    }

    /// The same start, another length.
    pub(crate) fn lasting(self, length: Duration) -> Self {
        Self { length, ..self }
    }

    pub(crate) fn length(&self) -> Duration {
        self.length
    }

    pub(crate) fn left(&self) -> Result<Duration, Elapsed> {
        let left = self.length.saturating_sub(self.start.elapsed());
        if left.is_zero() { Err(Elapsed) } else { Ok(left) }
    }

    /// Waits until `fd` has one of `events`, or an error to be read from it.
    pub(crate) fn wait(&self, fd: impl AsFd, events: PollFlags) -> Result<(), Elapsed> {
        loop {
            let left = self.left()? + Duration::from_millis(1);
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(fd.as_fd(), events)], timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                // The read or write that follows meets the same trouble and names it.
                Err(_) => return Ok(()),
            }
        }
    }
}

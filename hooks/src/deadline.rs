//! One deadline for everything that may wait.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

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

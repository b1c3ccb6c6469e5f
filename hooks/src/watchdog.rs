//! Ends what the hook does at its deadline, whatever it is at: reading, parsing, a file system that hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

use crate::deadline::{Deadline, GRACE};

/// As the main thread's.
const STACK: usize = 8 * 1024 * 1024;

/// How the work went.
pub(crate) enum Ended<T> {
    Done(T),
    /// It did not end in time, or not at all.
    Late {
        then: IfLate,
        length: Duration,
    },
}

/// What becomes of a start where there is no answer in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfLate {
    Refuse,
    LetPass,
}

/// What the work tells of itself while it goes on.
pub(crate) struct Reins<T> {
    news: Sender<News<T>>,
    refuse: Arc<AtomicBool>,
}

enum News<T> {
    Length(Duration),
    Done(T),
}

impl<T> Reins<T> {
    /// How long all may take, from the start on.
    pub(crate) fn set_length(&self, length: Duration) {
        // Nobody listens any more when it is too late already.
        let _ = self.news.send(News::Length(length));
    }

    /// It is refused at first, while nothing is known.
    pub(crate) fn if_late(&self, then: IfLate) {
        self.refuse.store(then == IfLate::Refuse, Ordering::SeqCst);
    }
}

/// Runs `work` on a thread of its own until `deadline`, or the one that it sets itself.
pub(crate) fn guarded<T: Send + 'static>(
    deadline: Deadline,
    work: impl FnOnce(&Reins<T>) -> T + Send + 'static,
) -> Ended<T> {
    let (news, heard) = channel();
    let refuse = Arc::new(AtomicBool::new(true));
    let reins = Reins {
        news,
        refuse: Arc::clone(&refuse),
    };
    let run = move || {
        let done = work(&reins);
        let _ = reins.news.send(News::Done(done));
    };
    let mut deadline = deadline;
    let late = |deadline: Deadline| Ended::Late {
        then: match refuse.load(Ordering::SeqCst) {
            true => IfLate::Refuse,
            false => IfLate::LetPass,
        },
        length: deadline.length(),
    };
    if thread::Builder::new().stack_size(STACK).spawn(run).is_err() {
        return late(deadline);
    }
    loop {
        let left = deadline.left().unwrap_or_default() + GRACE;
        match heard.recv_timeout(left) {
            Ok(News::Length(length)) => deadline = deadline.lasting(length),
            Ok(News::Done(done)) => return Ended::Done(done),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return late(deadline),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deadline() -> Deadline {
        Deadline::started_now().lasting(Duration::from_secs(30))
    }

    #[test]
    fn work_that_ends_is_heard() {
        assert!(matches!(guarded(deadline(), |_| 7), Ended::Done(7)));
    }

    #[test]
    fn work_that_does_not_end_is_left_alone() {
        for then in [IfLate::Refuse, IfLate::LetPass] {
            let ended = guarded(deadline(), move |reins: &Reins<()>| {
                reins.if_late(then);
                reins.set_length(Duration::from_millis(20));
                loop {
                    thread::park();
                }
            });
            assert!(matches!(ended, Ended::Late { then: found, .. } if found == then));
        }
    }

    #[test]
    fn work_that_knows_nothing_yet_is_refused() {
        let ended = guarded(deadline(), |reins: &Reins<()>| {
            reins.set_length(Duration::from_millis(20));
            loop {
                thread::park();
            }
        });
        assert!(matches!(
            ended,
            Ended::Late {
                then: IfLate::Refuse,
                ..
            }
        ));
    }
}

//! Whether that which unlocks providers as virtseald starts is being tried.

use std::convert::Infallible;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;

/// Goes on from the start of virtseald until each has been tried.
#[derive(Debug, Default)]
pub(crate) struct FirstUnlocks {
    over: Mutex<bool>,
    ended: Condvar,
}

impl FirstUnlocks {
    pub(super) fn end(&self) {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.ended.notify_all();
    }

    /// Whether they are still being tried: who is refused from here on may ask again once they are not.
    pub(super) fn go_on(&self) -> bool {
        !*self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of what is being tried. Says whether it has come.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        let (over, _) = self
            .ended
            .wait_timeout_while(over, limit, |over| !*over)
            .unwrap_or_else(PoisonError::into_inner);
        *over
    }
}

/// Lives as long as somebody tries for the first time.
pub(crate) type Trying = mpsc::Sender<Infallible>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_goes_on_at_the_end_or_when_time_is_up() {
        let first = FirstUnlocks::default();
        assert!(first.go_on() && !first.wait(Duration::ZERO));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| first.wait(Duration::from_secs(60)));
            first.end();
            assert!(waiting.join().unwrap());
        });
        assert!(!first.go_on() && first.wait(Duration::ZERO));
    }
}

//! What goes on in the background while a provider is unlocked: the token is renewed in time, a server that was away
//! is found again, and `status` knows of it before a VM starts.

use std::sync::Weak;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::link::Link;

/// Between two looks at a server that answers.
pub(super) const HEALTHY: Duration = Duration::from_secs(30);
/// Between two looks at one that does not.
const ILL: Duration = Duration::from_secs(5);
/// The least time between two looks, whatever a token's lease says: one that comes to its end is due all the time.
const LEAST: Duration = Duration::from_secs(5);
/// The same where a token lasts no longer than a few of these.
const LEAST_OF_SHORT: Duration = Duration::from_millis(500);

/// The background thread of one provider; it ends when this is dropped.
pub(super) struct Keeper {
    _ends_when_dropped: Sender<()>,
}

impl Keeper {
    /// Without a thread everything still works, only later.
    pub(super) fn start(link: Weak<Link>) -> Option<Self> {
        let (sender, receiver) = channel();
        let thread = std::thread::Builder::new().name("transit".to_owned());
        thread.spawn(move || keep(&link, &receiver)).ok()?;
        Some(Self {
            _ends_when_dropped: sender,
        })
    }
}

fn keep(link: &Weak<Link>, end: &Receiver<()>) {
    let mut wait = ILL;
    if let Some(link) = link.upgrade() {
        wait = next_look(&link);
    }
    while let Err(RecvTimeoutError::Timeout) = end.recv_timeout(wait) {
        let Some(link) = link.upgrade() else {
            return;
        };
        let due = link.outlook().1.is_some_and(|due| due <= Instant::now());
        if due || !link.is_fresh() {
            link.look();
        }
        wait = next_look(&link);
    }
}

fn next_look(link: &Link) -> Duration {
    let (healthy, due) = link.outlook();
    let usual = if healthy { HEALTHY } else { ILL };
    let until_due = due.map(|due| due.saturating_duration_since(Instant::now()));
    pause(usual, until_due, link.lease_time())
}

/// Until the next look, where the token is to be renewed after `until_due` and was good for `lease`.
fn pause(usual: Duration, until_due: Option<Duration>, lease: Option<Duration>) -> Duration {
    let least = match lease {
        Some(time) if time < 4 * LEAST => LEAST_OF_SHORT.max(time / 8),
        _ => LEAST,
    };
    until_due.map_or(usual, |due| due.min(usual)).max(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seen before: a token that can't be renewed, and is due, cost 2 to 4 requests a second.
    #[test]
    fn a_token_that_stays_due_is_looked_at_seldom() {
        let hour = Some(Duration::from_secs(3600));
        let due = Some(Duration::ZERO);
        for lease in [None, hour, Some(4 * LEAST)] {
            assert_eq!(pause(HEALTHY, due, lease), LEAST);
            assert_eq!(pause(ILL, due, lease), LEAST);
        }
        for seconds in 0..20 {
            let lease = Some(Duration::from_secs(seconds));
            assert!(pause(HEALTHY, due, lease) >= LEAST_OF_SHORT);
        }
        assert_eq!(
            pause(HEALTHY, Some(Duration::from_secs(12)), hour),
            Duration::from_secs(12)
        );
        assert_eq!(pause(HEALTHY, hour, hour), HEALTHY);
        assert_eq!(pause(HEALTHY, None, None), HEALTHY);
    }
}

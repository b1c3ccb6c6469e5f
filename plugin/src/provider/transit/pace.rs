//! How often an unlocked provider looks at its server: so that the token is renewed in time, a server that was away is found
//! again, and `status` knows of it before a VM starts.

use std::time::Duration;

/// Between two looks at a server that answers.
pub(super) const HEALTHY: Duration = Duration::from_secs(30);
/// Between two looks at one that does not.
pub(super) const ILL: Duration = Duration::from_secs(5);
/// The least time between two looks, whatever a token's lease says: one that comes to its end is due all the time.
const LEAST: Duration = Duration::from_secs(5);
/// The same where a token lasts no longer than a few of these.
const LEAST_OF_SHORT: Duration = Duration::from_millis(500);

/// Until the next look, where the token is to be renewed after `until_due` and was good for `lease`.
pub(super) fn pause(usual: Duration, until_due: Option<Duration>, lease: Option<Duration>) -> Duration {
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

//! How long to wait before something that failed is tried again.

use std::time::Duration;

/// Pauses that double from the first up to the longest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
}

impl Backoff {
    pub(crate) const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest }
    }

    /// The pause after so many failures in a row, of which the first is 1.
    pub(crate) fn pause(self, failures: u32) -> Duration {
        let doubled = self.first.saturating_mul(1 << failures.saturating_sub(1).min(31));
        doubled.min(self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(60));
        let pauses = [1, 2, 3, 4, 5, 99, u32::MAX].map(|failures| backoff.pause(failures).as_secs());
        assert_eq!(pauses, [5, 10, 20, 40, 60, 60, 60]);
    }
}

//! Times, and what stands for many of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// How long the same thing took, many times, in milliseconds.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Times `run`.
    pub(crate) fn time<T>(&mut self, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let begin = Instant::now();
        let value = run()?;
        self.push(begin.elapsed());
        Ok(value)
    }

    pub(crate) fn push(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64() * 1000.0);
    }

    pub(crate) fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// In milliseconds.
    pub(crate) fn median(&self) -> Result<f64> {
        self.quantile(0.5)
    }

    /// In milliseconds: 99 of 100 took no longer.
    pub(crate) fn p99(&self) -> Result<f64> {
        self.quantile(0.99)
    }

    /// By the nearest rank.
    fn quantile(&self, share: f64) -> Result<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted
            .get(rank.saturating_sub(1))
            .copied()
            .context("nothing was measured")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let mut samples = Samples::default();
        for millis in (1..=200).rev() {
            samples.push(Duration::from_millis(millis));
        }
        assert_eq!(
            (samples.median().unwrap(), samples.p99().unwrap()),
            (100.0, 198.0)
        );
        assert!(Samples::default().median().is_err());
    }
}

//! How fast a job goes, and how long it will still take.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::model::deadlines::job::{PACE_AFTER, PACE_WINDOW};

/// How many samples there are in it.
const MAX_SAMPLES: u32 = 30;

/// How many units were done when.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    samples: VecDeque<(Instant, u64)>,
}

/// How fast it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pace {
    /// Units a second, at least one.
    pub per_second: u64,
    /// How long the rest takes at this pace.
    pub left: Duration,
}

impl Meter {
    /// `done` units are done by `now`. Fewer than before: it has begun again.
    pub(crate) fn note(&mut self, now: Instant, done: u64) {
        if self.done().is_some_and(|before| done < before) {
            self.samples.clear();
        }
        let is_close = |(at, _): &(Instant, u64)| now.duration_since(*at) < PACE_WINDOW / MAX_SAMPLES;
        // The last sample is the one of now; the one before it stays as long as they are close to each other.
        if self.samples.len() > 1 && self.samples.iter().rev().nth(1).is_some_and(is_close) {
            self.samples.pop_back();
        }
        self.samples.push_back((now, done));
        while self.samples.len() > 2 && now.duration_since(self.samples[0].0) > PACE_WINDOW {
            self.samples.pop_front();
        }
    }

    /// How many units are done; none while nothing was noted.
    pub(crate) fn done(&self) -> Option<u64> {
        self.samples.back().map(|(_, done)| *done)
    }

    /// How fast it goes by `now`, which has to do `total` units. None before that can be told, and while nothing goes on.
    pub(crate) fn pace(&self, now: Instant, total: u64) -> Option<Pace> {
        let ((since, first), (_, last)) = (self.samples.front()?, self.samples.back()?);
        let took = now.duration_since(*since);
        if took < PACE_AFTER {
            return None;
        }
        let rate = last.saturating_sub(*first) as f64 / took.as_secs_f64();
        if rate < 1.0 {
            return None;
        }
        let left = total.saturating_sub(*last) as f64 / rate;
        Some(Pace {
            per_second: rate as u64,
            left: Duration::from_secs(left.ceil() as u64),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_steady_job_is_told_its_end_and_one_that_stands_still_none() {
        let (start, mut meter) = (Instant::now(), Meter::default());
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        assert_eq!((meter.done(), meter.pace(start, 100)), (None, None));
        meter.note(start, 0);
        assert_eq!(meter.pace(start, 1000), None, "nothing is known yet");
        for second in 1..=50 {
            meter.note(at(second), second * 10);
        }
        let pace = meter.pace(at(50), 1000).unwrap();
        assert_eq!((pace.per_second, pace.left), (10, Duration::from_secs(50)));
        let slower = meter.pace(at(80), 1000).unwrap();
        assert!(slower.per_second < 10 && slower.left > pace.left);
        assert_eq!(meter.pace(at(50_000), 1000), None);
        assert_eq!(meter.pace(at(50), 500).unwrap().left, Duration::ZERO);
        meter.note(at(51), 0);
        assert_eq!(
            (meter.done(), meter.pace(at(51), 1000)),
            (Some(0), None),
            "it began again"
        );
    }

    proptest! {
        #[test]
        fn whatever_is_noted_the_end_is_at_the_pace_that_was_seen(
            steps in prop::collection::vec((0_u64..5_000, 0_u64..1_000_000), 0..200),
            more in 0_u64..10_000_000,
        ) {
            let (mut now, mut done, mut meter) = (Instant::now(), 0, Meter::default());
            let mut fastest = 0.0_f64;
            for (millis, units) in steps {
                now += Duration::from_millis(millis);
                done += units;
                meter.note(now, done);
                fastest = fastest.max(units as f64 / (millis.max(1) as f64 / 1000.0));
                prop_assert!(meter.samples.len() <= MAX_SAMPLES as usize + 3);
            }
            if let Some(pace) = meter.pace(now, done + more) {
                prop_assert!(pace.per_second >= 1 && pace.per_second as f64 <= fastest + 1.0);
                let least = Duration::from_secs(more / (pace.per_second + 1));
                prop_assert!(pace.left >= least, "{pace:?} for {more}");
            }
        }
    }
}

//! How a server has been doing, and in which order the servers of a cluster are asked. Pure decisions.
//!
//! A server that failed, or that was too slow while another one answered, goes behind the others. It comes back to
//! its place only after it has answered quickly [`RECOVERY`] times in a row: one lucky answer of a flapping server
//! must not cost the next start its patience again.

use std::time::{Duration, SystemTime};

use super::error::KmipError;
use crate::model::deadlines::kmip::NEXT_SERVER;

/// How many quick answers bring a server back to its place.
const RECOVERY: u32 = 2;

/// How one server has been doing.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    /// Why its last answer did not come; `None` after one that did.
    failure: Option<KmipError>,
    /// What it said when it let us in no further, until it has done as asked: a later silence takes nothing of that back.
    refusal: Option<KmipError>,
    /// Behind the others until it has recovered.
    demoted: bool,
    /// Nothing has come from it since it was asked last.
    silent: bool,
    quick_answers: u32,
    last_answer: Option<SystemTime>,
    asked: bool,
}

impl Health {
    /// It answered after `took`.
    pub(super) fn answered(&mut self, took: Duration, others: Others, now: SystemTime) {
        self.asked = true;
        self.failure = None;
        self.refusal = None;
        self.silent = false;
        self.last_answer = Some(now);
        if took > NEXT_SERVER && others == Others::Some {
            self.demoted = true;
            self.quick_answers = 0;
        } else if self.demoted {
            self.quick_answers += 1;
            self.demoted = self.quick_answers < RECOVERY;
        }
    }

    pub(super) fn failed(&mut self, why: KmipError) {
        self.asked = true;
        if matches!(why, KmipError::RefusesUs(_) | KmipError::TurnedAway(_)) {
            self.refusal = Some(why.clone());
        }
        self.failure = Some(why);
        self.outrun();
    }

    /// Another one answered first.
    pub(super) fn outrun(&mut self) {
        self.demoted = true;
        self.silent = true;
        self.quick_answers = 0;
    }

    /// As if never asked: after an unlock or a change of trust, the past says nothing.
    pub(super) fn forget(&mut self) {
        let last_answer = self.last_answer;
        *self = Self {
            last_answer,
            ..Self::default()
        };
    }

    pub(super) fn failure(&self) -> Option<&KmipError> {
        self.failure.as_ref()
    }

    /// Why this host must not believe that it is still welcome there.
    pub(super) fn refusal(&self) -> Option<&KmipError> {
        self.refusal.as_ref()
    }

    pub(super) fn was_asked(&self) -> bool {
        self.asked
    }

    pub(super) fn rank(&self) -> Rank {
        match (self.demoted, self.silent) {
            (false, _) => Rank::Good,
            (true, false) => Rank::Slow,
            (true, true) => Rank::Silent,
        }
    }

    pub(super) fn last_answer(&self) -> Option<SystemTime> {
        self.last_answer
    }
}

/// Whether there is anybody to be slower than.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Others {
    None,
    Some,
}

/// What decides who is asked first, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// In its place.
    Good,
    /// It answers, and has not recovered yet.
    Slow,
    /// It did not answer.
    Silent,
}

/// In which order to ask: by rank, and as configured among equals.
pub(super) fn order(ranks: &[Rank]) -> Vec<usize> {
    let mut order: Vec<_> = (0..ranks.len()).collect();
    order.sort_by_key(|nth| ranks[*nth]);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(5);
    const SLOW: Duration = Duration::from_millis(900);

    fn down() -> KmipError {
        KmipError::NoConnection("connect timed out".into())
    }

    fn answered(health: &mut Health, took: Duration) {
        health.answered(took, Others::Some, SystemTime::UNIX_EPOCH);
    }

    #[test]
    fn one_answer_does_not_bring_a_failed_server_back() {
        let mut health = Health::default();
        health.failed(down());
        assert!(health.rank() == Rank::Silent && health.failure().is_some());
        answered(&mut health, QUICK);
        assert!(health.rank() == Rank::Slow && health.failure().is_none());
        health.failed(down());
        answered(&mut health, QUICK);
        assert_eq!(health.rank(), Rank::Slow, "a flapping server stays behind");
        answered(&mut health, QUICK);
        assert_eq!(health.rank(), Rank::Good);
    }

    #[test]
    fn a_refusal_stands_until_an_answer() {
        let mut health = Health::default();
        health.failed(KmipError::TurnedAway("closed".into()));
        health.failed(down());
        assert!(matches!(health.refusal(), Some(KmipError::TurnedAway(_))));
        assert!(matches!(health.failure(), Some(KmipError::NoConnection(_))));
        answered(&mut health, QUICK);
        assert!(health.refusal().is_none());
    }

    #[test]
    fn slow_answers_demote_unless_there_is_no_other() {
        let mut health = Health::default();
        answered(&mut health, SLOW);
        assert!(health.rank() == Rank::Slow && health.failure().is_none());
        let mut health = Health::default();
        health.answered(SLOW, Others::None, SystemTime::UNIX_EPOCH);
        assert_eq!(health.rank(), Rank::Good);
        health.outrun();
        assert_eq!(health.rank(), Rank::Silent);
        answered(&mut health, QUICK);
        answered(&mut health, SLOW);
        answered(&mut health, QUICK);
        assert_eq!(health.rank(), Rank::Slow);
    }

    #[test]
    fn configured_order_is_kept_among_equals() {
        use Rank::{Good, Silent, Slow};
        assert_eq!(order(&[Good, Good, Good]), [0, 1, 2]);
        assert_eq!(order(&[Slow, Good, Good]), [1, 2, 0]);
        assert_eq!(order(&[Silent, Silent, Silent]), [0, 1, 2]);
        assert_eq!(order(&[Silent, Good, Slow]), [1, 2, 0]);
        assert_eq!(order(&[Silent, Slow]), [1, 0]);
        assert!(order(&[]).is_empty());
    }
}

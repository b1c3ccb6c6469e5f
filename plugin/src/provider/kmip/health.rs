//! How a server has been doing, and in which order the servers of a cluster are asked. Pure decisions.
//!
//! A server that failed, or that was too slow while another one answered, goes behind the others. It comes back to
//! its place only after it has answered quickly [`RECOVERY`] times in a row: one lucky answer of a flapping server
//! must not cost the next start its patience again.

use std::time::{Duration, SystemTime};

use super::error::KmipError;

/// How long the next server is not asked while one may still answer.
pub(super) const PATIENCE: Duration = Duration::from_millis(250);
/// How many quick answers bring a server back to its place.
const RECOVERY: u32 = 2;

/// How one server has been doing.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    /// Why its last answer did not come; `None` after one that did.
    failure: Option<KmipError>,
    /// Behind the others until it has recovered.
    demoted: bool,
    quick_answers: u32,
    last_answer: Option<SystemTime>,
    asked: bool,
}

impl Health {
    /// It answered after `took`; `alone` servers have no one to be slower than.
    pub(super) fn answered(&mut self, took: Duration, alone: bool, now: SystemTime) {
        self.asked = true;
        self.failure = None;
        self.last_answer = Some(now);
        if took > PATIENCE && !alone {
            self.demoted = true;
            self.quick_answers = 0;
        } else if self.demoted {
            self.quick_answers += 1;
            self.demoted = self.quick_answers < RECOVERY;
        }
    }

    /// It failed.
    pub(super) fn failed(&mut self, why: KmipError) {
        self.asked = true;
        self.failure = Some(why);
        self.demoted = true;
        self.quick_answers = 0;
    }

    /// Another one answered first.
    pub(super) fn outrun(&mut self) {
        self.demoted = true;
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

    pub(super) fn was_asked(&self) -> bool {
        self.asked
    }

    pub(super) fn is_demoted(&self) -> bool {
        self.demoted
    }

    pub(super) fn last_answer(&self) -> Option<SystemTime> {
        self.last_answer
    }
}

/// In which order to ask: as configured, demoted servers last.
pub(super) fn order(demoted: &[bool]) -> Vec<usize> {
    let mut order: Vec<_> = (0..demoted.len()).collect();
    order.sort_by_key(|nth| demoted[*nth]);
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(5);
    const SLOW: Duration = Duration::from_millis(900);

    fn down() -> KmipError {
        KmipError::Unreachable("connect timed out".into())
    }

    fn answered(health: &mut Health, took: Duration) {
        health.answered(took, false, SystemTime::UNIX_EPOCH);
    }

    #[test]
    fn one_answer_does_not_bring_a_failed_server_back() {
        let mut health = Health::default();
        health.failed(down());
        assert!(health.is_demoted() && health.failure().is_some());
        answered(&mut health, QUICK);
        assert!(health.is_demoted() && health.failure().is_none());
        health.failed(down());
        answered(&mut health, QUICK);
        assert!(health.is_demoted(), "a flapping server stays behind");
        answered(&mut health, QUICK);
        assert!(!health.is_demoted());
    }

    #[test]
    fn slow_answers_demote_unless_there_is_no_other() {
        let mut health = Health::default();
        answered(&mut health, SLOW);
        assert!(health.is_demoted() && health.failure().is_none());
        let mut health = Health::default();
        health.answered(SLOW, true, SystemTime::UNIX_EPOCH);
        assert!(!health.is_demoted());
        health.outrun();
        answered(&mut health, QUICK);
        answered(&mut health, SLOW);
        answered(&mut health, QUICK);
        assert!(health.is_demoted());
    }

    #[test]
    fn configured_order_is_kept_among_equals() {
        assert_eq!(order(&[false, false, false]), [0, 1, 2]);
        assert_eq!(order(&[true, false, false]), [1, 2, 0]);
        assert_eq!(order(&[true, true, true]), [0, 1, 2]);
        assert_eq!(order(&[true, false, true]), [1, 0, 2]);
        assert!(order(&[]).is_empty());
    }
}

//! Which objects that have moved are being looked for where they were.
//!
//! An old place may be on storage that does not answer, so each is looked at by a thread of its own: one that hangs keeps back
//! nothing but itself.

use std::collections::BTreeSet;

use crate::model::envelope::EnvelopeId;
use crate::vm::moved::Moved;

/// How many may hang at once.
const MAX_LOOKS: usize = 8;

/// What starts have opened elsewhere than the keystore has it.
#[derive(Debug, Default)]
pub(super) struct Settling {
    noted: Vec<Moved>,
    looked_for: BTreeSet<EnvelopeId>,
}

impl Settling {
    /// Kept until somebody has time. Of one object the last move counts.
    pub(super) fn note(&mut self, moved: Vec<Moved>) {
        self.noted
            .retain(|old| moved.iter().all(|new| new.envelope != old.envelope));
        self.noted.extend(moved);
    }

    /// Those that are to be looked for now, until [`Settling::end`].
    pub(super) fn begin(&mut self) -> Vec<Moved> {
        let mut begun = Vec::new();
        for moved in std::mem::take(&mut self.noted) {
            let has_room = self.looked_for.len() < MAX_LOOKS;
            match has_room && self.looked_for.insert(moved.envelope) {
                true => begun.push(moved),
                false => self.noted.push(moved),
            }
        }
        begun
    }

    /// Says whether others wait.
    pub(super) fn end(&mut self, envelope: EnvelopeId) -> bool {
        self.looked_for.remove(&envelope);
        !self.noted.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(envelope: EnvelopeId, to: &str) -> Moved {
        Moved {
            envelope,
            from: "/old".to_owned(),
            to: to.into(),
        }
    }

    #[test]
    fn one_that_hangs_keeps_back_nothing_but_itself() {
        let (hangs, other) = (EnvelopeId::random(), EnvelopeId::random());
        let mut settling = Settling::default();
        settling.note(vec![moved(hangs, "/a")]);
        assert_eq!(settling.begin(), [moved(hangs, "/a")]);
        settling.note(vec![moved(hangs, "/b"), moved(other, "/c")]);
        settling.note(vec![moved(hangs, "/d")]);
        assert_eq!(settling.begin(), [moved(other, "/c")]);
        assert!(settling.end(other), "the last move of the first is forgotten");
        assert_eq!(settling.begin(), []);
        settling.end(hangs);
        assert_eq!(settling.begin(), [moved(hangs, "/d")]);
        assert!(!settling.end(hangs));
    }

    #[test]
    fn no_more_are_looked_for_at_once_than_there_are_threads_for() {
        let mut settling = Settling::default();
        settling.note(
            (0..2 * MAX_LOOKS)
                .map(|_| moved(EnvelopeId::random(), "/a"))
                .collect(),
        );
        let first = settling.begin();
        assert_eq!((first.len(), settling.begin().len()), (MAX_LOOKS, 0));
        for moved in first {
            assert!(settling.end(moved.envelope));
        }
        assert_eq!(settling.begin().len(), MAX_LOOKS);
    }
}

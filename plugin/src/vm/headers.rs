//! Starts and rewrites of image headers keep out of each other's way.
//!
//! A start that met QEMU's locks of a rewrite, or half a header, would fail for no reason that a user could know. So a start
//! holds its envelopes first and waits for a rewrite that is under way, and a rewrite leaves what is held alone: it comes
//! again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::model::deadlines::start::TICK;
use crate::model::envelope::EnvelopeId;
use crate::vm::start::Deadline;

#[derive(Debug, Default)]
pub(crate) struct Headers {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    writing: BTreeSet<EnvelopeId>,
    held: BTreeMap<EnvelopeId, usize>,
}

/// A start that needs its headers as they are.
pub(crate) struct Held<'a> {
    headers: &'a Headers,
    envelopes: Vec<EnvelopeId>,
}

pub(crate) struct Writing<'a> {
    headers: &'a Headers,
    envelope: EnvelopeId,
}

impl Headers {
    /// With the headers that a killed daemon was rewriting: they stay taken until they are finished.
    pub(crate) fn interrupted(envelopes: Vec<EnvelopeId>) -> Self {
        let headers = Self::default();
        headers.lock().writing.extend(envelopes);
        headers
    }

    /// Keeps these headers as they are, once no rewrite of them is under way; waits no longer than anybody waits for it.
    pub(crate) fn hold(&self, envelopes: Vec<EnvelopeId>, deadline: &Deadline) -> Held<'_> {
        let mut state = self.lock();
        for envelope in &envelopes {
            *state.held.entry(*envelope).or_default() += 1;
        }
        while envelopes.iter().any(|envelope| state.writing.contains(envelope)) && !deadline.has_passed() {
            state = self
                .changed
                .wait_timeout(state, TICK)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        drop(state);
        Held {
            headers: self,
            envelopes,
        }
    }

    /// Takes a header to rewrite it, unless a start holds it.
    pub(crate) fn write(&self, envelope: EnvelopeId) -> Option<Writing<'_>> {
        let mut state = self.lock();
        if state.held.contains_key(&envelope) || !state.writing.insert(envelope) {
            return None;
        }
        drop(state);
        Some(Writing {
            headers: self,
            envelope,
        })
    }

    /// Takes over a header that a killed daemon was rewriting.
    pub(crate) fn take_over(&self, envelope: EnvelopeId) -> Writing<'_> {
        self.lock().writing.insert(envelope);
        Writing {
            headers: self,
            envelope,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writing<'_> {
    /// It is not finished: starts go on waiting for it.
    pub(crate) fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut state = self.headers.lock();
        for envelope in &self.envelopes {
            if let Some(count) = state.held.get_mut(envelope) {
                *count -= 1;
                if *count == 0 {
                    state.held.remove(envelope);
                }
            }
        }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.headers.lock().writing.remove(&self.envelope);
        self.headers.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use std::time::Duration;

    use super::*;

    #[test]
    fn a_start_waits_for_a_rewrite_and_a_rewrite_leaves_a_start_alone() {
        let (one, other) = (EnvelopeId::random(), EnvelopeId::random());
        let headers = Headers::interrupted(vec![one]);
        assert!(headers.write(one).is_none());
        let began = Instant::now();
        drop(headers.hold(vec![one], &Deadline::after(Duration::from_millis(120))));
        assert!(began.elapsed() >= Duration::from_millis(120));
        std::thread::scope(|scope| {
            let writing = headers.take_over(one);
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                drop(writing);
            });
            let held = headers.hold(vec![one], &Deadline::after(Duration::from_secs(60)));
            assert!(headers.write(one).is_none());
            assert!(headers.write(other).is_some());
            drop(held);
        });
        headers.write(one).unwrap().keep();
        assert!(headers.write(one).is_none());
    }
}

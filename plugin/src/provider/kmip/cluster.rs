//! The servers of one KMS, asked in order: a dead or slow one costs [`NEXT_SERVER`] once, not a start its deadline.
//!
//! A request that can be repeated goes to the first server and, while that one is silent, after [`NEXT_SERVER`] to the
//! next as well. The first answer that does what was asked counts; a "no" counts only once every server that can be reached
//! has said one, for the one that was asked first may lag behind. A request that can't be repeated (Create, …) goes to one
//! server at a time: to the next where the one before refused it, was not reached, or took more than its share of the time.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::call::Call;
use super::endpoint::Endpoint;
use super::error::KmipError;
use super::health::{self, Others};
use super::message::{self, Outcome, ProtocolError};
use super::node::{Access, Node};
use super::ttlv::Item;
use super::version::KmipVersion;
use crate::model::backoff::Backoff;
use crate::model::deadlines::kmip::{NEXT_SERVER, PROBE, REPEAT};
use crate::provider::ProviderError;
use crate::provider::toolbox::certificate::CertificateFacts;
use crate::provider::toolbox::race::{Raced, race};
use crate::provider::toolbox::{at_once, lock};
use crate::secret::SecretBytes;

/// How often a request is sent that can be repeated, and how long to wait in between.
const TRIES: u32 = 3;
const BACKOFF: Backoff = Backoff::new(REPEAT.start, REPEAT.end);

/// The servers of one KMS.
pub(super) struct Cluster {
    nodes: Vec<Arc<Node>>,
}

impl Cluster {
    pub(super) fn new(endpoints: &[Endpoint], version: Option<KmipVersion>) -> Self {
        let node = |endpoint: &Endpoint| Arc::new(Node::new(endpoint.clone(), version));
        Self {
            nodes: endpoints.iter().map(node).collect(),
        }
    }

    pub(super) fn nodes(&self) -> &[Arc<Node>] {
        &self.nodes
    }

    /// Closes all connections; the next calls use those of `epoch`.
    pub(super) fn close(&self, epoch: u64) {
        for node in &self.nodes {
            node.close(epoch);
            lock(&node.health).forget();
        }
    }

    /// Sends `calls` as one request, and returns what `read` makes of the first answer that it accepts.
    ///
    /// # Errors
    /// When no server's answer is accepted before `deadline`: what counts of what they said, or what is wrong with each.
    pub(super) fn call<T>(
        &self,
        access: &Arc<Access>,
        calls: Vec<Call>,
        deadline: Instant,
        mut read: impl FnMut(&[Outcome]) -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        if !calls.iter().all(|call| call.operation().is_idempotent()) {
            return self.one_by_one(access, &calls, deadline, &mut read);
        }
        // A cluster that was down a moment ago is not waited for again and again.
        let was_down = self.all_failed(|_| true);
        let (calls, order, mut attempt) = (Arc::new(calls), self.order(), 1);
        loop {
            let error = match self.race(access, &calls, &order, deadline, &mut read) {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            let wait = BACKOFF.pause(attempt);
            let in_time = Instant::now() + wait < deadline;
            if attempt == TRIES || was_down || !in_time || !self.all_failed(KmipError::is_transient) {
                return Err(error);
            }
            std::thread::sleep(wait);
            attempt += 1;
        }
    }

    /// Whether every server failed when it was last asked, each of that kind.
    fn all_failed(&self, kind: impl Fn(&KmipError) -> bool) -> bool {
        let failed = |node: &Arc<Node>| lock(&node.health).failure().is_some_and(&kind);
        self.nodes.iter().all(failed)
    }

    /// One try: every server in turn, the next one as soon as one has failed, has refused or was silent for a while.
    fn race<T>(
        &self,
        access: &Arc<Access>,
        calls: &Arc<Vec<Call>>,
        order: &[usize],
        deadline: Instant,
        read: &mut impl FnMut(&[Outcome]) -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        let mut said = Vec::new();
        let ask = {
            let (nodes, access, calls) = (self.nodes.clone(), Arc::clone(access), Arc::clone(calls));
            let others = self.others();
            move |nth: usize| nodes[nth].timed(&access, &calls, deadline, others)
        };
        let judge = |nth, answer: Result<SecretBytes, KmipError>| {
            let read = self.read(nth, &answer.ok()?, calls.len(), read);
            read.map_err(|error| said.push(error)).ok()
        };
        let raced = race(order.iter().copied(), NEXT_SERVER, deadline, ask, judge)
            .map_err(|error| KmipError::NoConnection(format!("can't start a thread: {error}")))?;
        match raced {
            Raced::Won(found, slower) => {
                for nth in slower {
                    lock(&self.nodes[nth].health).outrun();
                }
                Ok(found)
            }
            Raced::Lost(silent) => {
                for nth in silent {
                    let why = KmipError::NoAnswer("no answer in time".into());
                    lock(&self.nodes[nth].health).failed(why);
                }
                Err(self.conclude(said))
            }
        }
    }

    /// Each server in turn, each with its share of the time.
    fn one_by_one<T>(
        &self,
        access: &Access,
        calls: &[Call],
        deadline: Instant,
        read: &mut impl FnMut(&[Outcome]) -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        let (order, mut said) = (self.order(), Vec::new());
        for (place, nth) in order.iter().enumerate() {
            let left = deadline.saturating_duration_since(Instant::now());
            let share = match order.len() - place {
                1 => deadline,
                _ => Instant::now() + left / 2,
            };
            if let Ok(answer) = self.nodes[*nth].timed(access, calls, share, self.others()) {
                match self.read(*nth, &answer, calls.len(), read) {
                    Ok(found) => return Ok(found),
                    Err(error) => said.push(error),
                }
            }
        }
        Err(self.conclude(said))
    }

    /// Sends `calls` to every server at once, and returns what `read` makes of each answer: for what counts only if all say it.
    pub(super) fn ask_each<T>(
        &self,
        access: &Access,
        calls: &[Call],
        deadline: Instant,
        mut read: impl FnMut(&[Outcome]) -> Result<T, ProviderError>,
    ) -> Vec<(String, Result<T, ProviderError>)> {
        let ask = |node: &Arc<Node>| node.timed(access, calls, deadline, self.others());
        let mut said = Vec::with_capacity(self.nodes.len());
        for (nth, answer) in at_once(&self.nodes, ask).into_iter().enumerate() {
            let read = match answer {
                Some(Ok(answer)) => self.read(nth, &answer, calls.len(), &mut read),
                Some(Err(error)) => Err(error.into()),
                None => Err(ProviderError::Unreachable(
                    "the thread that asked it has ended".into(),
                )),
            };
            said.push((self.nodes[nth].endpoint.to_string(), read));
        }
        said
    }

    /// What `read` makes of an answer, and what that says of the server.
    fn read<T>(
        &self,
        nth: usize,
        answer: &SecretBytes,
        calls: usize,
        read: &mut impl FnMut(&[Outcome]) -> Result<T, ProviderError>,
    ) -> Result<T, ProviderError> {
        let mut found = || {
            let message = Item::decode(answer.expose()).map_err(ProtocolError::from)?;
            let outcomes = message::outcomes(&message, calls)?;
            Ok::<_, KmipError>(read(&outcomes))
        };
        let read = found().map_err(ProviderError::from).and_then(|read| read);
        if let Some(trouble) = read.as_ref().err().and_then(KmipError::of_server) {
            lock(&self.nodes[nth].health).failed(trouble);
        }
        read
    }

    /// What counts of what servers `said` and of what keeps the others from saying anything.
    fn conclude(&self, said: Vec<ProviderError>) -> ProviderError {
        let text = self.failure_text();
        let shut = self.nodes.iter().filter_map(|node| {
            let health = lock(&node.health);
            let failure = health
                .failure()
                .filter(|why| matches!(why, KmipError::NotTrusted(_)));
            failure.or_else(|| health.refusal()).cloned()
        });
        let all = said.into_iter().chain(shut.map(ProviderError::from));
        match ProviderError::of_all(all.collect()) {
            Some(error) => error.retold(|_| text),
            None => ProviderError::Unreachable(text),
        }
    }

    /// Asks every server for its operations, and notes how it does. Ends after [`PROBE`].
    pub(super) fn probe(&self, access: &Access) {
        self.probe_until(access, Instant::now() + PROBE);
    }

    pub(super) fn probe_until(&self, access: &Access, deadline: Instant) {
        at_once(&self.nodes, |node| {
            node.timed(access, &[Call::Query], deadline, self.others())
                .map(drop)
        });
    }

    /// Beside each server.
    fn others(&self) -> Others {
        match self.nodes.len() {
            1 => Others::None,
            _ => Others::Some,
        }
    }

    pub(super) fn order(&self) -> Vec<usize> {
        let ranks = self.nodes.iter().map(|node| lock(&node.health).rank());
        health::order(&ranks.collect::<Vec<_>>())
    }

    /// `2 of 3 nodes: connect timed out`
    fn failure_text(&self) -> String {
        let failing: Vec<_> = self
            .nodes
            .iter()
            .filter_map(|node| {
                let health = lock(&node.health);
                let failure = health.failure()?.to_string();
                let refusal = health.refusal().map(ToString::to_string);
                let failure = match refusal.filter(|refusal| *refusal != failure) {
                    Some(refusal) => format!("{failure}, and before that {refusal}"),
                    None => failure,
                };
                Some((node.endpoint.to_string(), failure))
            })
            .collect();
        describe(self.nodes.len(), &failing)
    }

    /// When one of them last answered.
    pub(super) fn last_answer(&self) -> Option<SystemTime> {
        let answers = self.nodes.iter().map(|node| lock(&node.health).last_answer());
        answers.max().flatten()
    }

    /// How the servers did when each was asked last: [`ProviderError::Trouble`] also where only some of them fail, and
    /// [`ProviderError::RefusesUs`] also where they may.
    pub(super) fn status(&self) -> Result<(), ProviderError> {
        let (mut unasked, mut failing) = (0, 0);
        for node in &self.nodes {
            let health = lock(&node.health);
            unasked += usize::from(!health.was_asked());
            failing += usize::from(health.failure().is_some());
        }
        if unasked > 0 && unasked + failing == self.nodes.len() {
            return Err(ProviderError::Unreachable("not asked yet".into()));
        }
        match failing {
            0 => Ok(()),
            some if some < self.nodes.len() => Err(ProviderError::Trouble(self.failure_text())),
            _ => Err(match self.conclude(self.failures()) {
                ProviderError::TurnedAway(text) => ProviderError::RefusesUs(text),
                ProviderError::BesideTheQuestion(text) => ProviderError::Trouble(text),
                error => error,
            }),
        }
    }

    /// What those said that answered last time, and had something wrong.
    fn failures(&self) -> Vec<ProviderError> {
        let failures = self.nodes.iter().filter_map(|node| {
            let failure = lock(&node.health).failure().cloned()?;
            matches!(failure, KmipError::Trouble(_) | KmipError::BesideTheQuestion(_)).then_some(failure)
        });
        failures.map(ProviderError::from).collect()
    }

    /// The certificates that the servers showed last, with where.
    pub(super) fn certificates(&self) -> Vec<(String, CertificateFacts)> {
        let shown = |node: &Arc<Node>| Some((node.endpoint.to_string(), node.certificate()?));
        self.nodes.iter().filter_map(shown).collect()
    }
}

impl Node {
    /// An exchange, and what it says about the server.
    fn timed(
        &self,
        access: &Access,
        calls: &[Call],
        deadline: Instant,
        others: Others,
    ) -> Result<SecretBytes, KmipError> {
        let started = Instant::now();
        let answer = self.exchange(access, calls, deadline);
        let mut health = lock(&self.health);
        match &answer {
            Ok(_) => health.answered(started.elapsed(), others, SystemTime::now()),
            Err(error) => health.failed(error.clone()),
        }
        answer
    }
}

fn describe(nodes: usize, failing: &[(String, String)]) -> String {
    let same = failing.windows(2).all(|pair| pair[0].1 == pair[1].1);
    match failing {
        [] => "no answer".to_owned(),
        [(endpoint, why)] if nodes == 1 => format!("{endpoint}: {why}"),
        [(_, why), ..] if same && failing.len() == nodes => format!("{nodes} of {nodes} nodes: {why}"),
        some => {
            let each: Vec<_> = some
                .iter()
                .map(|(endpoint, why)| format!("{endpoint}: {why}"))
                .collect();
            format!("{} of {nodes} nodes: {}", some.len(), each.join("; "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failing(of: &[(&str, &str)]) -> Vec<(String, String)> {
        of.iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
            .collect()
    }

    #[test]
    fn failures_are_told_in_one_line() {
        let timed_out = "connect timed out";
        assert_eq!(
            describe(
                3,
                &failing(&[("a", timed_out), ("b", timed_out), ("c", timed_out)])
            ),
            "3 of 3 nodes: connect timed out"
        );
        assert_eq!(
            describe(3, &failing(&[("b:1", timed_out)])),
            "1 of 3 nodes: b:1: connect timed out"
        );
        assert_eq!(describe(1, &failing(&[("b:1", "x")])), "b:1: x");
        assert_eq!(
            describe(2, &failing(&[("a", "x"), ("b", "y")])),
            "2 of 2 nodes: a: x; b: y"
        );
    }
}

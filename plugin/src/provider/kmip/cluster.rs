//! The servers of one KMS, asked in order: a dead or slow one costs [`PATIENCE`] once, not a start its deadline.
//!
//! A request that can be repeated goes to the first server and, while that one is silent, after [`PATIENCE`] to the
//! next as well. The first answer that does what was asked counts; a "no" counts only once every server that can be reached
//! has said one, for the one that was asked first may lag behind. A request that can't be repeated (Create, …) goes to one
//! server at a time: to the next where the one before refused it, was not reached, or took more than its share of the time.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant, SystemTime};

use super::call::Call;
use super::endpoint::Endpoint;
use super::error::KmipError;
use super::health::{self, PATIENCE};
use super::message::{self, Outcome, ProtocolError};
use super::node::{Access, Node, lock};
use super::ttlv::Item;
use super::version::KmipVersion;
use crate::provider::ProviderError;
use crate::provider::toolbox::certificate::CertificateFacts;
use crate::secret::SecretBytes;

/// How often a request is sent that can be repeated, and how long to wait before the second time; then twice that.
const TRIES: u32 = 3;
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// What a probe may take.
const PROBE_TIME: Duration = Duration::from_secs(3);

/// The servers of one KMS.
pub(super) struct Cluster {
    nodes: Vec<Arc<Node>>,
}

/// How the servers are doing, all together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ClusterStatus {
    /// Nothing has been asked yet.
    Unknown,
    /// None does what it should; this is why.
    Unreachable(String),
    /// The certificates that they show are not trusted.
    NotTrusted(String),
    /// They answer, and refuse us.
    RefusesUs(String),
    /// Some do, or they answer and have troubles.
    Partly(String),
    /// All do.
    Good,
}

type Answer = (usize, Result<SecretBytes, KmipError>);

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
        let was_down = self
            .nodes
            .iter()
            .all(|node| lock(&node.health).failure().is_some());
        let (calls, order, mut wait) = (Arc::new(calls), self.order(), FIRST_WAIT);
        for attempt in 1.. {
            let error = match self.race(access, &calls, &order, deadline, &mut read) {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            let transient = self
                .nodes
                .iter()
                .all(|node| lock(&node.health).failure().is_some_and(KmipError::is_transient));
            let in_time = Instant::now() + wait < deadline;
            if attempt == TRIES || was_down || !transient || !in_time {
                return Err(error);
            }
            std::thread::sleep(wait);
            wait *= 2;
        }
        unreachable!("the loop ends by its last try")
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
        let (sender, answers) = channel();
        let mut race = Race::new(order);
        let mut said = Vec::new();
        loop {
            if let Some(nth) = race.start_next() {
                self.start(nth, access, calls, deadline, &sender)?;
            }
            match race.next_answer(&answers, deadline) {
                Some((nth, Ok(answer))) => match self.read(nth, &answer, calls.len(), read) {
                    Ok(found) => {
                        for slower in race.running.iter().filter(|other| **other != nth) {
                            lock(&self.nodes[*slower].health).outrun();
                        }
                        return Ok(found);
                    }
                    Err(error) => {
                        said.push(error);
                        race.running.retain(|other| *other != nth);
                    }
                },
                Some((nth, Err(_))) => race.running.retain(|other| *other != nth),
                None if race.is_waiting() => {}
                None => {
                    for silent in &race.running {
                        let why = KmipError::NoAnswer("no answer in time".into());
                        lock(&self.nodes[*silent].health).failed(why);
                    }
                    return Err(self.conclude(said));
                }
            }
            if race.is_over() {
                return Err(self.conclude(said));
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
            if let Ok(answer) = self.nodes[*nth].timed(access, calls, share, self.is_alone()) {
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
        let answers: Vec<_> = std::thread::scope(|scope| {
            let asked: Vec<_> = self
                .nodes
                .iter()
                .map(|node| scope.spawn(|| node.timed(access, calls, deadline, self.is_alone())))
                .collect();
            asked
                .into_iter()
                .map(std::thread::ScopedJoinHandle::join)
                .collect()
        });
        let mut said = Vec::with_capacity(answers.len());
        for (nth, answer) in answers.into_iter().enumerate() {
            let read = match answer {
                Ok(Ok(answer)) => self.read(nth, &answer, calls.len(), &mut read),
                Ok(Err(error)) => Err(error.into()),
                Err(_) => Err(ProviderError::Unreachable(
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
            Some(ProviderError::NotTrusted(_)) => ProviderError::NotTrusted(text),
            Some(ProviderError::RefusesUs(_)) => ProviderError::RefusesUs(text),
            Some(ProviderError::TurnedAway(_)) => ProviderError::TurnedAway(text),
            Some(ProviderError::Trouble(_)) => ProviderError::Trouble(text),
            Some(ProviderError::BesideTheQuestion(_)) => ProviderError::BesideTheQuestion(text),
            Some(other) => other,
            None => ProviderError::Unreachable(text),
        }
    }

    fn start(
        &self,
        nth: usize,
        access: &Arc<Access>,
        calls: &Arc<Vec<Call>>,
        deadline: Instant,
        sender: &Sender<Answer>,
    ) -> Result<(), KmipError> {
        let (node, access, calls) = (
            Arc::clone(&self.nodes[nth]),
            Arc::clone(access),
            Arc::clone(calls),
        );
        let (sender, alone) = (sender.clone(), self.is_alone());
        let work = move || {
            // Nobody waits any more when this fails; an answer that is dropped is wiped.
            let _ = sender.send((nth, node.timed(&access, &calls, deadline, alone)));
        };
        std::thread::Builder::new()
            .name("kmip".to_owned())
            .spawn(work)
            .map(drop)
            .map_err(|error| KmipError::NoConnection(format!("can't start a thread: {error}")))
    }

    /// Asks every server for its operations, and notes how it does. Ends after [`PROBE_TIME`].
    pub(super) fn probe(&self, access: &Access) {
        self.probe_until(access, Instant::now() + PROBE_TIME);
    }

    pub(super) fn probe_until(&self, access: &Access, deadline: Instant) {
        std::thread::scope(|scope| {
            for node in &self.nodes {
                scope.spawn(|| node.timed(access, &[Call::Query], deadline, self.is_alone()));
            }
        });
    }

    fn is_alone(&self) -> bool {
        self.nodes.len() == 1
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

    /// How the servers did when each was asked last.
    pub(super) fn status(&self) -> ClusterStatus {
        if self.nodes.iter().any(|node| !lock(&node.health).was_asked()) {
            let all_asked_fail = self.nodes.iter().all(|node| {
                let health = lock(&node.health);
                !health.was_asked() || health.failure().is_some()
            });
            if all_asked_fail {
                return ClusterStatus::Unknown;
            }
        }
        let failing = self
            .nodes
            .iter()
            .filter(|node| lock(&node.health).failure().is_some());
        match failing.count() {
            0 => ClusterStatus::Good,
            some if some < self.nodes.len() => ClusterStatus::Partly(self.failure_text()),
            _ => match self.conclude(self.failures()) {
                ProviderError::NotTrusted(text) => ClusterStatus::NotTrusted(text),
                ProviderError::RefusesUs(text) | ProviderError::TurnedAway(text) => {
                    ClusterStatus::RefusesUs(text)
                }
                ProviderError::Trouble(text) | ProviderError::BesideTheQuestion(text) => {
                    ClusterStatus::Partly(text)
                }
                _ => ClusterStatus::Unreachable(self.failure_text()),
            },
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
        alone: bool,
    ) -> Result<SecretBytes, KmipError> {
        let started = Instant::now();
        let answer = self.exchange(access, calls, deadline);
        let mut health = lock(&self.health);
        match &answer {
            Ok(_) => health.answered(started.elapsed(), alone, SystemTime::now()),
            Err(error) => health.failed(error.clone()),
        }
        answer
    }
}

/// Who has been asked, and who is still expected to answer.
struct Race<'a> {
    waiting: &'a [usize],
    running: Vec<usize>,
}

impl<'a> Race<'a> {
    fn new(order: &'a [usize]) -> Self {
        Self {
            waiting: order,
            running: Vec::new(),
        }
    }

    fn start_next(&mut self) -> Option<usize> {
        let (next, rest) = self.waiting.split_first()?;
        self.waiting = rest;
        self.running.push(*next);
        Some(*next)
    }

    fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    fn is_over(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Waits until one answers, or long enough to ask the next.
    fn next_answer(&self, answers: &Receiver<Answer>, deadline: Instant) -> Option<Answer> {
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = if self.is_waiting() {
            PATIENCE.min(left)
        } else {
            left
        };
        answers.recv_timeout(patience).ok()
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

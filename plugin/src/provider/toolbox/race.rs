//! Several that can do the same are asked one after the other, the next one while those before it may still answer.

use std::io;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

/// How a race ended.
pub(crate) enum Raced<C, T> {
    /// One did it, while these had not answered yet.
    Won(T, Vec<C>),
    /// None did, and these had not answered when the time was up.
    Lost(Vec<C>),
}

/// Has each of `candidates` asked on a thread of its own, the next one as soon as one has failed, or all have been silent for
/// `head_start`. What `judge` makes of the first answer that it accepts wins.
pub(crate) fn race<C: Copy + PartialEq + Send + 'static, A: Send + 'static, T>(
    candidates: impl IntoIterator<Item = C>,
    head_start: Duration,
    deadline: Instant,
    ask: impl Fn(C) -> A + Clone + Send + 'static,
    mut judge: impl FnMut(C, A) -> Option<T>,
) -> io::Result<Raced<C, T>> {
    let (sender, answers) = channel();
    let (mut waiting, mut running) = (candidates.into_iter().peekable(), Vec::new());
    loop {
        if let Some(next) = waiting.next() {
            let (sender, ask) = (sender.clone(), ask.clone());
            let work = move || {
                // Nobody waits any more when this fails: a key in the answer is wiped, a connection closed.
                let _ = sender.send((next, ask(next)));
            };
            std::thread::Builder::new().name("race".to_owned()).spawn(work)?;
            running.push(next);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let is_last = waiting.peek().is_none();
        match answers.recv_timeout(if is_last { left } else { head_start.min(left) }) {
            Ok((candidate, answer)) => {
                running.retain(|other| *other != candidate);
                if let Some(won) = judge(candidate, answer) {
                    return Ok(Raced::Won(won, running));
                }
                if is_last && running.is_empty() {
                    return Ok(Raced::Lost(running));
                }
            }
            Err(_) if is_last => return Ok(Raced::Lost(running)),
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD_START: Duration = Duration::from_millis(20);

    /// Each candidate answers after that many milliseconds; those below 10 are not what was asked for.
    fn raced(candidates: &[u64], time: Duration) -> Raced<u64, u64> {
        let ask = |after| std::thread::sleep(Duration::from_millis(after));
        let judge = |candidate, ()| (candidate >= 10).then_some(candidate);
        let candidates = candidates.to_vec();
        race(candidates, HEAD_START, Instant::now() + time, ask, judge).unwrap()
    }

    #[test]
    fn a_silent_one_and_one_that_fails_make_room_for_the_next() {
        let long = Duration::from_secs(60);
        assert!(matches!(raced(&[30_000, 1, 10], long), Raced::Won(10, slower) if slower == [30_000]));
        assert!(matches!(raced(&[1, 2], long), Raced::Lost(silent) if silent.is_empty()));
    }

    #[test]
    fn those_that_are_silent_at_the_end_are_named() {
        let short = Duration::from_millis(60);
        assert!(
            matches!(raced(&[30_000, 1, 40_000], short), Raced::Lost(silent) if silent == [30_000, 40_000])
        );
    }
}

//! One call of a provider, on a thread of its own, with a deadline.
//!
//! A provider may hang in a library or a network that nothing can interrupt. Its thread is left behind then, and what
//! it still returns is dropped, which wipes any key in it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::Duration;

use crate::provider::ProviderError;

pub(crate) fn within<T: Send + 'static>(
    deadline: Duration,
    call: impl FnOnce() -> Result<T, ProviderError> + Send + 'static,
) -> Result<T, ProviderError> {
    let (sender, receiver) = sync_channel(1);
    on_a_thread(move || {
        // Nobody waits any more when this fails.
        let _ = sender.send(call());
    })?;
    answer(&receiver, deadline)?
}

/// Makes `call` for each of `items`, all on one thread, each with the deadline of its own. The answers are in the items'
/// order; they end early, with an error that is about the provider as a whole, when one does not come in time.
pub(crate) fn each_within<I: Send + 'static, T: Send + 'static>(
    deadline: Duration,
    items: Vec<I>,
    call: impl FnMut(I) -> Result<T, ProviderError> + Send + 'static,
) -> Result<Vec<Result<T, ProviderError>>, ProviderError> {
    let count = items.len();
    let (sender, receiver) = sync_channel(count.max(1));
    on_a_thread(move || {
        // Ends where nobody waits any more.
        let _ = items
            .into_iter()
            .map(call)
            .try_for_each(|answer| sender.send(answer));
    })?;
    (0..count).map(|_| answer(&receiver, deadline)).collect()
}

fn on_a_thread(work: impl FnOnce() + Send + 'static) -> Result<(), ProviderError> {
    let thread = std::thread::Builder::new().name("provider".to_owned());
    let started = thread.spawn(work).map(drop);
    started.map_err(ProviderError::internal("starting a thread"))
}

fn answer<T>(receiver: &Receiver<T>, deadline: Duration) -> Result<T, ProviderError> {
    receiver.recv_timeout(deadline).map_err(|error| match error {
        RecvTimeoutError::Timeout => {
            ProviderError::Unreachable(format!("no answer within {:.1} s", deadline.as_secs_f64()))
        }
        RecvTimeoutError::Disconnected => ProviderError::internal("calling it")("its thread ended"),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_hanging_call_costs_its_deadline_and_no_more() {
        let started = Instant::now();
        let answer = within(Duration::from_millis(50), || {
            std::thread::sleep(Duration::from_secs(30));
            Ok(())
        });
        assert!(matches!(answer, Err(ProviderError::Unreachable(_))));
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn each_call_has_its_own_deadline() {
        let slow = |nth: u64| {
            std::thread::sleep(Duration::from_millis(if nth == 3 { 30_000 } else { 20 }));
            Ok(nth)
        };
        let answers = each_within(Duration::from_secs(10), (10..40).collect(), slow).unwrap();
        let answers: Vec<u64> = answers.into_iter().map(Result::unwrap).collect();
        assert_eq!(answers, (10..40).collect::<Vec<_>>());
        assert!(matches!(
            each_within(Duration::from_secs(1), vec![1, 2, 3, 4], slow),
            Err(ProviderError::Unreachable(_))
        ));
    }

    #[test]
    fn an_answer_in_time_is_passed_on() {
        assert!(matches!(within(Duration::from_secs(20), || Ok(7)), Ok(7)));
        let refused: Result<(), _> = within(Duration::from_secs(20), || Err(ProviderError::Locked));
        assert!(matches!(refused, Err(ProviderError::Locked)));
    }
}

//! One call of a provider, on a thread of its own, with a deadline.
//!
//! A provider may hang in a library or a network that nothing can interrupt. Its thread is left behind then, and what
//! it still returns is dropped, which wipes any key in it.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use crate::provider::ProviderError;

pub(super) fn within<T: Send + 'static>(
    deadline: Duration,
    call: impl FnOnce() -> Result<T, ProviderError> + Send + 'static,
) -> Result<T, ProviderError> {
    let (sender, receiver) = sync_channel(1);
    std::thread::Builder::new()
        .name("provider".to_owned())
        .spawn(move || {
            // Nobody waits any more when this fails.
            let _ = sender.send(call());
        })
        .map_err(ProviderError::internal("starting a thread"))?;
    match receiver.recv_timeout(deadline) {
        Ok(answer) => answer,
        Err(RecvTimeoutError::Timeout) => Err(ProviderError::Unreachable(format!(
            "no answer within {:.1} s",
            deadline.as_secs_f64()
        ))),
        Err(RecvTimeoutError::Disconnected) => Err(ProviderError::internal("calling it")("its thread ended")),
    }
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
    fn an_answer_in_time_is_passed_on() {
        assert!(matches!(within(Duration::from_secs(20), || Ok(7)), Ok(7)));
        let refused: Result<(), _> = within(Duration::from_secs(20), || Err(ProviderError::Locked));
        assert!(matches!(refused, Err(ProviderError::Locked)));
    }
}

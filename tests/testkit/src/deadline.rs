//! Waiting for what another process brings about, never longer than a deadline.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Calls `poll` until it returns a value. After `limit` the error says that `what` did not happen.
///
/// # Errors
/// The deadline has passed, or `poll` failed.
pub fn wait_until<T>(limit: Duration, what: &str, mut poll: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = poll()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what} did not happen within {} s", limit.as_secs_f32());
        }
        sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_value_as_soon_as_there_is_one() {
        let mut calls = 0;
        let value = wait_until(Duration::from_secs(5), "the third call", || {
            calls += 1;
            Ok((calls == 3).then_some(calls))
        });
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn names_what_did_not_happen() {
        let error = wait_until::<()>(Duration::ZERO, "the guest's boot", || Ok(None)).unwrap_err();
        assert_eq!(error.to_string(), "the guest's boot did not happen within 0 s");
    }
}

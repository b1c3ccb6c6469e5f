//! Hears what virtseald tells systemd.

use std::io::ErrorKind;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::SealedHost;

/// The socket that `Type=notify` is about.
pub struct Readiness(UnixDatagram);

impl Readiness {
    /// What goes into the environment of virtseald, as an argument of `env`.
    pub const ENVIRONMENT: &str = "NOTIFY_SOCKET=/run/notify";

    /// Listens, before virtseald starts.
    ///
    /// # Errors
    /// When there is a socket already.
    pub fn of(sealed: &SealedHost) -> Result<Self> {
        let socket = UnixDatagram::bind(sealed.host().path("/run/notify"))?;
        Ok(Self(socket))
    }

    /// Waits until virtseald says that it is ready, and forgets that it did.
    ///
    /// # Errors
    /// It does not, within `limit`.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            self.0
                .set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut message = [0; 4096];
            match self.0.recv(&mut message) {
                Ok(length) if String::from_utf8_lossy(&message[..length]).contains("READY=1") => {
                    return Ok(());
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if left.is_zero() || error.kind() == ErrorKind::WouldBlock => {
                    bail!("virtseald did not say within {limit:?} that it is ready: {error}")
                }
                Err(error) => return Err(error).context("what virtseald tells systemd"),
            }
        }
    }

    /// Whether virtseald has said so by now. Forgets it.
    #[must_use]
    pub fn has_come(&self) -> bool {
        self.wait(Duration::ZERO).is_ok()
    }
}

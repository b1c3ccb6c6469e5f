//! A VM's serial console, as text with deadlines.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::deadline::wait_until;

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How much of the console an error shows.
const TAIL_BYTES: usize = 2000;

/// A connection to a serial console. QEMU serves one at a time and keeps nothing for later: connect right after the start.
pub struct Console {
    socket: UnixStream,
    /// All that was read, for messages.
    transcript: Vec<u8>,
    /// Up to where `expect` has consumed it.
    consumed: usize,
}

impl Console {
    /// Connects to the unix socket that QEMU serves the console on.
    ///
    /// # Errors
    /// Nobody listens there within ten seconds.
    pub fn connect(path: &Path) -> Result<Self> {
        let what = format!("a console at {}", path.display());
        let socket = wait_until(CONNECT_DEADLINE, &what, || Ok(UnixStream::connect(path).ok()))?;
        Ok(Self {
            socket,
            transcript: Vec::new(),
            consumed: 0,
        })
    }

    /// Types a line.
    ///
    /// # Errors
    /// QEMU has closed the console.
    pub fn send(&mut self, line: &str) -> Result<()> {
        self.socket
            .write_all(format!("{line}\n").as_bytes())
            .context("the console does not take input")
    }

    /// Waits for `pattern` and returns what came before it since the last call.
    ///
    /// # Errors
    /// It did not come within `limit`, or the console was closed; the message holds the console's last lines.
    pub fn expect(&mut self, pattern: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = find(&self.transcript[self.consumed..], pattern.as_bytes()) {
                let before = &self.transcript[self.consumed..self.consumed + at];
                let before = String::from_utf8_lossy(before).into_owned();
                self.consumed += at + pattern.len();
                return Ok(before);
            }
            self.read_until(deadline)
                .with_context(|| format!("waiting for {pattern:?} on the console"))?;
        }
    }

    /// Waits for a whole line and returns it without its end.
    ///
    /// # Errors
    /// As [`Console::expect`].
    pub fn line(&mut self, limit: Duration) -> Result<String> {
        Ok(self.expect("\n", limit)?.trim_end_matches('\r').to_owned())
    }

    /// All that the console has shown since it was connected.
    pub fn transcript(&self) -> String {
        String::from_utf8_lossy(&self.transcript).into_owned()
    }

    fn read_until(&mut self, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(
            !left.is_zero(),
            "the deadline has passed; the console shows:\n{}",
            self.tail()
        );
        self.socket.set_read_timeout(Some(left))?;
        let mut chunk = [0; 4096];
        match self.socket.read(&mut chunk) {
            Ok(0) => bail!("the VM has closed its console, which showed:\n{}", self.tail()),
            Ok(length) => self.transcript.extend_from_slice(&chunk[..length]),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(error).context("the console can't be read"),
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let start = self.transcript.len().saturating_sub(TAIL_BYTES);
        String::from_utf8_lossy(&self.transcript[start..]).into_owned()
    }
}

fn find(text: &[u8], pattern: &[u8]) -> Option<usize> {
    text.windows(pattern.len()).position(|window| window == pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Console, UnixStream) {
        let (socket, other) = UnixStream::pair().unwrap();
        (
            Console {
                socket,
                transcript: Vec::new(),
                consumed: 0,
            },
            other,
        )
    }

    #[test]
    fn lines_come_one_by_one() {
        let (mut console, mut guest) = pair();
        guest.write_all(b"READY\r\nOK read-disk M1\r\npart").unwrap();
        assert_eq!(console.line(Duration::from_secs(1)).unwrap(), "READY");
        assert_eq!(console.line(Duration::from_secs(1)).unwrap(), "OK read-disk M1");
        let error = console.line(Duration::from_millis(10)).unwrap_err();
        assert!(format!("{error:#}").contains("part"), "{error:#}");
    }

    #[test]
    fn a_closed_console_is_not_a_timeout() {
        let (mut console, guest) = pair();
        drop(guest);
        let error = console.expect("READY", Duration::from_secs(1)).unwrap_err();
        assert!(
            format!("{error:#}").contains("has closed its console"),
            "{error:#}"
        );
    }
}

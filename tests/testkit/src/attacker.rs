//! Members of the group that may read, who mean no good: the attacks of `src/bin/reader.rs`, under way.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::{Host, SealedHost, built_program};

/// A user who attacks. Dropping it ends that.
pub struct Attacker {
    /// Which attack it is.
    pub attack: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Attacker {
    /// A group that every Debian has, and that may read after [`Attacker::let_read`].
    pub const GROUP: u32 = 60;
    const GROUP_NAME: &str = "games";
    /// A user that no host has; each attack has one of its own from here on.
    pub const FIRST_USER: u32 = 54_321;
    /// Those that were seen, and two like them: replies that nobody reads, messages that do not go on.
    const ATTACKS: [&str; 9] = [
        "status",
        "watch",
        "audit",
        "idle",
        "descriptors",
        "linger",
        "endless",
        "unread",
        "trickle",
    ];

    /// Configures and restarts the daemon, so that attackers are readers. Every provider is locked then.
    ///
    /// # Errors
    /// When it does not start again.
    pub fn let_read(sealed: &mut SealedHost) -> Result<()> {
        sealed.configure(&format!("socket_group: {}\n", Self::GROUP_NAME))?;
        sealed.stop_daemon(Signal::SIGTERM)?;
        sealed.start_daemon()
    }

    /// All attacks, each under way.
    ///
    /// # Errors
    /// When one does not begin.
    pub fn all(host: &Host) -> Result<Vec<Self>> {
        let start = |(attack, uid)| Self::start(host, attack, uid);
        Self::ATTACKS
            .into_iter()
            .zip(Self::FIRST_USER..)
            .map(start)
            .collect()
    }

    /// One of them, under way.
    ///
    /// # Errors
    /// When it does not begin.
    pub fn start(host: &Host, attack: &'static str, uid: u32) -> Result<Self> {
        let mut child = host
            .command(built_program("reader")?)
            .args([attack, &uid.to_string(), &Self::GROUP.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut attacker = Self {
            attack,
            child,
            input,
            output,
        };
        ensure!(attacker.line()? == "ready", "{attack} does not begin");
        Ok(attacker)
    }

    /// Ends it; what it got, as `reader` counts that.
    ///
    /// # Errors
    /// When it has ended by itself.
    pub fn end(&mut self) -> Result<u64> {
        drop(self.input.take());
        self.line()?.parse().with_context(|| self.attack)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

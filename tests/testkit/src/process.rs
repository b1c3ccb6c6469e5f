//! A daemon that a test runs inside a namespace: libvirtd, virtseald, a key server.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::deadline::wait_until;
use crate::namespace::Namespace;

const START_DEADLINE: Duration = Duration::from_secs(10);
/// Leaves its pid, then becomes the program. Without a child of its own: a tracer that comes now must find nothing but the
/// program's calls.
const LAUNCHER: &str = r#"echo $$ >"$1" && shift && exec "$@""#;

/// A running daemon. Dropping it kills it.
pub struct Process {
    name: String,
    /// nsenter, which ends as the daemon ends.
    child: Child,
    pid: u32,
    init_pid_root: PathBuf,
    log: PathBuf,
}

impl Process {
    /// Starts `argv` in the namespace. What it prints is appended to `/var/log/NAME.out` there.
    pub(crate) fn spawn(namespace: &Namespace, name: &str, argv: &[&str]) -> Result<Self> {
        let log = namespace.path(format!("/var/log/{name}.out"));
        let output = File::options().create(true).append(true).open(&log)?;
        let pid_file = format!("/run/{name}.e2e-pid");
        let _ = fs::remove_file(namespace.path(&pid_file));
        let mut child = namespace
            .command("sh")
            .args(["-c", LAUNCHER, "sh", &pid_file])
            .args(argv)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            // A daemon that a story stops must not be in a group with others: when a group with a stopped process becomes
            // an orphan, the kernel sends SIGHUP to all of it.
            .process_group(0)
            .spawn()
            .with_context(|| format!("{name} did not start"))?;
        let pid = wait_until(START_DEADLINE, &format!("the start of {name}"), || {
            // Asked first: a daemon that refuses its configuration may be gone before its pid is read.
            let ended = child.try_wait()?;
            let pid = fs::read_to_string(namespace.path(&pid_file)).unwrap_or_default();
            match (pid.strip_suffix('\n').and_then(|pid| pid.parse().ok()), ended) {
                (None, Some(status)) => bail!("{name} ended at once with {status}"),
                (pid, _) => Ok(pid),
            }
        })?;
        Ok(Self {
            name: name.to_owned(),
            child,
            pid,
            init_pid_root: namespace.path("/"),
            log,
        })
    }

    /// Its pid as processes in the namespace see it.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its directory under the namespace's `/proc`, reachable from this side (`cmdline`, `environ`, `status`, …).
    pub fn proc(&self) -> PathBuf {
        self.init_pid_root.join("proc").join(self.pid.to_string())
    }

    /// What it has printed so far.
    pub fn output(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// The state of the child can't be read.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        ensure!(self.ended()?.is_none(), "{} has ended", self.name);
        let outside = self.outside_pid()?;
        kill(outside, signal).with_context(|| format!("{} could not be sent {signal}", self.name))?;
        if signal == Signal::SIGCONT {
            self.continue_nsenter();
        }
        Ok(())
    }

    /// nsenter stops when the daemon stops.
    fn continue_nsenter(&self) {
        if let Ok(pid) = self.child.id().try_into() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGCONT);
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_until(limit, &what, || Ok(self.child.try_wait()?))
    }

    /// Its pid as this side sees it: nsenter forks to enter a pid namespace, so the daemon is its only child.
    ///
    /// # Errors
    /// It has ended.
    pub fn outside_pid(&self) -> Result<Pid> {
        let nsenter = self.child.id();
        let children = fs::read_to_string(format!("/proc/{nsenter}/task/{nsenter}/children"))?;
        let pid = children
            .split_whitespace()
            .next()
            .with_context(|| format!("{} has ended", self.name))?;
        Ok(Pid::from_raw(pid.parse()?))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.ended() {
            let _ = self.signal(Signal::SIGKILL);
            self.continue_nsenter();
            let _ = self.child.wait();
        }
    }
}

//! A private view of the machine: own `/run`, `/var/log`, `/var/cache`, `/etc/libvirt`, `/etc/virtseal`,
//! `/var/lib/libvirt`, `/var/lib/virtseal` and `/var/lib/swtpm-localca`, and own pids. `host/namespace` sets it up.
//!
//! Invariant: nothing started inside outlives the [`Namespace`], not even when the test is killed, because its first
//! process ends at the end of its standard input, and the kernel then kills the rest and drops all mounts.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::programs::script;

const SERVICE_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Runs the namespace to its end and then removes its directory: also when the test was killed.
const KEEPER: &str = r#"unshare --mount --pid --fork --kill-child -- "$1" "$2"; rm -rf -- "$2""#;

/// The namespace, and the temporary directory that backs all that is written in it.
pub struct Namespace {
    keeper: Child,
    /// The first process inside, as this side numbers it.
    init_pid: u32,
    directory: PathBuf,
}

impl Namespace {
    /// Makes a namespace whose private paths are empty.
    ///
    /// # Errors
    /// No root, or a kernel or container that does not allow mounts; the script's own messages go to stderr.
    pub fn new() -> Result<Self> {
        let directory = tempfile::Builder::new()
            .prefix("virtseal-e2e-")
            .tempdir()
            .context("no temporary directory")?;
        let mut keeper = Command::new("bash")
            .args(["-c", KEEPER, "bash"])
            .arg(script("namespace"))
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A Ctrl-C is for the test; the keeper has to clean up after it.
            .process_group(0)
            .spawn()
            .context("bash did not start")?;
        let directory = directory.keep();
        let mut line = String::new();
        let stdout = keeper.stdout.take().context("bash has no standard output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        let init_pid = parse_ready(&line)
            .context("the private namespace could not be set up; its messages are above")?;
        Ok(Self {
            keeper,
            init_pid,
            directory,
        })
    }

    /// A command that will run inside, in the directory `/`, with a service's environment: what cargo or an
    /// administrator's shell has exported is none of a host's business, and libvirt shows the environment of a hook
    /// that refuses.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("nsenter");
        command
            .env_clear()
            .env("PATH", SERVICE_PATH)
            .env("HOME", "/root")
            .arg("--target")
            .arg(self.init_pid.to_string())
            .args(["--mount", "--pid", "--"])
            .arg(program.as_ref())
            .env("LC_ALL", "C");
        command
    }

    /// The path by which this side reaches `inside`, an absolute path in the namespace. It sees what is mounted there, and
    /// is short enough for a unix socket.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.init_pid));
        let inside = inside.as_ref();
        root.join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// The directory on a disk that backs every private path. It has the same path inside and outside.
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        // Returns after the kernel has killed and reaped everything inside, and the directory is gone.
        let _ = self.keeper.wait();
    }
}

fn parse_ready(line: &str) -> Option<u32> {
    line.trim_end().strip_prefix("ready ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_line_carries_the_pid() {
        assert_eq!(parse_ready("ready 4711\n"), Some(4711));
        assert_eq!(parse_ready(""), None);
        assert_eq!(parse_ready("ready soon\n"), None);
    }
}

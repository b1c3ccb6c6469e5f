//! Key servers for stories: the real ones, each on a loopback port with a directory of its own, ended when dropped.
//!
//! They run outside of a [`Host`](crate::Host)'s namespace, which shares the network and `/dev/shm` with the machine.
//! `add_to` makes a provider of each on a [`SealedHost`](crate::SealedHost), by the command line as an admin does.

mod authority;
mod openbao;
mod pykmip;
mod relay;
mod softhsm;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::wait_until;

pub use authority::{Authority, Certified};
pub use openbao::OpenBao;
pub use pykmip::PyKmip;
pub use relay::{Manner, Relay};
pub use softhsm::{Removed, SoftHsm, token_directory};

const START_DEADLINE: Duration = Duration::from_secs(90);
/// A server may have children, so its whole group ends: when its input closes, also because the test was killed.
const ENDS_WITH_ITS_INPUT: &str = r#""$@" & read -r _; kill -9 0"#;

/// A directory that hosts see too, in memory: servers sync each change.
fn directory() -> Result<TempDir> {
    tempfile::tempdir_in("/dev/shm").context("/dev/shm can't be written")
}

/// A port that nobody listens on; whoever needs it binds it soon.
///
/// # Errors
/// None is free.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A program that `make deps` puts under `target/test-tools`.
///
/// # Errors
/// It is not there.
pub fn test_tool(path: &str, package: &str) -> Result<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/test-tools");
    let program = tools.join(path);
    ensure!(
        program.is_file(),
        "{} is missing (PyPI package {package}); run: make deps",
        program.display()
    );
    Ok(program)
}

/// A server with all its children.
#[derive(Debug)]
pub struct Running {
    shell: Child,
    port: u16,
}

impl Running {
    /// Starts it, and waits until it listens on `port` of 127.0.0.1. What it prints is in `output` of `directory`.
    ///
    /// # Errors
    /// It is not there, or ends instead.
    pub fn start<S: AsRef<OsStr>>(
        program: &Path,
        arguments: impl IntoIterator<Item = S>,
        directory: &Path,
        port: u16,
    ) -> Result<Self> {
        let log = directory.join("output");
        let output = File::options().create(true).append(true).open(&log)?;
        let shell = Command::new("sh")
            .args(["-c", ENDS_WITH_ITS_INPUT, "sh"])
            .arg(program)
            .args(arguments)
            .env("HOME", directory)
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output)
            .process_group(0)
            .spawn()
            .with_context(|| format!("{} did not start", program.display()))?;
        let mut running = Self { shell, port };
        let what = format!("the start of {}", program.display());
        wait_until(START_DEADLINE, &what, || {
            let said = || fs::read_to_string(&log).unwrap_or_default();
            ensure!(running.shell.try_wait()?.is_none(), "it ended: {}", said());
            Ok(TcpStream::connect(("127.0.0.1", port)).ok().map(drop))
        })?;
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        // It was started by this process and is waited for nowhere else.
        let _ = self.shell.wait();
        // The shell has ended; the others of its group end a moment later.
        while TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a UTF-8 path")
}

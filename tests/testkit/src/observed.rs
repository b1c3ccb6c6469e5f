//! Looking into processes: what they start, and what is in their memory.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::{Host, Process, wait_until};

const PATIENCE: Duration = Duration::from_secs(30);

/// strace on a process and all that it starts; the log has every argument and every variable in full.
pub struct Strace(Process);

impl Strace {
    /// Follows the process `pid`, whose directory under `/proc` is `proc`, from now on; the log is `/run/NAME.execve`.
    ///
    /// # Errors
    /// It can't be followed.
    pub fn attach(host: &Host, name: &str, pid: u32, proc: &Path) -> Result<Self> {
        let (pid, log) = (pid.to_string(), format!("/run/{name}.execve"));
        let options = ["-f", "-v", "-s", "1000000", "-e", "trace=execve,execveat"];
        let argv = [&["strace"], &options[..], &["-o", &log, "-p", &pid]].concat();
        let strace = host.spawn(&format!("strace-{name}"), &argv)?;
        wait_until(PATIENCE, "strace to attach", || {
            let status = fs::read_to_string(proc.join("status"))?;
            let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
            Ok(tracer.is_some_and(|tracer| tracer.trim() != "0").then_some(()))
        })?;
        Ok(Self(strace))
    }

    /// Lets go of all that it follows, with the log complete.
    ///
    /// # Errors
    /// strace does not end.
    pub fn end(mut self) -> Result<()> {
        self.0.signal(Signal::SIGTERM)?;
        self.0.wait(PATIENCE).map(drop)
    }
}

/// All that a debugger reads of the process with this pid in the namespace: also what core dumps leave out.
///
/// # Errors
/// gdb can't read it.
pub fn core_image(host: &Host, pid: u32) -> Result<Vec<u8>> {
    let pid = pid.to_string();
    let file = format!("/run/core.{pid}");
    let dump = format!("generate-core-file {file}");
    let commands = [
        "set use-coredump-filter off",
        "set dump-excluded-mappings on",
        &dump,
    ];
    let mut arguments = vec!["gdb", "-nx", "-batch", "-p", &pid];
    arguments.extend(commands.iter().flat_map(|command| ["-ex", command]));
    let said = host.run(&arguments)?;
    let core = fs::read(host.path(&file)).with_context(|| format!("no core image: {said:?}"))?;
    fs::remove_file(host.path(&file))?;
    Ok(core)
}

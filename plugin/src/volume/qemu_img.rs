//! Running `qemu-img`: what it inherits, how it is followed, and that it never outlives its job.

use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use serde::{Deserialize, Serialize};

use super::error::{Attempt, VolumeError};

/// How much of a job is done: 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Percent(pub f32);

/// A `qemu-img` with these arguments.
pub(crate) fn qemu_img(arguments: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs `command` with `inherited` under their own numbers. `source` is for messages.
pub(crate) fn run(
    mut command: Command,
    inherited: &[BorrowedFd<'_>],
    source: &Path,
    progress: impl FnMut(Percent) -> ControlFlow<()>,
) -> Result<ControlFlow<()>, VolumeError> {
    bequeath(&mut command, inherited.iter().map(AsRawFd::as_raw_fd).collect());
    let mut child = Guarded(command.spawn().map_err(VolumeError::QemuImgMissing)?);
    let stdout = child.0.stdout.take();
    let stderr = child.0.stderr.take();
    let (outcome, said) = thread::scope(|scope| {
        let said = scope.spawn(|| stderr.map(last_words).unwrap_or_default());
        let outcome = stdout.map_or(Ok(ControlFlow::Continue(())), |out| follow(out, progress));
        if !matches!(outcome, Ok(ControlFlow::Continue(()))) {
            child.kill();
        }
        (outcome, said.join().unwrap_or_default())
    });
    let status = child.0.wait().attempt("wait for qemu-img on", source)?;
    let outcome = outcome.attempt("hear from qemu-img about", source)?;
    if outcome.is_continue() && !status.success() {
        let said = if said.is_empty() { status.to_string() } else { said };
        return Err(VolumeError::QemuImg {
            path: source.to_owned(),
            said,
        });
    }
    Ok(outcome)
}

/// A child that does not outlive its owner.
struct Guarded(Child);

impl Guarded {
    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
        let _ = self.0.wait();
    }
}

/// The child keeps `inherited`, dies with this thread, and dumps no core.
fn bequeath(command: &mut Command, inherited: Vec<RawFd>) {
    let parent = nix::unistd::getpid();
    let prepare = move || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        if nix::unistd::getppid() != parent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?;
        for fd in &inherited {
            // SAFETY: fcntl takes numbers only; clearing the flags of a descriptor of this new process touches no memory.
            if unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec `prepare` makes only system calls that are async-signal-safe, and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Reports each `(12.34/100%)` of `out` until it ends.
fn follow(
    mut out: impl Read,
    mut progress: impl FnMut(Percent) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let mut buffer = [0; 256];
    let mut line = Vec::new();
    loop {
        let read = match out.read(&mut buffer) {
            Ok(0) => return Ok(ControlFlow::Continue(())),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        for byte in &buffer[..read] {
            if *byte != b')' {
                line.push(*byte);
                continue;
            }
            if let Some(percent) = percent(&line)
                && progress(percent).is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
            line.clear();
        }
        // Anything this long is no progress report.
        if line.len() > 1024 {
            line.clear();
        }
    }
}

fn percent(line: &[u8]) -> Option<Percent> {
    let text = std::str::from_utf8(line).ok()?;
    let (_, number) = text.strip_suffix("/100%")?.rsplit_once('(')?;
    let number: f32 = number.trim().parse().ok()?;
    (0.0..=100.0).contains(&number).then_some(Percent(number))
}

/// The end of what the child has to say, on one line.
fn last_words(mut stderr: impl Read) -> String {
    let mut kept = Vec::new();
    // Reading stops early only when the pipe breaks, and then there is no more to say.
    let _ = stderr.by_ref().take(4096).read_to_end(&mut kept);
    let _ = io::copy(&mut stderr, &mut io::sink());
    let text = String::from_utf8_lossy(&kept).replace(|c: char| c.is_control() && c != '\n', "?");
    let lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim_start_matches("qemu-img: "))
        .collect();
    lines.join("; ")
}

/// The name of an inherited descriptor for the child.
pub(crate) fn descriptor(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_as_qemu_img_writes_it() {
        let out = &b"    (0.00/100%)\r    (12.50/100%)\r    (100.00/100%)\r\n"[..];
        let mut heard = Vec::new();
        let end = follow(out, |percent| {
            heard.push(percent.0);
            ControlFlow::Continue(())
        });
        assert!(end.unwrap().is_continue());
        assert_eq!(heard, [0.0, 12.5, 100.0]);
    }

    #[test]
    fn progress_can_stop_the_job_and_garbage_is_no_progress() {
        assert!(
            follow(&b"(1.00/100%)(2.00/100%)"[..], |_| ControlFlow::Break(()))
                .unwrap()
                .is_break()
        );
        for garbage in [
            "(nan/100%)",
            "(/100%)",
            "(101/100%)",
            "()",
            "\u{fffd})",
            "(1/10%)",
        ] {
            let heard = follow(garbage.as_bytes(), |_| ControlFlow::Break(())).unwrap();
            assert!(heard.is_continue(), "{garbage}");
        }
    }

    #[test]
    fn what_the_child_says_becomes_one_line() {
        assert_eq!(
            last_words(&b"qemu-img: no such thing\nqemu-img: really\x1b[2J\n"[..]),
            "no such thing; really?[2J"
        );
    }
}

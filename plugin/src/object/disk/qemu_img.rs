//! Running `qemu-img`: what it inherits, what it may reach, how it is followed, and that it never outlives its job.
//! Nothing else here starts it.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use serde::{Deserialize, Serialize};

use super::error::{Attempt, VolumeError};
use super::sandbox::Sandbox;
use crate::domain::DeclaredFormat;

/// How much of a job is done: 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Percent(pub f32);

/// A `qemu-img` that is still to run.
///
/// It reaches the descriptors that it is given here, by [`descriptor`], and no other file: see [`Sandbox`].
pub(crate) struct QemuImg<'a> {
    command: Command,
    program: PathBuf,
    sources: Vec<BorrowedFd<'a>>,
    targets: Vec<BorrowedFd<'a>>,
    unnamed: Vec<BorrowedFd<'a>>,
    input: Input,
}

/// What it parses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Input {
    /// Nothing that others wrote.
    Ours,
    /// A header that can name other files.
    Foreign,
}

impl<'a> QemuImg<'a> {
    /// With these arguments.
    pub(crate) fn new(arguments: &[&str]) -> Result<Self, VolumeError> {
        let program = program()?;
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env_clear()
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Ok(Self {
            command,
            program,
            sources: Vec::new(),
            targets: Vec::new(),
            unnamed: Vec::new(),
            input: Input::Ours,
        })
    }

    /// Adds an argument.
    pub(crate) fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// It gets a pipe, or memory that is in no file system.
    pub(crate) fn inheriting(mut self, fd: BorrowedFd<'a>) -> Self {
        self.unnamed.push(fd);
        self
    }

    /// Adds the image in `fd` as an argument. Its driver is named, nothing is guessed; whatever backing file its header
    /// names by now is not opened.
    pub(crate) fn source(mut self, fd: BorrowedFd<'a>, format: DeclaredFormat) -> Self {
        let file = format!(r#""file":{{"driver":"file","filename":"{}"}}"#, descriptor(fd));
        match format {
            DeclaredFormat::Raw => self.command.arg(format!(r#"json:{{"driver":"raw",{file}}}"#)),
            DeclaredFormat::Qcow2 => {
                self.input = Input::Foreign;
                self.command
                    .arg(format!(r#"json:{{"driver":"qcow2","backing":null,{file}}}"#))
            }
        };
        self.sources.push(fd);
        self
    }

    /// It may read and write `fd`.
    pub(crate) fn writing(mut self, fd: BorrowedFd<'a>) -> Self {
        self.targets.push(fd);
        self
    }

    /// Runs it. `source` is for messages.
    pub(crate) fn run(
        mut self,
        source: &Path,
        progress: impl FnMut(Percent) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, VolumeError> {
        let sandbox = Sandbox::new(&self.program, &self.sources, &self.targets)
            .attempt("confine qemu-img to", source)?;
        refuse_unconfined(self.input, sandbox.confines_files(), source)?;
        let inherited = [&self.sources[..], &self.targets, &self.unnamed].concat();
        let inherited = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        bequeath(&mut self.command, inherited, sandbox);
        let mut child = Guarded(self.command.spawn().map_err(VolumeError::QemuImgMissing)?);
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
}

/// A raw image names no files, and what we made ourselves names none either.
fn refuse_unconfined(input: Input, confined: bool, source: &Path) -> Result<(), VolumeError> {
    if input == Input::Ours || confined {
        return Ok(());
    }
    Err(VolumeError::unsupported(
        source,
        "it is qcow2, which can name other files, and this kernel can't keep qemu-img away from them: it has no Landlock",
        "boot the kernel with landlock in its parameter lsm=, or make it raw elsewhere and give that",
    ))
}

/// Found here, because the child has no environment.
fn program() -> Result<PathBuf, VolumeError> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path)
        .map(|directory| directory.join("qemu-img"))
        .find_map(|program| std::fs::canonicalize(program).ok())
        .ok_or_else(|| VolumeError::QemuImgMissing(io::ErrorKind::NotFound.into()))
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

/// The child keeps `inherited`, dies with this thread, dumps no core, and enters the sandbox.
fn bequeath(command: &mut Command, inherited: Vec<RawFd>, sandbox: Sandbox) {
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
        sandbox.enter()
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
    use crate::model::problem::Problem;

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
    fn without_landlock_only_what_names_no_files_is_read() {
        let path = Path::new("/images/cloud.qcow2");
        let refused = Problem::from(refuse_unconfined(Input::Foreign, false, path).unwrap_err()).to_string();
        assert!(
            refused.contains("Landlock") && refused.contains("lsm="),
            "{refused}"
        );
        assert!(refuse_unconfined(Input::Ours, false, path).is_ok());
        assert!(refuse_unconfined(Input::Foreign, true, path).is_ok());
    }

    #[test]
    fn only_this_file_starts_qemu_img() {
        let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if !path.ends_with("disk/qemu_img.rs") && !path.ends_with("tests.rs") {
                    let text = std::fs::read_to_string(&path).unwrap();
                    assert!(
                        !text.contains("(\"qemu-img\")"),
                        "{path:?} starts qemu-img unconfined"
                    );
                }
            }
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

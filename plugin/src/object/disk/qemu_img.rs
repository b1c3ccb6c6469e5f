//! Running `qemu-img`: what it inherits, what it may reach, how it is followed, and that it never outlives its job.
//! Nothing else here starts it.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::error::{Attempt, VolumeError};
use super::sandbox::Sandbox;
use crate::domain::DeclaredFormat;
use crate::model::deadlines::image::{ENDS, GO_ON, IN_USE};
use crate::secret::Passphrase;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, setrlimit};

/// How much of a job is done: 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Percent(pub f32);

/// What is heard of a job. Whoever breaks has it killed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Heard {
    /// So much of it is done.
    Done(Percent),
    /// All is done, or it was killed, and the process with this id does not end: it is stuck in storage that does not answer, where no
    /// signal reaches it.
    Stuck(u32),
}

/// A `qemu-img` that is still to run.
///
/// It reaches the descriptors that it is given here, by [`descriptor`], and no other file: see [`Sandbox`].
pub(crate) struct QemuImg<'a> {
    command: Command,
    program: PathBuf,
    sources: Vec<BorrowedFd<'a>>,
    targets: Vec<BorrowedFd<'a>>,
    unnamed: Vec<BorrowedFd<'a>>,
    /// The reading end of a pipe with a passphrase.
    key: Option<OwnedFd>,
    input: Input,
}

/// An image of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChainLayer<'a> {
    pub file: BorrowedFd<'a>,
    pub place: Place,
    pub format: DeclaredFormat,
    /// The name of the secret that opens it.
    pub secret: Option<&'a str>,
    pub access: Access,
}

/// What kind of file an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    File,
    Device,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// As QEMU takes it. Whoever calls holds the locks.
fn node_of(layers: &[ChainLayer<'_>]) -> serde_json::Value {
    let Some((layer, below)) = layers.split_first() else {
        return serde_json::Value::Null;
    };
    let driver = match layer.place {
        Place::File => "file",
        Place::Device => "host_device",
    };
    let file = serde_json::json!({ "driver": driver, "locking": "off", "filename": descriptor(layer.file) });
    match layer.format {
        DeclaredFormat::Raw => serde_json::json!({ "driver": "raw", "file": file }),
        DeclaredFormat::Qcow2 => {
            let mut node = serde_json::json!({ "driver": "qcow2", "file": file, "backing": node_of(below) });
            if let Some(secret) = layer.secret {
                node["encrypt"] = serde_json::json!({ "format": "luks", "key-secret": secret });
            }
            node
        }
    }
}

/// What a `qemu-img` that ran to its end has said.
pub(crate) struct Answer {
    /// `None` if a signal has ended it.
    pub code: Option<i32>,
    pub stdout: Vec<u8>,
    /// On standard error, in one line.
    pub said: String,
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
            key: None,
            input: Input::Ours,
        })
    }

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

    /// It gets the passphrase as its secret `key`, through a pipe.
    pub(crate) fn with_key(mut self, passphrase: &Passphrase) -> io::Result<Self> {
        let pipe = passphrase_pipe(passphrase)?;
        let secret = format!("secret,id=key,file={}", descriptor(pipe.as_fd()));
        self.command.arg("--object").arg(secret);
        self.key = Some(pipe);
        Ok(self)
    }

    /// Adds the encrypted qcow2 image in `fd` as an argument, which its secret `key` opens. Nothing below it is opened.
    pub(crate) fn sealed(mut self, fd: BorrowedFd<'_>, locking: Locking) -> Self {
        self.input = Input::Foreign;
        self.command.arg(format!(
            r#"json:{{"driver":"qcow2","backing":null,"encrypt":{{"format":"luks","key-secret":"key"}},"file":{{"driver":"file","locking":"{}","filename":"{}"}}}}"#,
            locking.word(),
            descriptor(fd)
        ));
        self
    }

    /// It may read `fd`.
    pub(crate) fn reading(mut self, fd: BorrowedFd<'a>) -> Self {
        self.sources.push(fd);
        self
    }

    /// Adds an image as an argument with those that it is based on, in turn. No driver is guessed, and no file that a header
    /// names is opened.
    pub(crate) fn chain(mut self, layers: &[ChainLayer<'a>]) -> Self {
        self.input = Input::Foreign;
        for layer in layers {
            match layer.access {
                Access::Read => self.sources.push(layer.file),
                Access::Write => self.targets.push(layer.file),
            }
        }
        self.command.arg(format!("json:{}", node_of(layers)));
        self
    }

    /// It may read and write `fd`.
    pub(crate) fn writing(mut self, fd: BorrowedFd<'a>) -> Self {
        self.targets.push(fd);
        self
    }

    /// Runs it to its end, and tells from time to time that this does not come. `source` is for messages.
    pub(crate) fn run(
        self,
        source: &Path,
        progress: impl FnMut(Heard) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, VolumeError> {
        let progress = RefCell::new(progress);
        let listen = |out: ChildStdout| {
            follow(out, has_more, |percent| {
                progress.borrow_mut()(Heard::Done(percent))
            })
        };
        let stuck = |pid| progress.borrow_mut()(Heard::Stuck(pid));
        let (outcome, status, said) = self.hear(source, listen, stuck)?;
        if outcome.is_continue() && !status.success() {
            let said = if said.is_empty() { status.to_string() } else { said };
            return Err(VolumeError::QemuImg {
                path: source.to_owned(),
                said,
            });
        }
        Ok(outcome)
    }

    /// Runs it until `deadline`, and hears what it answers. `image` is for messages.
    pub(crate) fn answer(self, image: &Path, deadline: Instant) -> Result<Answer, VolumeError> {
        let mut stdout = Vec::new();
        let listen = |out: ChildStdout| {
            each_chunk(out, has_more, |chunk| {
                stdout.extend_from_slice(chunk.unwrap_or_default());
                match Instant::now() < deadline && stdout.len() < MAX_ANSWER {
                    true => ControlFlow::Continue(()),
                    false => ControlFlow::Break(()),
                }
            })
        };
        // Nobody is told: whoever asks waits for its end.
        let (outcome, status, said) = self.hear(image, listen, |_| ControlFlow::Break(()))?;
        match outcome {
            ControlFlow::Continue(()) => Ok(Answer {
                code: status.code(),
                stdout,
                said,
            }),
            ControlFlow::Break(()) => Err(VolumeError::QemuImg {
                path: image.to_owned(),
                said: "it took too long, and was stopped".to_owned(),
            }),
        }
    }

    /// Runs it while `listen` hears its standard output; it is killed if that ends early. `stuck` is told now and then that it does not end.
    fn hear(
        mut self,
        image: &Path,
        listen: impl FnOnce(ChildStdout) -> io::Result<ControlFlow<()>>,
        mut stuck: impl FnMut(u32) -> ControlFlow<()>,
    ) -> Result<(ControlFlow<()>, ExitStatus, String), VolumeError> {
        let sandbox = Sandbox::new(&self.program, &self.sources, &self.targets)
            .attempt("confine qemu-img to", image)?;
        refuse_unconfined(self.input, sandbox.confines_files(), image)?;
        let inherited = [&self.sources[..], &self.targets, &self.unnamed].concat();
        let key = self.key.iter().map(AsRawFd::as_raw_fd);
        let inherited = inherited.iter().map(AsRawFd::as_raw_fd).chain(key).collect();
        bequeath(&mut self.command, inherited, sandbox);
        let mut child = Guarded(self.command.spawn().map_err(VolumeError::QemuImgMissing)?);
        let stdout = child.0.stdout.take();
        let stderr = child.0.stderr.take();
        let (words, said) = mpsc::channel();
        // Nobody is left to hear them when this fails.
        thread::spawn(move || words.send(stderr.map(last_words).unwrap_or_default()));
        let mut outcome = stdout.map_or(Ok(ControlFlow::Continue(())), listen);
        let status = loop {
            if !matches!(outcome, Ok(ControlFlow::Continue(()))) {
                child.kill();
            }
            if let Some(status) = child.ends_within(ENDS).attempt("wait for qemu-img on", image)? {
                break status;
            }
            if stuck(child.0.id()).is_break() {
                outcome = outcome.map(|_| ControlFlow::Break(()));
            }
        };
        let said = said.recv_timeout(ENDS).unwrap_or_default();
        let outcome = outcome.attempt("hear from qemu-img about", image)?;
        Ok((outcome, status, said))
    }
}

/// Far more than an answer in JSON has.
const MAX_ANSWER: usize = 1 << 20;

/// Whether QEMU takes its locks on an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Locking {
    /// As a VM does: whoever has it open otherwise is noticed, and kept out.
    Locks,
    /// It keeps no VM from starting; the caller looks whether one did.
    None,
}

impl Locking {
    fn word(self) -> &'static str {
        match self {
            Self::Locks => "on",
            Self::None => "off",
        }
    }
}

/// The reading end of a pipe that holds the passphrase: 64 bytes, which any pipe takes at once.
pub(super) fn passphrase_pipe(passphrase: &Passphrase) -> io::Result<OwnedFd> {
    let (reading, writing) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    File::from(writing).write_all(passphrase.expose())?;
    Ok(reading)
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

    fn ends_within(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let end = Instant::now() + limit;
        loop {
            match self.0.try_wait()? {
                None if Instant::now() < end => thread::sleep(IN_USE),
                ended => return Ok(ended),
            }
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.kill();
        let _ = self.0.wait();
    }
}

/// A check counts each cluster of a file, and a header and a hole make that as many as their writer likes. What virtseald and its children
/// may have together (`MemoryMax` of its unit) is twice this. Images of 16 TiB with the usual clusters take half of it.
const MAX_DATA: u64 = 1 << 30;

/// The child keeps `inherited`, dies with this thread, dumps no core, takes no more memory than [`MAX_DATA`], and enters the sandbox.
fn bequeath(command: &mut Command, inherited: Vec<RawFd>, sandbox: Sandbox) {
    let parent = nix::unistd::getpid();
    let prepare = move || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        if nix::unistd::getppid() != parent {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        setrlimit(Resource::RLIMIT_DATA, MAX_DATA, MAX_DATA)?;
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

/// Waits until there is something to be read, or nothing more to come; not for long.
fn has_more(out: &impl AsFd) -> io::Result<bool> {
    let mut waited = [PollFd::new(out.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(GO_ON).expect("it is short");
    match poll(&mut waited, limit) {
        Ok(count) => Ok(count > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Hands each part of `out` to `hear` until it ends, and nothing while there is none.
fn each_chunk<T: Read>(
    mut out: T,
    has_more: impl Fn(&T) -> io::Result<bool>,
    mut hear: impl FnMut(Option<&[u8]>) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let mut buffer = [0; 256];
    loop {
        let heard = if has_more(&out)? {
            match out.read(&mut buffer) {
                Ok(0) => return Ok(ControlFlow::Continue(())),
                Ok(read) => hear(Some(&buffer[..read])),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
        } else {
            hear(None)
        };
        if heard.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
}

/// Reports each `(12.34/100%)` of `out` until it ends, and the last one again while there is none.
fn follow<T: Read>(
    out: T,
    has_more: impl Fn(&T) -> io::Result<bool>,
    mut progress: impl FnMut(Percent) -> ControlFlow<()>,
) -> io::Result<ControlFlow<()>> {
    let (mut line, mut last) = (Vec::new(), Percent(0.0));
    each_chunk(out, has_more, |chunk| {
        let Some(chunk) = chunk else {
            return progress(last);
        };
        for byte in chunk {
            if *byte != b')' {
                line.push(*byte);
                continue;
            }
            if let Some(percent) = percent(&line) {
                last = percent;
                if progress(percent).is_break() {
                    return ControlFlow::Break(());
                }
            }
            line.clear();
        }
        // Anything this long is no progress report.
        if line.len() > 1024 {
            line.clear();
        }
        ControlFlow::Continue(())
    })
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
        let end = follow(
            out,
            |_| Ok(true),
            |percent| {
                heard.push(percent.0);
                ControlFlow::Continue(())
            },
        );
        assert!(end.unwrap().is_continue());
        assert_eq!(heard, [0.0, 12.5, 100.0]);
    }

    #[test]
    fn progress_can_stop_the_job_and_garbage_is_no_progress() {
        assert!(
            follow(
                &b"(1.00/100%)(2.00/100%)"[..],
                |_| Ok(true),
                |_| ControlFlow::Break(())
            )
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
            let heard = follow(garbage.as_bytes(), |_| Ok(true), |_| ControlFlow::Break(())).unwrap();
            assert!(heard.is_continue(), "{garbage}");
        }
    }

    #[test]
    fn who_has_nothing_to_tell_is_stopped_all_the_same() {
        let (reading, writing) = io::pipe().unwrap();
        (&writing).write_all(b"(12.50/100%)").unwrap();
        let mut heard = Vec::new();
        let end = follow(reading, has_more, |percent| {
            heard.push(percent.0);
            match heard.len() {
                3 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        assert!(end.unwrap().is_break());
        assert_eq!(heard, [12.5, 12.5, 12.5]);
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

//! Data from other images, moved by `qemu-img`.
//!
//! The child gets everything through inherited descriptors: the source, the target (which has no name yet) and a
//! pipe with the passphrase. No path or key is in its arguments. It dies with the thread that started it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};

use super::error::{Attempt, VolumeError};
use super::open::{Format, Image};
use super::size::Bytes;
use super::staging::Staged;
use crate::secret::Passphrase;

/// How much of a job is done: 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Percent(pub f32);

/// An image whose data can be copied: raw or qcow2, plain, complete in itself.
pub(crate) struct Source {
    image: Image,
    path: PathBuf,
    format: &'static str,
}

impl Source {
    /// Opens `path`, and refuses what can't be copied safely: a hostile image must not name other files.
    pub(crate) fn open(path: &Path) -> Result<Self, VolumeError> {
        let image = Image::open(path)?;
        let format = match image.format()? {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            encrypted => {
                return Err(VolumeError::unsupported(
                    path,
                    format!("it is encrypted ({}), and can't be a source", encrypted.as_str()),
                    "give a plain raw or qcow2 image",
                ));
            }
        };
        if let Some(other) = image.rests_on() {
            return Err(VolumeError::unsupported(
                path,
                format!("its data is partly in {other}"),
                "flatten it with `qemu-img convert -O qcow2` first",
            ));
        }
        if format == "raw" {
            refuse_compressed(&image, path)?;
        }
        Ok(Self {
            image,
            path: path.to_owned(),
            format,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The size of its disk, in whole sectors.
    pub(crate) fn virtual_size(&self) -> Bytes {
        let size = self.image.virtual_size();
        size.whole_sectors().unwrap_or(size)
    }

    /// All of its data, which may have `limit` bytes at the most.
    pub(crate) fn read_all(&self, limit: u64) -> Result<Vec<u8>, VolumeError> {
        let size = self.image.virtual_size();
        if size.0 > limit {
            return Err(VolumeError::unsupported(
                &self.path,
                format!("it has {size}, more than any UEFI variable store"),
                "give the template that belongs to the firmware",
            ));
        }
        if self.format == "raw" {
            return read_exactly(self.image.file(), size.0).attempt("read", &self.path);
        }
        let copy = memfd_create("template", MFdFlags::MFD_CLOEXEC)
            .map(File::from)
            .attempt("copy", &self.path)?;
        copy.set_len(size.0).attempt("copy", &self.path)?;
        let source = self.image.file().as_fd();
        let mut command = qemu_img(&["convert", "-n", "-f", self.format, "-O", "raw"]);
        command.arg(descriptor(source)).arg(descriptor(copy.as_fd()));
        let no_progress = |_| ControlFlow::Continue(());
        run(command, &[source, copy.as_fd()], &self.path, no_progress).map(drop)?;
        read_exactly(&copy, size.0).attempt("copy", &self.path)
    }
}

/// Copies all data of `source` into the encrypted image `target`, which must be new: what is not written reads as
/// zeros already.
pub(crate) fn fill(
    source: &Source,
    target: &Staged,
    passphrase: &Passphrase,
    target_path: &Path,
    progress: impl FnMut(Percent) -> ControlFlow<()>,
) -> Result<(), VolumeError> {
    let key = passphrase_pipe(passphrase).attempt("pass a key for", target_path)?;
    let (from, to) = (source.image.file().as_fd(), target.file().as_fd());
    let mut command = qemu_img(&["convert", "-p", "-n", "--target-is-zero", "-f", source.format]);
    command
        .arg("--object")
        .arg(format!("secret,id=key,file={}", descriptor(key.as_fd())))
        .arg("--target-image-opts")
        .arg(descriptor(from))
        .arg(target_options(to));
    match run(command, &[from, to, key.as_fd()], &source.path, progress)? {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(VolumeError::Stopped(target_path.to_owned())),
    }
}

/// Nobody else can know the target, so it needs no lock; a lock of ours on it must not stop QEMU either.
fn target_options(target: BorrowedFd<'_>) -> String {
    format!(
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=key,file.driver=file,file.locking=off,file.filename={}",
        descriptor(target)
    )
}

fn qemu_img(arguments: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs `command` with `inherited` under their own numbers. `source` is for messages.
fn run(
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
    let text = String::from_utf8_lossy(&kept);
    let lines: Vec<&str> = text
        .lines()
        .map(|line| line.trim_start_matches("qemu-img: "))
        .collect();
    lines.join("; ")
}

/// The reading end of a pipe that holds the passphrase: 64 bytes, which any pipe takes at once.
fn passphrase_pipe(passphrase: &Passphrase) -> io::Result<OwnedFd> {
    let (reading, writing) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    File::from(writing).write_all(passphrase.expose())?;
    Ok(reading)
}

fn descriptor(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn read_exactly(file: &File, len: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn refuse_compressed(image: &Image, path: &Path) -> Result<(), VolumeError> {
    const COMPRESSED: [(&[u8], &str); 5] = [
        (b"\x1f\x8b\x08", "gzip"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"BZh", "bzip2"),
        (b"PK\x03\x04", "zip"),
    ];
    let mut start = [0; 8];
    let read = image.file().read_at(&mut start, 0).attempt("read", path)?;
    match COMPRESSED
        .iter()
        .find(|(magic, _)| start[..read].starts_with(magic))
    {
        Some((_, name)) => Err(VolumeError::unsupported(
            path,
            format!("it is compressed with {name}"),
            "unpack it first",
        )),
        None => Ok(()),
    }
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
            last_words(&b"qemu-img: no such thing\nqemu-img: really\n"[..]),
            "no such thing; really"
        );
    }
}

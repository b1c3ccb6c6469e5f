//! A daemon that dies at a chosen system call.
//!
//! [`Tracer`] follows all threads of a running process and counts, over all of them, the system calls by which it leaves
//! something behind: writes to files and sockets, fsync, rename, link, unlink and their kin. At the Nth it kills the
//! process, before the call has any effect. strace can do this too, but counts each thread and each call by itself.
//!
//! Of a row of pwrite64 into one file the first two count: dying before, within and after it are what can differ.
//!
//! Children of the process are not followed. A process that is a child of this one must not be waited for meanwhile: that
//! wait would get what is meant for the tracer. amd64 only, like the stage.

use std::fmt;
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

const POLL_INTERVAL: Duration = Duration::from_micros(50);
const END_DEADLINE: Duration = Duration::from_secs(10);
/// What rax holds on the way into a system call.
const ENTERING: u64 = (-(libc::ENOSYS as i64)) as u64;

/// A traced process. Dropping it lets the process go on without a tracer.
pub struct Tracer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Trace>>>,
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Trace {
    /// The calls that leave something behind, in their order, the last one being that which was not made any more.
    pub steps: Vec<Step>,
    /// Whether the process was killed.
    pub killed: bool,
}

/// A call that leaves something behind. Its text is the call with its file or, for a name, where that is:
/// `fdatasync(keystore.db-wal)`, `rename(index.new, virtseal)`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// `fsync`, `pwrite64`, `rename`, `wait for a child`, …
    pub call: String,
    /// The last part of the file's path; `socket`; `unnamed file` for one that was made without a name. Of a rename or a
    /// link the file that gets a name.
    pub file: String,
    /// Where a name appears or goes: the last part of that directory's path.
    pub directory: String,
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.file.as_str(), self.directory.as_str()) {
            ("", _) => f.write_str(&self.call),
            (file, "") => write!(f, "{}({file})", self.call),
            (file, directory) => write!(f, "{}({file}, {directory})", self.call),
        }
    }
}

impl Tracer {
    /// Follows the process `pid`, and kills it before its `nth` step, counted from 1 and from now.
    ///
    /// # Errors
    /// It can't be traced.
    pub fn kill_at(pid: Pid, nth: usize) -> Result<Self> {
        Self::follow(pid, nth, &Counts::All)
    }

    /// The same, counting only what it does to files: how often it talks to others may differ from one time to the next.
    ///
    /// # Errors
    /// It can't be traced.
    pub fn kill_at_change(pid: Pid, nth: usize) -> Result<Self> {
        Self::follow(pid, nth, &Counts::Changes)
    }

    /// The same, counting only what it does to files with `name` in theirs, and its next step after each.
    ///
    /// # Errors
    /// It can't be traced.
    pub fn kill_at_file(pid: Pid, nth: usize, name: &'static str) -> Result<Self> {
        Self::follow(pid, nth, &Counts::File(name))
    }

    fn follow(pid: Pid, nth: usize, counts: &Counts) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (ready, attached) = channel();
        let watch = Watch {
            leader: pid,
            nth,
            counts: *counts,
            counted: 0,
            stop: Arc::clone(&stop),
            trace: Trace::default(),
        };
        // ptrace knows the tracing thread, and lets go of everything when that thread ends.
        let thread = spawn(move || watch.run(&ready));
        let tracer = Self {
            stop,
            thread: Some(thread),
        };
        attached.recv().context("the tracer has ended")??;
        Ok(tracer)
    }

    /// Whether there is nothing left to trace.
    pub fn process_is_gone(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the tracing and says what was seen.
    ///
    /// # Errors
    /// The process could not be followed.
    pub fn finish(mut self) -> Result<Trace> {
        self.stop.store(true, Ordering::SeqCst);
        let thread = self.thread.take().context("it was finished before")?;
        thread.join().map_err(|_| anyhow!("the tracer has panicked"))?
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Which steps a kill waits for.
#[derive(Clone, Copy)]
enum Counts {
    All,
    /// No messages.
    Changes,
    /// Those on a file, each with the step after it.
    File(&'static str),
}

struct Watch {
    leader: Pid,
    nth: usize,
    counts: Counts,
    counted: usize,
    stop: Arc<AtomicBool>,
    trace: Trace,
}

impl Watch {
    fn run(mut self, ready: &Sender<Result<()>>) -> Result<Trace> {
        let attached = self.attach();
        let failed = attached.is_err();
        ready.send(attached)?;
        if failed {
            return Ok(self.trace);
        }
        let mut end = None;
        loop {
            // Only what this thread traces: other children belong to others.
            let flags = WaitPidFlag::WNOHANG | WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
            match waitpid(Pid::from_raw(-1), Some(flags)) {
                Ok(WaitStatus::StillAlive) if self.stop.load(Ordering::SeqCst) => {
                    // A process that was told to die is gone soon.
                    let end = end.get_or_insert_with(|| Instant::now() + END_DEADLINE);
                    if !self.trace.killed {
                        return Ok(self.trace);
                    }
                    if Instant::now() > *end {
                        bail!("process {} does not die", self.leader);
                    }
                    sleep(POLL_INTERVAL);
                }
                Ok(WaitStatus::StillAlive) => sleep(POLL_INTERVAL),
                Ok(status) => self.handle(status),
                // No tracee is left: the process is gone.
                Err(Errno::ECHILD) => return Ok(self.trace),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Threads may appear meanwhile: those of traced threads are traced from birth, the others are found again.
    fn attach(&self) -> Result<()> {
        let mut known = Vec::new();
        loop {
            let mut found = false;
            for entry in fs::read_dir(format!("/proc/{}/task", self.leader))? {
                let thread: i32 = entry?.file_name().to_string_lossy().parse()?;
                if known.contains(&thread) {
                    continue;
                }
                known.push(thread);
                found = true;
                let thread = Pid::from_raw(thread);
                let options = ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_TRACECLONE;
                match ptrace::seize(thread, options) {
                    Ok(()) => ptrace::interrupt(thread)?,
                    // Traced from birth, or gone already.
                    Err(Errno::EPERM | Errno::ESRCH) if known.len() > 1 => {}
                    Err(error) => {
                        return Err(error).context(format!("process {} can't be traced", self.leader));
                    }
                }
            }
            if !found {
                return Ok(());
            }
        }
    }

    fn handle(&mut self, status: WaitStatus) {
        let (thread, signal) = match status {
            WaitStatus::PtraceSyscall(thread) => {
                self.count(thread);
                (thread, None)
            }
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            _ => return,
        };
        // It may have been killed meanwhile.
        let _ = ptrace::syscall(thread, signal);
    }

    fn count(&mut self, thread: Pid) {
        let Ok(registers) = ptrace::getregs(thread) else {
            return;
        };
        if registers.rax != ENTERING || self.trace.killed {
            return;
        }
        let arguments = [registers.rdi, registers.rsi, registers.rdx, registers.r10];
        let step = step(thread, registers.orig_rax as i64, arguments);
        let is_seen = |step: &Step| {
            !self.goes_on(step) && (matches!(self.counts, Counts::All) || step.file != "socket")
        };
        if let Some(step) = step.filter(is_seen) {
            let counts = match self.counts {
                Counts::All | Counts::Changes => true,
                Counts::File(name) => {
                    let before = self.trace.steps.last();
                    step.file.contains(name) || before.is_some_and(|before| before.file.contains(name))
                }
            };
            self.trace.steps.push(step);
            self.counted += usize::from(counts);
            if counts && self.counted == self.nth {
                self.trace.killed = kill(self.leader, Signal::SIGKILL).is_ok();
            }
        }
    }

    /// Whether it is the third write of a row into one file.
    fn goes_on(&self, step: &Step) -> bool {
        let last = self.trace.steps.iter().rev().take(2);
        step.call == "pwrite64" && last.filter(|last| *last == step).count() == 2
    }
}

/// The call with its first four arguments, if it leaves something behind.
fn step(thread: Pid, call: i64, arguments: [u64; 4]) -> Option<Step> {
    let [first, second, third, fourth] = arguments;
    // A descriptor that stands for the working directory, which is absent from calls that take a path alone.
    let here = libc::AT_FDCWD as u64;
    let bare = |call: &str| {
        Some(Step {
            call: call.into(),
            ..Step::default()
        })
    };
    let name = match call {
        libc::SYS_fsync => "fsync",
        libc::SYS_fdatasync => "fdatasync",
        libc::SYS_ftruncate => "ftruncate",
        libc::SYS_fallocate => "fallocate",
        libc::SYS_fchmod => "fchmod",
        libc::SYS_fchown => "fchown",
        libc::SYS_pwrite64 => "pwrite64",
        libc::SYS_pwritev => "pwritev",
        libc::SYS_write => "write",
        libc::SYS_writev => "writev",
        libc::SYS_sendto => "sendto",
        libc::SYS_sendmsg => "sendmsg",
        libc::SYS_openat if third & libc::O_CREAT as u64 != 0 => return bare("openat(O_CREAT)"),
        libc::SYS_openat if third & libc::O_TMPFILE as u64 == libc::O_TMPFILE as u64 => {
            return bare("openat(O_TMPFILE)");
        }
        libc::SYS_rename => return named(thread, "rename", (here, first), (here, second)),
        libc::SYS_renameat | libc::SYS_renameat2 => {
            return named(thread, "rename", (first, second), (third, fourth));
        }
        libc::SYS_link => return named(thread, "link", (here, first), (here, second)),
        libc::SYS_linkat => return named(thread, "link", (first, second), (third, fourth)),
        libc::SYS_unlink => return named(thread, "unlink", (here, first), (here, first)),
        libc::SYS_unlinkat => return named(thread, "unlink", (first, second), (first, second)),
        libc::SYS_mkdir | libc::SYS_mkdirat => return bare("mkdir"),
        libc::SYS_chmod | libc::SYS_fchmodat => return bare("chmod"),
        libc::SYS_wait4 | libc::SYS_waitid => return bare("wait for a child"),
        _ => return None,
    };
    let target = opened(thread, first);
    // Its log is on 2; anonymous descriptors are between its threads, and secret memory goes with it.
    let lasts = target.starts_with('/') && !target.starts_with("/secretmem");
    let counts = first != 2 && (lasts || target.starts_with("socket:"));
    counts.then(|| Step {
        call: name.into(),
        file: last_part(&target),
        directory: String::new(),
    })
}

/// A call that gives `source` the name `target`, each a directory's descriptor and the address of a path.
fn named(thread: Pid, call: &str, source: (u64, u64), target: (u64, u64)) -> Option<Step> {
    let source = path_of(thread, source);
    // A file without a name is linked by way of its descriptor.
    let source = match source.rsplit_once("/fd/") {
        Some((_, descriptor)) if !descriptor.contains('/') => {
            opened(thread, descriptor.parse().unwrap_or(u64::MAX))
        }
        _ => source,
    };
    let target = path_of(thread, target);
    let directory = target.rsplit_once('/').map_or("", |(directory, _)| directory);
    // A directory that is held open is named by its descriptor.
    let directory = match directory.rsplit_once("/fd/") {
        Some((_, descriptor)) => opened(thread, descriptor.parse().unwrap_or(u64::MAX)),
        None => directory.to_owned(),
    };
    Some(Step {
        call: call.into(),
        file: last_part(&source),
        directory: last_part(&directory),
    })
}

/// What a descriptor of the traced process is.
fn opened(thread: Pid, descriptor: u64) -> String {
    let target = fs::read_link(format!("/proc/{thread}/fd/{}", descriptor as i32)).unwrap_or_default();
    target.to_string_lossy().into_owned()
}

/// The path at an address in the traced process, below the directory that `descriptor` is.
fn path_of(thread: Pid, (descriptor, address): (u64, u64)) -> String {
    let mut path = Vec::new();
    let memory = fs::File::open(format!("/proc/{thread}/mem"));
    while path.len() < libc::PATH_MAX as usize
        && let Ok(memory) = &memory
    {
        // A read across the end of a page may fail as a whole.
        let mut byte = [0];
        match memory.read_exact_at(&mut byte, address + path.len() as u64) {
            Ok(()) if byte[0] != 0 => path.push(byte[0]),
            _ => break,
        }
    }
    let path = String::from_utf8_lossy(&path).into_owned();
    match descriptor as i32 {
        _ if path.starts_with('/') => path,
        libc::AT_FDCWD => path,
        descriptor if path.is_empty() => opened(thread, descriptor as u64),
        descriptor => format!("{}/{path}", opened(thread, descriptor as u64)),
    }
}

fn last_part(path: &str) -> String {
    let short = path.rsplit('/').next().unwrap_or_default();
    match short {
        socket if socket.starts_with("socket:") => "socket".into(),
        unnamed if unnamed.ends_with(" (deleted)") => "unnamed file".into(),
        named => named.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// Writes three lines into a file, one write each, once it is told to.
    const WRITER: &str = r#"read line; for n in 1 2 3; do echo $n >>"$0"; done; read line"#;

    fn lines_after(nth: usize) -> (Trace, String) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("lines");
        let mut child = Command::new("bash")
            .args(["-c", WRITER])
            .arg(&file)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let tracer = Tracer::kill_at(Pid::from_raw(child.id() as i32), nth).unwrap();
        use std::io::Write;
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"\n").unwrap();
        let wanted = || fs::read_to_string(&file).unwrap_or_default();
        let deadline = Instant::now() + END_DEADLINE;
        while wanted().lines().count() < 3 && !tracer.process_is_gone() && Instant::now() < deadline {
            sleep(Duration::from_millis(5));
        }
        let trace = tracer.finish().unwrap();
        drop(stdin);
        // The tracer was told already if it died: here both are one process.
        let _ = child.wait();
        (trace, wanted())
    }

    #[test]
    fn each_step_is_counted_and_the_last_is_not_made() {
        let (all, lines) = lines_after(1000);
        assert_eq!((all.killed, lines.as_str()), (false, "1\n2\n3\n"), "{all:?}");
        let steps: Vec<_> = all.steps.iter().map(Step::to_string).collect();
        assert_eq!(
            steps,
            ["openat(O_CREAT)", "write(lines)"].repeat(3),
            "the steps of the writer"
        );
        for (nth, expected) in [(1, ""), (2, ""), (3, "1\n"), (4, "1\n"), (6, "1\n2\n")] {
            let (trace, lines) = lines_after(nth);
            assert!(trace.killed, "{nth}: {trace:?} {lines:?}");
            assert_eq!((trace.steps.len(), lines.as_str()), (nth, expected));
        }
    }
}

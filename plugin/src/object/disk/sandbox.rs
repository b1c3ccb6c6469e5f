//! What a child that parses other people's bytes may reach: what it is handed, its program and libraries, nothing else.
//!
//! An image can name other files, and a parser can have holes. So the child gives up, before its program runs, every file
//! that it was not given (Landlock) and every socket (seccomp): also when the image's header changes while it is read.
//! The rules are made in the parent; between fork and exec the child makes three system calls and allocates nothing.
//! A kernel without Landlock confines no files: [`Sandbox::confines_files`] says so, and the caller decides.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, Scope,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// The newest rules that are asked for; an older kernel enforces those that it knows.
const RULES: ABI = ABI::V6;

/// Where dynamic linkers and `qemu-img` find code. None of it is secret.
const LIBRARIES: [&str; 5] = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib"];
const LINKER_CACHE: &str = "/etc/ld.so.cache";
/// QEMU tries there whether the kernel has locks of open files; without them it takes others, which are lost when any file is closed.
const LOCK_PROBE: &str = "/dev/null";

/// System calls that lead out of the process without a file name. io_uring runs others unseen.
const NO_WAY_OUT: [libc::c_long; 7] = [
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_open_by_handle_at,
    libc::SYS_io_uring_setup,
];

/// Rules for a child that is still to be started.
pub(crate) struct Sandbox {
    files: Option<OwnedFd>,
    calls: BpfProgram,
}

impl Sandbox {
    /// For `program`, which may read `sources`, and read and write `targets`. It is to open them anew by `/proc/self/fd`.
    pub(crate) fn new(
        program: &Path,
        sources: &[BorrowedFd<'_>],
        targets: &[BorrowedFd<'_>],
    ) -> io::Result<Self> {
        Ok(Self {
            files: files(program, sources, targets).map_err(io::Error::other)?.into(),
            calls: calls().map_err(io::Error::other)?,
        })
    }

    /// Whether this kernel keeps the child away from other files.
    pub(crate) fn confines_files(&self) -> bool {
        self.files.is_some()
    }

    /// Takes the rules upon this process, for good. Only system calls: to be called between fork and exec.
    pub(crate) fn enter(&self) -> io::Result<()> {
        nix::sys::prctl::set_no_new_privs()?;
        if let Some(files) = &self.files {
            // SAFETY: the system call takes two numbers, and touches no memory of this process.
            let restricted = unsafe { libc::syscall(libc::SYS_landlock_restrict_self, files.as_raw_fd(), 0) };
            if restricted != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // It hands the program in `calls` to the kernel.
        seccompiler::apply_filter(&self.calls).map_err(|_| io::ErrorKind::PermissionDenied.into())
    }
}

fn files(
    program: &Path,
    sources: &[BorrowedFd<'_>],
    targets: &[BorrowedFd<'_>],
) -> Result<RulesetCreated, RulesetError> {
    let read = AccessFs::ReadFile | AccessFs::IoctlDev;
    let code = AccessFs::ReadFile | AccessFs::ReadDir | AccessFs::Execute;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(RULES))?
        .handle_access(AccessNet::from_all(RULES))?
        .scope(Scope::from_all(RULES))?
        .create()?;
    for source in sources {
        rules = rules.add_rule(PathBeneath::new(source, read))?;
    }
    for target in targets {
        rules = rules.add_rule(PathBeneath::new(
            target,
            read | AccessFs::WriteFile | AccessFs::Truncate,
        ))?;
    }
    rules = allow(rules, program, AccessFs::ReadFile | AccessFs::Execute)?;
    rules = allow(rules, Path::new(LINKER_CACHE), AccessFs::ReadFile.into())?;
    rules = allow(
        rules,
        Path::new(LOCK_PROBE),
        AccessFs::ReadFile | AccessFs::WriteFile,
    )?;
    LIBRARIES
        .iter()
        .try_fold(rules, |rules, directory| allow(rules, Path::new(directory), code))
}

/// What is not there needs no rule.
fn allow(
    rules: RulesetCreated,
    path: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    match PathFd::new(path) {
        Ok(found) => rules.add_rule(PathBeneath::new(found, access)),
        Err(_) => Ok(rules),
    }
}

fn calls() -> Result<BpfProgram, seccompiler::BackendError> {
    let refused = NO_WAY_OUT.map(|call| (call, Vec::new()));
    let filter = SeccompFilter::new(
        BTreeMap::from(refused),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        TargetArch::try_from(std::env::consts::ARCH)?,
    )?;
    filter.try_into()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::fd::AsFd;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Output, Stdio};

    use super::*;

    fn confined(script: &str, sources: &[&File], targets: &[&File]) -> Output {
        let shell = fs::canonicalize("/bin/sh").unwrap();
        let as_fds = |files: &[&File]| files.iter().map(|file| file.as_raw_fd()).collect::<Vec<_>>();
        let inherited = [as_fds(sources), as_fds(targets)].concat();
        let sources: Vec<_> = sources.iter().map(|file| file.as_fd()).collect();
        let targets: Vec<_> = targets.iter().map(|file| file.as_fd()).collect();
        let sandbox = Sandbox::new(&shell, &sources, &targets).unwrap();
        assert!(
            sandbox.confines_files(),
            "these tests need a kernel with Landlock: boot it with lsm=landlock,…"
        );
        let mut command = Command::new(shell);
        command.args(["-c", script]).stdin(Stdio::null());
        let enter = move || {
            for fd in &inherited {
                // SAFETY: numbers only.
                unsafe { libc::fcntl(*fd, libc::F_SETFD, 0) };
            }
            sandbox.enter()
        };
        // SAFETY: system calls only.
        unsafe { command.pre_exec(enter) };
        command.output().unwrap()
    }

    #[test]
    fn a_child_reads_what_it_is_given_and_nothing_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let given = directory.path().join("given");
        fs::write(&given, "given").unwrap();
        fs::write(directory.path().join("other"), "other").unwrap();
        let source = File::open(&given).unwrap();
        let said = confined(
            &format!(
                "while read -r line || [ -n \"$line\" ]; do echo $line; done < /proc/self/fd/{}",
                source.as_raw_fd()
            ),
            &[&source],
            &[],
        );
        assert_eq!(said.stdout, b"given\n", "{said:?}");
        for other in [
            directory.path().join("other").to_str().unwrap(),
            "/etc/passwd",
            "/proc/1/environ",
        ] {
            let refused = confined(&format!("read -r line < {other} && echo $line"), &[&source], &[]);
            assert!(
                refused.stdout.is_empty() && !refused.status.success(),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn a_child_writes_to_its_target_alone() {
        let directory = tempfile::tempdir().unwrap();
        let source = File::create_new(directory.path().join("source")).unwrap();
        let target = File::create_new(directory.path().join("target")).unwrap();
        let write = |file: &File| format!("echo x > /proc/self/fd/{}", file.as_raw_fd());
        assert!(confined(&write(&target), &[&source], &[&target]).status.success());
        assert!(!confined(&write(&source), &[&source], &[&target]).status.success());
        let made = format!("echo x > {}", directory.path().join("new").display());
        assert!(!confined(&made, &[&source], &[&target]).status.success());
        assert_eq!(fs::read(directory.path().join("target")).unwrap(), b"x\n");
        assert_eq!(fs::read(directory.path().join("source")).unwrap(), b"");
    }

    #[test]
    fn a_child_can_see_whether_there_are_locks_of_open_files() {
        let probed = confined(": <> /dev/null", &[], &[]);
        assert!(probed.status.success(), "{probed:?}");
        assert!(!confined(": <> /dev/zero", &[], &[]).status.success());
    }

    #[test]
    fn a_child_runs_no_other_program_and_has_no_sockets() {
        let refused = confined("/bin/ls /", &[], &[]);
        assert!(!refused.status.success(), "{refused:?}");
        // SAFETY: the child of the fork makes system calls only, and ends by one.
        let status = unsafe {
            let sandbox = Sandbox::new(Path::new("/bin/sh"), &[], &[]).unwrap();
            match libc::fork() {
                0 => {
                    let entered = sandbox.enter().is_ok();
                    let socket = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0);
                    libc::_exit(i32::from(!entered || socket >= 0))
                }
                child => {
                    let mut status = -1;
                    libc::waitpid(child, &raw mut status, 0);
                    status
                }
            }
        };
        assert_eq!(status, 0);
    }
}

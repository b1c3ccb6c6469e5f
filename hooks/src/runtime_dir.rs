//! A tmpfs on the directory where libvirt keeps a running domain's files, among them `master-key.aes`.
//!
//! With that key the passphrases can be read back from QEMU's command line, which libvirt logs; so it must never
//! reach a disk. libvirt takes the directory as it finds it. The mount's source is `virtseal:` and the VM's UUID:
//! so a mount of ours is known from others', whatever libvirt's ids are by then.
//!
//! QEMU's user may own the parent directory, so nothing here follows a link in it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};

use crate::conf::{Conf, TmpfsPolicy};
use crate::vm::Vm;

/// libvirt puts this many characters of the name into the directory's.
const SHORT_NAME: usize = 20;
/// Room for the key and the sockets; the mode is libvirt's.
const OPTIONS: &str = "size=1m,mode=0750";

/// The mounts made for one start.
pub(crate) struct RuntimeDir {
    mounted: Vec<PathBuf>,
}

impl RuntimeDir {
    /// Mounts for the start of `vm`; `None` where the policy says not to.
    pub(crate) fn mount_for(vm: &Vm<'_>, conf: &Conf) -> Result<Option<Self>, String> {
        if conf.master_key_tmpfs == TmpfsPolicy::Off {
            return Ok(None);
        }
        let id = vm.id.ok_or("the domain XML has no id")?;
        let base = &conf.runtime_dir;
        let base = fs::canonicalize(base).map_err(|error| format!("{}: {error}", base.display()))?;
        // It does not run, so what a crash left behind is of no use.
        unmount_all(&base, |mount| mount.source == source(vm));
        let mut made = Self { mounted: Vec::new() };
        for name in directory_names(id, &vm.name) {
            let path = base.join(OsStr::from_bytes(&name));
            if let Err(error) = mount_one(&base, &name, &source(vm)) {
                made.undo();
                return Err(format!("{}: {error}", path.display()));
            }
            made.mounted.push(path);
        }
        Ok(Some(made))
    }

    /// For a start that is refused after all.
    pub(crate) fn undo(self) {
        for path in self.mounted {
            unmount(&path);
        }
    }

    /// After the end of `vm`.
    pub(crate) fn release(vm: &Vm<'_>, conf: &Conf) {
        if let Ok(base) = fs::canonicalize(&conf.runtime_dir) {
            unmount_all(&base, |mount| mount.source == source(vm));
        }
    }
}

fn source(vm: &Vm<'_>) -> String {
    format!("virtseal:{}", vm.uuid)
}

/// The names that libvirt may use. It cuts after 20 characters in a UTF-8 locale and after 20 bytes in any other;
/// its locale is not known here, so where they differ both are prepared.
fn directory_names(id: u32, name: &str) -> Vec<Vec<u8>> {
    let full = |short: &[u8]| [format!("domain-{id}-").as_bytes(), short].concat();
    let characters: String = name.chars().take(SHORT_NAME).collect();
    let bytes = &name.as_bytes()[..name.len().min(SHORT_NAME)];
    let mut names = vec![full(characters.as_bytes()), full(bytes)];
    names.dedup();
    names
}

fn mount_one(base: &Path, name: &[u8], source: &str) -> Result<(), String> {
    if name.contains(&b'/') || name.contains(&0) {
        return Err("no file name".into());
    }
    let path = base.join(OsStr::from_bytes(name));
    // A domain id is used once at a time, so this one's owner is gone.
    unmount_all(base, |mount| {
        mount.path == path && mount.source.starts_with("virtseal:")
    });
    let directory = directory(base, OsStr::from_bytes(name)).map_err(|errno| match errno {
        Errno::ELOOP | Errno::ENOTDIR => "it is there, but is not a directory".into(),
        other => other.desc().to_owned(),
    })?;
    // Through the descriptor: the name could stand for something else by now.
    let target = format!("/proc/self/fd/{}", directory.as_raw_fd());
    mount_tmpfs(source, &target).map_err(|errno| format!("tmpfs: {}", errno.desc()))?;
    if mounts()
        .iter()
        .any(|mount| mount.path == path && mount.source == source)
    {
        return Ok(());
    }
    for stray in mounts().iter().filter(|mount| mount.source == source) {
        let _ = umount2(&stray.path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    Err("it was moved meanwhile".into())
}

/// Makes and opens a directory, never through a link.
fn directory(base: &Path, name: &OsStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let base = open(base, flags, Mode::empty())?;
    match mkdirat(&base, name, Mode::S_IRWXU) {
        Ok(()) | Err(Errno::EEXIST) => openat(&base, name, flags | OFlag::O_NOFOLLOW, Mode::empty()),
        Err(errno) => Err(errno),
    }
}

/// Not swapped out either, from Linux 6.4 on.
fn mount_tmpfs(source: &str, target: &str) -> nix::Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let attempt = |options: &str| mount(Some(source), target, Some("tmpfs"), flags, Some(options));
    match attempt(&format!("{OPTIONS},noswap")) {
        Err(Errno::EINVAL) => attempt(OPTIONS),
        result => result,
    }
}

struct Mount {
    path: PathBuf,
    source: String,
}

/// Every mount this process sees, from `/proc/self/mountinfo` (proc(5)); a line it can't read is left out.
fn mounts() -> Vec<Mount> {
    let Ok(file) = File::open("/proc/self/mountinfo") else {
        return Vec::new();
    };
    let lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
    lines.filter_map(|line| mount_line(&line)).collect()
}

fn mount_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let path = unescape(fields.nth(4)?);
    let mut tail = fields.skip_while(|field| *field != b"-").skip(2);
    Some(Mount {
        path: std::ffi::OsString::from_vec(path).into(),
        source: String::from_utf8(unescape(tail.next()?)).ok()?,
    })
}

/// `\040` and the like stand for bytes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind
            .get(..3)
            .and_then(|digits| std::str::from_utf8(digits).ok());
        let value = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (first, value) {
            (b'\\', Some(value)) => {
                out.push(value);
                rest = &behind[3..];
            }
            _ => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}

fn unmount_all(base: &Path, ours: impl Fn(&Mount) -> bool) {
    for mount in mounts() {
        if mount.path.parent() == Some(base) && ours(&mount) {
            unmount(&mount.path);
        }
    }
}

fn unmount(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    let _ = fs::remove_dir(path);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(name: &str) -> Vec<String> {
        let names = directory_names(7, name).into_iter();
        names
            .map(|name| String::from_utf8_lossy(&name).into_owned())
            .collect()
    }

    #[test]
    fn the_directory_is_named_as_libvirt_names_it() {
        assert_eq!(names("web01"), ["domain-7-web01"]);
        assert_eq!(
            names("a-name-of-more-than-twenty"),
            ["domain-7-a-name-of-more-than-"]
        );
        assert_eq!(names("käse"), ["domain-7-käse"]);
        assert_eq!(
            names("ääääääääääääääääääääää"),
            ["domain-7-ääääääääääääääääääää", "domain-7-ääääääääää"]
        );
    }

    #[test]
    fn a_mount_line_is_read() {
        let line =
            br"36 35 98:0 /m /mnt/a\040b rw,nosuid shared:1 master:2 - tmpfs virtseal:1\0112 rw,size=1k";
        let mount = mount_line(line).unwrap();
        assert_eq!(mount.path, Path::new("/mnt/a b"));
        assert_eq!(mount.source, "virtseal:1\t2");
        assert!(mount_line(b"36 35 98:0").is_none());
        assert_eq!(unescape(br"a\04"), br"a\04");
        assert_eq!(unescape(br"\999"), br"\999");
    }
}

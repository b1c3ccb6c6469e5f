//! What keeps keys inside the daemon's process, and what keeps the process small.

use std::ops::Range;
use std::{fs, io};

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};

/// Freed memory is overwritten with this byte, see `mallopt(3)`: libvirt's client library frees the buffers in
/// which it sent a secret without clearing them.
const FREED: libc::c_int = 0x5a;
/// A daemon with a dozen threads needs no heap for each.
const HEAPS: libc::c_int = 2;

/// How many descriptors this process may have, if the hard limit lets it: many times what all connections take.
const DESCRIPTORS: u64 = 16 * 1024;

/// No core dumps, no ptrace by the same user, private files, no keys in freed memory. Call it first.
///
/// # Errors
/// When the kernel refuses: then nothing secret may be read.
pub(crate) fn harden() -> io::Result<()> {
    umask(Mode::from_bits_truncate(0o077));
    silence_tss();
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    prctl::set_dumpable(false)?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(DESCRIPTORS.min(hard)), hard)?;
    // SAFETY: mallopt changes settings of the allocator, and is called before there are other threads.
    let set =
        unsafe { libc::mallopt(libc::M_PERTURB, FREED) == 1 && libc::mallopt(libc::M_ARENA_MAX, HEAPS) == 1 };
    if set {
        Ok(())
    } else {
        Err(io::Error::other("mallopt was refused"))
    }
}

/// The TSS writes what the daemon reports anyway to standard error, several lines for each error. Whoever looks for more
/// sets its `TSS2_LOG`.
fn silence_tss() {
    const LEVELS: &str = "TSS2_LOG";
    if std::env::var_os(LEVELS).is_none() {
        // SAFETY: called before there are other threads.
        #[expect(clippy::disallowed_methods, reason = "it is no key")]
        unsafe {
            std::env::set_var(LEVELS, "all+NONE");
        }
    }
}

/// Gives the memory that a burst of work has left free back to the system.
pub(crate) fn trim() {
    crate::secret::pages::release();
    // SAFETY: malloc_trim only touches free memory of the allocator.
    unsafe { libc::malloc_trim(0) };
}

/// The code and constants of this program and of the libraries it is linked with: for libvirt's sake about seventy,
/// of which the dynamic linker has read the tables once, and most of which are never called.
#[derive(Debug)]
pub(crate) struct LinkedCode(Vec<Range<usize>>);

impl LinkedCode {
    /// What is mapped now. Call it before there are other threads: all of it is linked and relocated then, and stays
    /// mapped as it is until the process ends.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        fs::read_to_string("/proc/self/smaps").map(|smaps| Self(unwritten(&smaps)))
    }

    /// Leaves those pages to the page cache. What is used again comes back from there, a page fault each.
    pub(crate) fn release(&self) {
        for range in &self.0 {
            // SAFETY: a file's pages that nobody can write to, and that have no copy of ours, are read anew from the
            // file with the same content.
            unsafe { libc::madvise(range.start as *mut libc::c_void, range.len(), libc::MADV_DONTNEED) };
        }
    }
}

/// The mappings of files, in the format of `/proc/PID/smaps` (proc(5)), that are private and read-only and have no page
/// that was ever written to, as relocated ones were.
fn unwritten(smaps: &str) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut mapping = None;
    for line in smaps.lines() {
        if let Some(amount) = line.strip_prefix("Anonymous:") {
            found.extend(mapping.take().filter(|_| amount.trim() == "0 kB"));
        } else if let Some(range) = read_only_file(line) {
            mapping = Some(range);
        } else if line
            .split_ascii_whitespace()
            .next()
            .is_some_and(|first| first.contains('-'))
        {
            mapping = None;
        }
    }
    found
}

/// The range of `ADDRESS-ADDRESS r-xp OFFSET DEVICE INODE /PATH`.
fn read_only_file(line: &str) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let path = fields.nth(3)?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    (matches!(permissions, "r-xp" | "r--p") && path.starts_with('/'))
        .then_some(address(start)?..address(end)?)
}

/// The id of this machine, see machine-id(5); none where it has none.
pub(crate) fn machine_id() -> Option<String> {
    let id = fs::read_to_string("/etc/machine-id").ok()?;
    Some(id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0c0000000-55d0c0100000 r--p 00000000 fe:00 131 /usr/bin/virtseald
Rss:                 400 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
55d0c0100000-55d0c0200000 r-xp 00100000 fe:00 131 /usr/bin/virtseald
Anonymous:             0 kB
55d0c0200000-55d0c0300000 r--p 00200000 fe:00 131 /usr/bin/virtseald
Anonymous:           144 kB
55d0c0300000-55d0c0400000 rw-p 00300000 fe:00 131 /usr/bin/virtseald
Anonymous:             0 kB
55d0c0400000-55d0c0500000 rw-p 00000000 00:00 0 [heap]
Anonymous:             0 kB
7fff00000000-7fff00001000 r-xp 00000000 00:00 0 [vdso]
Anonymous:             0 kB
7fff00002000-7fff00003000 r--p 00000000 00:00 0
Anonymous:             0 kB
";

    #[test]
    fn only_pages_that_are_still_the_files_are_released() {
        let expected = [
            0x55d0_c000_0000..0x55d0_c010_0000,
            0x55d0_c010_0000..0x55d0_c020_0000,
        ];
        assert_eq!(unwritten(SMAPS), expected);
        assert!(unwritten("garbage\n-\n1-2\n").is_empty());
    }

    #[test]
    fn code_works_after_its_pages_were_released() {
        let code = LinkedCode::of_this_process().unwrap();
        assert!(!code.0.is_empty());
        code.release();
        assert_eq!(openssl::sha::sha256(b"")[0], 0xe3);
        assert_eq!(unwritten(SMAPS).len(), 2);
    }
}

//! What keeps keys inside the daemon's process.

use std::io;

use nix::sys::prctl;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::stat::{Mode, umask};

/// Freed memory is overwritten with this byte, see `mallopt(3)`: libvirt's client library frees the buffers in
/// which it sent a secret without clearing them.
const FREED: libc::c_int = 0x5a;
/// A daemon with a dozen threads needs no heap for each.
const HEAPS: libc::c_int = 2;

/// No core dumps, no ptrace by the same user, private files, no keys in freed memory. Call it first.
///
/// # Errors
/// When the kernel refuses: then nothing secret may be read.
pub fn harden() -> io::Result<()> {
    umask(Mode::from_bits_truncate(0o077));
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    prctl::set_dumpable(false)?;
    // SAFETY: mallopt changes settings of the allocator, and is called before there are other threads.
    let set =
        unsafe { libc::mallopt(libc::M_PERTURB, FREED) == 1 && libc::mallopt(libc::M_ARENA_MAX, HEAPS) == 1 };
    if set {
        Ok(())
    } else {
        Err(io::Error::other("mallopt was refused"))
    }
}

/// Gives the memory that a burst of work has left free back to the system.
pub fn trim() {
    // SAFETY: malloc_trim only touches free memory of the allocator.
    unsafe { libc::malloc_trim(0) };
}

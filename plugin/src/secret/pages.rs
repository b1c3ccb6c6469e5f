//! Memory for secrets, a page at the least: from `memfd_secret(2)`, or locked anonymous pages that core dumps leave out.
//!
//! To make or unmake a page of `memfd_secret` interrupts every CPU of the host, because the kernel takes the page out of
//! its own map. A start needs a dozen secrets for a millisecond each, so single pages, zeroed, are kept for the next one
//! until [`release`].

use std::io;
use std::ptr::NonNull;
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zeroize::Zeroize;

const PAGE: usize = 4096;
/// As many as 32 starts at once need: 2 MiB.
const MAX_SPARE: usize = 512;

/// Single pages that are mapped, all zero, and nobody's.
static SPARE: Mutex<Vec<Spare>> = Mutex::new(Vec::new());

/// The first byte of such a page.
struct Spare(NonNull<u8>);

// SAFETY: a mapping belongs to no thread.
unsafe impl Send for Spare {}

/// Whole pages of secret memory. They are zeroed when dropped.
pub(super) struct Pages {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is owned by this value alone and is reached only through `&self` and `&mut self`.
unsafe impl Send for Pages {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Pages {}

impl Pages {
    /// At least `len` zero bytes.
    ///
    /// # Errors
    /// The kernel's, when memory can't be mapped or locked (`RLIMIT_MEMLOCK`).
    pub(super) fn zeroed(len: usize) -> io::Result<Self> {
        let len = len.max(1).div_ceil(PAGE) * PAGE;
        let kept = if len == PAGE { spare().pop() } else { None };
        let base = match kept {
            Some(Spare(base)) => base,
            None => map_memfd_secret(len).or_else(|_| map_locked(len))?,
        };
        Ok(Self { base, len })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: `base` maps `len` readable bytes for as long as `self` lives.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }

    /// All bytes, to be filled in place.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `&mut self` is the only access.
        unsafe { slice::from_raw_parts_mut(self.base.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        let mut spare = spare();
        if self.len == PAGE && spare.len() < MAX_SPARE {
            spare.push(Spare(self.base));
        } else {
            drop(spare);
            unmap(self.base, self.len);
        }
    }
}

/// Gives the pages that are kept back to the system.
pub(crate) fn release() {
    let pages = std::mem::take(&mut *spare());
    for Spare(base) in pages {
        unmap(base, PAGE);
    }
}

fn spare() -> MutexGuard<'static, Vec<Spare>> {
    // Nothing in here can panic half-way.
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn unmap(base: NonNull<u8>, len: usize) {
    // SAFETY: `base` and `len` are what mmap returned and was asked for; nothing borrows them any more.
    unsafe { libc::munmap(base.as_ptr().cast(), len) };
}

fn map_memfd_secret(len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: memfd_secret takes flags only and returns a descriptor or -1.
    let fd = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned to us and is owned by nobody else.
    let fd = unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    nix::unistd::ftruncate(&fd, i64::try_from(len).map_err(io::Error::other)?)?;
    map(len, libc::MAP_SHARED, std::os::fd::AsRawFd::as_raw_fd(&fd))
}

fn map_locked(len: usize) -> io::Result<NonNull<u8>> {
    let base = map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)?;
    // SAFETY: `base` maps `len` bytes that were just mapped and that nothing else knows.
    let locked = unsafe {
        libc::mlock(base.as_ptr().cast(), len) == 0
            && libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTDUMP) == 0
            && libc::madvise(base.as_ptr().cast(), len, libc::MADV_WIPEONFORK) == 0
    };
    if locked {
        return Ok(base);
    }
    let error = io::Error::last_os_error();
    // SAFETY: as above.
    unsafe { libc::munmap(base.as_ptr().cast(), len) };
    Err(error)
}

fn map(len: usize, flags: i32, fd: i32) -> io::Result<NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice aliases nothing.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned a null mapping"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locked_fallback_maps_writable_memory() {
        let base = map_locked(PAGE).unwrap();
        let mut pages = Pages { base, len: PAGE };
        pages.bytes_mut()[..5].copy_from_slice(b"abcde");
        assert_eq!(&pages.bytes()[..6], b"abcde\0");
    }

    /// The pages that are kept belong to the process, so nobody else may be in it.
    #[test]
    fn a_page_is_used_again_and_is_zero_then() {
        crate::host::own_process::run(|| {
            let mut pages = Pages::zeroed(32).unwrap();
            pages.bytes_mut().fill(0xaa);
            let base = pages.base;
            drop(pages);
            assert_eq!(spare().len(), 1);
            let again = Pages::zeroed(PAGE).unwrap();
            assert_eq!((again.base, again.bytes()), (base, &[0; PAGE][..]));
            assert_eq!(Pages::zeroed(PAGE + 1).unwrap().bytes().len(), 2 * PAGE);
            drop(again);
            release();
            assert!(spare().is_empty());
            assert_eq!(Pages::zeroed(0).unwrap().bytes(), [0; PAGE]);
        });
    }
}

//! A heap that forgets.
//!
//! Libraries keep passphrases and keys in buffers of their own for a moment (the age stream, the reader of the
//! socket) and free them as they are. Here every block is zeroed before it goes back to the allocator, in the
//! daemon, in the command line and in the tests, so a core image taken after a lock shows none of it.

use std::alloc::{GlobalAlloc, Layout, System};

/// For `#[global_allocator]`: a program sets it, and a library leaves that to its program.
#[derive(Debug)]
pub struct WipingHeap;

#[cfg(test)]
#[global_allocator]
static HEAP: WipingHeap = WipingHeap;

// SAFETY: every call is passed on to `System`, which upholds the contract. `realloc` is the trait's own, by
// way of `alloc` and `dealloc`, so that what it moves away from is wiped as well.
unsafe impl GlobalAlloc for WipingHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller gives back `layout.size()` bytes at `block` and uses them no more; explicit_bzero
        // is a memset that the compiler may not drop for being the last use.
        unsafe {
            libc::explicit_bzero(block.cast(), layout.size());
            System.dealloc(block, layout);
        }
    }
}

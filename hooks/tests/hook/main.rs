//! The hook as libvirt runs it: the real binary, XML on stdin, libvirt's environment.

#![allow(clippy::unwrap_used, reason = "this is how a test fails")]

mod daemon;
mod protocol;
mod runtime_dir;
mod strangers;

/// The VM of all tests.
const UUID: &str = "6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7";

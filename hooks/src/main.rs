//! The libvirt hook.
fn main() {}

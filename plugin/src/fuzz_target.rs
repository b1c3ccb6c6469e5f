//! What a room gives to be fuzzed; `crate::fuzz` gathers all of it.

/// A reader of bytes that others wrote.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// What it reads.
    pub name: &'static str,
    /// Inputs that it takes, to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Reads an input. Whether it took it.
    pub read: fn(&[u8]) -> bool,
}

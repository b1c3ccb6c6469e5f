//! What ureq reads from and writes to: zeroed as soon as it was used.

use std::fmt;

use ureq::unversioned::transport::Buffers;
use zeroize::{Zeroize, Zeroizing};

const BUFFER: usize = 32 * 1024;

/// Buffers that hold nothing longer than it is needed.
pub(super) struct WipedBuffers {
    input: Zeroizing<Vec<u8>>,
    start: usize,
    end: usize,
    progress: bool,
    output: Zeroizing<Vec<u8>>,
    spare: Zeroizing<Vec<u8>>,
}

impl WipedBuffers {
    pub(super) fn new() -> Self {
        let buffer = || Zeroizing::new(vec![0; BUFFER]);
        Self {
            input: buffer(),
            start: 0,
            end: 0,
            progress: false,
            output: buffer(),
            spare: Zeroizing::default(),
        }
    }
}

impl WipedBuffers {
    /// Hands the first `amount` bytes of the output to `send`, and forgets them.
    pub(super) fn send_output<T>(&mut self, amount: usize, send: impl FnOnce(&[u8]) -> T) -> T {
        let sent = send(&self.output[..amount]);
        self.output[..amount].zeroize();
        sent
    }
}

impl fmt::Debug for WipedBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WipedBuffers([redacted])")
    }
}

impl Buffers for WipedBuffers {
    fn output(&mut self) -> &mut [u8] {
        &mut self.output
    }

    fn input(&self) -> &[u8] {
        &self.input[self.start..self.end]
    }

    fn input_append_buf(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            let moved = self.end - self.start;
            self.input[moved..self.end].zeroize();
            (self.start, self.end) = (0, moved);
        }
        &mut self.input[self.end..]
    }

    fn input_appended(&mut self, amount: usize) {
        self.end += amount;
    }

    fn input_consume(&mut self, amount: usize) {
        self.progress = amount > 0;
        let upto = (self.start + amount).min(self.end);
        self.input[self.start..upto].zeroize();
        self.start = upto;
    }

    /// Bodies of a known length, and we send no others, go to the output at once; the spare is for the others.
    fn tmp_and_output(&mut self) -> (&mut [u8], &mut [u8]) {
        self.spare.resize(BUFFER / 2, 0);
        (&mut self.spare, &mut self.output)
    }

    fn can_use_input(&self) -> bool {
        self.start < self.end && self.progress
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn used_bytes_are_gone_from_the_buffers() {
        let mut buffers = WipedBuffers::new();
        buffers.input_append_buf()[..9].copy_from_slice(b"headsecre");
        buffers.input_appended(9);
        buffers.input_consume(4);
        assert!(buffers.can_use_input());
        assert_eq!(buffers.input(), b"secre");
        assert!(buffers.input[..4].iter().all(|byte| *byte == 0));
        buffers.input_append_buf()[0] = b't';
        buffers.input_appended(1);
        assert_eq!(buffers.input(), b"secret");
        buffers.input_consume(6);
        assert!(buffers.input.iter().all(|byte| *byte == 0));
        assert!(!buffers.can_use_input());
    }
}

//! Random inputs made out of good ones, for what reads bytes that others wrote.
//!
//! No coverage guides it, so what a reader takes is kept as a new beginning: several changes deep, inputs are still close to
//! the format. A run is repeated by its seed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use fastrand::Rng;
use nix::time::{ClockId, clock_gettime};

/// No reader may compute longer for an input of a few KiB. What else the machine does is not counted.
const MAX_TIME: Duration = Duration::from_secs(2);
/// The most beginnings that are kept.
const MAX_KEPT: usize = 512;
/// The longest input.
const MAX_LEN: usize = 64 * 1024;
/// Where counts and lengths turn.
const NUMBERS: [u64; 14] = [
    0,
    1,
    7,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// What a run has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fuzzed {
    /// How many inputs were read.
    pub runs: u64,
    /// How many of them were taken.
    pub taken: u64,
}

/// The input that a reader failed on.
#[derive(Clone, PartialEq, Eq)]
pub struct Failing {
    /// What was wrong.
    pub why: String,
    /// The input.
    pub input: Vec<u8>,
}

impl std::fmt::Debug for Failing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: b\"{}\"", self.why, self.input.escape_ascii())
    }
}

/// Gives `read` the seeds, then `runs` inputs that are made of these. `read` says whether it took an input.
///
/// # Errors
/// With the first input for which `read` panics or takes too long.
pub fn fuzz(
    seeds: &[Vec<u8>],
    runs: u64,
    seed: u64,
    read: impl Fn(&[u8]) -> bool,
) -> Result<Fuzzed, Box<Failing>> {
    let mut rng = Rng::with_seed(seed);
    let mut kept = seeds.to_vec();
    let mut taken = 0;
    for input in seeds {
        taken += u64::from(read_in_time(input, &read)?);
    }
    for _ in 0..runs {
        let mut input = kept
            .get(rng.usize(..kept.len().max(1)))
            .cloned()
            .unwrap_or_default();
        for _ in 0..=rng.u32(..4) {
            change(&mut input, &kept, &mut rng);
        }
        input.truncate(MAX_LEN);
        if !read_in_time(&input, &read)? {
            continue;
        }
        taken += 1;
        if kept.len() < MAX_KEPT {
            kept.push(input);
        } else {
            // The seeds stay: whatever follows may have lost what was in them.
            let at = rng.usize(seeds.len()..MAX_KEPT);
            kept[at] = input;
        }
    }
    Ok(Fuzzed {
        runs: runs + seeds.len() as u64,
        taken,
    })
}

fn read_in_time(input: &[u8], read: impl Fn(&[u8]) -> bool) -> Result<bool, Box<Failing>> {
    let failing = |why: String| {
        Box::new(Failing {
            why,
            input: input.to_vec(),
        })
    };
    let began = computed();
    let taken =
        catch_unwind(AssertUnwindSafe(|| read(input))).map_err(|_| failing("it panics".to_owned()))?;
    match computed().saturating_sub(began) {
        took if took > MAX_TIME => Err(failing(format!("it takes {took:?}"))),
        _ => Ok(taken),
    }
}

/// The CPU time of this thread.
fn computed() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn change(input: &mut Vec<u8>, kept: &[Vec<u8>], rng: &mut Rng) {
    let at = rng.usize(..=input.len());
    let end = at + rng.usize(..=(input.len() - at).min(32));
    match rng.u8(..9) {
        0 if at < input.len() => input[at] ^= 1 << rng.u8(..8),
        1 if at < input.len() => input[at] = rng.u8(..),
        2 => drop(input.drain(at..end)),
        3 => drop(input.splice(at..at, std::iter::repeat_with(|| rng.u8(..)).take(end - at))),
        4 => {
            let piece = input[at..end].to_vec();
            let to = rng.usize(..=input.len());
            input.splice(to..to, piece);
        }
        5 => number(input, at, rng),
        6 => digits(input, rng),
        7 => {
            // A piece of another input, in the place of what is here.
            let Some(other) = rng.choice(kept).filter(|other| !other.is_empty()) else {
                return;
            };
            let from = rng.usize(..other.len());
            let to = from + rng.usize(..=(other.len() - from).min(64));
            input.splice(at..end, other[from..to].iter().copied());
        }
        _ => input.truncate(at),
    }
}

/// A binary number where a length or a count may be.
fn number(input: &mut [u8], at: usize, rng: &mut Rng) {
    let number = NUMBERS[rng.usize(..NUMBERS.len())]
        .wrapping_add(u64::from(rng.u8(..3)))
        .wrapping_sub(1);
    let width = [1, 2, 4, 8][rng.usize(..4)];
    if let Some(place) = input.get_mut(at..at + width) {
        let bytes = number.to_be_bytes();
        place.copy_from_slice(&bytes[8 - width..]);
        if rng.bool() {
            place.reverse();
        }
    }
}

/// Another number in the place of one that is written in digits.
fn digits(input: &mut Vec<u8>, rng: &mut Rng) {
    let from = rng.usize(..=input.len());
    let Some(at) = input[from..].iter().position(u8::is_ascii_digit) else {
        return;
    };
    let at = from + at;
    let len = input[at..]
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    let number = NUMBERS[rng.usize(..NUMBERS.len())];
    input.splice(at..at + len, number.to_string().into_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes what begins with `LEN` and that many bytes.
    fn careless(input: &[u8]) -> bool {
        let Some(len) = input.strip_prefix(b"LEN").and_then(|rest| rest.first()) else {
            return false;
        };
        let _ = &input[4..4 + usize::from(*len)];
        true
    }

    #[test]
    fn a_length_that_is_believed_is_found() {
        let seeds = [b"LEN\x02ab".to_vec()];
        let failing = fuzz(&seeds, 10_000, 1, careless).unwrap_err();
        assert_eq!(failing.why, "it panics");
        assert!(failing.input.starts_with(b"LEN"));
    }

    #[test]
    fn what_is_sound_passes_and_most_of_it_stays_near_the_format() {
        let sound = |input: &[u8]| input.starts_with(b"LEN");
        let fuzzed = fuzz(&[b"LEN\x02ab".to_vec()], 10_000, 1, sound).unwrap();
        assert_eq!(fuzzed.runs, 10_001);
        assert!(fuzzed.taken > 1_000 && fuzzed.taken < 10_001, "{fuzzed:?}");
    }
}

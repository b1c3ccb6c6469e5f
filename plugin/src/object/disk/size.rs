//! Sizes as users write them, and the cluster sizes that qcow2 allows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A number of bytes. Written as digits with an optional binary suffix, as `qemu-img` reads it: `512`, `64k`,
/// `100G`, `100GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u32); 6] = [("E", 60), ("P", 50), ("T", 40), ("G", 30), ("M", 20), ("K", 10)];

/// The text is not a size.
#[derive(Debug, Error)]
#[error("`{text}` is not a size: {reason}")]
pub struct SizeError {
    text: String,
    reason: &'static str,
}

impl FromStr for Bytes {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = |reason| SizeError {
            text: text.to_owned(),
            reason,
        };
        let trimmed = text.trim();
        let digits = trimmed
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(trimmed.len());
        let (number, suffix) = trimmed.split_at(digits);
        let number: u64 = number
            .parse()
            .map_err(|_| error("write digits and one of K, M, G, T, P, E, such as 100G"))?;
        let shift = shift_of(suffix).ok_or_else(|| error("its suffix is none of K, M, G, T, P, E"))?;
        number
            .checked_mul(1 << shift)
            .map(Self)
            .ok_or_else(|| error("it is 16 EiB or more"))
    }
}

fn shift_of(suffix: &str) -> Option<u32> {
    let upper = suffix.to_ascii_uppercase();
    if upper.is_empty() || upper == "B" {
        return Some(0);
    }
    let unit = upper.strip_suffix("IB").unwrap_or(&upper);
    UNITS
        .iter()
        .find(|(name, _)| *name == unit)
        .map(|(_, shift)| *shift)
}

impl Bytes {
    /// The size rounded up to whole 512-byte sectors, as QEMU rounds; `None` past 16 EiB.
    #[must_use]
    pub fn whole_sectors(self) -> Option<Self> {
        self.0.checked_next_multiple_of(512).map(Self)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS
            .iter()
            .find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift))
        {
            Some((name, shift)) => write!(f, "{} {name}iB", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// The size of a qcow2 cluster: a power of two from 512 bytes to 2 MiB. 64 KiB unless asked otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "u64")]
pub struct ClusterSize {
    bits: u32,
}

impl ClusterSize {
    /// The cluster size whose binary logarithm is `bits`; `None` unless it is 9 to 21.
    #[must_use]
    pub fn from_bits(bits: u32) -> Option<Self> {
        (9..=21).contains(&bits).then_some(Self { bits })
    }

    /// The binary logarithm of [`Self::bytes`].
    #[must_use]
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// How many clusters `bytes` take.
    #[must_use]
    pub fn clusters(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}

impl Default for ClusterSize {
    fn default() -> Self {
        Self { bits: 16 }
    }
}

impl From<ClusterSize> for u64 {
    fn from(size: ClusterSize) -> Self {
        size.bytes()
    }
}

impl TryFrom<Bytes> for ClusterSize {
    type Error = SizeError;

    fn try_from(Bytes(bytes): Bytes) -> Result<Self, Self::Error> {
        Some(bytes)
            .filter(|bytes| bytes.is_power_of_two())
            .and_then(|bytes| Self::from_bits(bytes.trailing_zeros()))
            .ok_or(SizeError {
                text: bytes.to_string(),
                reason: "a cluster is a power of two from 512 to 2M",
            })
    }
}

impl FromStr for ClusterSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.parse::<Bytes>()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1b", 1),
            ("64k", 65536),
            ("100G", 100 << 30),
            ("3MiB", 3 << 20),
            ("7E", 7 << 60),
        ] {
            let parsed = text.parse::<Bytes>().map(|size| size.0).unwrap_or_default();
            assert_eq!(parsed, bytes, "{text}");
        }
        for text in ["", "G", "-1", "1.5G", "16E", "99999999999999999999", "1X", "1GG"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_show_their_largest_whole_unit() {
        assert_eq!(Bytes(100 << 30).to_string(), "100 GiB");
        assert_eq!(Bytes(1536 << 20).to_string(), "1536 MiB");
        assert_eq!(Bytes(513).to_string(), "513 bytes");
        assert_eq!(Bytes(0).to_string(), "0 bytes");
    }

    #[test]
    fn clusters_are_powers_of_two_in_bounds() {
        for (text, ok) in [
            ("512", true),
            ("2M", true),
            ("64k", true),
            ("256", false),
            ("4M", false),
            ("600", false),
            ("0", false),
        ] {
            assert_eq!(text.parse::<ClusterSize>().is_ok(), ok, "{text}");
        }
    }

    #[test]
    fn rounding_up_never_wraps() {
        assert_eq!(Bytes(513).whole_sectors(), Some(Bytes(1024)));
        assert_eq!(Bytes(u64::MAX).whole_sectors(), None);
    }
}

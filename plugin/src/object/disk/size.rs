//! Sizes as users write them, and the cluster sizes that qcow2 allows.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A number of bytes. Written as people do, and read as libvirt reads its units: `512`, `64k`, `100G` and `1.5TiB` are by powers of
/// 1024, `20GB` is by powers of 1000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(transparent)]
pub(crate) struct Bytes(pub u64);

const UNITS: [(&str, u32); 6] = [("E", 60), ("P", 50), ("T", 40), ("G", 30), ("M", 20), ("K", 10)];

#[derive(Debug, Error)]
#[error("`{text}` is not a size: {reason}")]
pub(crate) struct SizeError {
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
        let is_of_number = |c: char| c.is_ascii_digit() || c == '.';
        let end = trimmed.find(|c| !is_of_number(c)).unwrap_or(trimmed.len());
        let (number, suffix) = trimmed.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let no_number = || error("write a number and one of K, M, G, T, P, E, such as 100G, 1.5T or 20GB");
        if number.is_empty() {
            return Err(no_number());
        }
        let unit =
            unit(suffix.trim_start()).ok_or_else(|| error("its suffix is none of K, M, G, T, P, E"))?;
        if number.contains('.') && (fraction.is_empty() || fraction.len() > MAX_DECIMALS || unit == 1) {
            return Err(no_number());
        }
        let whole: u64 = whole.parse().map_err(|_| no_number())?;
        let decimals = 10_u128.pow(fraction.len() as u32);
        let part: u128 = match fraction {
            "" => 0,
            fraction => fraction.parse().map_err(|_| no_number())?,
        };
        // Neither product comes near to the end of 128 bits.
        let bytes = u128::from(whole) * u128::from(unit) + part * u128::from(unit) / decimals;
        let bytes = u64::try_from(bytes).map_err(|_| error("it is 16 EiB or more"))?;
        Ok(Self(bytes))
    }
}

/// How many digits behind the point count for something.
const MAX_DECIMALS: usize = 18;

fn unit(suffix: &str) -> Option<u64> {
    let upper = suffix.to_ascii_uppercase();
    if upper.is_empty() || upper == "B" {
        return Some(1);
    }
    let (name, is_decimal) = match (upper.strip_suffix("IB"), upper.strip_suffix('B')) {
        (Some(name), _) => (name, false),
        (None, Some(name)) => (name, true),
        (None, None) => (upper.as_str(), false),
    };
    let (_, shift) = UNITS.iter().find(|(unit, _)| *unit == name)?;
    Some(match is_decimal {
        true => 1000_u64.pow(shift / 10),
        false => 1 << shift,
    })
}

impl Bytes {
    /// The size rounded up to whole 512-byte sectors, as QEMU rounds; `None` past 16 EiB.
    pub(crate) fn whole_sectors(self) -> Option<Self> {
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
pub(crate) struct ClusterSize {
    bits: u32,
}

impl ClusterSize {
    /// The cluster size whose binary logarithm is `bits`; `None` unless it is 9 to 21.
    pub(crate) fn from_bits(bits: u32) -> Option<Self> {
        (9..=21).contains(&bits).then_some(Self { bits })
    }

    /// The binary logarithm of [`Self::bytes`].
    pub(crate) fn bits(self) -> u32 {
        self.bits
    }

    pub(crate) fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// How many clusters `bytes` take.
    pub(crate) fn clusters(self, bytes: u64) -> u64 {
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
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1b", 1),
            ("64k", 65536),
            ("100G", 100 << 30),
            ("3MiB", 3 << 20),
            ("7E", 7 << 60),
            ("20GB", 20_000_000_000),
            ("64kb", 64_000),
            ("1.5T", 3 << 39),
            ("0.5 GiB", 512 << 20),
            ("2.25MB", 2_250_000),
            ("1.0000000001k", 1024),
        ] {
            let parsed = text.parse::<Bytes>().map(|size| size.0).unwrap_or_default();
            assert_eq!(parsed, bytes, "{text}");
        }
        for text in [
            "",
            "G",
            "-1",
            "1.5",
            "1.5B",
            "1.G",
            ".5G",
            "1.2.3G",
            "16E",
            "99999999999999999999",
            "1X",
            "1GG",
            "1,5G",
            "18.5EB",
            "15.9999999999999999999E",
        ] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        for text in ["", "+5G", "-1", "G"] {
            let told = text.parse::<Bytes>().unwrap_err().to_string();
            assert!(told.contains("write a number"), "{told}");
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

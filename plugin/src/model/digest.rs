//! The sum of a file, as distributions publish it beside an image.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Which sum. MD5 and SHA-1 prove nothing of what others may have made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Algorithm {
    Sha256,
    Sha512,
}

/// Written `sha256:HEX` where machines read it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Digest {
    algorithm: Algorithm,
    bytes: Vec<u8>,
}

impl Algorithm {
    const ALL: [Self; 2] = [Self::Sha256, Self::Sha512];

    /// As in `sha256:HEX`.
    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    /// How many bytes a sum has.
    fn len(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

impl Digest {
    /// `None` where that is no sum of this kind.
    pub(crate) fn new(algorithm: Algorithm, bytes: Vec<u8>) -> Option<Self> {
        (bytes.len() == algorithm.len()).then_some(Self { algorithm, bytes })
    }

    /// Tells by the length which one it is.
    pub(crate) fn from_hex(text: &str) -> Option<Self> {
        let bytes = hex::decode(text).ok()?;
        let algorithm = Algorithm::ALL
            .into_iter()
            .find(|algorithm| algorithm.len() == bytes.len())?;
        Self::new(algorithm, bytes)
    }

    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.name(), hex::encode(&self.bytes))
    }
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is neither sha256: with 64 hex digits nor sha512: with 128")]
pub(crate) struct NoDigest(String);

impl FromStr for Digest {
    type Err = NoDigest;

    fn from_str(text: &str) -> Result<Self, NoDigest> {
        let read = || {
            let (name, hex) = text.split_once(':')?;
            Self::from_hex(hex).filter(|digest| digest.algorithm.name() == name)
        };
        read().ok_or_else(|| NoDigest(text.to_owned()))
    }
}

impl TryFrom<String> for Digest {
    type Error = NoDigest;

    fn try_from(text: String) -> Result<Self, NoDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_is_read_as_it_is_written_and_nothing_else_is() {
        for (name, digits) in [("sha256", 64), ("sha512", 128)] {
            let text = format!("{name}:{}", "0f".repeat(digits / 2));
            let digest: Digest = text.parse().unwrap();
            assert_eq!(digest.to_string(), text);
            assert_eq!(
                text.to_uppercase().replace("SHA", "sha").parse(),
                Ok(digest.clone())
            );
            let json = serde_json::to_string(&digest).unwrap();
            assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest);
            for other in [
                text.replace(name, "md5"),
                text[..text.len() - 2].to_owned(),
                text.replace(':', ""),
                text.replace('f', "g"),
            ] {
                assert!(other.parse::<Digest>().is_err(), "{other}");
            }
        }
        let swapped = format!("sha512:{}", "0f".repeat(32));
        assert!(swapped.parse::<Digest>().is_err());
    }
}

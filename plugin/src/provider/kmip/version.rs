//! The versions of the protocol that this client speaks, and what each can do.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::tag::Tag;
use super::ttlv::Item;
use crate::model::stored_as_text;
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct KmipVersion {
    major: u8,
    minor: u8,
}

impl KmipVersion {
    const fn new(major: u8, minor: u8) -> Self {
        Self { major, minor }
    }

    /// What this client speaks, the best first.
    pub(super) const SPOKEN: [Self; 6] = [
        Self::new(2, 1),
        Self::new(2, 0),
        Self::new(1, 4),
        Self::new(1, 3),
        Self::new(1, 2),
        Self::new(1, 1),
    ];
    /// The first version with DiscoverVersions.
    pub(super) const FIRST: Self = Self::new(1, 1);
    pub(super) const V2_0: Self = Self::new(2, 0);
    /// The first version whose Encrypt can authenticate.
    pub(super) const WITH_GCM: Self = Self::new(1, 4);

    /// Attributes are structures of their own from 2.0 on, and name-value pairs in a template before.
    pub(super) fn has_attributes(self) -> bool {
        self.major >= 2
    }

    /// Whether a list can be asked for from a place in it on.
    pub(super) fn has_offsets(self) -> bool {
        self >= Self::new(1, 3)
    }

    pub(super) fn item(self) -> Item<'static> {
        Item::structure(
            Tag::PROTOCOL_VERSION,
            [
                Item::integer(Tag::PROTOCOL_VERSION_MAJOR, self.major.into()),
                Item::integer(Tag::PROTOCOL_VERSION_MINOR, self.minor.into()),
            ],
        )
    }

    /// `None` for what no version of this client can be.
    pub(super) fn of_item(item: &Item) -> Option<Self> {
        let number = |tag| u8::try_from(item.find(tag)?.as_integer()?).ok();
        Some(Self::new(
            number(Tag::PROTOCOL_VERSION_MAJOR)?,
            number(Tag::PROTOCOL_VERSION_MINOR)?,
        ))
    }
}

impl fmt::Display for KmipVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The text names no version that this client speaks.
#[derive(Debug, Error)]
#[error("{0:?} is not a KMIP version that virtseal speaks: use 1.1, 1.2, 1.3, 1.4, 2.0 or 2.1")]
pub(crate) struct NotAVersion(String);

impl FromStr for KmipVersion {
    type Err = NotAVersion;

    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let known = Self::SPOKEN.into_iter();
        let mut found = known.filter(|version| version.to_string() == text);
        found.next().ok_or_else(|| NotAVersion(text.to_owned()))
    }
}

stored_as_text!(KmipVersion);

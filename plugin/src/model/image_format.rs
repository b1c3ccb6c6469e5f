//! The formats of images.

use serde::{Deserialize, Serialize};
use zlink::idl;
use zlink::introspect::Type;

/// What kind of image a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) enum Format {
    /// qcow2 without encryption.
    #[serde(rename = "qcow2")]
    Qcow2,
    /// qcow2 with LUKS1 inside: what virtseal makes for disks.
    #[serde(rename = "qcow2+luks1")]
    Qcow2Luks1,
    /// A LUKS1 header and its payload: what virtseal makes for UEFI variable stores.
    #[serde(rename = "luks1")]
    Luks1,
    /// A LUKS2 header and its payload.
    #[serde(rename = "luks2")]
    Luks2,
    /// No format that shows.
    #[serde(rename = "raw")]
    Raw,
}

impl Format {
    /// The name in messages and in JSON.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Qcow2Luks1 => "qcow2+luks1",
            Self::Luks1 => "luks1",
            Self::Luks2 => "luks2",
            Self::Raw => "raw",
        }
    }

    /// Whether it is LUKS without qcow2 around it: what a variable store of ours is.
    pub(crate) fn is_bare_luks(self) -> bool {
        matches!(self, Self::Luks1 | Self::Luks2)
    }

    pub(crate) fn is_encrypted(self) -> bool {
        matches!(self, Self::Qcow2Luks1 | Self::Luks1 | Self::Luks2)
    }
}

/// `qcow2+luks1` can't be a word of a Varlink enum.
impl Type for Format {
    const TYPE: &'static idl::Type<'static> = &idl::Type::String;
}

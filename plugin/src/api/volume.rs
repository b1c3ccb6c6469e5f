//! What a check of a volume tells.

use serde::{Deserialize, Serialize};
use zlink::introspect::{CustomType, Type};

use super::{FindingView, OrNewer};
use crate::model::image_format::Format;

/// How the envelope that an image carries stands to the keystore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum KeystoreCopy {
    /// It is what the keystore has.
    Same,
    /// It is an earlier version, and follows.
    Older,
    /// It is neither.
    Other,
    /// The image carries none, as a variable store.
    NotCarried,
    /// The keystore has no envelope for the image.
    Unknown,
}

/// What the tables of an image are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum ImageStructure {
    Sound,
    /// Room is lost, and no data.
    Leaks,
    /// Data is lost, or will be.
    Corrupt,
    /// Somebody has it open, so nothing can be told.
    InUse,
    /// Its format has no tables.
    NotChecked,
}

/// Reply of `volume check`: the image has opened.
#[derive(Clone, Debug, Serialize, Deserialize, Type)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct VolumeChecked {
    pub path: String,
    /// `qcow2+luks1`, `luks1`.
    pub format: OrNewer<Format>,
    /// Of its disk, in bytes.
    pub size: u64,
    /// The UUID of the envelope that has opened it.
    pub envelope: String,
    /// The name of the VM that it was made for, or its UUID.
    pub vm: String,
    /// Of that envelope.
    pub generation: Option<i64>,
    pub copy: OrNewer<KeystoreCopy>,
    pub structure: OrNewer<ImageStructure>,
    /// Clusters that nothing uses.
    pub leaks: u64,
    /// Errors in its tables.
    pub errors: u64,
    /// What is wrong.
    pub findings: Vec<FindingView>,
}

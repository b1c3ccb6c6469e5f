//! What an image says of itself without a key.

use std::path::PathBuf;

use serde::Serialize;

use super::file_id::FileId;
use super::luks::LuksInfo;
use super::qcow2::BackingName;
use super::qcow2::allocation::Data;
use super::size::{Bytes, ClusterSize};
use crate::model::envelope::Envelope;
use crate::model::image_format::Format;

/// What an image says without any key.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct VolumeInfo {
    pub path: PathBuf,
    pub format: Format,
    /// Size of the disk that a guest sees, in bytes.
    pub virtual_size: Bytes,
    /// Only for qcow2, in bytes.
    #[cfg_attr(test, schemars(with = "Option<u64>"))]
    pub cluster_size: Option<ClusterSize>,
    /// Only for qcow2.
    pub backing: Option<BackingName>,
    /// Only for LUKS: cipher, keyslots, payload.
    pub luks: Option<LuksInfo>,
    /// The copy that the image carries.
    pub envelope: Option<Envelope>,
    /// What is wrong with a copy that can't be read: it says nothing of the image.
    pub unreadable_envelope: Option<String>,
    /// Only for qcow2: how many snapshots are in it.
    #[serde(skip)]
    pub snapshots: u32,
    /// Whether anything would be lost with it. An image with a backing file, and any LUKS file that is not qcow2,
    /// count as holding data.
    pub data: Data,
    /// To be given to `create` by a caller that wants to replace this very file.
    #[serde(skip)]
    pub file_id: FileId,
}

/// The copy of an envelope in an image. Anybody who writes the image has written it: one that can't be read is a bad copy, and
/// no reason to do without the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ImageCopy {
    /// The image carries none.
    None,
    /// It is one in form.
    Envelope(Box<Envelope>),
    /// What is wrong with it.
    Unreadable(String),
}

impl ImageCopy {
    /// The one that can be read.
    pub(crate) fn envelope(self) -> Option<Envelope> {
        match self {
            Self::Envelope(envelope) => Some(*envelope),
            Self::None | Self::Unreadable(_) => None,
        }
    }

    /// What is wrong with it.
    pub(crate) fn flaw(&self) -> Option<String> {
        match self {
            Self::Unreadable(why) => Some(why.clone()),
            Self::None | Self::Envelope(_) => None,
        }
    }
}

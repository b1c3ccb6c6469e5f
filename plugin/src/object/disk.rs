//! Encrypted images: made, inspected and opened, by our own code.
//!
//! The daemon calls this for disks: qcow2 with LUKS inside, the envelope in a header extension. New files get their name once they are complete and have been opened with their key, and
//! reading takes no lock and follows no file name that an image gives, except in [`known_layers`]. An image that exists is
//! written to only while nobody has it open: see [`rewrite_envelope`] and [`resize()`].
//!
//! - [`create()`], [`create_from`]: make images, crash-safe; [`sweep_temporaries`] after a crash
//! - [`prepare_over`], [`prepare_empty`]: replace one that holds nothing, while nobody can open it ([`ImageLock`]); the last step is a
//!   rename ([`Prepared`])
//! - [`inspect`], [`known_layers`], [`header_digest`]: read them without a key
//! - [`inspect_declared`]: the same, where somebody has declared the format; only a file that is ours needs no declaration
//! - [`open()`]: opens one with its key
//! - [`check()`], [`resize()`]: what `qemu-img` does with one and its key
//! - [`rewrite_envelope`], [`finish_rewrite`]: bring the envelope in an image up to date; [`shred`] ends its keys
//!
//! An image carries its envelope in a qcow2 header extension of type `0x76736561` ("vsea"): one byte for the format
//! (1), one for the place (0 here, 1 behind the LUKS1 header, for clusters too small), two zero bytes, the length of
//! the JSON (32 bits, big-endian), then the JSON itself or, for place 1, where it begins in bytes from the LUKS1
//! header (64 bits, big-endian).

mod chain;
mod check;
pub(super) mod convert;
mod create;
mod declared;
pub(super) mod error;
mod file_id;
mod format;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod info;
mod lock;
pub(super) mod luks;
mod merge;
pub(super) mod open;
mod plain;
mod prepared;
mod qcow2;
mod qemu_img;
mod resize;
mod rewrite;
mod sandbox;
mod size;
pub(super) mod staging;

pub(crate) use crate::model::image_format::Format;
pub(crate) use chain::{Layer, known_layers};
pub(crate) use check::{Structure, check};
pub(crate) use create::{Backing, CreateRequest, create, create_from, prepare_over, source_size};
#[cfg(test)]
pub(crate) use create::{create_from_watched, create_watched, prepare_over_watched};
pub(crate) use declared::{Declaration, inspect_declared};
pub(crate) use error::VolumeError;
pub(crate) use file_id::FileId;
pub(crate) use info::{ImageCopy, VolumeInfo};
pub(crate) use lock::ImageLock;
pub(crate) use luks::{KeyslotInfo, LuksInfo};
pub(crate) use merge::{Base, Below, merge, verify as verify_merged, verify_all};
pub(crate) use open::{header_digest, identify, inspect, open};
pub(crate) use plain::prepare_empty;
pub(crate) use prepared::Prepared;
pub(crate) use qcow2::allocation::Data;
pub(crate) use qemu_img::Heard;
pub(crate) use resize::resize;
pub(crate) use rewrite::{Carried, finish_rewrite, is_free, rewrite_envelope, shred};
pub(crate) use size::{Bytes, ClusterSize};
#[cfg(test)]
pub(crate) use staging::Step;
pub(crate) use staging::{remove, sweep_temporaries};

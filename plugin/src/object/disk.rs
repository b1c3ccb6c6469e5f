//! Encrypted images: made, inspected and opened, by our own code.
//!
//! The daemon calls this for disks: qcow2 with LUKS inside, the envelope in a header extension. New files get their name once they are complete and have been opened with their key, and
//! reading takes no lock and follows no file name that an image gives, except in [`backing_chain`]. An image that exists is
//! written to in one place, and only while nobody has it open: see [`rewrite_envelope`].
//!
//! - [`create()`], [`create_from`]: make images, crash-safe; [`sweep_temporaries`] after a crash
//! - [`prepare_over`], [`prepare_empty`]: replace one that holds nothing, while nobody can open it ([`ImageLock`]); the last step is a
//!   rename ([`Prepared`])
//! - [`inspect`], [`backing_chain`], [`header_digest`]: read them without a key
//! - [`inspect_declared`]: the same, where somebody has declared the format; only a file that is ours needs no declaration
//! - [`verify`]: opens one with its key
//! - [`rewrite_envelope`], [`finish_rewrite`]: bring the envelope in an image up to date; [`shred_keys`] ends its keys
//!
//! An image carries its envelope in a qcow2 header extension of type `0x76736561` ("vsea"): one byte for the format
//! (1), one for the place (0 here, 1 behind the LUKS1 header, for clusters too small), two zero bytes, the length of
//! the JSON (32 bits, big-endian), then the JSON itself or, for place 1, where it begins in bytes from the LUKS1
//! header (64 bits, big-endian).

mod chain;
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
pub(super) mod open;
mod plain;
mod prepared;
mod qcow2;
mod qemu_img;
mod rewrite;
mod sandbox;
mod size;
pub(super) mod staging;

pub use chain::{Layer, backing_chain, known_layers};
pub use create::{
    Backing, BackingFormat, CreateRequest, Created, create, create_from, create_from_watched,
    create_over_watched, prepare_over, source_size,
};
pub use declared::{Declaration, inspect_declared};
pub use error::{Flaw, Part, VolumeError};
pub use file_id::FileId;
pub use format::Format;
pub use info::{BackingEntry, ImageCopy, VolumeInfo};
pub use lock::ImageLock;
pub use luks::{KeyslotInfo, LuksInfo};
pub use open::{header_digest, identify, inspect, verify};
pub use plain::prepare_empty;
pub use prepared::Prepared;
pub use qcow2::allocation::Data;
pub use qemu_img::Percent;
pub use rewrite::{Carried, Shredded, Shredding, finish_rewrite, is_free, rewrite_envelope, shred_keys};
pub use size::{Bytes, ClusterSize, SizeError};
pub use staging::{Step, sweep_temporaries};

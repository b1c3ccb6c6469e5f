//! Encrypted images: made, inspected and opened, by our own code.
//!
//! The daemon calls this for disks (qcow2 with LUKS1 inside, the envelope in a header extension) and for UEFI
//! variable stores (plain LUKS1). New files get their name once they are complete and have been opened with their key, and
//! reading takes no lock and follows no file name that an image gives, except in [`backing_chain`]. An image that exists is
//! written to in one place, and only while nobody has it open: see [`rewrite_envelope`].
//!
//! - [`create()`], [`create_from`], [`create_nvram`]: make images, crash-safe; [`sweep_temporaries`] after a crash
//! - [`create_over`], [`empty_over`], [`copy_over`]: replace one that holds nothing, while nobody can open it ([`ImageLock`])
//! - [`inspect_declared`]: the same, where somebody has declared the format; only a file that is ours needs no declaration
//! - [`prepare_over`], [`prepare_nvram`], [`prepare_empty`], [`prepare_copy`]: the same in two steps, of which the second is a
//!   rename ([`Prepared`])
//! - [`inspect`], [`backing_chain`], [`header_digest`]: read them without a key
//! - [`verify`]: opens one with its key
//! - [`rewrite_envelope`], [`finish_rewrite`]: bring the envelope in an image up to date; [`shred_keys`] ends its keys
//!
//! An image carries its envelope in a qcow2 header extension of type `0x76736561` ("vsea"): one byte for the format
//! (1), one for the place (0 here, 1 behind the LUKS1 header, for clusters too small), two zero bytes, the length of
//! the JSON (32 bits, big-endian), then the JSON itself or, for place 1, where it begins in bytes from the LUKS1
//! header (64 bits, big-endian).

mod chain;
mod convert;
mod create;
mod declared;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod lock;
pub mod luks1;
mod nvram;
mod open;
mod plain;
mod prepared;
mod qcow2;
mod qemu_img;
mod rewrite;
mod sandbox;
mod size;
mod staging;

pub use chain::{Layer, backing_chain, known_layers};
pub use create::{
    Backing, BackingFormat, CreateRequest, Created, Step, create, create_from, create_from_watched,
    create_over, create_over_watched, prepare_over,
};
pub use declared::{Declaration, inspect_declared};
pub use error::{Flaw, Part, VolumeError};
pub use lock::ImageLock;
pub use nvram::{create_nvram, create_nvram_watched, prepare_nvram, read_variables};
pub use open::{BackingEntry, Format, ImageCopy, VolumeInfo, header_digest, identify, inspect, verify};
pub use plain::{copy_over, empty_over, prepare_copy, prepare_empty};
pub use prepared::Prepared;
pub use qcow2::allocation::Data;
pub use qemu_img::Percent;
pub use rewrite::{Carried, Shredded, Shredding, finish_rewrite, is_free, rewrite_envelope, shred_keys};
pub use size::{Bytes, ClusterSize, SizeError};
pub use staging::{FileId, sweep_temporaries};

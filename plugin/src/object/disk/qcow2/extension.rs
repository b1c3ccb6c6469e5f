//! The envelope inside an image: a header extension of virtseal's own, type `0x76736561` ("vsea").
//!
//! QEMU keeps extensions that it does not know through everything but `convert`. The payload, all big-endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 0 | format, 1 |
//! | 1 | place: 0 the JSON follows here, 1 it follows the LUKS1 header |
//! | 2-3 | 0 |
//! | 4-7 | length of the JSON in bytes |
//! | 8-15 | only for place 1: where the JSON begins, in bytes from the LUKS1 header |
//!
//! The second place is for images whose first cluster is too small. The area that qcow2 gives to the LUKS1 header
//! is then made longer than LUKS needs, so that `qemu-img check` counts those clusters as used and leaves them be.

use super::flaw;
use crate::model::envelope::Envelope;
use crate::object::disk::error::{Flaw, Part};
use crate::object::disk::size::ClusterSize;

pub(crate) const KIND: u32 = 0x7673_6561;
/// What is kept free behind the LUKS1 header when the envelope goes there.
pub(crate) const ROOM_BEHIND_LUKS: u64 = Envelope::MAX_JSON as u64;
const FORMAT: u8 = 1;
/// What QEMU may want for itself in the first cluster: the header, a feature table, pointers to LUKS, bitmaps and a
/// data file, and the longest name of a backing file with its format.
const LEFT_TO_QEMU: u64 = 2048;

/// Where the envelope's JSON lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the extension itself.
    Inline,
    /// This many bytes from the LUKS1 header.
    BehindLuks(u64),
}

impl Place {
    /// The extension itself if QEMU has room enough beside it, else behind a LUKS1 header of `luks_len` bytes.
    pub(crate) fn choose(json: &str, cluster_size: ClusterSize, luks_len: u64) -> Self {
        if json.len() as u64 + LEFT_TO_QEMU <= cluster_size.bytes() {
            Self::Inline
        } else {
            Self::BehindLuks(luks_len)
        }
    }
}

/// What the extension says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    pub(crate) place: Place,
    /// Length of the JSON in bytes, at most [`Envelope::MAX_JSON`].
    pub(crate) len: usize,
}

pub(crate) fn payload(json: &str, place: Place) -> Vec<u8> {
    let mut out = vec![FORMAT, u8::from(place != Place::Inline), 0, 0];
    out.extend_from_slice(&(json.len() as u32).to_be_bytes());
    match place {
        Place::Inline => out.extend_from_slice(json.as_bytes()),
        Place::BehindLuks(offset) => out.extend_from_slice(&offset.to_be_bytes()),
    }
    out
}

/// Reads a payload that lies at `offset` of the file.
pub(crate) fn pointer(payload: &[u8], offset: u64) -> Result<Pointer, Flaw> {
    let broken = |what: &str| Err(Flaw::new(Part::Envelope, offset, what));
    let Some(([format, place, 0, 0], rest)) = payload.split_first_chunk() else {
        return broken("the envelope's header extension is malformed");
    };
    if *format != FORMAT {
        return broken("the envelope was written by a later virtseal: upgrade this one");
    }
    let Some((len, rest)) = rest.split_first_chunk() else {
        return broken("the envelope's header extension ends too early");
    };
    let len = u32::from_be_bytes(*len) as usize;
    let place = match (place, rest.first_chunk()) {
        (0, _) if rest.len() == len => Place::Inline,
        (1, Some(start)) if rest.len() == 8 => Place::BehindLuks(u64::from_be_bytes(*start)),
        _ => return broken("the envelope's length and place do not fit"),
    };
    if len > Envelope::MAX_JSON {
        return broken("the envelope is longer than any can be");
    }
    Ok(Pointer { place, len })
}

/// Appends an extension, padded to 8 bytes.
pub(crate) fn push(header: &mut Vec<u8>, kind: u32, payload: &[u8]) {
    header.extend_from_slice(&kind.to_be_bytes());
    header.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    header.extend_from_slice(payload);
    header.resize(header.len().next_multiple_of(8), 0);
}

/// The envelope whose JSON was found at `offset` of the file.
pub(crate) fn envelope(json: &[u8], offset: u64) -> Result<Envelope, Flaw> {
    let text = std::str::from_utf8(json)
        .map_err(|_| Flaw::new(Part::Envelope, offset, "the envelope is not text"))?;
    Envelope::from_json(text).map_err(|error| Flaw::new(Part::Envelope, offset, error.to_string()))
}

/// Where the JSON lies in the file, given where the extension's payload and the LUKS1 header's area are.
pub(crate) fn locate(pointer: Pointer, payload_offset: u64, luks: super::Span) -> Result<u64, Flaw> {
    match pointer.place {
        Place::Inline => Ok(payload_offset + 8),
        Place::BehindLuks(start) => start
            .checked_add(pointer.len as u64)
            .filter(|end| *end <= luks.len)
            .map(|_| luks.offset + start)
            .ok_or_else(|| {
                flaw(
                    payload_offset as usize,
                    "the envelope lies outside of the encryption header's area",
                )
            }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Span;
    use super::*;

    #[test]
    fn the_place_leaves_qemu_its_room() {
        let json = "x".repeat(600);
        for (bits, inline) in [(9, false), (11, false), (12, true), (16, true), (21, true)] {
            let cluster = ClusterSize::from_bits(bits).unwrap();
            assert_eq!(
                Place::choose(&json, cluster, 4096) == Place::Inline,
                inline,
                "2^{bits}"
            );
        }
    }

    proptest! {
        #[test]
        fn round_trip(json in "[a-z]{0,3000}", behind in prop::option::of(0_u64..1 << 40)) {
            let place = behind.map_or(Place::Inline, Place::BehindLuks);
            let read = pointer(&payload(&json, place), 0).unwrap();
            prop_assert_eq!(read, Pointer { place, len: json.len() });
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..40), offset: u64, len: u64) {
            if let Ok(pointer) = pointer(&bytes, 1000) {
                let found = locate(pointer, 1000, Span { offset: offset >> 2, len: len >> 2 });
                prop_assert!(found.is_err() || pointer.len as u64 <= (len >> 2).max(bytes.len() as u64));
            }
        }
    }
}

//! New images: which cluster holds what, and the bytes that go there.
//!
//! header | refcount table | refcount blocks | LUKS1 header | L1 table. Every cluster up to the end has the refcount
//! one, which is what `qemu-img check` wants to see. Only what is not zero is written; the rest is a hole, so an
//! image of any size takes about 270 KiB of disk and as long to make.

use super::extension::{self, Place, ROOM_BEHIND_LUKS};
use super::{
    BACKING_FORMAT_EXTENSION, BackingName, HEADER_LEN, LUKS, LUKS_EXTENSION, MAGIC, MAX_L1_BYTES, Span,
};
use crate::object::disk::luks::Fresh;
use crate::object::disk::size::{Bytes, ClusterSize};

const REFCOUNT_ORDER: u32 = 4;
const REFCOUNT_LEN: u64 = 2;

/// Bytes for one place of a new file.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) offset: u64,
    pub(crate) bytes: Vec<u8>,
}

/// A new file: its length, and what is not zero in it.
#[derive(Debug)]
pub(crate) struct Blueprint {
    pub(crate) len: u64,
    pub(crate) regions: Vec<Region>,
}

/// Why an image can't be laid out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum LayoutError {
    /// More than this is impossible with the cluster size.
    TooLarge { most: Bytes },
    /// The first cluster has no room for the backing file's name; this is how much it has.
    BackingName { name: String, room: u64 },
}

/// The first cluster of each part, and how many it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    cluster: ClusterSize,
    refcount_table: u64,
    refcount_blocks: u64,
    luks: u64,
    l1: u64,
    l1_entries: u64,
}

impl Layout {
    fn plan(size: Bytes, cluster: ClusterSize, luks_len: u64) -> Result<Self, LayoutError> {
        let bytes_per_l2 = cluster.bytes() / 8 * cluster.bytes();
        let l1_entries = size.0.div_ceil(bytes_per_l2);
        if l1_entries * 8 > MAX_L1_BYTES {
            return Err(LayoutError::TooLarge {
                most: Bytes(MAX_L1_BYTES / 8 * bytes_per_l2),
            });
        }
        let mut layout = Self {
            cluster,
            refcount_table: 1,
            refcount_blocks: 1,
            luks: cluster.clusters(luks_len),
            l1: cluster.clusters(l1_entries * 8).max(1),
            l1_entries,
        };
        layout.count_refcounts();
        Ok(layout)
    }

    /// Refcount blocks count themselves and the table that lists them: grow both until they do.
    fn count_refcounts(&mut self) {
        loop {
            let blocks = self.cluster.clusters(self.total() * REFCOUNT_LEN);
            let table = self.cluster.clusters(blocks * 8);
            if blocks <= self.refcount_blocks && table <= self.refcount_table {
                return;
            }
            self.refcount_blocks = blocks;
            self.refcount_table = table;
        }
    }

    fn total(&self) -> u64 {
        1 + self.refcount_table + self.refcount_blocks + self.luks + self.l1
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster << self.cluster.bits()
    }

    fn refcount_blocks_offset(&self) -> u64 {
        self.offset(1 + self.refcount_table)
    }

    fn luks_offset(&self) -> u64 {
        self.offset(1 + self.refcount_table + self.refcount_blocks)
    }

    fn l1_offset(&self) -> u64 {
        self.offset(1 + self.refcount_table + self.refcount_blocks + self.luks)
    }
}

/// What a new image consists of, apart from its layout.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) size: Bytes,
    pub(crate) cluster_size: ClusterSize,
    pub(crate) backing: Option<&'a BackingName>,
    pub(crate) luks: Fresh,
    pub(crate) envelope: &'a str,
}

impl Parts<'_> {
    /// Lays the image out.
    pub(crate) fn blueprint(self) -> Result<Blueprint, LayoutError> {
        let luks_header_len = self.luks.payload_offset;
        let place = Place::choose(self.envelope, self.cluster_size, luks_header_len);
        let luks_len = match place {
            Place::Inline => luks_header_len,
            Place::BehindLuks(start) => start + ROOM_BEHIND_LUKS,
        };
        let layout = Layout::plan(self.size, self.cluster_size, luks_len)?;
        let header = self.header(&layout, luks_len, place)?;
        let mut regions = vec![region(0, header)];
        regions.extend(refcounts(&layout));
        let luks = layout.luks_offset();
        let at = |(offset, bytes)| region(luks + offset, bytes);
        regions.extend(self.luks.regions.into_iter().map(at));
        if let Place::BehindLuks(start) = place {
            regions.push(region(luks + start, self.envelope.as_bytes().to_vec()));
        }
        Ok(Blueprint {
            len: layout.offset(layout.total()),
            regions,
        })
    }

    fn header(&self, layout: &Layout, luks_len: u64, place: Place) -> Result<Vec<u8>, LayoutError> {
        let mut out = fixed_header(layout, self.size);
        let luks = Span {
            offset: layout.luks_offset(),
            len: luks_len,
        };
        let pointer = [luks.offset.to_be_bytes(), luks.len.to_be_bytes()].concat();
        if let Some(format) = self.backing.and_then(|backing| backing.format.as_deref()) {
            extension::push(&mut out, BACKING_FORMAT_EXTENSION, format.as_bytes());
        }
        extension::push(&mut out, LUKS_EXTENSION, &pointer);
        extension::push(
            &mut out,
            extension::KIND,
            &extension::payload(self.envelope, place),
        );
        out.resize(out.len() + 8, 0);
        if let Some(backing) = self.backing {
            append_backing_name(&mut out, &backing.name, layout.cluster)?;
        }
        Ok(out)
    }
}

fn fixed_header(layout: &Layout, size: Bytes) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&3_u32.to_be_bytes());
    out.extend_from_slice(&[0; 12]);
    out.extend_from_slice(&layout.cluster.bits().to_be_bytes());
    out.extend_from_slice(&size.0.to_be_bytes());
    out.extend_from_slice(&LUKS.to_be_bytes());
    out.extend_from_slice(&(layout.l1_entries as u32).to_be_bytes());
    out.extend_from_slice(&layout.l1_offset().to_be_bytes());
    out.extend_from_slice(&layout.offset(1).to_be_bytes());
    out.extend_from_slice(&(layout.refcount_table as u32).to_be_bytes());
    out.resize(96, 0);
    out.extend_from_slice(&REFCOUNT_ORDER.to_be_bytes());
    out.extend_from_slice(&(HEADER_LEN as u32).to_be_bytes());
    out.resize(HEADER_LEN, 0);
    out
}

fn append_backing_name(header: &mut Vec<u8>, name: &str, cluster: ClusterSize) -> Result<(), LayoutError> {
    let room = cluster.bytes().saturating_sub(header.len() as u64).min(1023);
    if name.len() as u64 > room {
        return Err(LayoutError::BackingName {
            name: name.to_owned(),
            room,
        });
    }
    let offset = header.len() as u64;
    header[8..16].copy_from_slice(&offset.to_be_bytes());
    header[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
    header.extend_from_slice(name.as_bytes());
    Ok(())
}

fn refcounts(layout: &Layout) -> [Region; 2] {
    let table = (0..layout.refcount_blocks)
        .flat_map(|block| (layout.refcount_blocks_offset() + layout.offset(block)).to_be_bytes())
        .collect();
    let counts = 1_u16.to_be_bytes().repeat(layout.total() as usize);
    [
        region(layout.offset(1), table),
        region(layout.refcount_blocks_offset(), counts),
    ]
}

fn region(offset: u64, bytes: Vec<u8>) -> Region {
    Region { offset, bytes }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Encryption, Header};
    use super::*;
    use crate::object::disk::luks;
    use crate::secret::Dek;

    fn parts<'a>(
        size: u64,
        bits: u32,
        envelope: &'a str,
        backing: Option<&'a BackingName>,
    ) -> Result<Blueprint, LayoutError> {
        let passphrase = Dek::from_bytes(&[3; 32]).unwrap().passphrase().unwrap();
        Parts {
            size: Bytes(size),
            cluster_size: ClusterSize::from_bits(bits).unwrap(),
            backing,
            luks: luks::create(&passphrase).unwrap(),
            envelope,
        }
        .blueprint()
    }

    fn first_cluster(blueprint: &Blueprint, bits: u32) -> Vec<u8> {
        let mut cluster = blueprint.regions[0].bytes.clone();
        cluster.resize(1 << bits, 0);
        cluster
    }

    #[test]
    fn the_largest_disks_are_those_of_qemu() {
        for (bits, most) in [(9, 128_u64 << 30), (16, 2 << 50), (21, 2 << 60)] {
            assert!(parts(most, bits, "{}", None).is_ok());
            assert_eq!(
                parts(most + 512, bits, "{}", None).unwrap_err(),
                LayoutError::TooLarge { most: Bytes(most) }
            );
        }
    }

    #[test]
    fn regions_stay_apart_and_inside() {
        for bits in 9..=21 {
            let mut blueprint = parts(64 << 30, bits, &"e".repeat(500), None).unwrap();
            blueprint.regions.sort_by_key(|region| region.offset);
            let mut end = 0;
            for region in &blueprint.regions {
                assert!(region.offset >= end, "2^{bits}");
                end = region.offset + region.bytes.len() as u64;
            }
            assert!(end <= blueprint.len, "2^{bits}");
        }
    }

    #[test]
    fn a_backing_name_that_does_not_fit_is_refused() {
        let backing = BackingName {
            name: "b".repeat(400),
            format: Some("qcow2".to_owned()),
        };
        assert!(matches!(
            parts(1 << 30, 9, "{}", Some(&backing)),
            Err(LayoutError::BackingName { .. })
        ));
        assert!(parts(1 << 30, 12, "{}", Some(&backing)).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn what_is_laid_out_is_read_back(sectors in 1_u64..1 << 28, bits in 9_u32..=21, name in "[a-z/]{1,200}") {
            let backing = BackingName { name, format: Some("raw".to_owned()) };
            let blueprint = parts(sectors * 512, bits, r#"{"a":1}"#, Some(&backing)).unwrap();
            let header = Header::parse(&first_cluster(&blueprint, bits), blueprint.len).unwrap();
            prop_assert_eq!(header.virtual_size, Bytes(sectors * 512));
            prop_assert_eq!(header.backing, Some(backing));
            prop_assert!(header.envelope.is_some());
            prop_assert!(matches!(header.encryption, Encryption::Luks(_)));
        }
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_an_error_or_is_read() {
        let blueprint = parts(10 << 30, 12, "{}", None).unwrap();
        let cluster = first_cluster(&blueprint, 12);
        for len in 0..cluster.len() {
            if let Err(flaw) = Header::parse(&cluster[..len], len as u64) {
                assert!(flaw.offset <= 4096, "{flaw}");
            }
        }
        assert!(
            Header::parse(&cluster, 4096)
                .unwrap_err()
                .what
                .contains("truncated")
        );
        for at in 0..256 {
            for flip in [1, 0x40, 0xff] {
                let mut changed = cluster.clone();
                changed[at] ^= flip;
                if let Err(flaw) = Header::parse(&changed, blueprint.len) {
                    assert!(flaw.offset <= 4096, "{flaw}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn hostile_numbers_never_panic(at in 0_usize..250, value: u64, file_len: u64) {
            let blueprint = parts(10 << 30, 9, "{}", None).unwrap();
            let mut cluster = first_cluster(&blueprint, 9);
            cluster[at..at + 8].copy_from_slice(&value.to_be_bytes());
            let _ = Header::parse(&cluster, file_len);
        }

        #[test]
        fn garbage_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 24..600), file_len: u64) {
            bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
            bytes[20..24].copy_from_slice(&9_u32.to_be_bytes());
            let _ = Header::parse(&bytes, file_len);
        }
    }
}

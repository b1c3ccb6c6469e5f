//! Targets: headers of images that others wrote.

use super::luks::{self, luks1};
use super::qcow2::{self, Header};
use super::size::{Bytes, ClusterSize};
use crate::fuzz_target::Target;
use crate::secret::Dek;

pub(crate) const TARGETS: [Target; 2] = [
    Target {
        name: "qcow2_header",
        seeds: || [9, 12].map(first_cluster).into(),
        read: |bytes| {
            let len = 1 << 30;
            let Ok(header) = Header::parse(bytes, len) else {
                return false;
            };
            if header.envelope.is_some()
                && let Ok(other) = qcow2::rewrite::with_payload(bytes, len, Some(b"{}"))
            {
                let read = Header::parse(&other, len).expect("a rewritten header is read");
                assert_eq!(read.envelope.map(|(_, payload)| payload), Some(b"{}".to_vec()));
                assert_eq!((read.l1, read.virtual_size), (header.l1, header.virtual_size));
            }
            true
        },
    },
    Target {
        name: "luks1_header",
        seeds: || vec![luks().regions[0].1.clone()],
        read: |bytes| {
            let space = 4 << 20;
            let Ok(header) = luks1::Header::parse(bytes, space) else {
                return false;
            };
            assert!(header.payload_offset() <= space);
            let again = luks1::Header::parse(&header.to_bytes(), space);
            assert_eq!(again.ok(), Some(header));
            true
        },
    },
];

fn luks() -> luks::Fresh {
    let passphrase = Dek::from_bytes(&[3; 32]).and_then(|dek| dek.passphrase());
    luks::create(&passphrase.expect("memory for a passphrase")).expect("a LUKS header")
}

/// An image of ours, its clusters of 2^`bits` bytes.
fn first_cluster(bits: u32) -> Vec<u8> {
    let cluster_size = ClusterSize::from_bits(bits).expect("a cluster size");
    let parts = qcow2::layout::Parts {
        size: Bytes(1 << 26),
        cluster_size,
        backing: None,
        luks: luks(),
        envelope: "{}",
    };
    let blueprint = parts.blueprint().expect("a small image");
    let mut cluster = vec![0; 1 << bits];
    for region in blueprint
        .regions
        .iter()
        .filter(|region| region.offset < 1 << bits)
    {
        let at = usize::try_from(region.offset).expect("within a cluster");
        cluster[at..at + region.bytes.len()].copy_from_slice(&region.bytes);
    }
    cluster
}

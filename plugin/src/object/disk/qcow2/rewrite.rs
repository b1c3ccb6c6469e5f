//! A qcow2 header with another envelope in it, or none.
//!
//! Everything else stays as it is: fields, extensions and their order, the backing file's name. Only where that name lies
//! may change, since it follows the extensions.

use super::{END_EXTENSION, Fields, Header, extension, flaw};
use crate::object::disk::error::Flaw;

/// The first cluster with `payload` in the envelope's extension. It has one already.
///
/// # Errors
/// When the header can't be read, has no such extension, or has no room for this one.
pub(crate) fn with_payload(cluster: &[u8], file_len: u64, payload: Option<&[u8]>) -> Result<Vec<u8>, Flaw> {
    let before = Header::parse(cluster, file_len)?;
    let fields = Fields(cluster);
    let version = fields.version()?;
    let header_len = match version {
        2 => 72,
        _ => fields.header_len(before.cluster_size)?,
    };
    let mut out = cluster[..header_len].to_vec();
    for found in fields.extensions(version, before.cluster_size)? {
        match (found.kind, payload) {
            (extension::KIND, Some(payload)) => extension::push(&mut out, extension::KIND, payload),
            (extension::KIND, None) => {}
            (kind, _) => extension::push(&mut out, kind, found.payload),
        }
    }
    extension::push(&mut out, END_EXTENSION, &[]);
    if let Some(backing) = &before.backing {
        let offset = out.len() as u64;
        out[8..16].copy_from_slice(&offset.to_be_bytes());
        out.extend_from_slice(backing.name.as_bytes());
    }
    if out.len() > cluster.len() {
        return Err(flaw(
            header_len,
            format!(
                "its first cluster of {} bytes has no room for the envelope",
                cluster.len()
            ),
        ));
    }
    out.resize(cluster.len(), 0);
    let mut after = Header::parse(&out, file_len)?;
    let written = after.envelope.take();
    after.envelope.clone_from(&before.envelope);
    if after == before && written.as_ref().map(|(_, payload)| payload.as_slice()) == payload {
        Ok(out)
    } else {
        Err(flaw(header_len, "it would not read back as it was"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Parts;
    use super::super::{BackingName, Encryption};
    use super::*;
    use crate::object::disk::luks;
    use crate::object::disk::size::{Bytes, ClusterSize};
    use crate::secret::Dek;
    use extension::Place;

    fn image(bits: u32, backing: Option<&BackingName>) -> (Vec<u8>, u64) {
        let cluster_size = ClusterSize::from_bits(bits).unwrap();
        let blueprint = Parts {
            size: Bytes(1 << 20),
            cluster_size,
            backing,
            luks: luks::create(&Dek::random().unwrap().passphrase().unwrap()).unwrap(),
            envelope: "{}",
        }
        .blueprint()
        .unwrap();
        let mut first = blueprint.regions[0].bytes.clone();
        first.resize(cluster_size.bytes() as usize, 0);
        (first, blueprint.len)
    }

    #[test]
    fn everything_else_stays_whatever_the_length() {
        let backing = BackingName {
            name: "/images/base.qcow2".to_owned(),
            format: Some("qcow2".to_owned()),
        };
        for backing in [None, Some(&backing)] {
            for len in [0, 1, 7, 8, 600, 5000] {
                let (first, file_len) = image(16, backing);
                let json = "x".repeat(len);
                let payload = extension::payload(&json, Place::Inline);
                let out = with_payload(&first, file_len, Some(&payload)).unwrap();
                let read = Header::parse(&out, file_len).unwrap();
                assert_eq!(read.backing.as_ref(), backing);
                assert_eq!(read.envelope.unwrap().1, payload);
                assert!(matches!(read.encryption, Encryption::Luks(_)));
                let back = with_payload(&out, file_len, Some(&extension::payload("{}", Place::Inline)));
                assert_eq!(back.unwrap(), first);
                let gone = with_payload(&out, file_len, None).unwrap();
                assert_eq!(Header::parse(&gone, file_len).unwrap().envelope, None);
            }
        }
    }

    #[test]
    fn a_header_that_ends_between_two_words_is_refused() {
        let (mut first, file_len) = image(16, None);
        let len = u32::from_be_bytes(first[100..104].try_into().unwrap());
        first.insert(len as usize, 0);
        first.pop();
        first[100..104].copy_from_slice(&(len + 1).to_be_bytes());
        let error = with_payload(&first, file_len, Some(b"{}")).unwrap_err();
        assert!(error.what.contains("multiple of 8"), "{}", error.what);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (first, file_len) = image(12, None);
        let payload = extension::payload(&"x".repeat(4000), Place::Inline);
        let error = with_payload(&first, file_len, Some(&payload)).unwrap_err();
        assert!(error.what.contains("no room"), "{}", error.what);
    }
}

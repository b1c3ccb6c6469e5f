//! The layout of a state file: header and records, checked in full before anything is made of them.
//!
//! [`parse`] is a pure function over bytes that others wrote. It allocates nothing, and every length is compared with
//! what is really there before it is used.
//!
//! All integers are big-endian:
//!
//! ```text
//! offset  bytes
//!      0      1  version of the layout: 2
//!      1      1  oldest version that a reader must know
//!      2      2  size of this header: 10
//!      4      2  flags
//!      6      4  length of the file, header included
//!     10         records: tag (2), length (4), that many bytes
//! ```

use crate::format_error::{FormatError, HEADER_BYTES, Tag, VERSION};

const RECORD_HEADER_BYTES: usize = 6;

const FLAG_ENCRYPTED: u16 = 0x01;
const FLAG_MIGRATION_ENCRYPTED: u16 = 0x02;
const FLAG_MIGRATION_DATA: u16 = 0x04;
const FLAG_256_BIT_KEY: u16 = 0x08;
const FLAG_MIGRATION_256_BIT_KEY: u16 = 0x10;
const MIGRATION_FLAGS: u16 = FLAG_MIGRATION_ENCRYPTED | FLAG_MIGRATION_DATA | FLAG_MIGRATION_256_BIT_KEY;
const STATE_FLAGS: u16 = FLAG_ENCRYPTED | FLAG_256_BIT_KEY;

/// Size of the HMAC-SHA256 in a [`Tag::Hmac`] record.
pub(crate) const HMAC_BYTES: usize = 32;
/// Size of a [`Tag::Iv`] record. AES uses the first [`CIPHER_BLOCK_BYTES`]; the HMAC covers all of it.
pub(crate) const IV_RECORD_BYTES: usize = 32;
/// Block size of AES.
pub(crate) const CIPHER_BLOCK_BYTES: usize = 16;

/// The parts of a well-formed file, borrowed from its bytes.
#[derive(Debug)]
pub(crate) enum Layout<'a> {
    Plain(&'a [u8]),
    Encrypted {
        ciphertext: &'a [u8],
        hmac: &'a [u8; HMAC_BYTES],
        iv: &'a [u8; IV_RECORD_BYTES],
    },
}

/// Takes a state file apart.
pub(crate) fn parse(file: &[u8]) -> Result<Layout<'_>, FormatError> {
    let flags = parse_header(file)?;
    let records = Records::parse(file)?;
    if flags & FLAG_ENCRYPTED == 0 {
        plain_layout(flags, &records)
    } else {
        encrypted_layout(flags, &records)
    }
}

fn parse_header(file: &[u8]) -> Result<u16, FormatError> {
    if file.is_empty() {
        return Err(FormatError::Empty);
    }
    let Some(&[version, min_version, s0, s1, f0, f1, l0, l1, l2, l3]) = file.first_chunk::<HEADER_BYTES>()
    else {
        return Err(FormatError::ShortHeader { actual: file.len() });
    };
    let header_bytes = u16::from_be_bytes([s0, s1]);
    if version != VERSION || min_version > VERSION || usize::from(header_bytes) != HEADER_BYTES {
        return Err(FormatError::UnknownVersion {
            version,
            min_version,
            header_bytes,
        });
    }
    let declared = u32::from_be_bytes([l0, l1, l2, l3]);
    if usize::try_from(declared) != Ok(file.len()) {
        return Err(FormatError::WrongLength {
            declared,
            actual: file.len(),
        });
    }
    check_flags(u16::from_be_bytes([f0, f1]))
}

fn check_flags(flags: u16) -> Result<u16, FormatError> {
    if flags & !(STATE_FLAGS | MIGRATION_FLAGS) != 0 {
        return Err(FormatError::UnknownFlags { flags });
    }
    if flags & MIGRATION_FLAGS != 0 {
        return Err(FormatError::MigrationBlob { flags });
    }
    if flags & STATE_FLAGS == FLAG_ENCRYPTED {
        return Err(FormatError::ShortKey);
    }
    Ok(flags)
}

#[derive(Default)]
struct Records<'a> {
    plain: Option<&'a [u8]>,
    ciphertext: Option<&'a [u8]>,
    hmac: Option<&'a [u8]>,
    iv: Option<&'a [u8]>,
}

impl<'a> Records<'a> {
    fn parse(file: &'a [u8]) -> Result<Self, FormatError> {
        let mut records = Self::default();
        let mut offset = HEADER_BYTES;
        while offset < file.len() {
            let (tag, value) = record_at(file, offset)?;
            if records.entry(tag).replace(value).is_some() {
                return Err(FormatError::RepeatedTag { tag, offset });
            }
            offset += RECORD_HEADER_BYTES + value.len();
        }
        Ok(records)
    }

    fn entry(&mut self, tag: Tag) -> &mut Option<&'a [u8]> {
        match tag {
            Tag::Plain => &mut self.plain,
            Tag::Ciphertext => &mut self.ciphertext,
            Tag::Hmac => &mut self.hmac,
            Tag::Iv => &mut self.iv,
        }
    }
}

fn record_at(file: &[u8], offset: usize) -> Result<(Tag, &[u8]), FormatError> {
    let truncated = FormatError::TruncatedRecord { offset };
    let (&[t0, t1, l0, l1, l2, l3], rest) = file[offset..]
        .split_first_chunk::<RECORD_HEADER_BYTES>()
        .ok_or(truncated)?;
    let number = u16::from_be_bytes([t0, t1]);
    let tag = Tag::from_number(number).ok_or(FormatError::UnknownTag { tag: number, offset })?;
    let length = usize::try_from(u32::from_be_bytes([l0, l1, l2, l3])).map_err(|_| truncated)?;
    Ok((tag, rest.get(..length).ok_or(truncated)?))
}

fn plain_layout<'a>(flags: u16, records: &Records<'a>) -> Result<Layout<'a>, FormatError> {
    let encrypted = [
        (Tag::Ciphertext, records.ciphertext),
        (Tag::Hmac, records.hmac),
        (Tag::Iv, records.iv),
    ];
    if let Some((tag, _)) = encrypted.into_iter().find(|(_, value)| value.is_some()) {
        return Err(FormatError::Contradiction { flags, tag });
    }
    let tag = Tag::Plain;
    let plain = records.plain.ok_or(FormatError::MissingTag { tag })?;
    if flags & FLAG_256_BIT_KEY != 0 {
        return Err(FormatError::Contradiction { flags, tag });
    }
    if plain.is_empty() {
        return Err(FormatError::WrongRecordSize { tag, actual: 0 });
    }
    Ok(Layout::Plain(plain))
}

fn encrypted_layout<'a>(flags: u16, records: &Records<'a>) -> Result<Layout<'a>, FormatError> {
    if records.plain.is_some() {
        return Err(FormatError::Contradiction {
            flags,
            tag: Tag::Plain,
        });
    }
    let tag = Tag::Ciphertext;
    let ciphertext = records.ciphertext.ok_or(FormatError::MissingTag { tag })?;
    if ciphertext.is_empty() || !ciphertext.len().is_multiple_of(CIPHER_BLOCK_BYTES) {
        return Err(FormatError::WrongRecordSize {
            tag,
            actual: ciphertext.len(),
        });
    }
    Ok(Layout::Encrypted {
        ciphertext,
        hmac: sized(Tag::Hmac, records.hmac)?,
        iv: sized(Tag::Iv, records.iv)?,
    })
}

fn sized<const N: usize>(tag: Tag, value: Option<&[u8]>) -> Result<&[u8; N], FormatError> {
    let value = value.ok_or(FormatError::MissingTag { tag })?;
    value.try_into().map_err(|_| FormatError::WrongRecordSize {
        tag,
        actual: value.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn file(flags: u16, records: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (tag, value) in records {
            body.extend(tag.to_be_bytes());
            body.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
            body.extend(*value);
        }
        let length = u32::try_from(HEADER_BYTES + body.len()).unwrap();
        let mut file = vec![2, 1, 0, 10];
        file.extend(flags.to_be_bytes());
        file.extend(length.to_be_bytes());
        file.extend(body);
        file
    }

    const ENCRYPTED: [(u16, &[u8]); 3] = [(2, &[0; 48]), (3, &[1; 32]), (6, &[2; 32])];

    fn error(file: &[u8]) -> FormatError {
        parse(file).unwrap_err()
    }

    #[test]
    fn accepts_both_kinds_and_any_order_of_records() {
        assert!(matches!(
            parse(&file(0, &[(1, b"state")])),
            Ok(Layout::Plain(b"state"))
        ));
        let mut records = ENCRYPTED;
        records.reverse();
        let bytes = file(9, &records);
        let Ok(Layout::Encrypted { ciphertext, hmac, iv }) = parse(&bytes) else {
            panic!("{:?}", parse(&bytes))
        };
        assert_eq!((ciphertext, hmac, iv), (&[0; 48][..], &[1; 32], &[2; 32]));
    }

    #[test]
    fn each_break_of_the_format_has_its_own_error() {
        let plain = file(0, &[(1, b"state")]);
        let patched = |at: usize, value: u8| {
            let mut bytes = plain.clone();
            bytes[at] = value;
            bytes
        };
        assert_eq!(error(b""), FormatError::Empty);
        assert_eq!(error(b"\x02\x01"), FormatError::ShortHeader { actual: 2 });
        for (at, value) in [(0, 1), (0, 3), (1, 3), (3, 11)] {
            assert!(
                matches!(error(&patched(at, value)), FormatError::UnknownVersion { .. }),
                "byte {at}"
            );
        }
        assert_eq!(
            error(&patched(9, 22)),
            FormatError::WrongLength {
                declared: 22,
                actual: 21
            }
        );
        assert_eq!(
            error(&patched(4, 0x80)),
            FormatError::UnknownFlags { flags: 0x8000 }
        );
        for flags in [0x02, 0x04, 0x10] {
            assert_eq!(
                error(&patched(5, flags)),
                FormatError::MigrationBlob { flags: flags.into() }
            );
        }
        assert_eq!(error(&patched(5, 1)), FormatError::ShortKey);
        assert_eq!(
            error(&patched(5, 8)),
            FormatError::Contradiction {
                flags: 8,
                tag: Tag::Plain
            }
        );
        assert_eq!(
            error(&patched(12, 0xff)),
            FormatError::TruncatedRecord { offset: 10 }
        );
    }

    #[test]
    fn records_that_do_not_fit_are_named() {
        assert_eq!(error(&file(0, &[])), FormatError::MissingTag { tag: Tag::Plain });
        assert_eq!(
            error(&file(0, &[(1, b"")])),
            FormatError::WrongRecordSize {
                tag: Tag::Plain,
                actual: 0
            }
        );
        assert_eq!(
            error(&file(0, &[(4, b"x")])),
            FormatError::UnknownTag { tag: 4, offset: 10 }
        );
        assert_eq!(
            error(&file(0, &[(1, b"x"), (1, b"y")])),
            FormatError::RepeatedTag {
                tag: Tag::Plain,
                offset: 17
            }
        );
        assert_eq!(
            error(&file(0, &ENCRYPTED)),
            FormatError::Contradiction {
                flags: 0,
                tag: Tag::Ciphertext
            }
        );
        assert_eq!(
            error(&file(9, &[(1, b"x")])),
            FormatError::Contradiction {
                flags: 9,
                tag: Tag::Plain
            }
        );
        for (missing, tag) in [Tag::Ciphertext, Tag::Hmac, Tag::Iv].into_iter().enumerate() {
            let mut records = ENCRYPTED.to_vec();
            records.remove(missing);
            assert_eq!(error(&file(9, &records)), FormatError::MissingTag { tag });
            let mut records = ENCRYPTED;
            records[missing].1 = b"short";
            assert_eq!(
                error(&file(9, &records)),
                FormatError::WrongRecordSize { tag, actual: 5 }
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _answer = parse(&bytes);
        }

        #[test]
        fn any_records_behind_a_good_header_give_an_answer(
            flags in prop_oneof![Just(0u16), Just(9)],
            records in proptest::collection::vec((0u16..9, proptest::collection::vec(any::<u8>(), 0..70)), 0..5),
            patch in proptest::option::of((any::<proptest::sample::Index>(), any::<u8>())),
        ) {
            let borrowed: Vec<_> = records.iter().map(|(tag, value)| (*tag, value.as_slice())).collect();
            let mut bytes = file(flags, &borrowed);
            if let Some((at, value)) = patch {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Ok(Layout::Encrypted { ciphertext, .. }) = parse(&bytes) {
                prop_assert!(!ciphertext.is_empty() && ciphertext.len() % CIPHER_BLOCK_BYTES == 0);
            }
        }

        #[test]
        fn every_truncation_is_refused(
            state in proptest::collection::vec(any::<u8>(), 1..64),
            cut in any::<proptest::sample::Index>(),
        ) {
            let bytes = file(0, &[(1, &state)]);
            prop_assert!(parse(&bytes).is_ok());
            prop_assert!(parse(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }
}

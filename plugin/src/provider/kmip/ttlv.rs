//! TTLV, KMIP's encoding (KMIP 1.4 section 9.1, KMIP 2.1 section 10): tag (3 bytes), type (1), length (4), value,
//! padded to a multiple of 8 bytes.
//!
//! Nothing that a server sends is trusted: depth, size and number of items are bounded, and every length is checked
//! before anything is taken. Tags, enumerations and even types that this client does not know pass through as they
//! are, for servers go beyond the specification. Byte strings are borrowed from the message, so that key material is
//! never copied while it is read; `Debug` shows their length only.

use std::borrow::Cow;
use std::fmt;

use thiserror::Error;

use super::tag::Tag;

/// The most bytes that a message may have after its first 8: a batch of keys has a few KiB.
pub(super) const MAX_BYTES: usize = 256 * 1024;
/// How deep structures may nest; KMIP's own messages need 9.
pub(super) const MAX_DEPTH: usize = 16;
pub(super) const MAX_ITEMS: usize = 4096;

/// One item: a tag and its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Item<'a> {
    pub(super) tag: Tag,
    pub(super) value: Value<'a>,
}

/// What an item holds.
#[derive(Clone, PartialEq)]
pub(super) enum Value<'a> {
    Structure(Vec<Item<'a>>),
    Integer(i32),
    LongInteger(i64),
    Enumeration(u32),
    Boolean(bool),
    /// Text that is not UTF-8 arrives with replacement characters: it may be the only explanation there is.
    Text(Cow<'a, str>),
    Bytes(Cow<'a, [u8]>),
    /// Seconds since 1970, UTC.
    DateTime(i64),
    /// Seconds.
    Interval(u32),
    /// A big integer, or a type of a later version, as it was sent.
    Other {
        kind: u8,
        bytes: Cow<'a, [u8]>,
    },
}

mod kind {
    pub(super) const STRUCTURE: u8 = 1;
    pub(super) const INTEGER: u8 = 2;
    pub(super) const LONG_INTEGER: u8 = 3;
    pub(super) const ENUMERATION: u8 = 5;
    pub(super) const BOOLEAN: u8 = 6;
    pub(super) const TEXT: u8 = 7;
    pub(super) const BYTES: u8 = 8;
    pub(super) const DATE_TIME: u8 = 9;
    pub(super) const INTERVAL: u8 = 10;
}

impl<'a> Item<'a> {
    pub(super) fn structure(tag: Tag, items: impl Into<Vec<Item<'a>>>) -> Self {
        let value = Value::Structure(items.into());
        Self { tag, value }
    }

    pub(super) fn integer(tag: Tag, value: i32) -> Self {
        let value = Value::Integer(value);
        Self { tag, value }
    }

    pub(super) fn enumeration(tag: Tag, value: u32) -> Self {
        let value = Value::Enumeration(value);
        Self { tag, value }
    }

    pub(super) fn text(tag: Tag, value: impl Into<Cow<'a, str>>) -> Self {
        let value = Value::Text(value.into());
        Self { tag, value }
    }

    pub(super) fn bytes(tag: Tag, value: impl Into<Cow<'a, [u8]>>) -> Self {
        let value = Value::Bytes(value.into());
        Self { tag, value }
    }

    /// The items of a structure; of anything else, none.
    pub(super) fn items(&self) -> &[Item<'a>] {
        match &self.value {
            Value::Structure(items) => items,
            _ => &[],
        }
    }

    /// The first item in this structure with that tag.
    pub(super) fn find(&self, tag: Tag) -> Option<&Item<'a>> {
        self.items().iter().find(|item| item.tag == tag)
    }

    /// All items in this structure with that tag.
    pub(super) fn all(&self, tag: Tag) -> impl Iterator<Item = &Item<'a>> {
        self.items().iter().filter(move |item| item.tag == tag)
    }

    pub(super) fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn as_bytes(&self) -> Option<&[u8]> {
        match &self.value {
            Value::Bytes(bytes) => Some(bytes),
            _ => None,
        }
    }

    pub(super) fn as_enumeration(&self) -> Option<u32> {
        match self.value {
            Value::Enumeration(value) => Some(value),
            _ => None,
        }
    }

    pub(super) fn as_integer(&self) -> Option<i32> {
        match self.value {
            Value::Integer(value) => Some(value),
            _ => None,
        }
    }

    /// Appends the encoding to `out`.
    ///
    /// # Errors
    /// [`TtlvError::TooLong`] for a value that no length field can hold.
    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), TtlvError> {
        out.extend_from_slice(&self.tag.0.to_be_bytes()[1..]);
        out.push(self.value.kind());
        let at = out.len();
        out.extend_from_slice(&[0; 4]);
        match &self.value {
            Value::Structure(items) => items.iter().try_for_each(|item| item.encode(out))?,
            Value::Integer(value) => out.extend_from_slice(&value.to_be_bytes()),
            Value::LongInteger(value) | Value::DateTime(value) => {
                out.extend_from_slice(&value.to_be_bytes());
            }
            Value::Enumeration(value) | Value::Interval(value) => {
                out.extend_from_slice(&value.to_be_bytes());
            }
            Value::Boolean(value) => out.extend_from_slice(&u64::from(*value).to_be_bytes()),
            Value::Text(text) => out.extend_from_slice(text.as_bytes()),
            Value::Bytes(bytes) | Value::Other { bytes, .. } => out.extend_from_slice(bytes),
        }
        let length = out.len() - at - 4;
        let field = u32::try_from(length).map_err(|_| TtlvError::TooLong { found: length })?;
        out[at..at + 4].copy_from_slice(&field.to_be_bytes());
        out.resize(out.len() + padding(length), 0);
        Ok(())
    }

    /// Reads the one item that `message` is.
    ///
    /// # Errors
    /// When it is anything else, or exceeds one of the limits above.
    pub(super) fn decode(message: &'a [u8]) -> Result<Self, TtlvError> {
        if message.len() > MAX_BYTES + 8 {
            return Err(TtlvError::TooLong { found: message.len() });
        }
        let mut reader = Reader {
            rest: message,
            items: 0,
        };
        let item = reader.item(0)?;
        match reader.rest.len() {
            0 => Ok(item),
            left => Err(TtlvError::Trailing { left }),
        }
    }
}

impl Value<'_> {
    fn kind(&self) -> u8 {
        match self {
            Self::Structure(_) => kind::STRUCTURE,
            Self::Integer(_) => kind::INTEGER,
            Self::LongInteger(_) => kind::LONG_INTEGER,
            Self::Enumeration(_) => kind::ENUMERATION,
            Self::Boolean(_) => kind::BOOLEAN,
            Self::Text(_) => kind::TEXT,
            Self::Bytes(_) => kind::BYTES,
            Self::DateTime(_) => kind::DATE_TIME,
            Self::Interval(_) => kind::INTERVAL,
            Self::Other { kind, .. } => *kind,
        }
    }
}

impl fmt::Debug for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Structure(items) => f.debug_list().entries(items).finish(),
            Self::Integer(value) => write!(f, "{value}"),
            Self::LongInteger(value) | Self::DateTime(value) => write!(f, "{value}"),
            Self::Enumeration(value) | Self::Interval(value) => write!(f, "{value:#x}"),
            Self::Boolean(value) => write!(f, "{value}"),
            Self::Text(text) => write!(f, "[text; {}]", text.len()),
            Self::Bytes(bytes) | Self::Other { bytes, .. } => write!(f, "[redacted; {}]", bytes.len()),
        }
    }
}

fn padding(length: usize) -> usize {
    length.wrapping_neg() % 8
}

/// How many bytes follow the first 8 of a message, which are `header`.
///
/// # Errors
/// When they are not a message's, or announce more than [`MAX_BYTES`].
pub(super) fn body_length(header: [u8; 8]) -> Result<usize, TtlvError> {
    let [t1, t2, t3, kind, l1, l2, l3, l4] = header;
    let (tag, length) = (
        u32::from_be_bytes([0, t1, t2, t3]),
        u32::from_be_bytes([l1, l2, l3, l4]),
    );
    if tag != Tag::RESPONSE_MESSAGE.0 || kind != kind::STRUCTURE {
        return Err(TtlvError::NotAResponse);
    }
    match usize::try_from(length) {
        Ok(length) if length <= MAX_BYTES => Ok(length),
        _ => Err(TtlvError::TooLong {
            found: usize::try_from(length).unwrap_or(usize::MAX),
        }),
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    items: usize,
}

impl<'a> Reader<'a> {
    fn item(&mut self, depth: usize) -> Result<Item<'a>, TtlvError> {
        self.items += 1;
        if depth >= MAX_DEPTH || self.items > MAX_ITEMS {
            return Err(TtlvError::TooComplex);
        }
        let [t1, t2, t3, kind] = *self.array::<4>()?;
        let tag = Tag(u32::from_be_bytes([0, t1, t2, t3]));
        let length = usize::try_from(u32::from_be_bytes(*self.array()?)).map_err(|_| TtlvError::Truncated)?;
        let value = self.take(length)?;
        // Some servers leave the padding of the very last item away.
        let padded = padding(length).min(self.rest.len());
        self.take(padded)?;
        let value = self.value(tag, kind, value, depth)?;
        Ok(Item { tag, value })
    }

    fn value(&mut self, tag: Tag, kind: u8, bytes: &'a [u8], depth: usize) -> Result<Value<'a>, TtlvError> {
        let wrong = |_| TtlvError::WrongLength {
            tag,
            found: bytes.len(),
        };
        Ok(match kind {
            kind::STRUCTURE => Value::Structure(self.structure(bytes, depth)?),
            kind::INTEGER => Value::Integer(i32::from_be_bytes(bytes.try_into().map_err(wrong)?)),
            kind::LONG_INTEGER => Value::LongInteger(i64::from_be_bytes(bytes.try_into().map_err(wrong)?)),
            kind::ENUMERATION => Value::Enumeration(u32::from_be_bytes(bytes.try_into().map_err(wrong)?)),
            kind::BOOLEAN => Value::Boolean(u64::from_be_bytes(bytes.try_into().map_err(wrong)?) != 0),
            kind::TEXT => Value::Text(String::from_utf8_lossy(bytes)),
            kind::BYTES => Value::Bytes(bytes.into()),
            kind::DATE_TIME => Value::DateTime(i64::from_be_bytes(bytes.try_into().map_err(wrong)?)),
            kind::INTERVAL => Value::Interval(u32::from_be_bytes(bytes.try_into().map_err(wrong)?)),
            kind => Value::Other {
                kind,
                bytes: bytes.into(),
            },
        })
    }

    fn structure(&mut self, bytes: &'a [u8], depth: usize) -> Result<Vec<Item<'a>>, TtlvError> {
        let mut inner = Reader {
            rest: bytes,
            items: self.items,
        };
        let mut items = Vec::new();
        while !inner.rest.is_empty() {
            items.push(inner.item(depth + 1)?);
        }
        self.items = inner.items;
        Ok(items)
    }

    fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], TtlvError> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(TtlvError::Truncated)?;
        self.rest = rest;
        Ok(array)
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], TtlvError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(TtlvError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }
}

/// Why bytes are no message that this client reads.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum TtlvError {
    #[error("the answer is not a KMIP response: is this the KMIP port?")]
    NotAResponse,
    #[error("the message has {found} bytes, more than the {MAX_BYTES} allowed")]
    TooLong { found: usize },
    #[error("the message nests deeper than {MAX_DEPTH} levels or has more than {MAX_ITEMS} items")]
    TooComplex,
    #[error("the message ends in the middle of an item")]
    Truncated,
    #[error("{left} bytes follow the message")]
    Trailing { left: usize },
    #[error("item {tag} can't have {found} bytes")]
    WrongLength { tag: Tag, found: usize },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn leaves() -> impl Strategy<Value = Value<'static>> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..40).prop_map(Cow::Owned);
        prop_oneof![
            any::<i32>().prop_map(Value::Integer),
            any::<i64>().prop_map(Value::LongInteger),
            any::<u32>().prop_map(Value::Enumeration),
            any::<bool>().prop_map(Value::Boolean),
            ".{0,20}".prop_map(|text| Value::Text(text.into())),
            bytes().prop_map(Value::Bytes),
            any::<i64>().prop_map(Value::DateTime),
            any::<u32>().prop_map(Value::Interval),
            (prop_oneof![Just(4u8), 11u8..], bytes()).prop_map(|(kind, bytes)| Value::Other { kind, bytes }),
        ]
    }

    fn items() -> impl Strategy<Value = Item<'static>> {
        let item = |(tag, value)| Item { tag: Tag(tag), value };
        let leaf = (0u32..1 << 24, leaves()).prop_map(item);
        leaf.prop_recursive(6, 64, 6, move |inner| {
            let structure = prop::collection::vec(inner, 0..6).prop_map(Value::Structure);
            (0u32..1 << 24, structure).prop_map(item)
        })
    }

    fn encoded(item: &Item) -> Vec<u8> {
        let mut bytes = Vec::new();
        item.encode(&mut bytes).unwrap();
        bytes
    }

    proptest! {
        #[test]
        fn round_trip(item in items()) {
            let bytes = encoded(&item);
            prop_assert_eq!(bytes.len() % 8, 0);
            prop_assert_eq!(Item::decode(&bytes).unwrap(), item);
        }

        #[test]
        fn garbage_is_an_error_or_an_item(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Item::decode(&bytes);
        }

        #[test]
        fn damaged_messages_never_panic(item in items(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut bytes = encoded(&item);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let _ = Item::decode(&bytes);
            bytes.truncate(at);
            prop_assert!(Item::decode(&bytes).is_err() || padding(at) != 0);
        }
    }

    /// The examples of KMIP 1.4 section 9.1.2.
    #[test]
    fn examples_of_the_specification() {
        let example = |value: Value<'static>, text: &str| {
            let item = Item {
                tag: Tag(0x42_0020),
                value,
            };
            assert_eq!(hex::encode(encoded(&item)), text);
            assert_eq!(Item::decode(&hex::decode(text).unwrap()).unwrap(), item);
        };
        example(Value::Integer(8), "42002002000000040000000800000000");
        example(
            Value::LongInteger(123_456_789_000_000_000),
            "420020030000000801b69b4ba5749200",
        );
        example(Value::Enumeration(255), "4200200500000004000000ff00000000");
        example(Value::Boolean(true), "42002006000000080000000000000001");
        example(
            Value::Text("Hello World".into()),
            "420020070000000b48656c6c6f20576f726c640000000000",
        );
        example(
            Value::Bytes(vec![1, 2, 3].into()),
            "42002008000000030102030000000000",
        );
        example(Value::DateTime(0x47da_67f8), "42002009000000080000000047da67f8");
        example(Value::Interval(864_000), "4200200a00000004000d2f0000000000");
        example(
            Value::Structure(vec![
                Item::enumeration(Tag(0x42_0004), 254),
                Item::integer(Tag(0x42_0005), 255),
            ]),
            "42002001000000204200040500000004000000fe000000004200050200000004000000ff00000000",
        );
    }

    #[test]
    fn deep_wide_and_long_messages_are_refused() {
        let mut deep = Item::integer(Tag(1), 1);
        for _ in 0..MAX_DEPTH {
            deep = Item::structure(Tag(1), [deep]);
        }
        assert_eq!(Item::decode(&encoded(&deep)), Err(TtlvError::TooComplex));
        let wide = Item::structure(Tag(1), vec![Item::structure(Tag(2), []); MAX_ITEMS]);
        assert_eq!(Item::decode(&encoded(&wide)), Err(TtlvError::TooComplex));
        let long = Item::bytes(Tag(1), vec![0; MAX_BYTES + 8]);
        assert!(matches!(
            Item::decode(&encoded(&long)),
            Err(TtlvError::TooLong { .. })
        ));
        // A structure that claims 4 GiB.
        let claim = hex::decode("42007b01ffffffff").unwrap();
        assert_eq!(Item::decode(&claim), Err(TtlvError::Truncated));
        let header = claim.try_into().unwrap();
        assert!(matches!(body_length(header), Err(TtlvError::TooLong { .. })));
        assert_eq!(body_length(*b"HTTP/1.1"), Err(TtlvError::NotAResponse));
    }

    #[test]
    fn missing_last_padding_is_forgiven_bytes_after_it_are_not() {
        let bytes = encoded(&Item::integer(Tag(1), 7));
        assert_eq!(Item::decode(&bytes[..12]).unwrap(), Item::integer(Tag(1), 7));
        let longer = [bytes, vec![0; 8]].concat();
        assert_eq!(Item::decode(&longer), Err(TtlvError::Trailing { left: 8 }));
    }

    #[test]
    fn debug_shows_no_key() {
        let key = Item::bytes(Tag::KEY_MATERIAL, b"hunter2hunter2".as_slice());
        assert_eq!(
            format!("{key:?}"),
            "Item { tag: 0x420043, value: [redacted; 14] }"
        );
    }
}

//! What can be wrong with a state file, told precisely enough to say which byte to look at.

use thiserror::Error;

/// The only version of the layout that is read.
pub(crate) const VERSION: u8 = 2;
pub(crate) const HEADER_BYTES: usize = 10;

/// How a file breaks the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The file holds no bytes, as after a power cut between its creation and its first write-back.
    #[error("the file is empty")]
    Empty,
    /// The file ends inside its header.
    #[error("the file ends after {actual} bytes, inside its {HEADER_BYTES}-byte header")]
    ShortHeader {
        /// Bytes in the file.
        actual: usize,
    },
    /// The header has another version or size: not a state file, or one of a swtpm that this crate does not know.
    #[error(
        "the header says version {version}, readable from version {min_version} on, {header_bytes} bytes: \
         expected version {VERSION} and {HEADER_BYTES} bytes"
    )]
    UnknownVersion {
        /// Version of the layout.
        version: u8,
        /// Oldest version that a reader must know.
        min_version: u8,
        /// Size of the header in bytes.
        header_bytes: u16,
    },
    /// The header's length is not the file's: cut off, or with something appended.
    #[error("the header says that the file has {declared} bytes, it has {actual}")]
    WrongLength {
        /// Bytes that the header promises.
        declared: u32,
        /// Bytes in the file.
        actual: usize,
    },
    /// A blob made for live migration, not a state file.
    #[error("this is a migration blob (flags {flags:#06x}), not a state file")]
    MigrationBlob {
        /// Flags of the header.
        flags: u16,
    },
    /// Flags that this crate does not know.
    #[error("the header has unknown flags ({flags:#06x})")]
    UnknownFlags {
        /// Flags of the header.
        flags: u16,
    },
    /// Encrypted under a 128-bit key, swtpm's default mode without libvirt.
    #[error("the state is encrypted under a 128-bit key, only 256-bit keys are supported")]
    ShortKey,
    /// A record runs past the end of the file.
    #[error("the record at byte {offset} runs past the end of the file")]
    TruncatedRecord {
        /// Where the record starts in the file.
        offset: usize,
    },
    /// A record that does not belong into a state file.
    #[error("the record at byte {offset} has the unknown tag {tag}")]
    UnknownTag {
        /// The tag's number.
        tag: u16,
        /// Where the record starts in the file.
        offset: usize,
    },
    /// A record occurs twice, so readers could differ in which one they take.
    #[error("there is a second {tag} record at byte {offset}")]
    RepeatedTag {
        /// The repeated tag.
        tag: Tag,
        /// Where the second record starts in the file.
        offset: usize,
    },
    /// A record that this kind of state needs is not there.
    #[error("the {tag} record is missing")]
    MissingTag {
        /// The missing tag.
        tag: Tag,
    },
    /// The header's flags call the state plain and the records are of an encrypted one, or the other way round.
    #[error("the header's flags ({flags:#06x}) contradict the {tag} record")]
    Contradiction {
        /// Flags of the header.
        flags: u16,
        /// A record that these flags exclude.
        tag: Tag,
    },
    /// A record's size is impossible for what it holds.
    #[error("the {tag} record has {actual} bytes")]
    WrongRecordSize {
        /// The record's tag.
        tag: Tag,
        /// Bytes in the record.
        actual: usize,
    },
}

/// The records of a state file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// The TPM's state in plaintext.
    Plain = 1,
    /// The TPM's state, encrypted.
    Ciphertext = 2,
    /// HMAC-SHA256 over ciphertext and IV.
    Hmac = 3,
    /// Initialization vector.
    Iv = 6,
}

impl std::fmt::Display for Tag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Tag::Plain => "plain data",
            Tag::Ciphertext => "encrypted data",
            Tag::Hmac => "HMAC",
            Tag::Iv => "IV",
        })
    }
}

impl Tag {
    pub(crate) fn from_number(number: u16) -> Option<Tag> {
        [Tag::Plain, Tag::Ciphertext, Tag::Hmac, Tag::Iv]
            .into_iter()
            .find(|tag| *tag as u16 == number)
    }
}

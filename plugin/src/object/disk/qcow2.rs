//! qcow2 headers, read from bytes that anyone may have written.
//!
//! The format is QEMU's `docs/interop/qcow2.txt`, versions 2 and 3. [`layout`] makes new images, [`extension`]
//! keeps the envelope in them, [`allocation`] tells whether they hold data. A [`Header`] that was parsed has its
//! tables inside the file and its counts within QEMU's own limits; nothing has been allocated by then that is
//! larger than a cluster.

pub(crate) mod allocation;
pub(crate) mod extension;
pub(crate) mod layout;
pub(crate) mod rewrite;

use serde::Serialize;

use super::error::{Flaw, Part};
use super::size::{Bytes, ClusterSize};

pub(crate) const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Length of the header that is written here, without extensions.
pub(crate) const HEADER_LEN: usize = 112;
pub(crate) const LUKS: u32 = 2;
/// QEMU's limit for the bytes of an L1 table.
pub(crate) const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_BACKING_NAME: u32 = 1023;
const MAX_BACKING_FORMAT: usize = 15;

pub(crate) const END_EXTENSION: u32 = 0;
pub(crate) const BACKING_FORMAT_EXTENSION: u32 = 0xe279_2aca;
pub(crate) const LUKS_EXTENSION: u32 = 0x0537_be77;

const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// How the data clusters are encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encryption {
    None,
    /// QEMU's AES-CBC of old, long withdrawn.
    Legacy,
    /// The span is the LUKS header's, with its key material.
    Luks(Span),
}

/// The image that shows through where this one has no data; a relative name counts from the image's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(crate) struct BackingName {
    #[serde(rename = "path")]
    pub(crate) name: String,
    pub(crate) format: Option<String>,
}

/// A qcow2 header whose bounds have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) cluster_size: ClusterSize,
    pub(crate) virtual_size: Bytes,
    pub(crate) backing: Option<BackingName>,
    pub(crate) encryption: Encryption,
    pub(crate) l1: Span,
    pub(crate) refcount_table: Span,
    pub(crate) snapshots: u32,
    pub(crate) marked_corrupt: bool,
    pub(crate) data_file: bool,
    pub(crate) extended_l2: bool,
    /// The payload of the envelope's extension, and where it begins.
    pub(crate) envelope: Option<(u64, Vec<u8>)>,
}

impl Header {
    /// The cluster size, from the first 24 bytes of the file: how much [`Self::parse`] wants to see.
    pub(crate) fn cluster_size(start: &[u8]) -> Result<ClusterSize, Flaw> {
        let fields = Fields(start);
        if start.get(..4) != Some(MAGIC) {
            return Err(flaw(0, "the qcow2 magic is missing"));
        }
        let bits = fields.u32(20)?;
        ClusterSize::from_bits(bits).ok_or_else(|| {
            flaw(
                20,
                format!("a cluster is said to have 2^{bits} bytes, 2^9 to 2^21 are allowed"),
            )
        })
    }

    /// Reads a header from the file's first cluster, or all of the file if that is shorter.
    pub(crate) fn parse(first_cluster: &[u8], file_len: u64) -> Result<Self, Flaw> {
        let fields = Fields(first_cluster);
        let cluster_size = Self::cluster_size(first_cluster)?;
        let version = fields.version()?;
        let features = if version == 2 { 0 } else { fields.u64(72)? };
        if features & !INCOMPATIBLE_KNOWN != 0 {
            return Err(flaw(
                72,
                format!("it uses features that virtseal does not know ({features:#x})"),
            ));
        }
        let mut header = Self {
            cluster_size,
            virtual_size: fields.virtual_size()?,
            backing: fields.backing_name(cluster_size)?,
            encryption: Encryption::None,
            l1: fields.l1(cluster_size, file_len)?,
            refcount_table: fields.refcount_table(cluster_size, file_len)?,
            snapshots: fields.u32(60)?,
            marked_corrupt: features & INCOMPATIBLE_CORRUPT != 0,
            data_file: features & INCOMPATIBLE_DATA_FILE != 0,
            extended_l2: features & INCOMPATIBLE_EXTENDED_L2 != 0,
            envelope: None,
        };
        header.check_l1_covers_the_size()?;
        header.read_extensions(&fields, version, file_len)?;
        header.check_encryption(&fields)?;
        Ok(header)
    }

    /// Bytes of the guest's disk that one L2 table maps.
    pub(crate) fn bytes_per_l2(&self) -> u64 {
        let entry = if self.extended_l2 { 16 } else { 8 };
        self.cluster_size.bytes() / entry * self.cluster_size.bytes()
    }

    fn check_l1_covers_the_size(&self) -> Result<(), Flaw> {
        let needed = self.virtual_size.0.div_ceil(self.bytes_per_l2());
        if needed > self.l1.len / 8 {
            let what = format!(
                "the L1 table has {} entries, {needed} are needed for {}",
                self.l1.len / 8,
                self.virtual_size
            );
            return Err(flaw(36, what));
        }
        Ok(())
    }

    fn read_extensions(&mut self, fields: &Fields<'_>, version: u32, file_len: u64) -> Result<(), Flaw> {
        for extension in fields.extensions(version, self.cluster_size)? {
            match extension.kind {
                BACKING_FORMAT_EXTENSION => {
                    let format = extension.text("the backing format")?;
                    if let Some(backing) = &mut self.backing {
                        backing.format = Some(format);
                    }
                }
                LUKS_EXTENSION => {
                    self.encryption = Encryption::Luks(extension.luks_span(self.cluster_size, file_len)?);
                }
                extension::KIND => {
                    self.envelope = Some((extension.offset as u64, extension.payload.to_vec()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check_encryption(&mut self, fields: &Fields<'_>) -> Result<(), Flaw> {
        self.encryption = match (fields.u32(32)?, self.encryption) {
            (0, Encryption::None) => Encryption::None,
            (1, Encryption::None) => Encryption::Legacy,
            (LUKS, found @ Encryption::Luks(_)) => found,
            (LUKS, _) => return Err(flaw(32, "it says LUKS, and has no encryption header")),
            (0 | 1, _) => return Err(flaw(32, "it has an encryption header, and does not say LUKS")),
            (other, _) => return Err(flaw(32, format!("the encryption method {other} does not exist"))),
        };
        Ok(())
    }
}

pub(super) fn flaw(offset: usize, what: impl Into<String>) -> Flaw {
    Flaw::new(Part::Qcow2, offset as u64, what)
}

struct Extension<'a> {
    kind: u32,
    /// Of its payload.
    offset: usize,
    payload: &'a [u8],
}

impl Extension<'_> {
    fn text(&self, of: &str) -> Result<String, Flaw> {
        Some(self.payload)
            .filter(|payload| payload.len() <= MAX_BACKING_FORMAT)
            .and_then(text)
            .ok_or_else(|| flaw(self.offset, format!("{of} is not the name of a format")))
    }

    fn luks_span(&self, cluster_size: ClusterSize, file_len: u64) -> Result<Span, Flaw> {
        let fields = Fields(self.payload);
        if self.payload.len() != 16 {
            return Err(flaw(
                self.offset,
                "the pointer to the encryption header has not 16 bytes",
            ));
        }
        let span = Span {
            offset: fields.u64(0)?,
            len: fields.u64(8)?,
        };
        check_span("the encryption header", self.offset, span, cluster_size, file_len)?;
        Ok(span)
    }
}

/// Names end up in messages: one line, and nothing that moves a terminal's cursor.
fn text(bytes: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(bytes).ok()?;
    (!text.contains(char::is_control)).then(|| text.to_owned())
}

fn check_span(of: &str, field: usize, span: Span, cluster: ClusterSize, file_len: u64) -> Result<(), Flaw> {
    let Span { offset, len } = span;
    if !offset.is_multiple_of(cluster.bytes()) || offset == 0 {
        return Err(flaw(
            field,
            format!("{of} is said to be at byte {offset}, not at a cluster"),
        ));
    }
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        let what = format!(
            "{of} ({len} bytes at {offset}) does not fit the file's {file_len} bytes: is it truncated?"
        );
        return Err(flaw(field, what));
    }
    Ok(())
}

/// The first cluster, read by offset.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N], Flaw> {
        self.0
            .get(offset..)
            .and_then(<[u8]>::first_chunk)
            .copied()
            .ok_or_else(|| flaw(self.0.len(), "it ends within the header"))
    }

    fn u32(&self, offset: usize) -> Result<u32, Flaw> {
        self.array(offset).map(u32::from_be_bytes)
    }

    fn u64(&self, offset: usize) -> Result<u64, Flaw> {
        self.array(offset).map(u64::from_be_bytes)
    }

    fn slice(&self, offset: usize, len: usize) -> Option<&'a [u8]> {
        self.0.get(offset..offset.checked_add(len)?)
    }

    fn version(&self) -> Result<u32, Flaw> {
        match self.u32(4)? {
            version @ (2 | 3) => Ok(version),
            other => Err(flaw(
                4,
                format!("it is of version {other}, virtseal reads 2 and 3"),
            )),
        }
    }

    fn virtual_size(&self) -> Result<Bytes, Flaw> {
        let size = self.u64(24)?;
        if i64::try_from(size).is_err() {
            return Err(flaw(
                24,
                format!("a disk of {size} bytes is more than QEMU can have"),
            ));
        }
        Ok(Bytes(size))
    }

    fn backing_name(&self, cluster_size: ClusterSize) -> Result<Option<BackingName>, Flaw> {
        let (offset, len) = (self.u64(8)?, self.u32(16)?);
        if offset == 0 {
            return Ok(None);
        }
        if len == 0 || len > MAX_BACKING_NAME || offset > cluster_size.bytes() {
            return Err(flaw(
                8,
                format!("the backing file's name ({len} bytes at {offset}) is out of bounds"),
            ));
        }
        let name = self
            .slice(offset as usize, len as usize)
            .ok_or_else(|| flaw(8, "the backing file's name runs past the first cluster"))?;
        let name = text(name).ok_or_else(|| flaw(offset as usize, "the backing file's name is not text"))?;
        Ok(Some(BackingName { name, format: None }))
    }

    fn l1(&self, cluster_size: ClusterSize, file_len: u64) -> Result<Span, Flaw> {
        let span = Span {
            offset: self.u64(40)?,
            len: u64::from(self.u32(36)?) * 8,
        };
        if span.len > MAX_L1_BYTES {
            return Err(flaw(
                36,
                format!("an L1 table of {} entries is more than QEMU allows", span.len / 8),
            ));
        }
        if span.len > 0 {
            check_span("the L1 table", 40, span, cluster_size, file_len)?;
        }
        Ok(span)
    }

    fn refcount_table(&self, cluster_size: ClusterSize, file_len: u64) -> Result<Span, Flaw> {
        let span = Span {
            offset: self.u64(48)?,
            len: u64::from(self.u32(56)?) * cluster_size.bytes(),
        };
        if span.len == 0 || span.len > MAX_REFCOUNT_TABLE_BYTES {
            return Err(flaw(
                56,
                format!("a refcount table of {} bytes is out of bounds", span.len),
            ));
        }
        check_span("the refcount table", 48, span, cluster_size, file_len)?;
        Ok(span)
    }

    fn extensions(&self, version: u32, cluster_size: ClusterSize) -> Result<Vec<Extension<'a>>, Flaw> {
        let mut at = match version {
            2 => 72,
            _ => self.header_len(cluster_size)?,
        };
        let end = match self.u64(8)? {
            0 => cluster_size.bytes() as usize,
            name => name as usize,
        };
        let mut extensions = Vec::new();
        while at < end {
            let (kind, len) = (self.u32(at)?, self.u32(at + 4)? as usize);
            if kind == END_EXTENSION {
                break;
            }
            let payload = self
                .slice(at + 8, len)
                .filter(|_| at + 8 + len <= end)
                .ok_or_else(|| {
                    flaw(
                        at,
                        format!("the header extension {kind:#010x} runs past the header ({len} bytes)"),
                    )
                })?;
            extensions.push(Extension {
                kind,
                offset: at + 8,
                payload,
            });
            at += 8 + len.next_multiple_of(8);
        }
        Ok(extensions)
    }

    fn header_len(&self, cluster_size: ClusterSize) -> Result<usize, Flaw> {
        let len = self.u32(100)?;
        if len < 104 || u64::from(len) > cluster_size.bytes() {
            return Err(flaw(
                100,
                format!("the header is said to have {len} bytes, which is out of bounds"),
            ));
        }
        // QEMU lets it pass; the specification does not, and extensions are padded by it.
        if !len.is_multiple_of(8) {
            return Err(flaw(
                100,
                format!("the header is said to have {len} bytes, which is not a multiple of 8"),
            ));
        }
        Ok(len as usize)
    }
}

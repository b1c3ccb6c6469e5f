//! LUKS1 headers: made, read from bytes that anyone may have written, and opened.
//!
//! The format is the LUKS On-Disk Format Specification 1.2.3: a 592-byte header, then the key material of eight
//! keyslots, then the payload. Only what QEMU writes by default is read: AES in XTS mode with `plain64` IVs and
//! SHA-256. Every length and offset is checked against the space that the header has before it is used, and the
//! iteration counts have a ceiling, so a hostile header costs neither memory nor time.
//!
//! What is made here always has one active keyslot, the first: QEMU tries them in order, and each dead guess costs
//! it a key derivation. Keyslots 6 and 7 stay unused, since the record of number 6 straddles a sector.

mod fields;
mod keymaterial;
mod keys;

use std::ops::Range;

use uuid::Uuid;

use self::fields::Fields;
use self::keymaterial::STRIPES;
pub(crate) use self::keys::MAX_ITERATIONS_OPENED;
use super::info::{KeyslotInfo, LuksInfo};
use super::sector::SECTOR;
use crate::object::disk::error::{Flaw, Part};

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const ACTIVE: u32 = 0x00ac_71f3;
const DEAD: u32 = 0x0000_dead;
const KEYSLOTS: usize = 8;
const DIGEST_LEN: usize = 20;
const SALT_LEN: usize = 32;
/// The most rounds that any one derivation, and all those of one header together, may ask for.
const MAX_ITERATIONS: u32 = 10_000_000;
const MAX_ITERATIONS_TOGETHER: u64 = 20_000_000;
/// Key material begins at multiples of 4 KiB, as QEMU and cryptsetup lay it out.
const ALIGNMENT_SECTORS: u32 = 8;
const VOLUME_KEY_LEN: usize = 64;

/// A LUKS1 header whose bounds have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    payload_sector: u32,
    key_len: usize,
    key_digest: [u8; DIGEST_LEN],
    key_digest_salt: [u8; SALT_LEN],
    key_digest_iterations: u32,
    uuid: Uuid,
    keyslots: [Keyslot; KEYSLOTS],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Keyslot {
    active: bool,
    iterations: u32,
    salt: [u8; SALT_LEN],
    first_sector: u32,
}

impl Header {
    /// Length of the header proper in bytes; key material follows after a gap.
    pub(crate) const LEN: usize = 592;

    /// Reads a header from its first bytes. `space` is how many bytes there are from the header to the end of
    /// what it may use: the file, or the area that qcow2 gives it.
    ///
    /// # Errors
    /// The first [`Flaw`], its offset counted from the header.
    pub(crate) fn parse(bytes: &[u8], space: u64) -> Result<Self, Flaw> {
        let mut fields = Fields::new(bytes)?;
        fields.expect(MAGIC, "the LUKS magic is missing")?;
        fields.expect(&1_u16.to_be_bytes(), "the LUKS version is not 1")?;
        fields.expect_name("aes", "cipher")?;
        fields.expect_name("xts-plain64", "cipher mode")?;
        fields.expect_name("sha256", "hash")?;
        let payload_sector = fields.u32();
        let key_len = fields.key_len()?;
        let header = Self {
            payload_sector,
            key_len,
            key_digest: fields.array(),
            key_digest_salt: fields.array(),
            key_digest_iterations: fields.iterations("the volume key's digest")?,
            uuid: fields.uuid()?,
            keyslots: fields.keyslots()?,
        };
        header.check_layout(space)?;
        header.check_work()?;
        Ok(header)
    }

    pub(crate) fn to_bytes(&self) -> [u8; Self::LEN] {
        let mut out = Vec::with_capacity(Self::LEN);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&1_u16.to_be_bytes());
        for name in ["aes", "xts-plain64", "sha256"] {
            push_padded(&mut out, name, 32);
        }
        out.extend_from_slice(&self.payload_sector.to_be_bytes());
        out.extend_from_slice(&(self.key_len as u32).to_be_bytes());
        out.extend_from_slice(&self.key_digest);
        out.extend_from_slice(&self.key_digest_salt);
        out.extend_from_slice(&self.key_digest_iterations.to_be_bytes());
        push_padded(&mut out, &self.uuid.to_string(), 40);
        for keyslot in &self.keyslots {
            out.extend_from_slice(&(if keyslot.active { ACTIVE } else { DEAD }).to_be_bytes());
            out.extend_from_slice(&keyslot.iterations.to_be_bytes());
            out.extend_from_slice(&keyslot.salt);
            out.extend_from_slice(&keyslot.first_sector.to_be_bytes());
            out.extend_from_slice(&STRIPES.to_be_bytes());
        }
        out.try_into().expect("the fields add up to 592 bytes")
    }

    /// Where the payload begins, in bytes from the header.
    pub(crate) fn payload_offset(&self) -> u64 {
        u64::from(self.payload_sector) * SECTOR as u64
    }

    /// What it says without a key.
    pub(crate) fn info(&self) -> LuksInfo {
        LuksInfo {
            cipher: "aes-xts-plain64",
            key_bits: self.key_len as u32 * 8,
            payload_offset: self.payload_offset(),
            uuid: self.uuid,
            digest_iterations: self.key_digest_iterations,
            keyslots: self.keyslots.iter().map(Keyslot::info).collect(),
        }
    }

    /// How many keyslots some passphrase opens.
    pub(crate) fn active_keyslots(&self) -> usize {
        self.keyslots.iter().filter(|keyslot| keyslot.active).count()
    }

    /// Where the key material of every keyslot lies, in bytes from the header.
    pub(crate) fn all_material(&self) -> impl Iterator<Item = Range<u64>> {
        (0..KEYSLOTS).map(|number| self.material(number))
    }

    /// The header with all keyslots dead, and without the volume key's digest.
    pub(crate) fn without_keys(&self) -> Self {
        let mut header = self.clone();
        header.key_digest = [0; DIGEST_LEN];
        header.key_digest_salt = [0; SALT_LEN];
        for keyslot in &mut header.keyslots {
            keyslot.active = false;
            keyslot.salt = [0; SALT_LEN];
        }
        header
    }

    /// Where the key material of a keyslot lies, in bytes from the header.
    pub(crate) fn material(&self, number: usize) -> Range<u64> {
        let start = u64::from(self.keyslots[number].first_sector) * SECTOR as u64;
        start..start + keymaterial::len(self.key_len) as u64
    }

    fn check_layout(&self, space: u64) -> Result<(), Flaw> {
        let flaw = |field, what| Err(Flaw::new(Part::Luks1, field, what));
        if self.payload_offset() > space {
            let what = format!(
                "the payload is said to begin at byte {}, past the end",
                self.payload_offset()
            );
            return flaw(PAYLOAD_FIELD, what);
        }
        for number in 0..KEYSLOTS {
            let material = self.material(number);
            if material.start < Self::LEN as u64 || material.end > self.payload_offset() {
                let what = format!(
                    "the key material of keyslot {number} lies outside of the space before the payload"
                );
                return flaw(material_field(number), what);
            }
            if let Some(other) = (0..number).find(|other| overlap(&material, &self.material(*other))) {
                let what = format!("the key material of keyslots {other} and {number} overlaps");
                return flaw(material_field(number), what);
            }
        }
        Ok(())
    }

    fn check_work(&self) -> Result<(), Flaw> {
        let active = self.keyslots.iter().filter(|keyslot| keyslot.active);
        let total: u64 = active
            .map(|keyslot| u64::from(keyslot.iterations) + u64::from(self.key_digest_iterations))
            .sum();
        if total > MAX_ITERATIONS_TOGETHER {
            let what = format!("its keyslots ask for {total} PBKDF2 rounds, more than can be sensible");
            return Err(Flaw::new(Part::Luks1, KEYSLOTS_FIELD, what));
        }
        Ok(())
    }
}

impl Keyslot {
    fn info(&self) -> KeyslotInfo {
        if self.active {
            KeyslotInfo::Active {
                iterations: self.iterations,
            }
        } else {
            KeyslotInfo::Dead
        }
    }
}

const PAYLOAD_FIELD: u64 = 104;
const KEYSLOTS_FIELD: u64 = 208;

fn material_field(keyslot: usize) -> u64 {
    KEYSLOTS_FIELD + 48 * keyslot as u64 + 40
}

/// The first sector of the key material of keyslot `number`, or of what follows the last one.
fn first_sector_of(number: u32) -> u32 {
    let each = (keymaterial::len(VOLUME_KEY_LEN) / SECTOR) as u32;
    ALIGNMENT_SECTORS + number * each.next_multiple_of(ALIGNMENT_SECTORS)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn push_padded(out: &mut Vec<u8>, name: &str, width: usize) {
    out.extend_from_slice(name.as_bytes());
    out.resize(out.len() + width - name.len(), 0);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::secret::Dek;

    #[test]
    fn lays_out_what_qemu_lays_out() {
        let passphrase = Dek::random().unwrap().passphrase().unwrap();
        let header = Header::create(&passphrase).unwrap().0;
        let offsets: Vec<u64> = (0..8).map(|number| header.material(number).start).collect();
        assert_eq!(
            offsets,
            [
                4096, 262_144, 520_192, 778_240, 1_036_288, 1_294_336, 1_552_384, 1_810_432
            ]
        );
        assert_eq!(header.payload_offset(), 2_068_480);
    }

    fn sample() -> ([u8; Header::LEN], u64) {
        let passphrase = Dek::from_bytes(&[7; 32]).unwrap().passphrase().unwrap();
        let header = Header::create(&passphrase).unwrap().0;
        (header.to_bytes(), header.payload_offset())
    }

    #[test]
    fn every_truncation_is_an_error_that_says_where() {
        let (bytes, space) = sample();
        assert!(Header::parse(&bytes, space).is_ok());
        assert!(Header::parse(&bytes, space - 1).is_err());
        for len in 0..Header::LEN {
            assert_eq!(
                Header::parse(&bytes[..len], space).unwrap_err().offset,
                len as u64
            );
        }
    }

    #[test]
    fn every_changed_byte_is_an_error_or_reads_back_as_itself() {
        let (bytes, space) = sample();
        for at in 0..Header::LEN {
            for flip in [1, 0x80, 0xff] {
                let mut changed = bytes;
                changed[at] ^= flip;
                match Header::parse(&changed, space) {
                    Ok(header) => assert!(header.check_layout(space).is_ok()),
                    Err(flaw) => assert!(flaw.offset < Header::LEN as u64, "{flaw}"),
                }
            }
        }
    }

    #[test]
    fn iterations_can_not_burn_time() {
        let (mut bytes, space) = sample();
        bytes[212..216].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(
            Header::parse(&bytes, space)
                .unwrap_err()
                .what
                .contains("4294967295")
        );
        for number in 0..8 {
            let at = 208 + 48 * number;
            bytes[at..at + 4].copy_from_slice(&ACTIVE.to_be_bytes());
            bytes[at + 4..at + 8].copy_from_slice(&MAX_ITERATIONS.to_be_bytes());
        }
        assert!(
            Header::parse(&bytes, space)
                .unwrap_err()
                .what
                .contains("80008000")
        );
    }

    #[test]
    fn overlapping_key_material_is_refused() {
        let (mut bytes, space) = sample();
        bytes[208 + 48 + 40..208 + 48 + 44].copy_from_slice(&8_u32.to_be_bytes());
        assert!(
            Header::parse(&bytes, space)
                .unwrap_err()
                .what
                .contains("overlaps")
        );
    }

    proptest! {
        #[test]
        fn round_trip(digest: [u8; 20], salt: [u8; 32], active: [bool; 8], iterations in 1_u32..100_000, uuid: u128) {
            let (bytes, space) = sample();
            let mut header = Header::parse(&bytes, space).unwrap();
            header.key_digest = digest;
            header.key_digest_salt = salt;
            header.uuid = Uuid::from_u128(uuid);
            for (keyslot, active) in header.keyslots.iter_mut().zip(active) {
                keyslot.active = active;
                keyslot.iterations = iterations;
            }
            prop_assert_eq!(Header::parse(&header.to_bytes(), space).unwrap(), header);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..700), space: u64) {
            let _ = Header::parse(&bytes, space);
        }

        #[test]
        fn hostile_numbers_never_panic(
            at in prop_oneof![Just(104_usize), Just(108), Just(164), (0_usize..8).prop_map(|n| 208 + 48 * n + 40)],
            value: u32,
            space: u64,
        ) {
            let (mut bytes, _) = sample();
            bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
            if let Ok(header) = Header::parse(&bytes, space) {
                prop_assert!(header.payload_offset() <= space);
            }
        }
    }
}

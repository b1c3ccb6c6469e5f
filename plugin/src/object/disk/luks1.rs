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
pub(crate) mod keymaterial;
pub(crate) mod sector;

use std::ops::Range;

use openssl::hash::MessageDigest;
use openssl::pkcs5::pbkdf2_hmac;
use serde::Serialize;
use uuid::Uuid;

use self::fields::Fields;
use self::keymaterial::STRIPES;
use self::sector::{SECTOR, SectorCipher};
use super::VolumeError;
use super::error::{Flaw, Part};
use crate::secret::{Passphrase, SecretBytes};

const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
const ACTIVE: u32 = 0x00ac_71f3;
const DEAD: u32 = 0x0000_dead;
const KEYSLOTS: usize = 8;
const DIGEST_LEN: usize = 20;
const SALT_LEN: usize = 32;
/// QEMU's floor. The passphrase has 256 random bits: more rounds add time and no strength.
const ITERATIONS: u32 = 1000;
/// The most rounds that any one derivation, and all those of one header together, may ask for.
const MAX_ITERATIONS: u32 = 10_000_000;
const MAX_ITERATIONS_TOGETHER: u64 = 20_000_000;
/// The most rounds that opening asks for, of one derivation and of all those of a header: keys of ours have 1000. A header
/// that others wrote costs a start no more than a fraction of a second.
pub(super) const MAX_ITERATIONS_OPENED: u32 = 100_000;
const MAX_ITERATIONS_OPENED_TOGETHER: u64 = 400_000;
/// Key material begins at multiples of 4 KiB, as QEMU and cryptsetup lay it out.
const ALIGNMENT_SECTORS: u32 = 8;
const VOLUME_KEY_LEN: usize = 64;

/// A LUKS1 header whose bounds have been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
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

/// What a header says without any key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LuksInfo {
    /// Always `aes-xts-plain64`.
    pub cipher: &'static str,
    /// Length of the volume key; XTS uses half of it for the data and half for the IVs.
    pub key_bits: u32,
    /// Where the payload begins, in bytes from the header.
    pub payload_offset: u64,
    /// The volume's UUID.
    pub uuid: Uuid,
    /// PBKDF2 rounds of the volume key's digest.
    pub digest_iterations: u32,
    /// All eight, in the order in which they are tried.
    pub keyslots: Vec<KeyslotInfo>,
}

/// One keyslot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum KeyslotInfo {
    /// Some passphrase opens it.
    Active {
        /// PBKDF2 rounds of that passphrase.
        iterations: u32,
    },
    /// Unused.
    Dead,
}

/// The key that encrypts the payload.
#[derive(Debug)]
pub struct VolumeKey(SecretBytes);

impl VolumeKey {
    pub(super) fn encryptor(&self) -> Result<SectorCipher, VolumeError> {
        Ok(SectorCipher::encryptor(self.0.expose())?)
    }
}

/// A header that has just been made, with what belongs beside it.
#[derive(Debug)]
pub struct Fresh {
    /// The header: the first [`Header::LEN`] bytes.
    pub header: Header,
    /// The encrypted key material of the first keyslot, [`Fresh::material_offset`] bytes from the header.
    pub material: Vec<u8>,
    /// The volume key.
    pub key: VolumeKey,
}

impl Fresh {
    /// Where [`Self::material`] goes, in bytes from the header.
    #[must_use]
    pub fn material_offset(&self) -> u64 {
        self.header.material(0).start
    }
}

impl Header {
    /// Length of the header proper in bytes; key material follows after a gap.
    pub const LEN: usize = 592;

    /// A new volume key under `passphrase`: aes-256-xts-plain64, SHA-256, 1000 rounds, keyslot 0.
    ///
    /// # Errors
    /// When OpenSSL fails or there is no memory for keys.
    pub fn create(passphrase: &Passphrase) -> Result<Fresh, VolumeError> {
        let key = SecretBytes::random(VOLUME_KEY_LEN).map_err(VolumeError::Memory)?;
        let mut header = Self {
            payload_sector: first_sector_of(KEYSLOTS as u32),
            key_len: VOLUME_KEY_LEN,
            key_digest: [0; DIGEST_LEN],
            key_digest_salt: random_salt()?,
            key_digest_iterations: ITERATIONS,
            uuid: Uuid::new_v4(),
            keyslots: std::array::from_fn(|number| Keyslot {
                active: false,
                iterations: 0,
                salt: [0; SALT_LEN],
                first_sector: first_sector_of(number as u32),
            }),
        };
        header.key_digest = header.digest_of(&key)?;
        header.keyslots[0].active = true;
        header.keyslots[0].iterations = ITERATIONS;
        header.keyslots[0].salt = random_salt()?;
        let slot_key = header.slot_key(&header.keyslots[0], passphrase)?;
        let material = keymaterial::seal(&key, &slot_key)?;
        Ok(Fresh {
            header,
            material,
            key: VolumeKey(key),
        })
    }

    /// Reads a header from its first bytes. `space` is how many bytes there are from the header to the end of
    /// what it may use: the file, or the area that qcow2 gives it.
    ///
    /// # Errors
    /// The first [`Flaw`], its offset counted from the header.
    pub fn parse(bytes: &[u8], space: u64) -> Result<Self, Flaw> {
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

    /// The header's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::LEN] {
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
    #[must_use]
    pub fn payload_offset(&self) -> u64 {
        u64::from(self.payload_sector) * SECTOR as u64
    }

    /// What it says without a key.
    #[must_use]
    pub fn info(&self) -> LuksInfo {
        LuksInfo {
            cipher: "aes-xts-plain64",
            key_bits: self.key_len as u32 * 8,
            payload_offset: self.payload_offset(),
            uuid: self.uuid,
            digest_iterations: self.key_digest_iterations,
            keyslots: self.keyslots.iter().map(Keyslot::info).collect(),
        }
    }

    /// The volume key, from the first active keyslot that `passphrase` opens; `None` if there is none. `read`
    /// fills a buffer with the bytes at an offset from the header.
    ///
    /// # Errors
    /// Those of `read`, and when OpenSSL fails or there is no memory for keys.
    pub fn unlock(
        &self,
        passphrase: &Passphrase,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), VolumeError>,
    ) -> Result<Option<VolumeKey>, VolumeError> {
        let mut material = vec![0; keymaterial::len(self.key_len)];
        for (number, keyslot) in self.keyslots.iter().enumerate().filter(|(_, k)| k.active) {
            read(self.material(number).start, &mut material)?;
            let slot_key = self.slot_key(keyslot, passphrase)?;
            let key = keymaterial::open(&material, &slot_key)?;
            if openssl::memcmp::eq(&self.digest_of(&key)?, &self.key_digest) {
                return Ok(Some(VolumeKey(key)));
            }
        }
        Ok(None)
    }

    /// Whether looking for the right keyslot takes bounded work.
    pub(super) fn is_cheap_to_open(&self) -> bool {
        let active = || self.keyslots.iter().filter(|keyslot| keyslot.active);
        let digest = self.key_digest_iterations;
        let total: u64 = active()
            .map(|keyslot| u64::from(keyslot.iterations) + u64::from(digest))
            .sum();
        digest <= MAX_ITERATIONS_OPENED
            && active().all(|keyslot| keyslot.iterations <= MAX_ITERATIONS_OPENED)
            && total <= MAX_ITERATIONS_OPENED_TOGETHER
    }

    fn slot_key(&self, keyslot: &Keyslot, passphrase: &Passphrase) -> Result<SecretBytes, VolumeError> {
        let mut key = SecretBytes::zeroed(self.key_len).map_err(VolumeError::Memory)?;
        derive(
            passphrase.expose(),
            &keyslot.salt,
            keyslot.iterations,
            key.expose_mut(),
        )?;
        Ok(key)
    }

    fn digest_of(&self, key: &SecretBytes) -> Result<[u8; DIGEST_LEN], VolumeError> {
        let mut digest = [0; DIGEST_LEN];
        derive(
            key.expose(),
            &self.key_digest_salt,
            self.key_digest_iterations,
            &mut digest,
        )?;
        Ok(digest)
    }

    /// How many keyslots some passphrase opens.
    pub(super) fn active_keyslots(&self) -> usize {
        self.keyslots.iter().filter(|keyslot| keyslot.active).count()
    }

    /// Where the key material of every keyslot lies, in bytes from the header.
    pub(super) fn all_material(&self) -> impl Iterator<Item = Range<u64>> {
        (0..KEYSLOTS).map(|number| self.material(number))
    }

    /// The header with all keyslots dead, and without the volume key's digest.
    pub(super) fn without_keys(&self) -> Self {
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
    fn material(&self, number: usize) -> Range<u64> {
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

fn random_salt() -> Result<[u8; SALT_LEN], VolumeError> {
    let mut salt = [0; SALT_LEN];
    openssl::rand::rand_bytes(&mut salt)?;
    Ok(salt)
}

fn derive(secret: &[u8], salt: &[u8], iterations: u32, out: &mut [u8]) -> Result<(), VolumeError> {
    pbkdf2_hmac(secret, salt, iterations as usize, MessageDigest::sha256(), out)?;
    Ok(())
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

    fn reader(fresh: &Fresh) -> impl FnMut(u64, &mut [u8]) -> Result<(), VolumeError> + '_ {
        |offset, out| {
            assert_eq!(offset, fresh.material_offset());
            out.copy_from_slice(&fresh.material);
            Ok(())
        }
    }

    #[test]
    fn opens_with_its_passphrase_and_no_other() {
        let passphrase = Dek::random().unwrap().passphrase().unwrap();
        let other = Dek::random().unwrap().passphrase().unwrap();
        let fresh = Header::create(&passphrase).unwrap();
        let key = fresh.header.unlock(&passphrase, reader(&fresh)).unwrap().unwrap();
        assert_eq!(key.0.expose(), fresh.key.0.expose());
        assert!(fresh.header.unlock(&other, reader(&fresh)).unwrap().is_none());
    }

    #[test]
    fn lays_out_what_qemu_lays_out() {
        let passphrase = Dek::random().unwrap().passphrase().unwrap();
        let header = Header::create(&passphrase).unwrap().header;
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
        let header = Header::create(&passphrase).unwrap().header;
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

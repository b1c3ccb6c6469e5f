//! The header's fields, read one after the other from bytes that anyone may have written.

use uuid::Uuid;

use super::keymaterial::STRIPES;
use super::{ACTIVE, DEAD, Header, KEYSLOTS, Keyslot, MAX_ITERATIONS};
use crate::object::disk::error::{Flaw, Part};

/// Reads the header's fields in order. The length is checked once, at the start.
pub(super) struct Fields<'a> {
    bytes: &'a [u8; Header::LEN],
    at: usize,
}

impl<'a> Fields<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, Flaw> {
        let bytes = bytes.first_chunk().ok_or_else(|| {
            let what = format!("it ends within the {} bytes of the header", Header::LEN);
            Flaw::new(Part::Luks1, bytes.len() as u64, what)
        })?;
        Ok(Self { bytes, at: 0 })
    }

    fn flaw(&self, what: impl Into<String>) -> Flaw {
        Flaw::new(Part::Luks1, self.at as u64, what)
    }

    pub(super) fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(&self.bytes[self.at..self.at + N]);
        self.at += N;
        out
    }

    pub(super) fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    pub(super) fn expect(&mut self, wanted: &[u8], otherwise: &str) -> Result<(), Flaw> {
        if self.bytes[self.at..].starts_with(wanted) {
            self.at += wanted.len();
            Ok(())
        } else {
            Err(self.flaw(otherwise))
        }
    }

    pub(super) fn expect_name(&mut self, wanted: &str, field: &str) -> Result<(), Flaw> {
        let found = &self.bytes[self.at..self.at + 32];
        let name = found.split(|byte| *byte == 0).next().unwrap_or_default();
        if name != wanted.as_bytes() {
            let name = name.escape_ascii();
            return Err(self.flaw(format!("the {field} is `{name}`, virtseal opens `{wanted}` only")));
        }
        self.at += 32;
        Ok(())
    }

    pub(super) fn key_len(&mut self) -> Result<usize, Flaw> {
        match u32::from_be_bytes(*self.bytes[self.at..].first_chunk().expect("well before the end")) {
            length @ (32 | 64) => {
                self.at += 4;
                Ok(length as usize)
            }
            found => Err(self.flaw(format!("the volume key has {found} bytes, not 32 or 64"))),
        }
    }

    pub(super) fn iterations(&mut self, of: &str) -> Result<u32, Flaw> {
        let at = self.at;
        match self.u32() {
            rounds @ 1..=MAX_ITERATIONS => Ok(rounds),
            found => {
                let what = format!("{of} asks for {found} PBKDF2 rounds, 1 to {MAX_ITERATIONS} are allowed");
                Err(Flaw::new(Part::Luks1, at as u64, what))
            }
        }
    }

    pub(super) fn uuid(&mut self) -> Result<Uuid, Flaw> {
        let at = self.at;
        let text: [u8; 40] = self.array();
        text.split(|byte| *byte == 0)
            .next()
            .and_then(|text| Uuid::try_parse_ascii(text).ok())
            .ok_or_else(|| Flaw::new(Part::Luks1, at as u64, "the UUID is not one"))
    }

    pub(super) fn keyslots(&mut self) -> Result<[Keyslot; KEYSLOTS], Flaw> {
        let mut keyslots = Vec::with_capacity(KEYSLOTS);
        for number in 0..KEYSLOTS {
            keyslots.push(self.keyslot(number)?);
        }
        Ok(keyslots.try_into().expect("eight were pushed"))
    }

    fn keyslot(&mut self, number: usize) -> Result<Keyslot, Flaw> {
        let at = self.at;
        let active = match self.u32() {
            ACTIVE => true,
            DEAD => false,
            found => {
                let what = format!("keyslot {number} is neither active nor dead ({found:#010x})");
                return Err(Flaw::new(Part::Luks1, at as u64, what));
            }
        };
        let iterations = if active {
            self.iterations(&format!("keyslot {number}"))?
        } else {
            self.u32()
        };
        let keyslot = Keyslot {
            active,
            iterations,
            salt: self.array(),
            first_sector: self.u32(),
        };
        let what = format!("keyslot {number} has not {STRIPES} stripes");
        self.expect(&STRIPES.to_be_bytes(), &what)?;
        Ok(keyslot)
    }
}

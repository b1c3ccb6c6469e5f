//! The ways to wrap a payload by a KEK in a token, and what a token must offer for each; `body.rs` has what they make.

use std::fmt;

use cryptoki::mechanism::{MechanismInfo, MechanismType};
use thiserror::Error;

use super::settings::KeyBits;

/// The length of a key for an HMAC, in bytes.
pub(super) const HMAC_KEY: usize = 32;

/// A way to wrap, in the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mechanism {
    Gcm,
    KeyWrap,
    KeyWrapPad,
    CbcHmac,
}

/// What a mechanism of the token must be able to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Encrypt,
    Wrap,
    Sign,
    Generate,
}

impl Mechanism {
    /// All, best first.
    pub(super) const ALL: [Self; 4] = [Self::Gcm, Self::KeyWrap, Self::KeyWrapPad, Self::CbcHmac];

    /// The name in a stanza.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Gcm => "AES-GCM",
            Self::KeyWrap => "AES-KW",
            Self::KeyWrapPad => "AES-KW-PAD",
            Self::CbcHmac => "AES-CBC-PAD+HMAC-SHA256",
        }
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mechanism| mechanism.as_str() == name)
    }

    /// Whether KEKs for it wrap session objects; else they encrypt.
    pub(super) fn wraps_objects(self) -> bool {
        matches!(self, Self::KeyWrap | Self::KeyWrapPad)
    }

    fn needs(self) -> &'static [(MechanismType, Use)] {
        match self {
            Self::Gcm => &[(MechanismType::AES_GCM, Use::Encrypt)],
            Self::KeyWrap => &[(MechanismType::AES_KEY_WRAP, Use::Wrap)],
            Self::KeyWrapPad => &[(MechanismType::AES_KEY_WRAP_PAD, Use::Wrap)],
            Self::CbcHmac => &[
                (MechanismType::AES_CBC_PAD, Use::Encrypt),
                (MechanismType::SHA256_HMAC, Use::Sign),
                (MechanismType::GENERIC_SECRET_KEY_GEN, Use::Generate),
            ],
        }
    }

    /// What a token that offers all of `offers` can do, best first.
    ///
    /// # Errors
    /// What it lacks, when it can do nothing.
    pub(super) fn choose(offers: &[Offered], bits: KeyBits) -> Result<Vec<Self>, Missing> {
        let lacks = |need: &(MechanismType, Use)| !offers.iter().any(|offered| offered.serves(*need, bits));
        let generate = (MechanismType::AES_KEY_GEN, Use::Generate);
        let possible: Vec<_> = Self::ALL
            .into_iter()
            .filter(|mechanism| !mechanism.needs().iter().any(&lacks))
            .collect();
        if !possible.is_empty() && !lacks(&generate) {
            return Ok(possible);
        }
        let name = |need: &(MechanismType, Use)| need.0.to_string();
        let lacking = |mechanism: Self| {
            let needs = mechanism.needs().iter().filter(|need| lacks(need));
            needs.map(name).collect::<Vec<_>>().join(" and ")
        };
        let alternatives = match possible.is_empty() {
            true => Self::ALL.into_iter().map(lacking).collect(),
            false => Vec::new(),
        };
        Err(Missing {
            bits: bits.into(),
            key_generation: lacks(&generate),
            alternatives,
        })
    }
}

/// A mechanism that a token offers.
#[derive(Clone, Debug)]
pub(super) struct Offered {
    mechanism: MechanismType,
    uses: Vec<Use>,
    /// Smallest and largest key, in bytes or in bits: tokens differ.
    sizes: (usize, usize),
}

impl Offered {
    pub(super) fn new(mechanism: MechanismType, info: &MechanismInfo) -> Self {
        let uses = [
            (Use::Encrypt, info.encrypt() && info.decrypt()),
            (Use::Wrap, info.wrap() && info.unwrap()),
            (Use::Sign, info.sign() && info.verify()),
            (Use::Generate, info.generate()),
        ];
        Self {
            mechanism,
            uses: uses
                .into_iter()
                .filter(|(_, can)| *can)
                .map(|(one, _)| one)
                .collect(),
            sizes: (info.min_key_size(), info.max_key_size()),
        }
    }

    fn serves(&self, (mechanism, purpose): (MechanismType, Use), bits: KeyBits) -> bool {
        self.mechanism == mechanism && self.uses.contains(&purpose) && self.takes(mechanism, bits)
    }

    fn takes(&self, mechanism: MechanismType, bits: KeyBits) -> bool {
        let generic = [MechanismType::SHA256_HMAC, MechanismType::GENERIC_SECRET_KEY_GEN];
        let bytes = if generic.contains(&mechanism) {
            HMAC_KEY
        } else {
            bits.bytes()
        };
        let (least, most) = self.sizes;
        let within = |size| least <= size && size <= most;
        // Tokens that do not care say 0.
        most == 0 || within(bytes) || within(8 * bytes)
    }
}

/// What a token would have to offer.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) struct Missing {
    bits: u32,
    key_generation: bool,
    /// Any of these would do; empty when something is there.
    alternatives: Vec<String>,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the token can't protect keys with AES-{}: it lacks ",
            self.bits
        )?;
        if self.key_generation {
            f.write_str("CKM_AES_KEY_GEN")?;
        }
        if self.key_generation && !self.alternatives.is_empty() {
            f.write_str(", and ")?;
        }
        f.write_str(&self.alternatives.join(", or else "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(mechanism: MechanismType, uses: &[Use], sizes: (usize, usize)) -> Offered {
        Offered {
            mechanism,
            uses: uses.to_vec(),
            sizes,
        }
    }

    fn key_generation() -> Offered {
        offered(MechanismType::AES_KEY_GEN, &[Use::Generate], (16, 32))
    }

    fn everything() -> Vec<Offered> {
        vec![
            offered(MechanismType::SHA256_HMAC, &[Use::Sign], (32, 512)),
            offered(MechanismType::AES_CBC_PAD, &[Use::Encrypt], (16, 32)),
            offered(
                MechanismType::GENERIC_SECRET_KEY_GEN,
                &[Use::Generate],
                (1, 1 << 31),
            ),
            offered(MechanismType::AES_KEY_WRAP_PAD, &[Use::Wrap], (0, 0)),
            offered(MechanismType::AES_KEY_WRAP, &[Use::Wrap], (128, 256)),
            offered(MechanismType::AES_GCM, &[Use::Encrypt], (16, 32)),
            key_generation(),
        ]
    }

    fn choose(offers: &[Offered]) -> Result<Vec<Mechanism>, String> {
        Mechanism::choose(offers, KeyBits::Aes256).map_err(|missing| missing.to_string())
    }

    #[test]
    fn best_comes_first_whatever_the_token_lists_first() {
        let mut offers = everything();
        assert_eq!(choose(&offers).unwrap(), Mechanism::ALL);
        offers.remove(5);
        assert_eq!(choose(&offers).unwrap()[0], Mechanism::KeyWrap);
        offers.drain(3..5);
        assert_eq!(choose(&offers).unwrap(), [Mechanism::CbcHmac]);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(
            choose(&[]).unwrap_err(),
            "the token can't protect keys with AES-256: it lacks CKM_AES_KEY_GEN, and CKM_AES_GCM, or else \
             CKM_AES_KEY_WRAP, or else CKM_AES_KEY_WRAP_PAD, or else CKM_AES_CBC_PAD and CKM_SHA256_HMAC and \
             CKM_GENERIC_SECRET_KEY_GEN"
        );
        let mut offers = everything();
        offers.pop();
        assert_eq!(
            choose(&offers).unwrap_err(),
            "the token can't protect keys with AES-256: it lacks CKM_AES_KEY_GEN"
        );
        // As TPMs do: a MAC, and no way to make the key for it.
        let tpm = [
            key_generation(),
            offered(MechanismType::AES_CBC_PAD, &[Use::Encrypt], (16, 32)),
            offered(MechanismType::SHA256_HMAC, &[Use::Sign], (32, 32)),
        ];
        assert!(
            choose(&tpm)
                .unwrap_err()
                .ends_with("or else CKM_GENERIC_SECRET_KEY_GEN")
        );
    }

    #[test]
    fn a_mechanism_that_only_wraps_or_takes_short_keys_does_not_count() {
        let offers = [
            key_generation(),
            offered(MechanismType::AES_GCM, &[Use::Wrap], (16, 32)),
            offered(MechanismType::AES_KEY_WRAP, &[Use::Wrap], (16, 16)),
        ];
        assert!(choose(&offers).is_err());
        assert_eq!(
            Mechanism::choose(&offers, KeyBits::Aes128).unwrap(),
            [Mechanism::KeyWrap]
        );
    }

    #[test]
    fn names_are_read_back() {
        for mechanism in Mechanism::ALL {
            assert_eq!(Mechanism::parse(mechanism.as_str()), Some(mechanism));
        }
        assert_eq!(Mechanism::parse("ROT13"), None);
    }
}

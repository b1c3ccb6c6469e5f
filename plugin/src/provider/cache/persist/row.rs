//! One KEK as it lies on disk: AES-256-GCM (NIST SP 800-38D) under a key that takes both the TPM and the keystore.
//!
//! Key = HKDF-SHA256 (RFC 5869) of 32 bytes that the TPM gives back, salted with what the keystore holds, with a label and
//! the provider's UUID as info. Its additional data names the
//! provider, the KEK and its times, so that no row can stand in for another, live longer, or be younger than it is.

use std::io;

use crate::crypto::aead::{self, KEY};
use crate::crypto::kdf;
use crate::model::envelope::{KekId, ProviderId};
use crate::secret::SecretBytes;
use crate::store::UnixTime;

/// What opens the rows of one provider until its salt changes.
pub(super) struct RowKey {
    key: SecretBytes,
    provider: ProviderId,
}

/// From when to when a row counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) fetched: UnixTime,
    pub(super) expires: UnixTime,
}

impl Span {
    pub(super) fn lasting(fetched: UnixTime, seconds: u64) -> Self {
        let expires = fetched.saturating_add_unsigned(seconds);
        Self { fetched, expires }
    }

    /// Also for a clock that was set back.
    pub(super) fn holds(self, now: UnixTime) -> bool {
        self.fetched <= now && now < self.expires
    }

    /// For what does not hold.
    pub(super) fn why_not(self, now: UnixTime) -> &'static str {
        if now < self.fetched {
            "its key on disk is from the future: the clock was set back"
        } else {
            "its key on disk has expired"
        }
    }

    /// Whether `newer` is worth a write: after a quarter of the time, or when the clock was set back.
    pub(super) fn is_to_be_renewed_by(self, newer: Self) -> bool {
        let quarter = newer.expires.saturating_sub(newer.fetched) / 4;
        !self.holds(newer.fetched) || newer.fetched.saturating_sub(self.fetched) >= quarter
    }
}

impl RowKey {
    pub(super) fn derive(secret: &SecretBytes, salt: &[u8], provider: ProviderId) -> io::Result<Self> {
        let mut info = b"virtseal persisted keks v1\0".to_vec();
        info.extend_from_slice(provider.0.as_bytes());
        let key = kdf::hkdf(secret.expose(), salt, &info)?;
        Ok(Self { key, provider })
    }

    /// # Errors
    /// When `bytes` is no AES-256 key, or there is no OpenSSL.
    pub(super) fn encrypt(&self, kek: &KekId, span: Span, bytes: &SecretBytes) -> io::Result<Vec<u8>> {
        if bytes.expose().len() != KEY {
            return Err(io::Error::other("a KEK of another length"));
        }
        let data = self.additional_data(kek, span);
        aead::encrypt(&self.key, &data, bytes.expose()).map_err(io::Error::other)
    }

    /// The KEK; `None` for anything but what [`RowKey::encrypt`] returned for the same KEK and times.
    pub(super) fn decrypt(&self, kek: &KekId, span: Span, body: &[u8]) -> io::Result<Option<SecretBytes>> {
        let mut bytes = SecretBytes::zeroed(KEY)?;
        let data = self.additional_data(kek, span);
        let opened = aead::decrypt(&self.key, &data, body, bytes.expose_mut());
        Ok(opened.is_ok().then_some(bytes))
    }

    /// Label ‖ provider (16 bytes) ‖ fetched, expires (8 bytes each, big-endian) ‖ the KEK's name.
    fn additional_data(&self, kek: &KekId, span: Span) -> Vec<u8> {
        let mut data = b"virtseal persisted kek v1".to_vec();
        data.extend_from_slice(self.provider.0.as_bytes());
        data.extend_from_slice(&span.fetched.to_be_bytes());
        data.extend_from_slice(&span.expires.to_be_bytes());
        data.extend_from_slice(kek.0.as_bytes());
        data
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn secret(byte: u8) -> SecretBytes {
        SecretBytes::take(&mut [byte; KEY]).unwrap()
    }

    fn row_key(secret_byte: u8, salt: &[u8], provider: u128) -> RowKey {
        RowKey::derive(&secret(secret_byte), salt, ProviderId(Uuid::from_u128(provider))).unwrap()
    }

    fn kek(name: &str) -> KekId {
        KekId(name.to_owned())
    }

    const SPAN: Span = Span {
        fetched: 1000,
        expires: 2000,
    };

    fn opens(key: &RowKey, name: &str, span: Span, body: &[u8]) -> bool {
        let opened = key.decrypt(&kek(name), span, body).unwrap();
        opened.is_some_and(|bytes| bytes.expose() == [7; KEY])
    }

    #[test]
    fn row_opens_as_what_it_is_and_as_nothing_else() {
        let key = row_key(1, b"salt", 1);
        let body = key.encrypt(&kek("a"), SPAN, &secret(7)).unwrap();
        assert!(opens(&key, "a", SPAN, &body));
        assert!(opens(&row_key(1, b"salt", 1), "a", SPAN, &body));
        assert!(!opens(&key, "b", SPAN, &body), "moved to another KEK");
        for (fetched, expires) in [(1001, 2000), (999, 2000), (1000, 2001), (1000, i64::MAX)] {
            assert!(!opens(&key, "a", Span { fetched, expires }, &body), "other times");
        }
        assert!(
            !opens(&row_key(1, b"salt", 2), "a", SPAN, &body),
            "another provider"
        );
        assert!(
            !opens(&row_key(1, b"other", 1), "a", SPAN, &body),
            "from before a purge"
        );
        assert!(!opens(&row_key(2, b"salt", 1), "a", SPAN, &body), "another TPM");
        let again = key.encrypt(&kek("a"), SPAN, &secret(7)).unwrap();
        assert_ne!(body, again, "a nonce of its own");
        assert!(
            key.encrypt(&kek("a"), SPAN, &SecretBytes::random(16).unwrap())
                .is_err()
        );
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let key = row_key(1, b"salt", 1);
        let body = key.encrypt(&kek("a"), SPAN, &secret(7)).unwrap();
        for bit in 0..body.len() * 8 {
            let mut flipped = body.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!opens(&key, "a", SPAN, &flipped), "bit {bit}");
        }
        for length in 0..body.len() {
            assert!(!opens(&key, "a", SPAN, &body[..length]), "{length} bytes");
        }
    }

    #[test]
    fn times_hold_by_a_clock_between_them() {
        for (now, holds) in [
            (999, false),
            (1000, true),
            (1999, true),
            (2000, false),
            (i64::MIN, false),
        ] {
            assert_eq!(SPAN.holds(now), holds, "{now}");
        }
    }

    #[test]
    fn row_is_renewed_after_a_quarter_of_its_time() {
        let row = Span::lasting(1000, 400);
        assert_eq!(
            row,
            Span {
                fetched: 1000,
                expires: 1400
            }
        );
        for (fetched, renewed) in [
            (1000, false),
            (1099, false),
            (1100, true),
            (1400, true),
            (999, true),
        ] {
            assert_eq!(
                row.is_to_be_renewed_by(Span::lasting(fetched, 400)),
                renewed,
                "{fetched}"
            );
        }
        assert!(
            Span::lasting(0, i64::MAX as u64).is_to_be_renewed_by(Span::lasting(9, 20)),
            "a shorter time"
        );
        assert_eq!(Span::lasting(5, u64::MAX).expires, i64::MAX);
    }

    /// HKDF-SHA256 worked out with another implementation, so that neither label nor order ever changes.
    #[test]
    fn derivation_is_pinned() {
        let key = row_key(0x11, &[0x22; 32], 0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        assert_eq!(
            hex::encode(key.key.expose()),
            "08732b63ba33e50111a22cc10280833b1fe03f31dcea5d2e0a253255e337989b"
        );
    }

    proptest! {
            #[test]
            fn garbage_opens_nothing_and_never_panics(
                body in proptest::collection::vec(any::<u8>(), 0..100),
                name in ".{0,20}",
                fetched in any::<i64>(),
                expires in any::<i64>(),
            ) {
                let key = row_key(1, b"salt", 1);
    let opened = key.decrypt(&kek(&name), Span { fetched, expires }, &body).unwrap();
                prop_assert!(opened.is_none());
            }

            #[test]
            fn names_and_times_round_trip(name in ".{0,40}", fetched in any::<i64>(), expires in any::<i64>()) {
                let key = row_key(1, b"salt", 1);
                let span = Span { fetched, expires };
                let body = key.encrypt(&kek(&name), span, &secret(7)).unwrap();
                prop_assert!(opens(&key, &name, span, &body));
            }
        }
}

//! Envelopes: the records that carry a data key wrapped.
//!
//! An envelope belongs to one object of one VM. Each of its stanzas holds the same 64-byte payload, the DEK
//! followed by SHA-256 of the [`Binding`], wrapped by one key provider; any one of them opens the envelope. The
//! binding is checked after every unwrap, so an envelope put in another's place yields an error and never a key.
//!
//! The JSON form here is what the keystore, the domain XML and the image header carry.

use std::fmt;
use std::io;
use std::str::FromStr;

use openssl::hash::{MessageDigest, hash};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use crate::secret::{Dek, SecretBytes};

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            /// A new random id.
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text.trim()).map(Self)
            }
        }
    };
}

uuid_id!(
    /// Names an envelope; also the UUID of the libvirt secret that its DEK becomes.
    EnvelopeId
);
uuid_id!(
    /// A VM: the `<uuid>` of its domain.
    VmId
);
uuid_id!(
    /// A key provider, independent of its name on any host.
    ProviderId
);

/// What an envelope's DEK encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    /// A disk image.
    Disk,
    /// The state of the VM's TPM.
    Vtpm,
    /// The UEFI variable store.
    Nvram,
}

impl ObjectKind {
    /// The name in messages, in JSON and in the keystore.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Vtpm => "vtpm",
            Self::Nvram => "nvram",
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Counts the changes of an envelope; of two copies the higher one wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Names a KEK inside its provider; opaque outside of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KekId(pub String);

impl fmt::Display for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a payload is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The envelope that carries the payload.
    pub envelope: EnvelopeId,
    /// The VM that it belongs to.
    pub vm: VmId,
    /// The kind of object that the DEK encrypts.
    pub kind: ObjectKind,
}

impl Binding {
    /// SHA-256 over a domain-separation label, the format version, the envelope's and the VM's UUID (16 bytes
    /// each, big-endian) and one byte for the kind.
    pub fn digest(&self) -> Result<[u8; 32], EnvelopeError> {
        let kind = match self.kind {
            ObjectKind::Disk => 1,
            ObjectKind::Vtpm => 2,
            ObjectKind::Nvram => 3,
        };
        let mut message = b"virtseal binding\0".to_vec();
        message.push(Envelope::VERSION);
        message.extend_from_slice(self.envelope.0.as_bytes());
        message.extend_from_slice(self.vm.0.as_bytes());
        message.push(kind);
        let digest = hash(MessageDigest::sha256(), &message).map_err(EnvelopeError::Digest)?;
        let mut out = [0; 32];
        out.copy_from_slice(&digest);
        Ok(out)
    }
}

/// What a provider wraps: DEK ‖ SHA-256(binding), 64 bytes.
#[derive(Debug)]
pub struct Payload(SecretBytes);

impl Payload {
    /// Length in bytes.
    pub const LEN: usize = 64;

    /// The payload of `dek` for the envelope that `binding` names.
    pub fn bind(dek: &Dek, binding: &Binding) -> Result<Self, EnvelopeError> {
        let mut bytes = SecretBytes::zeroed(Self::LEN).map_err(EnvelopeError::Memory)?;
        bytes.expose_mut()[..Dek::LEN].copy_from_slice(dek.expose());
        bytes.expose_mut()[Dek::LEN..].copy_from_slice(&binding.digest()?);
        Ok(Self(bytes))
    }

    /// What a provider unwrapped.
    ///
    /// # Errors
    /// [`EnvelopeError::PayloadLength`] unless `bytes` has 64 bytes.
    pub fn from_unwrapped(bytes: SecretBytes) -> Result<Self, EnvelopeError> {
        match bytes.expose().len() {
            Self::LEN => Ok(Self(bytes)),
            found => Err(EnvelopeError::PayloadLength { found }),
        }
    }

    /// The DEK, after the binding was compared in constant time.
    ///
    /// # Errors
    /// [`EnvelopeError::BindingMismatch`] when the payload was made for another envelope, VM or kind.
    pub fn dek(&self, binding: &Binding) -> Result<Dek, EnvelopeError> {
        let (dek, bound_to) = self.0.expose().split_at(Dek::LEN);
        if !openssl::memcmp::eq(bound_to, &binding.digest()?) {
            return Err(EnvelopeError::BindingMismatch(*binding));
        }
        Dek::from_bytes(dek).map_err(EnvelopeError::Memory)
    }

    /// The 64 bytes, for a provider's wrap.
    #[must_use]
    pub fn expose(&self) -> &[u8] {
        self.0.expose()
    }
}

/// One provider's copy of the wrapped payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stanza {
    /// The provider that can unwrap it.
    pub provider: ProviderId,
    /// The provider's name where it was wrapped: a hint for messages on a host that does not know the id.
    pub provider_name: String,
    /// The KEK in that provider.
    pub kek: KekId,
    /// How it was wrapped, in the provider's words (`A256GCM`, …).
    pub mechanism: String,
    /// The wrapped payload, as the mechanism lays it out.
    #[serde(with = "base64_bytes")]
    pub body: Vec<u8>,
}

/// An object's DEK, wrapped for one provider or more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Envelope {
    version: u8,
    /// Its name, and that of the libvirt secret.
    pub id: EnvelopeId,
    /// The VM that the object belongs to.
    pub vm: VmId,
    /// What the DEK encrypts.
    pub kind: ObjectKind,
    /// Rises with every change.
    pub generation: Generation,
    /// One per recipient; never empty.
    pub stanzas: Vec<Stanza>,
}

impl Envelope {
    /// The only format there is.
    pub const VERSION: u8 = 1;
    /// The most bytes that the JSON form may have: it must fit an image's header cluster.
    pub const MAX_JSON: usize = 32 * 1024;
    /// The most recipients an envelope may have.
    pub const MAX_STANZAS: usize = 16;

    /// A first-generation envelope for the payload bound to `binding`.
    ///
    /// # Errors
    /// [`EnvelopeError::StanzaCount`] for none or more than [`Self::MAX_STANZAS`].
    pub fn new(binding: &Binding, stanzas: Vec<Stanza>) -> Result<Self, EnvelopeError> {
        Self {
            version: Self::VERSION,
            id: binding.envelope,
            vm: binding.vm,
            kind: binding.kind,
            generation: Generation(1),
            stanzas,
        }
        .validated()
    }

    /// What its payload must be bound to.
    #[must_use]
    pub fn binding(&self) -> Binding {
        Binding {
            envelope: self.id,
            vm: self.vm,
            kind: self.kind,
        }
    }

    /// The compact JSON form.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("an envelope holds only strings, numbers and lists")
    }

    /// Reads the JSON form. Nothing in it can be trusted before a stanza was unwrapped.
    ///
    /// # Errors
    /// When it is too long, not an envelope, of another version, or without stanzas.
    pub fn from_json(json: &str) -> Result<Self, EnvelopeError> {
        if json.len() > Self::MAX_JSON {
            return Err(EnvelopeError::TooLong { found: json.len() });
        }
        let envelope: Self = serde_json::from_str(json).map_err(EnvelopeError::Json)?;
        envelope.validated()
    }

    fn validated(self) -> Result<Self, EnvelopeError> {
        if self.version != Self::VERSION {
            return Err(EnvelopeError::Version { found: self.version });
        }
        if !(1..=Self::MAX_STANZAS).contains(&self.stanzas.len()) {
            return Err(EnvelopeError::StanzaCount {
                found: self.stanzas.len(),
            });
        }
        Ok(self)
    }
}

/// Why an envelope or a payload can't be used.
#[derive(Debug, Error)]
pub enum EnvelopeError {
    /// Longer than [`Envelope::MAX_JSON`].
    #[error(
        "the envelope has {found} bytes, more than the {} allowed",
        Envelope::MAX_JSON
    )]
    TooLong {
        /// Its length in bytes.
        found: usize,
    },
    /// Not the JSON of an envelope.
    #[error("the envelope is damaged")]
    Json(#[source] serde_json::Error),
    /// Written by a later virtseal.
    #[error(
        "the envelope has format {found}, this virtseal reads {}: upgrade virtseal",
        Envelope::VERSION
    )]
    Version {
        /// The format found.
        found: u8,
    },
    /// No recipient, or too many.
    #[error(
        "the envelope has {found} stanzas, 1 to {} are allowed",
        Envelope::MAX_STANZAS
    )]
    StanzaCount {
        /// How many.
        found: usize,
    },
    /// A provider returned something that is not a payload.
    #[error("the unwrapped payload has {found} bytes instead of {}", Payload::LEN)]
    PayloadLength {
        /// How many bytes.
        found: usize,
    },
    /// The payload belongs to another envelope.
    #[error(
        "the wrapped key was not made for envelope {} ({} of VM {}): it was swapped or tampered with",
        .0.envelope, .0.kind, .0.vm
    )]
    BindingMismatch(Binding),
    /// OpenSSL can't hash.
    #[error("SHA-256 failed")]
    Digest(#[source] openssl::error::ErrorStack),
    /// No secret memory.
    #[error("no memory for a key (is RLIMIT_MEMLOCK too low?)")]
    Memory(#[source] io::Error),
}

mod base64_bytes {
    use base64::{Engine, engine::general_purpose::STANDARD};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kinds() -> impl Strategy<Value = ObjectKind> {
        prop_oneof![
            Just(ObjectKind::Disk),
            Just(ObjectKind::Vtpm),
            Just(ObjectKind::Nvram)
        ]
    }

    fn bindings() -> impl Strategy<Value = Binding> {
        (any::<u128>(), any::<u128>(), kinds()).prop_map(|(envelope, vm, kind)| Binding {
            envelope: EnvelopeId(Uuid::from_u128(envelope)),
            vm: VmId(Uuid::from_u128(vm)),
            kind,
        })
    }

    fn stanzas() -> impl Strategy<Value = Stanza> {
        (any::<u128>(), ".{0,20}", ".{0,20}", ".{0,20}", any::<[u8; 32]>()).prop_map(
            |(provider, provider_name, kek, mechanism, body)| Stanza {
                provider: ProviderId(Uuid::from_u128(provider)),
                provider_name,
                kek: KekId(kek),
                mechanism,
                body: body.to_vec(),
            },
        )
    }

    proptest! {
        #[test]
        fn json_round_trip(binding in bindings(), stanzas in prop::collection::vec(stanzas(), 1..4)) {
            let envelope = Envelope::new(&binding, stanzas).unwrap();
            prop_assert_eq!(Envelope::from_json(&envelope.to_json()).unwrap(), envelope);
        }

        #[test]
        fn garbage_is_an_error(text in ".{0,200}") {
            prop_assert!(Envelope::from_json(&text).is_err());
        }

        #[test]
        fn payload_opens_only_for_its_binding(a in bindings(), b in bindings()) {
            let dek = Dek::random().unwrap();
            let payload = Payload::bind(&dek, &a).unwrap();
            let opened = payload.dek(&a).unwrap();
            prop_assert_eq!(opened.expose(), dek.expose());
            prop_assert_eq!(payload.dek(&b).is_ok(), a == b);
        }
    }

    #[test]
    fn another_version_is_named() {
        let json = r#"{"version":2,"id":"6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7","vm":"6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b8","kind":"disk","generation":1,"stanzas":[]}"#;
        assert!(matches!(
            Envelope::from_json(json),
            Err(EnvelopeError::Version { found: 2 })
        ));
    }

    #[test]
    fn every_flipped_payload_byte_is_noticed_in_the_binding() {
        let binding = Binding {
            envelope: EnvelopeId::random(),
            vm: VmId::random(),
            kind: ObjectKind::Vtpm,
        };
        let payload = Payload::bind(&Dek::random().unwrap(), &binding).unwrap();
        for at in Dek::LEN..Payload::LEN {
            let mut bytes = payload.expose().to_vec();
            bytes[at] ^= 1;
            let tampered = Payload::from_unwrapped(SecretBytes::take(&mut bytes).unwrap()).unwrap();
            assert!(matches!(
                tampered.dek(&binding),
                Err(EnvelopeError::BindingMismatch(_))
            ));
        }
    }
}

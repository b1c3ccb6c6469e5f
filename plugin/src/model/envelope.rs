//! Envelopes: the records that carry a data key wrapped.
//!
//! An envelope belongs to one object of one VM. Each of its stanzas holds the same 64-byte payload, the DEK
//! followed by SHA-256 of the [`Binding`], wrapped by one key provider; any one of them opens the envelope. The
//! binding is checked after every unwrap, so an envelope put in another's place yields an error and never a key.
//!
//! The JSON form is what the keystore, the domain XML and the image header carry. The last two are written by people who
//! are not root, so an [`Envelope`] that was read from there proves nothing: its list of stanzas may lack one, and its
//! generation may be anything. [`Envelope::verify`] makes a [`Verified`] of it, which alone can be kept and changed.

mod json;
mod mac;
mod precedence;
mod verified;

use std::fmt;
use std::io;
use std::str::FromStr;

use openssl::hash::{MessageDigest, hash};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;
use zlink::introspect::CustomType;

use crate::secret::{Dek, SecretBytes};

pub(crate) use mac::Mac;
pub(crate) use precedence::{Generation, Precedence};
pub(crate) use verified::{Format1, Verified};

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[cfg_attr(test, derive(schemars::JsonSchema))]
        #[serde(transparent)]
        pub(crate) struct $name(pub Uuid);

        impl $name {
            pub(crate) fn random() -> Self {
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

/// Where a copy of an envelope is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[zlink(rename_all = "lowercase")]
pub(crate) enum CopyPlace {
    /// In the domain's metadata.
    Xml,
    /// In the header of the image.
    Image,
}

impl CopyPlace {
    /// The word in the keystore and in messages.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Xml => "xml",
            Self::Image => "image",
        }
    }
}

/// What an envelope's DEK encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, CustomType)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[zlink(rename_all = "lowercase")]
pub(crate) enum ObjectKind {
    Disk,
    /// The state of the VM's TPM.
    Vtpm,
    Nvram,
}

/// Who keeps an object, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// A file or device that QEMU opens, at a path that the XML names.
    Image,
    /// A directory of swtpm's, where libvirt has it by the VM's UUID.
    State,
}

impl ObjectKind {
    /// The name in messages, in JSON and in the keystore.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Vtpm => "vtpm",
            Self::Nvram => "nvram",
        }
    }

    /// What follows from its form is asked of it here, so that nobody else has to know the kinds.
    pub(crate) fn form(self) -> Form {
        match self {
            Self::Disk | Self::Nvram => Form::Image,
            Self::Vtpm => Form::State,
        }
    }

    /// Whether the first start of its VM makes it: until then none has to be there.
    pub(crate) fn is_made_at_first_start(self) -> bool {
        self.form() == Form::State
    }

    /// Whether its place is a path that is written down.
    pub(crate) fn is_kept_by_path(self) -> bool {
        self.form() == Form::Image
    }

    /// Its byte in what is hashed: never to be changed.
    fn code(self) -> u8 {
        match self {
            Self::Disk => 1,
            Self::Vtpm => 2,
            Self::Nvram => 3,
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Names a KEK inside its provider; opaque outside of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(transparent)]
pub(crate) struct KekId(pub String);

impl fmt::Display for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a payload is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Binding {
    pub envelope: EnvelopeId,
    pub vm: VmId,
    /// The kind of object that the DEK encrypts.
    pub kind: ObjectKind,
}

impl Binding {
    /// The version of the binding, which is not that of the envelope: format 2 keeps it, so that no stanza has to be
    /// wrapped anew.
    const VERSION: u8 = 1;

    /// SHA-256 over a domain-separation label, the binding's version, the envelope's and the VM's UUID (16 bytes
    /// each, big-endian) and one byte for the kind.
    pub(crate) fn digest(&self) -> Result<[u8; 32], EnvelopeError> {
        let mut message = b"virtseal binding\0".to_vec();
        message.push(Self::VERSION);
        message.extend_from_slice(self.envelope.0.as_bytes());
        message.extend_from_slice(self.vm.0.as_bytes());
        message.push(self.kind.code());
        let digest = hash(MessageDigest::sha256(), &message).map_err(EnvelopeError::Digest)?;
        let mut out = [0; 32];
        out.copy_from_slice(&digest);
        Ok(out)
    }
}

/// What a provider wraps: DEK ‖ SHA-256(binding), 64 bytes.
#[derive(Debug)]
pub(crate) struct Payload(SecretBytes);

impl Payload {
    pub(crate) const LEN: usize = 64;

    /// The payload of `dek` for the envelope that `binding` names.
    pub(crate) fn bind(dek: &Dek, binding: &Binding) -> Result<Self, EnvelopeError> {
        let mut bytes = SecretBytes::zeroed(Self::LEN).map_err(EnvelopeError::Memory)?;
        bytes.expose_mut()[..Dek::LEN].copy_from_slice(dek.expose());
        bytes.expose_mut()[Dek::LEN..].copy_from_slice(&binding.digest()?);
        Ok(Self(bytes))
    }

    /// What a provider unwrapped.
    ///
    /// # Errors
    /// [`EnvelopeError::PayloadLength`] unless `bytes` has 64 bytes.
    pub(crate) fn from_unwrapped(bytes: SecretBytes) -> Result<Self, EnvelopeError> {
        match bytes.expose().len() {
            Self::LEN => Ok(Self(bytes)),
            found => Err(EnvelopeError::PayloadLength { found }),
        }
    }

    /// The DEK, after the binding was compared in constant time.
    ///
    /// # Errors
    /// [`EnvelopeError::BindingMismatch`] when the payload was made for another envelope, VM or kind.
    pub(crate) fn dek(&self, binding: &Binding) -> Result<Dek, EnvelopeError> {
        let (dek, bound_to) = self.0.expose().split_at(Dek::LEN);
        if !openssl::memcmp::eq(bound_to, &binding.digest()?) {
            return Err(EnvelopeError::BindingMismatch(*binding));
        }
        Dek::from_bytes(dek).map_err(EnvelopeError::Memory)
    }

    /// The 64 bytes, for a provider's wrap.
    pub(crate) fn expose(&self) -> &[u8] {
        self.0.expose()
    }
}

/// One provider's copy of the wrapped payload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(crate) struct Stanza {
    pub provider: ProviderId,
    /// The provider's name where it was wrapped: a hint for messages on a host that does not know the id.
    pub provider_name: String,
    pub kek: KekId,
    /// How it was wrapped, in the provider's words (`A256GCM`, …).
    pub mechanism: String,
    /// The wrapped payload, as the mechanism lays it out.
    #[serde(with = "base64_bytes")]
    #[cfg_attr(test, schemars(with = "String"))]
    pub body: Vec<u8>,
}

/// An object's DEK, wrapped for one provider or more, as somebody has written it down: who, nobody knows.
///
/// What may be believed is a [`Verified`]; only the DEK that a stanza opens to makes one of this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "json::Wire", try_from = "json::Wire")]
pub(crate) struct Envelope {
    /// Its name, and that of the libvirt secret.
    pub id: EnvelopeId,
    /// The VM that the object belongs to.
    pub vm: VmId,
    /// What the DEK encrypts.
    pub kind: ObjectKind,
    /// Rises with every change.
    pub generation: Generation,
    /// The other VMs that root has let have the object too: in the order of their UUIDs, each once.
    pub shared_with: Vec<VmId>,
    /// Whether a VM has run with the object: from then on a missing one is a loss.
    pub seen: bool,
    /// One per recipient; never empty.
    pub stanzas: Vec<Stanza>,
    /// Over all of the above, under a key derived from the DEK; none in format 1.
    mac: Option<Mac>,
}

impl Envelope {
    /// The format that is written. Format 1, which has no MAC, is still read.
    pub(crate) const FORMAT: u8 = 2;
    /// The most bytes that the JSON form may have: it must fit an image's header cluster.
    pub(crate) const MAX_JSON: usize = 32 * 1024;
    /// The most recipients an envelope may have.
    pub(crate) const MAX_STANZAS: usize = 16;
    /// The most other VMs that an object may be shared with.
    pub(crate) const MAX_SHARED: usize = 64;

    /// What its payload must be bound to.
    pub(crate) fn binding(&self) -> Binding {
        Binding {
            envelope: self.id,
            vm: self.vm,
            kind: self.kind,
        }
    }

    /// Whether `vm` may have the object, by what the envelope says: it is its own, or root has shared it with it. To be
    /// believed of a [`Verified`] only.
    pub(crate) fn serves(&self, vm: VmId) -> bool {
        self.vm == vm || self.shared_with.binary_search(&vm).is_ok()
    }

    /// The format that it was written in: 1 or 2.
    pub(crate) fn format(&self) -> u8 {
        match self.mac {
            None => 1,
            Some(_) => Self::FORMAT,
        }
    }

    /// The compact JSON form: of format 1 as it was, so that a copy of it stays equal byte for byte.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("an envelope holds only strings, numbers and lists")
    }

    /// Reads the JSON form, of format 1 or 2. Nothing in it may be believed: see [`Envelope::verify`].
    ///
    /// # Errors
    /// When it is too long, not an envelope, of a later format, or breaks one of the limits.
    pub(crate) fn from_json(json: &str) -> Result<Self, EnvelopeError> {
        json::read(json)
    }

    fn validated(self) -> Result<Self, EnvelopeError> {
        if self.mac.is_some() && self.generation.stored().is_none() {
            return Err(EnvelopeError::Generation {
                found: self.generation,
            });
        }
        if !(1..=Self::MAX_STANZAS).contains(&self.stanzas.len()) {
            return Err(EnvelopeError::StanzaCount {
                found: self.stanzas.len(),
            });
        }
        let in_order = self.shared_with.is_sorted_by(|a, b| a < b) && !self.shared_with.contains(&self.vm);
        if self.shared_with.len() > Self::MAX_SHARED || !in_order {
            return Err(EnvelopeError::SharedWith);
        }
        Ok(self)
    }
}

/// Why an envelope or a payload can't be used.
#[derive(Debug, Error)]
pub(crate) enum EnvelopeError {
    #[error(
        "the envelope has {found} bytes, more than the {} allowed",
        Envelope::MAX_JSON
    )]
    TooLong { found: usize },
    #[error("the envelope is damaged")]
    Json(#[source] serde_json::Error),
    #[error(
        "the envelope has format {found}, this virtseal reads up to {}: upgrade virtseal",
        Envelope::FORMAT
    )]
    Version { found: u8 },
    #[error(
        "the envelope has {found} stanzas, 1 to {} are allowed",
        Envelope::MAX_STANZAS
    )]
    StanzaCount { found: usize },
    /// Higher than can be stored, see [`Generation::stored`].
    #[error("the envelope claims generation {found}, which no virtseal made")]
    Generation { found: Generation },
    /// Too many, not in order, or its own.
    #[error(
        "the envelope's list of VMs to share with is damaged: up to {} others, in order, are allowed",
        Envelope::MAX_SHARED
    )]
    SharedWith,
    /// The fields of one format under the number of another.
    #[error("the envelope is damaged: its fields are not those of format {version}")]
    Fields { version: u8 },
    /// There is no way to tell who made it.
    #[error("the envelope has format 1, which anyone who writes XML or images can have made")]
    Format1,
    /// The MAC is not one by its DEK.
    #[error("the envelope was changed by somebody who does not have its key (generation {generation})")]
    Mac { generation: Generation },
    #[error("HMAC-SHA256 failed")]
    Hmac(#[source] openssl::error::ErrorStack),
    /// A provider returned something that is not a payload.
    #[error("the unwrapped payload has {found} bytes instead of {}", Payload::LEN)]
    PayloadLength { found: usize },
    #[error(
        "the wrapped key was not made for envelope {} ({} of VM {}): it was swapped or tampered with",
        .0.envelope, .0.kind, .0.vm
    )]
    BindingMismatch(Binding),
    #[error("SHA-256 failed")]
    Digest(#[source] openssl::error::ErrorStack),
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
pub(crate) mod fixture;
#[cfg(test)]
mod tests;

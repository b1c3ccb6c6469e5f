//! KEKs of a native provider: derived from its root key, never stored.
//!
//! KEK = HKDF-SHA256 (RFC 5869) of the root key, salted with the provider's UUID; the info is a label and the
//! KEK's name. What it wraps is laid out as [`gcm`] says.

use std::fmt;
use std::str::FromStr;

use crate::crypto::kdf;
use crate::model::envelope::{KekId, Payload, ProviderId, VmId};
use crate::provider::toolbox::gcm::{self, MECHANISM};
use crate::provider::{KekScope, ProviderError};
use crate::secret::SecretBytes;

/// What a [`KekId`] of a native provider says: `v1:vm:<uuid>` or `v1:provider`, the number being the root key's
/// generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KekName {
    pub(super) generation: u32,
    pub(super) scope: KekScope,
}

impl KekName {
    pub(super) fn id(self) -> KekId {
        KekId(self.to_string())
    }

    /// Reads the one spelling that [`KekName::id`] writes: two spellings would be two keys.
    pub(super) fn parse(id: &KekId) -> Result<Self, ProviderError> {
        let unknown = || ProviderError::UnknownKek(id.clone());
        let name: Self = id.0.parse().map_err(|NotAName| unknown())?;
        if name.id() == *id {
            Ok(name)
        } else {
            Err(unknown())
        }
    }
}

impl fmt::Display for KekName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.scope {
            KekScope::Vm(vm) => write!(f, "v{}:vm:{vm}", self.generation),
            KekScope::Provider => write!(f, "v{}:provider", self.generation),
        }
    }
}

pub(super) struct NotAName;

impl FromStr for KekName {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let (generation, scope) = text
            .strip_prefix('v')
            .and_then(|rest| rest.split_once(':'))
            .ok_or(NotAName)?;
        let scope = match scope.split_once(':') {
            None if scope == "provider" => KekScope::Provider,
            Some(("vm", uuid)) => KekScope::Vm(uuid.parse::<VmId>().map_err(|_| NotAName)?),
            _ => return Err(NotAName),
        };
        Ok(Self {
            generation: generation.parse().map_err(|_| NotAName)?,
            scope,
        })
    }
}

/// A derived KEK, for one wrap or unwrap.
pub(super) struct Kek {
    key: SecretBytes,
    additional_data: Vec<u8>,
}

impl Kek {
    pub(super) fn derive(
        root: &SecretBytes,
        provider: ProviderId,
        name: KekName,
    ) -> Result<Self, ProviderError> {
        let mut info = b"virtseal native kek\0".to_vec();
        info.extend_from_slice(name.to_string().as_bytes());
        let key = kdf::hkdf(root.expose(), provider.0.as_bytes(), &info)
            .map_err(ProviderError::internal("deriving a KEK"))?;
        Ok(Self {
            key,
            additional_data: gcm::additional_data(provider, &name.to_string(), MECHANISM),
        })
    }

    pub(super) fn wrap(&self, payload: &Payload) -> Result<Vec<u8>, ProviderError> {
        gcm::wrap(&self.key, &self.additional_data, payload)
    }

    /// # Errors
    /// [`ProviderError::Tampered`] for anything but what [`Kek::wrap`] returned under the same name.
    pub(super) fn unwrap(&self, body: &[u8]) -> Result<Payload, ProviderError> {
        gcm::unwrap(&self.key, &self.additional_data, body)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    fn scopes() -> impl Strategy<Value = KekScope> {
        prop_oneof![
            Just(KekScope::Provider),
            any::<u128>().prop_map(|vm| KekScope::Vm(VmId(Uuid::from_u128(vm)))),
        ]
    }

    proptest! {
        #[test]
        fn names_round_trip(generation in any::<u32>(), scope in scopes()) {
            let name = KekName { generation, scope };
            prop_assert_eq!(KekName::parse(&name.id()).unwrap(), name);
        }

        #[test]
        fn other_spellings_are_unknown(text in "(v[0-9+ ]{0,3}:)?(vm|provider)?:?[0-9a-fA-F{}-]{0,40}") {
            if let Ok(name) = KekName::parse(&KekId(text.clone())) {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }

    #[test]
    fn upper_case_and_leading_zeros_are_unknown() {
        let vm = "6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7";
        assert!(KekName::parse(&KekId(format!("v1:vm:{vm}"))).is_ok());
        for text in [
            format!("v01:vm:{vm}"),
            format!("v+1:vm:{vm}"),
            format!("v1:vm:{}", vm.to_uppercase()),
            format!("v1:vm: {vm}"),
            format!("v1:vm:{{{vm}}}"),
            format!("v1:vm:{}", vm.replace('-', "")),
            "v1:vm".to_owned(),
            "v1:provider:".to_owned(),
            "1:provider".to_owned(),
            String::new(),
        ] {
            let id = KekId(text);
            assert!(
                matches!(KekName::parse(&id), Err(ProviderError::UnknownKek(_))),
                "{id}"
            );
        }
    }

    /// HKDF-SHA256 worked out with another implementation, so that neither label nor order ever changes:
    /// `python3 -c` with hmac and hashlib over the inputs below.
    #[test]
    fn derivation_is_pinned() {
        let mut root = [0x11; 32];
        let root = SecretBytes::take(&mut root).unwrap();
        let provider = ProviderId(Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff));
        let scope = KekScope::Vm(VmId(Uuid::from_u128(1)));
        let kek = Kek::derive(&root, provider, KekName { generation: 1, scope }).unwrap();
        assert_eq!(
            hex::encode(kek.key.expose()),
            "78f70f06406809bcfade5668aaba0459c75a4b91b71b65a438799bbf6f0d1b18"
        );
    }
}

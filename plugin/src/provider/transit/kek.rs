//! The names of KEKs at the server, and what a stanza holds.
//!
//! A KEK is `KEY:vN` (version N of a key of its own) or `KEY/UUID:vN` (derived from a shared key with that UUID, as
//! text, for its context). A VM's own key is called `virtseal-UUID-gN-RANDOM` and never again so: see [`kek_name`]. A stanza's body is the ciphertext without the `vault:vN:` in front and decoded, so that
//! there is one way to write it and each of its bytes is authenticated.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use uuid::Uuid;

use super::settings::{KeyName, TransitSettings};
use crate::model::envelope::{KekId, ProviderId, VmId};
use crate::provider::toolbox::kek_name;
use crate::provider::{KekScope, ScopeSetting};

/// Of every stanza that the engine wrapped.
pub(super) const MECHANISM: &str = "transit";
/// Of keys that virtseal makes.
const PREFIX: &str = "virtseal-";
/// More than any AEAD makes of a payload.
const MAX_BODY: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KekName {
    pub(super) key: KeyName,
    /// Whom a derived KEK serves.
    pub(super) context: Option<Uuid>,
    pub(super) version: u32,
}

impl KekName {
    /// The name in its one spelling; anything else names nothing.
    pub(super) fn parse(id: &KekId) -> Option<Self> {
        let (path, version) = id.0.rsplit_once(":v")?;
        let (key, context) = match path.split_once('/') {
            Some((key, context)) => (key, Some(Uuid::parse_str(context).ok()?)),
            None => (path, None),
        };
        let name = Self {
            key: KeyName::try_from(key.to_owned()).ok()?,
            context,
            version: version.parse().ok().filter(|version| *version > 0)?,
        };
        (name.id() == *id).then_some(name)
    }

    pub(super) fn id(&self) -> KekId {
        let Self {
            key,
            context,
            version,
        } = self;
        KekId(match context {
            Some(context) => format!("{key}/{context}:v{version}"),
            None => format!("{key}:v{version}"),
        })
    }

    /// One with a context is for many VMs.
    pub(super) fn serves(&self) -> ScopeSetting {
        match self.context {
            Some(_) => ScopeSetting::Provider,
            None => ScopeSetting::Vm,
        }
    }

    /// For a request: base64 of the context's text.
    pub(super) fn context(&self) -> Option<String> {
        self.context.map(|context| STANDARD.encode(context.to_string()))
    }

    /// As the engine writes `body`.
    pub(super) fn ciphertext(&self, body: &[u8]) -> String {
        format!("vault:v{}:{}", self.version, STANDARD.encode(body))
    }

    /// Version and body of what the engine wrote.
    pub(super) fn parse_ciphertext(text: &str) -> Option<(u32, Vec<u8>)> {
        let (version, body) = text.strip_prefix("vault:v")?.split_once(':')?;
        let body = STANDARD.decode(body).ok().filter(|body| is_body(body))?;
        Some((version.parse().ok()?, body))
    }
}

/// Whether the engine can have made it.
pub(super) fn is_body(body: &[u8]) -> bool {
    (1..=MAX_BODY).contains(&body.len())
}

/// Which key serves a scope.
pub(super) enum Serving {
    /// One whose name begins with this.
    Own(KeyName),
    /// The provider's, with this context.
    Shared(KeyName, Uuid),
}

/// The key that serves `scope`.
pub(super) fn serving(settings: &TransitSettings, provider: ProviderId, scope: &KekScope) -> Serving {
    let whom = match scope {
        KekScope::Vm(vm) => vm.0,
        KekScope::Provider => provider.0,
    };
    match settings.kek_scope {
        ScopeSetting::Vm => Serving::Own(made(whom)),
        ScopeSetting::Provider => Serving::Shared(shared_key(settings, provider), whom),
    }
}

/// Whether a stanza may name this key: an envelope, which anyone may have written, must not make us ask for the keys
/// of others.
pub(super) fn is_ours(settings: &TransitSettings, key: &KeyName) -> bool {
    key.as_str().starts_with(PREFIX) || settings.key.as_ref() == Some(key)
}

/// Whether the key was made for this VM alone.
pub(super) fn is_of_vm(key: &KeyName, vm: VmId) -> bool {
    kek_name::generation(made(vm.0).as_str(), key.as_str()).is_some()
}

/// A key to ask for where only the way to the engine is of interest.
pub(super) fn probed(settings: &TransitSettings, provider: ProviderId) -> KeyName {
    shared_key(settings, provider)
}

fn shared_key(settings: &TransitSettings, provider: ProviderId) -> KeyName {
    settings.key.clone().unwrap_or_else(|| made(provider.0))
}

fn made(whom: Uuid) -> KeyName {
    KeyName::try_from(format!("{PREFIX}{whom}")).expect("a UUID has only hex digits and '-'")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names() -> impl Strategy<Value = KekName> {
        (
            "[a-zA-Z0-9][a-zA-Z0-9._-]{0,40}",
            any::<Option<u128>>(),
            1..=u32::MAX,
        )
            .prop_map(|(key, context, version)| KekName {
                key: KeyName::try_from(key).unwrap(),
                context: context.map(Uuid::from_u128),
                version,
            })
    }

    proptest! {
        #[test]
        fn one_spelling_each(name in names()) {
            prop_assert_eq!(KekName::parse(&name.id()), Some(name));
        }

        #[test]
        fn garbage_names_nothing(text in "[a-z/:v0-9.-]{0,30}") {
            let id = KekId(text);
            if let Some(name) = KekName::parse(&id) {
                prop_assert_eq!(name.id(), id);
            }
        }

        #[test]
        fn ciphertext_round_trip(name in names(), body in prop::collection::vec(any::<u8>(), 1..200)) {
            let read = KekName::parse_ciphertext(&name.ciphertext(&body));
            prop_assert_eq!(read, Some((name.version, body)));
        }
    }

    #[test]
    fn other_spellings_name_nothing() {
        for text in [
            "",
            "a",
            "a:v0",
            "a:v01",
            "a:v+1",
            "a:v",
            "../a:v1",
            "a/b:v1",
            "a/../b:v1",
            ":v1",
        ] {
            assert_eq!(KekName::parse(&KekId(text.to_owned())), None, "{text}");
        }
        for text in ["", "vault:v1:", "vault:vx:AAAA", "vault:v1:====", "v1:AAAA"] {
            assert_eq!(KekName::parse_ciphertext(text), None, "{text}");
        }
    }
}

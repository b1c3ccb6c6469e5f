//! Words of closed sets: an enum on the wire, snake_case in JSON, `not backed up` where people read it.

use std::fmt;

use serde::de::value::Error as ValueError;
use serde::de::{DeserializeOwned, IntoDeserializer};
use serde::{Deserialize, Serialize};
use zlink::idl;
use zlink::introspect::Type;

/// A word of a set that this version knows, or one that a newer virtseald has: a command that is older shows it as it came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum OrNewer<T> {
    Known(T),
    Newer(String),
}

impl<T: Type> Type for OrNewer<T> {
    const TYPE: &'static idl::Type<'static> = T::TYPE;
}

#[cfg(test)]
impl<T: schemars::JsonSchema> schemars::JsonSchema for OrNewer<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        T::schema_name()
    }

    fn schema_id() -> std::borrow::Cow<'static, str> {
        T::schema_id()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        T::json_schema(generator)
    }
}

impl<T> From<T> for OrNewer<T> {
    fn from(word: T) -> Self {
        Self::Known(word)
    }
}

impl<T: DeserializeOwned> OrNewer<T> {
    /// The one that is called so on the wire.
    pub(crate) fn named(word: &str) -> Self {
        T::deserialize(word.into_deserializer())
            .map_or_else(|_: ValueError| Self::Newer(word.to_owned()), Self::Known)
    }
}

impl<T: Copy> OrNewer<T> {
    pub(crate) fn known(&self) -> Option<T> {
        match self {
            Self::Known(word) => Some(*word),
            Self::Newer(_) => None,
        }
    }
}

impl<T: Serialize> fmt::Display for OrNewer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(word) => f.write_str(&words(word)),
            Self::Newer(word) => write!(f, "{} (of a newer virtseald)", words(word)),
        }
    }
}

/// A word of the wire, as it is printed.
pub(crate) fn words(word: &impl Serialize) -> String {
    let json = serde_json::to_value(word).unwrap_or_default();
    json.as_str().unwrap_or_default().replace('_', " ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{JobState, ProviderState, VmState};

    #[test]
    fn states_are_words_for_people_and_snake_case_in_json() {
        let state = OrNewer::from(ProviderState::NotBackedUp);
        assert_eq!(state.to_string(), "not backed up");
        assert_eq!(serde_json::to_string(&state).unwrap(), r#""not_backed_up""#);
        assert_eq!(words(&VmState::NotInXml), "not in xml");
    }

    #[test]
    fn a_word_of_a_newer_daemon_is_shown_as_it_came() {
        let newer: OrNewer<JobState> = serde_json::from_str(r#""half_done""#).unwrap();
        assert_eq!(newer.known(), None);
        assert_eq!(newer.to_string(), "half done (of a newer virtseald)");
        assert_eq!(serde_json::to_string(&newer).unwrap(), r#""half_done""#);
        let known: OrNewer<JobState> = serde_json::from_str(r#""done""#).unwrap();
        assert_eq!(known, JobState::Done.into());
    }
}

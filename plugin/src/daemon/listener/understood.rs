//! Whether a call asks for something that this virtseald does not know.
//!
//! A field that is passed over is a request that is not fulfilled, and nobody is told: the sum that an image was to have, say, where the
//! command line is of a later version than virtseald. So a call with a field that the interface does not describe is refused, unless that is
//! null, which asks for nothing; so is one with a word that is not of its set. The hook's calls are let through: what is new in them is for
//! its virtseald to use, not to obey.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use zlink::idl::{Field, Interface, Type};

use crate::daemon::service::host_interface;

#[derive(Deserialize)]
struct Named<'a> {
    #[serde(borrow)]
    method: Cow<'a, str>,
}

#[derive(Deserialize)]
struct Given {
    #[serde(default)]
    parameters: Value,
    #[serde(default)]
    oneway: bool,
}

/// What a call asks for that this version does not know.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unknown {
    Field(String),
    Word {
        field: String,
        word: String,
        known: Vec<String>,
    },
}

/// What comes first of that in a call, and whether its caller waits for an answer.
pub(super) fn unknown(message: &[u8]) -> Option<(Unknown, bool)> {
    let interface = host_interface();
    let called = serde_json::from_slice::<Named<'_>>(message).ok()?.method;
    let name = called
        .strip_prefix(interface.name().as_str())?
        .strip_prefix('.')?;
    let method = interface.methods().find(|method| method.name() == name)?;
    let given = serde_json::from_slice::<Given>(message).ok()?;
    let unknown = unknown_of(interface, method.inputs(), &given.parameters)?;
    Some((unknown, !given.oneway))
}

fn unknown_of<'i, 't: 'i>(
    interface: &Interface<'_>,
    fields: impl Iterator<Item = &'i Field<'t>>,
    given: &Value,
) -> Option<Unknown> {
    let fields: Vec<_> = fields.collect();
    let mut given = given.as_object()?.iter().filter(|(_, value)| !value.is_null());
    given.find_map(|(name, value)| {
        let field = fields.iter().find(|field| field.name() == name.as_str());
        match field {
            Some(field) => unknown_in(interface, name, field.ty(), value),
            None => Some(Unknown::Field(name.clone())),
        }
    })
}

fn unknown_in(interface: &Interface<'_>, field: &str, kind: &Type<'_>, given: &Value) -> Option<Unknown> {
    match kind {
        Type::Optional(inner) => unknown_in(interface, field, inner, given),
        Type::Array(inner) => {
            let mut all = given.as_array()?.iter();
            all.find_map(|one| unknown_in(interface, field, inner, one))
        }
        Type::Map(inner) => {
            let mut all = given.as_object()?.values();
            all.find_map(|one| unknown_in(interface, field, inner, one))
        }
        Type::Object(fields) => unknown_of(interface, fields.iter(), given),
        Type::Custom(name) => {
            let kind = interface.custom_types().find(|kind| kind.name() == name)?;
            if let Some(object) = kind.as_object() {
                return unknown_of(interface, object.fields(), given);
            }
            let word = given.as_str()?;
            let words = kind.as_enum()?.variants();
            let known: Vec<_> = words.map(|known| known.name().as_str().to_owned()).collect();
            (!known.iter().any(|known| known == word)).then(|| Unknown::Word {
                field: field.to_owned(),
                word: word.to_owned(),
                known,
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(method: &str, parameters: &Value) -> Option<Unknown> {
        let message = json!({ "method": method, "parameters": parameters }).to_string();
        Some(unknown(message.as_bytes())?.0)
    }

    fn field(name: &str) -> Option<Unknown> {
        Some(Unknown::Field(name.to_owned()))
    }

    #[test]
    fn what_this_version_does_not_know_is_found_at_any_depth() {
        let create = "io.virtseal.Host.CreateVolume";
        let known = json!({"request": {"path": "/a", "vm": "web01", "digest": "sha256:00"}});
        assert_eq!(found(create, &known), None);
        let later = json!({"request": {"path": "/a", "vm": "web01", "verify": {"by": "x"}}});
        assert_eq!(found(create, &later), field("verify"));
        let nothing = json!({"request": {"path": "/a", "vm": "web01", "verify": null}});
        assert_eq!(found(create, &nothing), None);
        let top = json!({"vm": "web01", "unless": true});
        assert_eq!(found("io.virtseal.Host.ForgetVm", &top), field("unless"));
        let listed = json!({"request": {"assigned": [{"key": "a", "value": "b", "until": "c"}]}});
        assert_eq!(found("io.virtseal.Host.SetProvider", &listed), field("until"));
        for (method, parameters) in [
            ("io.virtseal.Lifecycle.Prepare", json!({"later": 1})),
            ("io.virtseal.Host.NoSuchMethod", json!({"later": 1})),
            ("org.varlink.service.GetInfo", json!({"later": 1})),
            (create, json!([1])),
            (create, json!({"request": 7})),
        ] {
            assert_eq!(found(method, &parameters), None, "{method}");
        }
        assert_eq!(unknown(b"{"), None);
    }

    #[test]
    fn a_word_of_another_set_is_refused_with_those_that_are_known() {
        let of = |format| json!({"request": {"path": "/a", "vm": "web01", "from_format": format}});
        let create = "io.virtseal.Host.CreateVolume";
        assert_eq!(found(create, &of(json!("raw"))), None);
        assert_eq!(found(create, &of(json!(null))), None);
        let word = |field: &str, word: &str, known: &[&str]| {
            let known = known.iter().map(ToString::to_string).collect();
            let (field, word) = (field.to_owned(), word.to_owned());
            Some(Unknown::Word { field, word, known })
        };
        assert_eq!(
            found(create, &of(json!("vmdk"))),
            word("from_format", "vmdk", &["raw", "qcow2"])
        );
        let add = json!({"name": "a", "kind": "cloud", "settings": ""});
        assert_eq!(
            found("io.virtseal.Host.AddProvider", &add),
            word("kind", "cloud", &["native", "kmip", "pkcs11", "transit"])
        );
    }

    #[test]
    fn only_who_waits_is_told() {
        let message =
            json!({"method": "io.virtseal.Host.ForgetVm", "parameters": {"later": 1}, "oneway": true});
        assert!(!unknown(message.to_string().as_bytes()).unwrap().1);
    }
}

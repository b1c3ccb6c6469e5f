//! Whether a call asks for something that this virtseald does not know.
//!
//! A field that is passed over is a request that is not fulfilled, and nobody is told: the sum that an image was to have, say, where the
//! command line is of a later version than virtseald. So a call with a field that the interface does not describe is refused, unless that is
//! null, which asks for nothing. The hook's calls are let through: what is new in them is for its virtseald to use, not to obey.

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
}

/// The first field of a call that is not known.
pub(super) fn unknown_field(message: &[u8]) -> Option<String> {
    let interface = host_interface();
    let called = serde_json::from_slice::<Named<'_>>(message).ok()?.method;
    let name = called
        .strip_prefix(interface.name().as_str())?
        .strip_prefix('.')?;
    let method = interface.methods().find(|method| method.name() == name)?;
    let given = serde_json::from_slice::<Given>(message).ok()?;
    unknown(interface, method.inputs(), &given.parameters)
}

fn unknown<'i, 't: 'i>(
    interface: &Interface<'_>,
    fields: impl Iterator<Item = &'i Field<'t>>,
    given: &Value,
) -> Option<String> {
    let fields: Vec<_> = fields.collect();
    let mut given = given.as_object()?.iter().filter(|(_, value)| !value.is_null());
    given.find_map(|(name, value)| {
        let field = fields.iter().find(|field| field.name() == name.as_str());
        match field {
            Some(field) => unknown_in(interface, field.ty(), value),
            None => Some(name.clone()),
        }
    })
}

fn unknown_in(interface: &Interface<'_>, kind: &Type<'_>, given: &Value) -> Option<String> {
    match kind {
        Type::Optional(inner) => unknown_in(interface, inner, given),
        Type::Array(inner) => {
            let mut all = given.as_array()?.iter();
            all.find_map(|one| unknown_in(interface, inner, one))
        }
        Type::Map(inner) => {
            let mut all = given.as_object()?.values();
            all.find_map(|one| unknown_in(interface, inner, one))
        }
        Type::Object(fields) => unknown(interface, fields.iter(), given),
        Type::Custom(name) => {
            let mut kinds = interface.custom_types();
            let object = kinds.find(|kind| kind.name() == name)?.as_object()?;
            unknown(interface, object.fields(), given)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn unknown_of(method: &str, parameters: &Value) -> Option<String> {
        let message = json!({ "method": method, "parameters": parameters }).to_string();
        unknown_field(message.as_bytes())
    }

    #[test]
    fn what_this_version_does_not_know_is_found_at_any_depth() {
        let create = "io.virtseal.Host.CreateVolume";
        let known = json!({"request": {"path": "/a", "vm": "web01", "digest": "sha256:00"}});
        assert_eq!(unknown_of(create, &known), None);
        let later = json!({"request": {"path": "/a", "vm": "web01", "verify": {"by": "x"}}});
        assert_eq!(unknown_of(create, &later).as_deref(), Some("verify"));
        let nothing = json!({"request": {"path": "/a", "vm": "web01", "verify": null}});
        assert_eq!(unknown_of(create, &nothing), None);
        let top = json!({"vm": "web01", "unless": true});
        assert_eq!(
            unknown_of("io.virtseal.Host.ForgetVm", &top).as_deref(),
            Some("unless")
        );
        let listed = json!({"request": {"assigned": [{"key": "a", "value": "b", "until": "c"}]}});
        assert_eq!(
            unknown_of("io.virtseal.Host.SetProvider", &listed).as_deref(),
            Some("until")
        );
        for (method, parameters) in [
            ("io.virtseal.Lifecycle.Prepare", json!({"later": 1})),
            ("io.virtseal.Host.NoSuchMethod", json!({"later": 1})),
            ("org.varlink.service.GetInfo", json!({"later": 1})),
            (create, json!([1])),
            (create, json!({"request": 7})),
        ] {
            assert_eq!(unknown_of(method, &parameters), None, "{method}");
        }
        assert_eq!(unknown_field(b"{"), None);
    }
}

//! The JSON form of an envelope, of both formats.
//!
//! ```json
//! {"version":1,"id":…,"vm":…,"kind":"disk","generation":1,"stanzas":[…]}
//! {"version":2,"id":…,"vm":…,"kind":"disk","generation":1,"shared_with":[],"seen":false,"stanzas":[…],"mac":"…"}
//! ```
//!
//! What another virtseal would add is an error, not a field to be passed over: the MAC would not cover it.

use serde::{Deserialize, Serialize};

use super::{Envelope, EnvelopeError, EnvelopeId, Generation, Mac, ObjectKind, Stanza, VmId};

/// An envelope, as an image or the XML carries it.
#[derive(Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub(super) struct Wire {
    version: u8,
    id: EnvelopeId,
    vm: VmId,
    kind: ObjectKind,
    generation: Generation,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shared_with: Option<Vec<VmId>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seen: Option<bool>,
    stanzas: Vec<Stanza>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(test, schemars(with = "Option<String>"))]
    mac: Option<Mac>,
}

#[cfg(test)]
impl schemars::JsonSchema for Envelope {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Envelope".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        Wire::json_schema(generator)
    }
}

/// All that every format has.
#[derive(Deserialize)]
struct AnyFormat {
    version: u8,
}

pub(super) fn read(json: &str) -> Result<Envelope, EnvelopeError> {
    if json.len() > Envelope::MAX_JSON {
        return Err(EnvelopeError::TooLong { found: json.len() });
    }
    let AnyFormat { version } = serde_json::from_str(json).map_err(EnvelopeError::Json)?;
    if !(1..=Envelope::FORMAT).contains(&version) {
        return Err(EnvelopeError::Version { found: version });
    }
    let wire: Wire = serde_json::from_str(json).map_err(EnvelopeError::Json)?;
    Envelope::try_from(wire)
}

impl From<Envelope> for Wire {
    fn from(envelope: Envelope) -> Self {
        let is_format_2 = envelope.mac.is_some();
        Self {
            version: envelope.format(),
            id: envelope.id,
            vm: envelope.vm,
            kind: envelope.kind,
            generation: envelope.generation,
            shared_with: is_format_2.then_some(envelope.shared_with),
            seen: is_format_2.then_some(envelope.seen),
            stanzas: envelope.stanzas,
            mac: envelope.mac,
        }
    }
}

impl TryFrom<Wire> for Envelope {
    type Error = EnvelopeError;

    fn try_from(wire: Wire) -> Result<Self, EnvelopeError> {
        let (shared_with, seen) = match (wire.version, wire.shared_with, wire.seen, &wire.mac) {
            (1, None, None, None) => (Vec::new(), false),
            (Envelope::FORMAT, Some(shared_with), Some(seen), Some(_)) => (shared_with, seen),
            (version, ..) => return Err(EnvelopeError::Fields { version }),
        };
        Envelope {
            id: wire.id,
            vm: wire.vm,
            kind: wire.kind,
            generation: wire.generation,
            shared_with,
            seen,
            stanzas: wire.stanzas,
            mac: wire.mac,
        }
        .validated()
    }
}

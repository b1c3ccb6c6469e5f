//! A target: what anybody may send to the socket.

use super::conversation::MethodCall;
use super::understood::unknown;
use crate::fuzz_target::Target;

pub(crate) const REQUEST: Target = Target {
    name: "varlink_request",
    seeds: || {
        [
            r#"{"method":"io.virtseal.Host.Status","parameters":{"after":null}}"#,
            r#"{"method":"io.virtseal.Host.VmStatus","parameters":{"vm":"web01","after":null},"more":true}"#,
            r#"{"method":"org.varlink.service.GetInfo"}"#,
        ]
        .map(|text| text.as_bytes().to_vec())
        .into()
    },
    read: |bytes| {
        unknown(bytes).is_none() && serde_json::from_slice::<zlink::Call<MethodCall<'_>>>(bytes).is_ok()
    },
};

//! What a native provider has in the `settings` of its keystore row.

use serde::{Deserialize, Serialize};

use crate::provider::setting::{Description, Settings};

pub(in crate::provider) const SETTINGS: Settings = Settings {
    keys: &[Description::KEY],
    check: |json| {
        Ok(serde_json::to_value(serde_json::from_value::<NativeSettings>(
            json,
        )?)?)
    },
};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NativeSettings {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    description: Option<Description>,
}

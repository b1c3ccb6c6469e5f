//! What is said of KEKs, wherever they are.

use serde::{Deserialize, Serialize};

use crate::model::envelope::VmId;

/// Whom a KEK serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KekScope {
    Vm(VmId),
    Provider,
}

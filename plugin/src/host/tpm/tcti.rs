//! How a TPM is reached.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use thiserror::Error;
use tss_esapi::TctiNameConf;

/// How to reach a TPM, as the TCG's TSS names it: `device:/dev/tpmrm0`, `tabrmd`, `swtpm:host=…,port=…`,
/// `mssim:host=…,port=…`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Tcti(pub(super) String);

impl Default for Tcti {
    fn default() -> Self {
        Self("device:/dev/tpmrm0".to_owned())
    }
}

impl fmt::Display for Tcti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The text is not a [`Tcti`].
#[derive(Debug, Error)]
#[error(
    "'{0}' does not say how to reach a TPM: use device:/dev/tpmrm0, tabrmd, swtpm:host=HOST,port=PORT or mssim:host=HOST,port=PORT"
)]
pub(crate) struct NotATcti(String);

impl FromStr for Tcti {
    type Err = NotATcti;

    fn from_str(text: &str) -> Result<Self, NotATcti> {
        match text.parse::<TctiNameConf>() {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(_) => Err(NotATcti(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Tcti {
    type Error = NotATcti;

    fn try_from(text: String) -> Result<Self, NotATcti> {
        text.parse()
    }
}

//! The format that the XML declares for a disk.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use zlink::introspect::CustomType;

use super::Disk;

/// The format of a plain image, as the domain XML or an admin states it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, CustomType)]
#[serde(rename_all = "snake_case")]
#[zlink(rename_all = "snake_case")]
pub(crate) enum DeclaredFormat {
    Raw,
    /// qcow2, encrypted or not.
    Qcow2,
}

impl DeclaredFormat {
    /// The name in XML, in messages and on the command line.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for DeclaredFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Neither of them.
#[derive(Debug, Error)]
#[error("it is raw or qcow2")]
pub(crate) struct NotDeclarable;

impl FromStr for DeclaredFormat {
    type Err = NotDeclarable;

    fn from_str(name: &str) -> Result<Self, NotDeclarable> {
        [Self::Raw, Self::Qcow2]
            .into_iter()
            .find(|format| format.as_str() == name)
            .ok_or(NotDeclarable)
    }
}

impl Disk {
    /// The format that the XML declares for it: raw, where it says nothing (libvirt guesses none either).
    ///
    /// # Errors
    /// With the name of another one.
    pub(crate) fn declared_format(&self) -> Result<DeclaredFormat, &str> {
        let name = self.format.as_deref().unwrap_or("raw");
        name.parse().map_err(|NotDeclarable| name)
    }
}

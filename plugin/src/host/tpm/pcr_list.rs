//! Lists of PCRs.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// The PCR that changes with each kernel, and for which each kernel brings a signature (systemd-stub, systemd-measure).
pub(super) const KERNEL: u8 = 11;

/// Which PCRs a policy looks at, such as `7` or `7,11`; systemd's `7+11` is read too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PcrList(pub(super) BTreeSet<u8>);

impl Default for PcrList {
    /// PCR 7: whether Secure Boot is on, and whose keys it trusts.
    fn default() -> Self {
        Self(BTreeSet::from([7]))
    }
}

impl fmt::Display for PcrList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, pcr) in self.0.iter().enumerate() {
            write!(f, "{}{pcr}", if nth == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

/// The text is not a [`PcrList`].
#[derive(Debug, Error)]
#[error(
    "'{0}' is not a list of PCRs: give numbers from 0 to 22, such as 7 or 4,7; not 16, which anybody can reset"
)]
pub(crate) struct NotAPcrList(String);

impl PcrList {
    /// How many PCRs a TPM of a PC has (TCG PC Client Platform TPM Profile).
    pub(super) const COUNT: u8 = 24;

    /// `None` where there are none.
    pub(super) fn of(pcrs: impl Iterator<Item = u8>) -> Option<Self> {
        Some(Self(pcrs.collect())).filter(|list| !list.0.is_empty())
    }

    /// Whether 11 is among them, which a kernel's signature may cover.
    pub(crate) fn has_kernel(&self) -> bool {
        self.0.contains(&KERNEL)
    }

    /// The others than 11, if there are any.
    pub(crate) fn without_kernel(&self) -> Option<Self> {
        Self::of(self.0.iter().copied().filter(|pcr| *pcr != KERNEL))
    }

    /// Whether 7 is among them.
    pub(crate) fn has_secure_boot(&self) -> bool {
        self.0.contains(&7)
    }

    /// Those that each update of a kernel, an initrd or a boot loader changes, and that no signature covers.
    pub(crate) fn changed_by_updates(&self) -> Option<Self> {
        Self::of([4, 8, 9, 12, 13].into_iter().filter(|pcr| self.0.contains(pcr)))
    }
}

impl FromStr for PcrList {
    type Err = NotAPcrList;

    fn from_str(text: &str) -> Result<Self, NotAPcrList> {
        text.split([',', '+'])
            .map(|number| number.trim().parse().ok().filter(|pcr| *pcr <= 22 && *pcr != 16))
            .collect::<Option<BTreeSet<u8>>>()
            .map(Self)
            .ok_or_else(|| NotAPcrList(text.to_owned()))
    }
}

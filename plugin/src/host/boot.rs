//! Which boot of this host it is.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use uuid::Uuid;

use super::file_error::FileError;

/// What the kernel calls a boot: another one each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootId(Uuid);

impl BootId {
    const FILE: &str = "/proc/sys/kernel/random/boot_id";

    /// The one that this host is in.
    pub(crate) fn of_host() -> Result<Self, FileError> {
        let path = Path::new(Self::FILE);
        let text = fs::read_to_string(path).map_err(FileError::of("read", path))?;
        text.trim()
            .parse()
            .map_err(|error| FileError::of("understand", path)(std::io::Error::other(error)))
    }
}

impl FromStr for BootId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl fmt::Display for BootId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_boot_has_one_name() {
        let boot = BootId::of_host().unwrap();
        assert_eq!(BootId::of_host().unwrap(), boot);
        assert_eq!(boot.to_string().parse(), Ok(boot));
        assert!("".parse::<BootId>().is_err());
    }
}

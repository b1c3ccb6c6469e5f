//! Why the configuration can't be used.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use thiserror::Error;

/// Each names the file.
#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    #[error("can't read {}", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// Not YAML, or nothing that is better explained.
    #[error("{}:{line} is not a valid setting", path.display())]
    Invalid {
        path: PathBuf,
        line: usize,
        #[source]
        source: Box<serde_yaml::Error>,
    },
    #[error("{}:{line}: {what}", path.display())]
    InLine {
        path: PathBuf,
        line: usize,
        what: String,
    },
}

impl ConfigError {
    /// How virtseald ends by a mistake in its settings, which no further try would mend: `EX_CONFIG` of sysexits(3).
    pub(crate) const EXIT_STATUS: u8 = 78;

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            // It may come later.
            Self::Unreadable { .. } => ExitCode::FAILURE,
            Self::Invalid { .. } | Self::InLine { .. } => ExitCode::from(Self::EXIT_STATUS),
        }
    }
}

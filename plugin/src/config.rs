//! `virtseald.yaml`: parsed once, at start and on SIGHUP, into a valid [`Config`].
//!
//! An unknown key is an error that names file, line and the nearest valid key: a misspelt policy must not be
//! taken for the default.

mod duration;
mod error;
mod log_filter;
mod mistakes;
mod policy;
mod settings;
#[cfg(test)]
mod tests;

use std::fs;
use std::path::Path;

use crate::model::envelope::Envelope;
use settings::MAX_BATCH;

pub(crate) use duration::parse_duration;
pub(crate) use error::ConfigError;
pub(crate) use log_filter::LogFilter;
pub(crate) use policy::Policies;
pub(crate) use settings::Config;

impl Config {
    pub(crate) fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.into(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Parses the text of `path`; an empty one means all defaults.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let means_nothing = |line: &str| line.is_empty() || line.starts_with('#');
        if text.lines().map(str::trim).all(means_nothing) {
            return Ok(Self::default());
        }
        let in_line = |(line, what)| {
            let path = path.into();
            ConfigError::InLine { path, line, what }
        };
        if let Some(repeated) = mistakes::repeated_key(text) {
            return Err(in_line(repeated));
        }
        let config: Self = serde_yaml::from_str(text).map_err(|source| {
            mistakes::explain(text).map_or_else(
                || ConfigError::Invalid {
                    path: path.into(),
                    line: source.location().map_or(1, |at| at.line()),
                    source: Box::new(source),
                },
                in_line,
            )
        })?;
        match config.out_of_bounds().or_else(|| config.inconsistency()) {
            Some((key, what)) => {
                let line = mistakes::keys(text).find(|(_, found)| *found == key);
                Err(in_line((
                    line.map_or(1, |(line, _)| line),
                    format!("{key}{what}"),
                )))
            }
            None => Ok(config),
        }
    }

    /// The first setting that has another value than it may, which its type does not show, and what it may have.
    fn out_of_bounds(&self) -> Option<(&'static str, String)> {
        let relative = [
            ("socket", &self.socket),
            ("state_dir", &self.state_dir),
            ("swtpm_dir", &self.swtpm_dir),
            ("nvram_dir", &self.nvram_dir),
        ]
        .into_iter()
        .chain(self.hook_socket.iter().map(|path| ("hook_socket", path)))
        .chain(self.image_dirs.iter().map(|path| ("image_dirs", path)))
        .find(|(_, path)| !path.is_absolute());
        if let Some((key, relative)) = relative {
            return Some((
                key,
                format!(": '{}' must be an absolute path", relative.display()),
            ));
        }
        if self.recipients.len() > Envelope::MAX_STANZAS || self.recipients.iter().any(String::is_empty) {
            let most = Envelope::MAX_STANZAS;
            return Some((
                "recipients",
                format!(" must be names of providers, {most} at the most"),
            ));
        }
        (!(1..=MAX_BATCH).contains(&self.batch_size))
            .then(|| ("batch_size", format!(" must be 1 to {MAX_BATCH}")))
    }

    /// What no setting shows alone.
    fn inconsistency(&self) -> Option<(&'static str, String)> {
        // The one that the file has: both defaults go together.
        let key = match self.provider_deadline == Self::default().provider_deadline {
            true => "hook_deadline",
            false => "provider_deadline",
        };
        (self.provider_deadline > self.hook_deadline).then(|| {
            let (provider, hook) = (self.provider_deadline, self.hook_deadline);
            (
                key,
                format!(
                    ": provider_deadline ({provider:?}) must not be longer than hook_deadline ({hook:?})"
                ),
            )
        })
    }
}

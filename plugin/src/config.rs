//! `virtseald.yaml`: parsed once, at start and on SIGHUP, into a valid [`Config`].
//!
//! An unknown key is an error that names file, line and the nearest valid key: a misspelt policy must not be
//! taken for the default.

mod log_filter;
mod policy;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};
use thiserror::Error;

use crate::host::tpm::Tcti;
use crate::model::envelope::Envelope;
use crate::recipients::Recipients;

pub use log_filter::LogFilter;
pub use policy::Policies;

/// The most envelopes that a job may have in memory.
const MAX_BATCH: u32 = 1000;

/// Each setting once: its type, what it is without a line in the file, what it takes, and whether a running daemon takes
/// another value (`live`) or only a restart does (`fixed`).
macro_rules! settings {
    ($($(#[$attribute:meta])* $reload:ident $key:ident: $type:ty = $default:expr, $takes:expr;)*) => {
        /// The daemon's settings. Every key has a default.
        #[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct Config {
            $($(#[$attribute])* pub $key: $type,)*
        }

        impl Default for Config {
            fn default() -> Self {
                Self { $($key: $default,)* }
            }
        }

        impl Config {
            const KEYS: &[&str] = &[$(stringify!($key)),*];

            /// What the key takes, in words.
            fn expected(key: &str) -> String {
                match key {
                    $(stringify!($key) => $takes.into(),)*
                    _ => "a path".into(),
                }
            }

            /// Becomes `new` as far as a running daemon can, and says which keys it can't change.
            pub fn reload(&mut self, mut new: Self) -> Vec<&'static str> {
                let mut kept = Vec::new();
                $(settings!(@$reload $key self new kept);)*
                *self = new;
                kept
            }
        }
    };
    (@live $key:ident $old:ident $new:ident $kept:ident) => {};
    (@fixed $key:ident $old:ident $new:ident $kept:ident) => {
        if $old.$key != $new.$key {
            $new.$key = $old.$key.clone();
            $kept.push(stringify!($key));
        }
    };
}

const SOME_TIME: &str =
    "a duration of more than 0: '10s', '500ms', '2m' or a number of seconds, at most an hour";
const PERHAPS_NO_TIME: &str = "a duration: 0, '500ms', '10s', '2m' or a number of seconds, at most an hour";

settings! {
    /// Where the daemon listens.
    fixed socket: PathBuf = "/run/virtseal/virtseald.sock".into(), "a path";
    /// Where the daemon listens for the hook: see [`Config::hook_socket`].
    fixed hook_socket: Option<PathBuf> = None, "a path";
    /// The group that may connect, and read.
    fixed socket_group: String = "virtseal".into(), "the name of a group";
    /// Keystore, sealed root keys, audit log.
    fixed state_dir: PathBuf = "/var/lib/virtseal".into(), "a path";
    /// The libvirt that starts the VMs.
    fixed libvirt_uri: String = "qemu:///system".into(), "a URI, such as qemu:///system";
    /// The most time that a start may wait for this daemon.
    #[serde(deserialize_with = "duration")]
    live hook_deadline: Duration = Duration::from_secs(10), SOME_TIME;
    /// The most time that a provider gets for one call.
    #[serde(deserialize_with = "duration")]
    live provider_deadline: Duration = Duration::from_secs(5), SOME_TIME;
    /// How often each provider is asked how it is.
    #[serde(deserialize_with = "duration")]
    live probe_interval: Duration = Recipients::PROBE_INTERVAL, SOME_TIME;
    /// Where libvirt keeps vTPM state, a directory per VM UUID.
    live swtpm_dir: PathBuf = "/var/lib/libvirt/swtpm".into(), "a path";
    /// Where new UEFI variable stores go when the domain names none.
    live nvram_dir: PathBuf = "/var/lib/libvirt/qemu/nvram".into(), "a path";
    /// Directories besides libvirt's own and its storage pools whose files domain XML may name for virtseal to change.
    live image_dirs: Vec<PathBuf> = Vec::new(), "a list of directories, such as [/srv/images]";
    /// The providers (names or UUIDs) that each new envelope gets a stanza of; the default provider alone, if empty.
    live recipients: Vec<String> = Vec::new(), "a list of names of providers, such as [kmip-prod, breakglass]";
    /// What sealed VMs may do beside their sealed objects.
    live policy: Policies = Policies::default(), format!(
            "a section with yes or no for {}, and below {} the same for single VMs",
            Policies::KEYS.join(", "),
            Policies::VMS
        );
    /// How many envelopes a job changes in one transaction.
    live batch_size: u32 = 50, format!("a whole number from 1 to {MAX_BATCH}");
    /// How long a job rests between two batches.
    #[serde(deserialize_with = "pause")]
    live interval: Duration = Duration::ZERO, PERHAPS_NO_TIME;
    /// How the TPM of this host is reached.
    fixed tpm: Tcti = Tcti::default(), "device:/dev/tpmrm0, tabrmd, swtpm:host=HOST,port=PORT or mssim:host=HOST,port=PORT";
    /// What to log.
    fixed log: LogFilter = LogFilter::default(), "one of error, warn, info, debug, trace, perhaps by module: info,virtseal=debug";
}

impl Config {
    /// Where the package puts it.
    pub const DEFAULT_PATH: &str = "/etc/virtseal/virtseald.yaml";

    /// Where the daemon listens for the hook, and for root alone: a path of its own, or the one beside `socket`.
    #[must_use]
    pub fn hook_socket(&self) -> PathBuf {
        let beside = || Self::hook_socket_beside(&self.socket);
        self.hook_socket.clone().unwrap_or_else(beside)
    }

    /// The hook's socket of the daemon that listens on `socket`, unless its configuration names another:
    /// `virtseald.sock` has `hook.sock`, `second.sock` has `second-hook.sock`.
    #[must_use]
    pub fn hook_socket_beside(socket: &Path) -> PathBuf {
        let name = socket.file_name().unwrap_or_default().to_string_lossy();
        socket.with_file_name(match name.strip_suffix(".sock") {
            Some("virtseald") => "hook.sock".to_owned(),
            Some(stem) => format!("{stem}-hook.sock"),
            None => format!("{name}-hook"),
        })
    }

    /// Reads `path`.
    ///
    /// # Errors
    /// When it can't be read, is not YAML, has an unknown key or a value that makes no sense.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.into(),
            source,
        })?;
        Self::parse(&text, path)
    }

    /// Parses the text of `path`; an empty one means all defaults.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        if text
            .lines()
            .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
        {
            return Ok(Self::default());
        }
        if let Some(repeated) = repeated_key(text, path) {
            return Err(repeated);
        }
        let config: Self = serde_yaml::from_str(text).map_err(|source| {
            unknown_key(text, path)
                .or_else(|| bad_value(text, path))
                .unwrap_or_else(|| ConfigError::Invalid {
                    path: path.into(),
                    line: source.location().map_or(1, |at| at.line()),
                    source: Box::new(source),
                })
        })?;
        config.validated(path)
    }

    fn validated(self, path: &Path) -> Result<Self, ConfigError> {
        let relative = [&self.socket, &self.state_dir, &self.swtpm_dir, &self.nvram_dir]
            .into_iter()
            .chain(&self.hook_socket)
            .chain(&self.image_dirs)
            .find(|path| !path.is_absolute());
        if let Some(value) = relative {
            return Err(ConfigError::RelativePath {
                path: path.into(),
                value: value.clone(),
            });
        }
        if self.recipients.len() > Envelope::MAX_STANZAS || self.recipients.iter().any(String::is_empty) {
            return Err(ConfigError::Recipients { path: path.into() });
        }
        if !(1..=MAX_BATCH).contains(&self.batch_size) {
            return Err(ConfigError::BatchSize { path: path.into() });
        }
        if self.provider_deadline > self.hook_deadline {
            return Err(ConfigError::Deadlines { path: path.into() });
        }
        Ok(self)
    }
}

/// Why the configuration can't be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read {}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not YAML.
    #[error("{}:{line} is not a valid setting", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Where in it.
        line: usize,
        /// What is wrong.
        #[source]
        source: Box<serde_yaml::Error>,
    },
    /// A value that its key does not take.
    #[error("{}:{line}: {key}: {found} is not {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Where in it.
        line: usize,
        /// The key.
        key: String,
        /// The value, as it is written there.
        found: String,
        /// What the key takes.
        expected: String,
    },
    /// A key that is set twice.
    #[error("{}:{line}: '{key}' is set in line {first} already", path.display())]
    Repeated {
        /// The file.
        path: PathBuf,
        /// The second time.
        line: usize,
        /// The first.
        first: usize,
        /// The key.
        key: String,
    },
    /// A key that does not exist.
    #[error("{}:{line}: unknown key '{key}'; {hint}", path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// Where in it.
        line: usize,
        /// The key.
        key: String,
        /// What may have been meant.
        hint: String,
    },
    /// A path that depends on where the daemon was started.
    #[error("{}: '{}' must be an absolute path", path.display(), value.display())]
    RelativePath {
        /// The file.
        path: PathBuf,
        /// The value.
        value: PathBuf,
    },
    /// No name, or more than an envelope holds.
    #[error("{}: recipients must be names of providers, {} at the most", path.display(), Envelope::MAX_STANZAS)]
    Recipients {
        /// The file.
        path: PathBuf,
    },
    /// No envelope at all, or more than should be in memory.
    #[error("{}: batch_size must be 1 to {MAX_BATCH}", path.display())]
    BatchSize {
        /// The file.
        path: PathBuf,
    },
    /// A provider that may take longer than the hook waits.
    #[error("{}: provider_deadline must not be longer than hook_deadline", path.display())]
    Deadlines {
        /// The file.
        path: PathBuf,
    },
}

/// The keys at the top level, each with the number of its line.
fn keys(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().filter_map(|(index, line)| {
        let key = line.split_once(':')?.0.trim_end();
        let is_key = !key.is_empty()
            && key
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        is_key.then_some((index + 1, key))
    })
}

fn unknown_key(text: &str, path: &Path) -> Option<ConfigError> {
    let Some((line, key)) = keys(text).find(|(_, key)| !Config::KEYS.contains(key)) else {
        return unknown_policy(text, path);
    };
    Some(ConfigError::UnknownKey {
        path: path.into(),
        line,
        key: key.into(),
        hint: hint_for(key),
    })
}

fn unknown_policy(text: &str, path: &Path) -> Option<ConfigError> {
    let settings: BTreeMap<String, serde_yaml::Value> = serde_yaml::from_str(text).ok()?;
    let key = Policies::unknown_key(settings.get("policy")?)?;
    let (section, _) = keys(text).find(|(_, key)| *key == "policy")?;
    let line = text
        .lines()
        .enumerate()
        .skip(section - 1)
        .find(|(_, line)| line.contains(&key));
    Some(ConfigError::UnknownKey {
        path: path.into(),
        line: line.map_or(section, |(index, _)| index + 1),
        hint: nearest(&key, &Policies::KEYS)
            .unwrap_or_else(|| format!("policy has {} and {}", Policies::KEYS.join(", "), Policies::VMS)),
        key,
    })
}

fn repeated_key(text: &str, path: &Path) -> Option<ConfigError> {
    let mut seen = BTreeMap::new();
    keys(text).find_map(|(line, key)| {
        let first = seen.insert(key, line)?;
        Some(ConfigError::Repeated {
            path: path.into(),
            line,
            first,
            key: key.into(),
        })
    })
}

/// The first setting whose value is refused, while the text is YAML: the parser has neither its line nor plain words.
fn bad_value(text: &str, path: &Path) -> Option<ConfigError> {
    let settings: BTreeMap<String, serde_yaml::Value> = serde_yaml::from_str(text).ok()?;
    let is_refused = |key: &str, value: &serde_yaml::Value| {
        let alone = BTreeMap::from([(key, value)]);
        serde_yaml::to_value(alone).is_ok_and(|alone| serde_yaml::from_value::<Config>(alone).is_err())
    };
    keys(text).find_map(|(line, key)| {
        let value = settings.get(key).filter(|value| is_refused(key, value))?;
        Some(ConfigError::Value {
            path: path.into(),
            line,
            key: key.into(),
            found: shown(value),
            expected: Config::expected(key),
        })
    })
}

/// In one line, and not a long one.
fn shown(value: &serde_yaml::Value) -> String {
    let text = serde_yaml::to_string(value).unwrap_or_default();
    let text = text.trim().replace('\n', " ");
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("'{}…'", &text[..end]),
        None => format!("'{}'", text.trim_matches(['\'', '"'])),
    }
}

fn hint_for(key: &str) -> String {
    if key == "require_sealed" {
        return "it is the hook's, which works with this daemon down: set it in /etc/virtseal/hook.conf"
            .into();
    }
    nearest(key, Config::KEYS).unwrap_or_else(|| format!("valid keys are {}", Config::KEYS.join(", ")))
}

fn nearest(key: &str, valid: &[&str]) -> Option<String> {
    let nearest = valid
        .iter()
        .map(|valid| (strsim::damerau_levenshtein(key, valid), valid))
        .min()?;
    (nearest.0 <= 4).then(|| format!("perhaps '{}' is meant", nearest.1))
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    match pause(deserializer)? {
        none if none.is_zero() => Err(de::Error::custom("a duration of 0")),
        some => Ok(some),
    }
}

/// A duration that may be 0.
fn pause<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Raw {
        Seconds(f64),
        Text(String),
    }
    let parsed = match Raw::deserialize(deserializer)? {
        Raw::Seconds(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Raw::Text(text) => parse_duration(&text),
    };
    match parsed {
        Some(value) if value <= Duration::from_secs(3600) => Ok(value),
        // Its words are those of `expected`.
        _ => Err(de::Error::custom("no duration")),
    }
}

fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..split].parse().ok()?;
    let unit = match text[split..].trim() {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * unit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Permission, Policy};

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("virtseald.yaml")).map_err(|error| crate::model::problem::chain(&error))
    }

    #[test]
    fn comments_alone_mean_defaults() {
        assert_eq!(parse("# socket: /x\n\n").unwrap(), Config::default());
    }

    #[test]
    fn durations_have_units() {
        let config = parse("hook_deadline: 1500ms\nprovider_deadline: 1").unwrap();
        assert_eq!(config.hook_deadline, Duration::from_millis(1500));
        assert_eq!(config.provider_deadline, Duration::from_secs(1));
        assert!(
            parse("hook_deadline: 0s")
                .unwrap_err()
                .contains("a duration of more than 0")
        );
        assert_eq!(parse("interval: 0").unwrap().interval, Duration::ZERO);
        assert!(parse("hook_deadline: -1").is_err());
        assert!(parse("hook_deadline: 10 parsecs").is_err());
    }

    #[test]
    fn bad_value_names_line_key_and_what_the_key_takes() {
        for (text, said) in [
            (
                "# first\nlog: info\nhook_deadline: soon",
                "3: hook_deadline: 'soon' is not a duration",
            ),
            ("interval: -1s", "1: interval: '-1s' is not a duration: 0"),
            (
                "socket: /x\n\nlog: loud",
                "3: log: 'loud' is not one of error, warn, info, debug, trace",
            ),
            ("log: [1]\n", "1: log: '- 1' is not one of error"),
            ("recipients: main", "1: recipients: 'main' is not a list of names"),
            (
                "recipients:\n- main\nbatch_size: -1",
                "3: batch_size: '-1' is not a whole number",
            ),
            ("tpm: the chip", "1: tpm: 'the chip' is not device:/dev/tpmrm0"),
            ("socket: [/x]", "1: socket: '- /x' is not a path"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.starts_with(&format!("virtseald.yaml:{said}")), "{error}");
        }
    }

    #[test]
    fn repeated_key_names_both_lines() {
        assert_eq!(
            parse("log: info\nsocket: /x\nlog: debug").unwrap_err(),
            "virtseald.yaml:3: 'log' is set in line 1 already"
        );
    }

    #[test]
    fn misspelt_key_names_file_line_and_nearest_key() {
        assert_eq!(
            parse("socket: /run/x\nprovder_deadline: 3s").unwrap_err(),
            "virtseald.yaml:2: unknown key 'provder_deadline'; perhaps 'provider_deadline' is meant"
        );
    }

    #[test]
    fn recipients_and_batches_have_their_bounds() {
        let config = parse("recipients: [kmip-prod, breakglass]\nbatch_size: 7").unwrap();
        assert_eq!(
            (config.recipients, config.batch_size),
            (vec!["kmip-prod".to_owned(), "breakglass".to_owned()], 7)
        );
        assert!(
            parse("recipients: ['']")
                .unwrap_err()
                .contains("names of providers")
        );
        assert!(parse("batch_size: 0").unwrap_err().contains("1 to 1000"));
    }

    #[test]
    fn policy_of_the_hook_is_sent_to_the_hooks_file() {
        assert!(parse("require_sealed: true").unwrap_err().contains("hook.conf"));
    }

    #[test]
    fn the_policy_allows_nothing_by_itself_and_a_vm_goes_before_the_host() {
        let domain = |name: &str| {
            let id = uuid::Uuid::from_u128(7);
            crate::domain::Domain::parse(&format!(
                "<domain type='kvm'><name>{name}</name><uuid>{id}</uuid></domain>"
            ))
            .unwrap()
        };
        let of = |text: &str, name: &str| parse(text).unwrap().policy.of(&domain(name));
        let (yes, no) = (Permission::Yes, Permission::No);
        assert_eq!(of("log: info", "a"), Policy::default());
        let text = "policy:\n  memory_on_disk: yes\n  mixed_disks: false\n  vms:\n    a: {memory_on_disk: no, mixed_disks: true}\n";
        assert_eq!(
            (of(text, "a").memory_on_disk, of(text, "b").memory_on_disk),
            (no, yes)
        );
        assert_eq!((of(text, "a").mixed_disks, of(text, "b").mixed_disks), (yes, no));
        let text = "policy: {vms: {a: {plain_backing: yes}, 00000000-0000-0000-0000-000000000007: {plain_backing: no}}}";
        assert_eq!(of(text, "a").plain_backing, no);
    }

    #[test]
    fn a_misspelt_policy_is_an_error_with_its_line() {
        for (text, parts) in [
            (
                "log: info\npolicy:\n  memory_on_dsik: yes\n",
                ["yaml:3", "memory_on_disk"],
            ),
            (
                "policy:\n  vms:\n    a:\n      mixed_disk: yes\n",
                ["yaml:4", "mixed_disks"],
            ),
            ("policy: {memory_on_disk: maybe}\n", ["yaml:1", "yes or no"]),
            ("policy: [memory_on_disk]\n", ["yaml:1", "yes or no"]),
        ] {
            let error = parse(text).unwrap_err();
            for part in parts {
                assert!(error.contains(part), "{error}");
            }
        }
    }

    #[test]
    fn relative_paths_and_swapped_deadlines_are_refused() {
        assert!(parse("state_dir: here").unwrap_err().contains("absolute"));
        assert!(
            parse("image_dirs: [/srv, vms]")
                .unwrap_err()
                .contains("'vms' must be an absolute")
        );
        assert_eq!(
            parse("image_dirs: [/srv]").unwrap().image_dirs,
            [Path::new("/srv")]
        );
        assert!(
            parse("hook_deadline: 1s")
                .unwrap_err()
                .contains("provider_deadline")
        );
    }

    #[test]
    fn every_key_is_listed_for_hints() {
        for key in Config::KEYS {
            let error = parse(&format!("{key}: {{a: 1}}")).unwrap_err();
            assert!(!error.contains(&format!("unknown key '{key}'")), "{key}: {error}");
        }
    }

    #[test]
    fn a_running_daemon_takes_over_what_it_can_and_says_what_it_keeps() {
        let mut config = parse("socket: /x\nhook_deadline: 20s").unwrap();
        let new = parse("socket: /y\nhook_deadline: 30s\nlog: debug").unwrap();
        assert_eq!(config.reload(new), ["socket", "log"]);
        assert_eq!(config, parse("socket: /x\nhook_deadline: 30s").unwrap());
        assert!(config.reload(config.clone()).is_empty());
    }

    #[test]
    fn garbage_is_an_error_with_a_line() {
        assert!(
            parse("socket: /x\n\tfoo")
                .unwrap_err()
                .starts_with("virtseald.yaml:2")
        );
        assert!(parse("- a\n- b").is_err());
    }
}

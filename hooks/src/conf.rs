//! `/etc/virtseal/hook.conf`: `key = value` lines, `#` comments.
//!
//! A mistake in it is kept, not raised: it must refuse sealed VMs and nobody else. Only where a mistake leaves
//! open whether unsealed VMs may start, they may not.

use std::ffi::OsString;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::deadline::START;

const PATH: &str = "/etc/virtseal/hook.conf";
/// For hooks alone.
const SOCKET: &str = "/run/virtseal/hook.sock";
/// Where a virtseald without that listens.
const OLD_SOCKET: &str = "/run/virtseal/virtseald.sock";
/// Sets a key to what stands behind the `=`.
type Set = fn(&mut Conf, &str) -> Result<(), String>;
const SETTINGS: [(&str, Set); 6] = [
    ("socket", |conf, value| {
        absolute(value).map(|path| conf.socket = path)
    }),
    ("index", |conf, value| {
        absolute(value).map(|path| conf.index = path)
    }),
    ("deadline", |conf, value| {
        deadline(value).map(|time| conf.deadline = time)
    }),
    (REQUIRE_SEALED, |conf, value| {
        // Stays so if the value is none.
        conf.require_sealed = true;
        boolean(value).map(|required| conf.require_sealed = required)
    }),
    ("master_key_tmpfs", |conf, value| {
        policy(value).map(|policy| conf.master_key_tmpfs = policy)
    }),
    ("runtime_dir", |conf, value| {
        absolute(value).map(|path| conf.runtime_dir = path)
    }),
];
const REQUIRE_SEALED: &str = "require_sealed";
const MAX_LENGTH: u64 = 64 * 1024;

/// What to do where QEMU's master key can't be kept off the disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TmpfsPolicy {
    Required,
    Preferred,
    Off,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conf {
    /// Where it was read from, for messages.
    pub(crate) path: PathBuf,
    pub(crate) socket: PathBuf,
    /// What is sealed here: see [`crate::index`].
    pub(crate) index: PathBuf,
    pub(crate) deadline: Duration,
    /// Also true where the file leaves it open.
    pub(crate) require_sealed: bool,
    pub(crate) master_key_tmpfs: TmpfsPolicy,
    /// The directory in which libvirt makes one for each running domain.
    pub(crate) runtime_dir: PathBuf,
    /// The first mistake: `FILE:LINE: what. Next: …`.
    pub(crate) problem: Option<String>,
}

impl Conf {
    /// Reads the file; a missing one means the defaults. The environment variables `VIRTSEAL_HOOK_CONF` (the
    /// file) and `VIRTSEAL_SOCKET` are for scripts: libvirt passes none of them on.
    pub(crate) fn load() -> Self {
        let path = variable("VIRTSEAL_HOOK_CONF").map_or_else(|| PATH.into(), PathBuf::from);
        let mut conf = match read(&path) {
            Ok(text) => Self::parse(&path, &text),
            Err(error) if error.kind() == ErrorKind::NotFound => Self::defaults(&path),
            Err(error) => Self {
                problem: Some(format!("{}: {error}. Next: make it readable", path.display())),
                require_sealed: true,
                ..Self::defaults(&path)
            },
        };
        if let Some(socket) = variable("VIRTSEAL_SOCKET") {
            conf.socket = socket.into();
        }
        if conf.socket == Path::new(SOCKET) && !conf.socket.exists() && Path::new(OLD_SOCKET).exists() {
            conf.socket = OLD_SOCKET.into();
        }
        conf
    }

    fn defaults(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            socket: SOCKET.into(),
            index: "/var/lib/virtseal/hook.index".into(),
            deadline: START,
            require_sealed: false,
            master_key_tmpfs: TmpfsPolicy::Required,
            runtime_dir: "/var/lib/libvirt/qemu".into(),
            problem: None,
        }
    }

    fn parse(path: &Path, text: &str) -> Self {
        let mut conf = Self::defaults(path);
        for (line, number) in text.lines().zip(1..) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Err(what) = conf.set(line) {
                let problem = || format!("{}:{number}: {what}. Next: correct that line", path.display());
                conf.problem.get_or_insert_with(problem);
            }
        }
        conf
    }

    fn set(&mut self, line: &str) -> Result<(), String> {
        let (key, value) = line.split_once('=').unwrap_or((line, ""));
        let (key, value) = (key.trim(), value.trim());
        if let Some((_, set)) = SETTINGS.iter().find(|(name, _)| *name == key) {
            return set(self, value);
        }
        let nearest = nearest(key);
        self.require_sealed |= nearest == REQUIRE_SEALED;
        Err(format!("unknown key {key:?}, perhaps {nearest} is meant"))
    }
}

fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_LENGTH + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_LENGTH {
        return Err(std::io::Error::new(
            ErrorKind::FileTooLarge,
            "the file is too long",
        ));
    }
    Ok(text)
}

fn absolute(value: &str) -> Result<PathBuf, String> {
    if value.starts_with('/') {
        Ok(value.into())
    } else {
        Err(format!("{value:?} is not an absolute path"))
    }
}

fn boolean(value: &str) -> Result<bool, String> {
    match value {
        "true" | "yes" => Ok(true),
        "false" | "no" => Ok(false),
        _ => Err(format!("{value:?} is neither true nor false")),
    }
}

fn policy(value: &str) -> Result<TmpfsPolicy, String> {
    match value {
        "required" => Ok(TmpfsPolicy::Required),
        "preferred" => Ok(TmpfsPolicy::Preferred),
        "off" => Ok(TmpfsPolicy::Off),
        _ => Err(format!("{value:?} is none of required, preferred, off")),
    }
}

/// `10`, `10s` or `500ms`, from 10 ms to 5 minutes.
fn deadline(value: &str) -> Result<Duration, String> {
    let (number, unit) = match (value.strip_suffix("ms"), value.strip_suffix('s')) {
        (Some(number), _) => (number, 1),
        (None, Some(number)) => (number, 1000),
        (None, None) => (value, 1000),
    };
    let millis = number
        .trim()
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit));
    match millis {
        Some(millis @ 10..=300_000) => Ok(Duration::from_millis(millis)),
        _ => Err(format!(
            "{value:?} is not a time from 10ms to 300s, such as 10s or 500ms"
        )),
    }
}

fn nearest(key: &str) -> &'static str {
    let names = SETTINGS.iter().map(|(name, _)| *name);
    names
        .min_by_key(|name| distance(key, name))
        .expect("there are settings")
}

/// Levenshtein's, on bytes; of a long key the start is enough.
fn distance(left: &str, right: &str) -> usize {
    let left = &left.as_bytes()[..left.len().min(40)];
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (index, from) in left.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = index + 1;
        for (column, to) in right.bytes().enumerate() {
            let replace = diagonal + usize::from(*from != to);
            diagonal = row[column + 1];
            row[column + 1] = replace.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Conf {
        Conf::parse(Path::new("/c"), text)
    }

    #[test]
    fn every_key_is_read() {
        let conf = parse(
            "# comment\n\n socket = /s/o c\nindex = /i\ndeadline=500ms\r\nrequire_sealed = yes\n\
             master_key_tmpfs = off\nruntime_dir = /r\n",
        );
        assert_eq!(
            conf,
            Conf {
                path: "/c".into(),
                socket: "/s/o c".into(),
                index: "/i".into(),
                deadline: Duration::from_millis(500),
                require_sealed: true,
                master_key_tmpfs: TmpfsPolicy::Off,
                runtime_dir: "/r".into(),
                problem: None,
            }
        );
        assert_eq!(parse(""), Conf::defaults(Path::new("/c")));
    }

    #[test]
    fn the_packaged_file_has_each_setting_with_its_default() {
        let packaged = include_str!("../../packaging/config/hook.conf");
        let lines = packaged.lines().filter_map(|line| line.strip_prefix('#'));
        let settings: Vec<_> = lines
            .filter(|line| line.contains(" = ") && !line.starts_with(' '))
            .collect();
        assert_eq!(parse(&settings.join("\n")), Conf::defaults(Path::new("/c")));
        for (name, _) in SETTINGS {
            // For tests: libvirt has no other.
            let is_there = settings.iter().any(|line| line.split(" = ").next() == Some(name));
            assert_eq!(is_there, name != "runtime_dir", "{name}");
        }
    }

    #[test]
    fn a_mistake_is_named_with_its_line_and_the_nearest_key() {
        let problem = parse("deadline = 5s\nsokcet = /a\ndeadline = never")
            .problem
            .unwrap();
        assert_eq!(
            problem,
            "/c:2: unknown key \"sokcet\", perhaps socket is meant. Next: correct that line"
        );
        for bad in [
            "socket = a",
            "socket",
            "index = hook.index",
            "deadline = 0",
            "deadline = 301s",
            "deadline = 9e9",
            "runtime_dir =",
        ] {
            let conf = parse(bad);
            assert!(conf.problem.is_some(), "{bad}");
            assert!(!conf.require_sealed, "{bad}");
        }
    }

    #[test]
    fn an_unclear_policy_is_the_strict_one() {
        for unclear in [
            "require_sealed = ture",
            "require_sealed",
            "requires_sealed = true",
            "Require-Sealed = 1",
        ] {
            assert!(parse(unclear).require_sealed, "{unclear}");
            assert!(parse(unclear).problem.is_some(), "{unclear}");
        }
        assert!(!parse("require_sealed = false\nfoo = 1").require_sealed);
    }
}

//! What libvirt's `qemu.conf` says: where file-backed memory goes, which firmware belongs to which variables, and whether a VM may
//! leave without TLS.
//!
//! The file has `key = value` lines; a value is a string, a number or a list of strings. A list may span lines.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const MEMORY_DIR: &str = "/var/lib/libvirt/qemu/ram";
/// Longer than any that is meant.
const MAX_BYTES: u64 = 1 << 20;

/// The settings that matter here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct QemuConf(BTreeMap<String, Vec<String>>);

impl QemuConf {
    /// Where libvirt reads it.
    pub(crate) const PATH: &str = "/etc/libvirt/qemu.conf";

    /// Reads the host's file; without one, everything is as libvirt has it by default.
    ///
    /// # Errors
    /// When there is one that can't be read or makes no sense.
    pub(crate) fn read() -> io::Result<Self> {
        let path = Path::new(Self::PATH);
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error),
            Ok(found) if found.len() > MAX_BYTES => return Err(io::Error::other("it is too long")),
            Ok(_) => {}
        }
        Self::parse(&fs::read_to_string(path)?).ok_or_else(|| io::Error::other("it can't be parsed"))
    }

    /// `None` if it is no such file.
    fn parse(text: &str) -> Option<Self> {
        let mut settings = BTreeMap::new();
        let mut rest = skip(text);
        while !rest.is_empty() {
            let (key, after) = rest.split_once('=')?;
            let key = key.trim();
            let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            if !is_key {
                return None;
            }
            let (values, after) = value(after.trim_start_matches([' ', '\t']))?;
            // Of two lines libvirt takes the first.
            settings.entry(key.to_owned()).or_insert(values);
            rest = skip(after);
        }
        Some(Self(settings))
    }

    /// A setting that has one value.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match &self.0.get(key)?[..] {
            [one] => Some(one),
            _ => None,
        }
    }

    /// Where libvirt puts memory that is a file.
    pub(crate) fn memory_dir(&self) -> PathBuf {
        self.text("memory_backing_dir")
            .map_or_else(|| MEMORY_DIR.into(), PathBuf::from)
    }

    /// Whether libvirt lets no VM leave this host without TLS. It looks at that where a migration begins, on the host that the
    /// VM leaves; one that goes through the connection of two libvirtds (`--tunnelled`) is not meant.
    pub(crate) fn forces_migration_tls(&self) -> bool {
        self.0
            .get("migrate_tls_force")
            .is_some_and(|values| matches!(&values[..], [one] if one == "1"))
    }

    /// The pairs of loader and variables, in order; `None` if the host sets none, and libvirt has those that it was built with.
    pub(crate) fn firmware(&self) -> Option<Vec<(PathBuf, PathBuf)>> {
        let pairs = self.0.get("nvram")?.iter();
        let pairs = pairs.filter_map(|pair| pair.split_once(':'));
        Some(
            pairs
                .map(|(loader, variables)| (loader.into(), variables.into()))
                .collect(),
        )
    }
}

/// Behind white space and comments.
fn skip(mut text: &str) -> &str {
    loop {
        text = text.trim_start();
        match text.strip_prefix('#') {
            Some(comment) => text = comment.split_once('\n').map_or("", |(_, rest)| rest),
            None => return text,
        }
    }
}

fn value(text: &str) -> Option<(Vec<String>, &str)> {
    if let Some(mut rest) = text.strip_prefix('[') {
        let mut values = Vec::new();
        loop {
            rest = skip(rest);
            if let Some(after) = rest.strip_prefix(']') {
                return Some((values, after));
            }
            let (item, after) = string(rest)?;
            values.push(item);
            rest = skip(after);
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
    }
    string(text).map(|(item, after)| (vec![item], after)).or_else(|| {
        let end = text.find('\n').unwrap_or(text.len());
        let number = text[..end].split('#').next()?.trim();
        let is_number = !number.is_empty() && number.chars().all(|c| c.is_ascii_digit() || c == '-');
        is_number.then(|| (vec![number.to_owned()], &text[end..]))
    })
}

fn string(text: &str) -> Option<(String, &str)> {
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let (item, rest) = text[1..].split_once(quote)?;
    Some((item.to_owned(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_libvirt_reads_them() {
        let conf = QemuConf::parse(
            "# nvram = [ \"/no:/no\" ]\nuser = \"root\"\nremember_owner=0\nnvram = [\n  \"/a:/b\", # first\n  '/c:/d'\n]\n\
             memory_backing_dir = \"/dev/shm\" # fast\n",
        )
        .unwrap();
        assert_eq!(conf.memory_dir(), Path::new("/dev/shm"));
        let pairs = conf.firmware().unwrap();
        assert_eq!(pairs, [("/a".into(), "/b".into()), ("/c".into(), "/d".into())]);
        let none = QemuConf::parse("\n# nothing\n").unwrap();
        assert_eq!((none.memory_dir(), none.firmware()), (MEMORY_DIR.into(), None));
    }

    #[test]
    fn tls_is_forced_only_where_libvirt_takes_it_so() {
        let forced = |text: &str| QemuConf::parse(text).unwrap().forces_migration_tls();
        assert!(forced("migrate_tls_force = 1 # always\n"));
        for text in [
            "",
            "#migrate_tls_force = 1\n",
            "migrate_tls_force = 0\n",
            "migrate_tls_force = 0\nmigrate_tls_force = 1\n",
            "default_tls_x509_verify = 1\n",
        ] {
            assert!(!forced(text), "{text}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_no_setting() {
        for text in ["nvram = [ \"/a", "= 1", "user", "user = root", "a b = 1"] {
            assert_eq!(QemuConf::parse(text), None, "{text}");
        }
    }
}

//! The index of what virtseal has sealed on this host, with which the hook decides without any daemon.
//!
//! virtseald replaces the file by rename before it defines or arms anything (`keystore::hook_index` writes it, ADR 11). Text
//! of fixed widths, sorted, so that a look takes a binary search:
//!
//! ```text
//! virtseal hook index 1
//! 0000000001 envelopes 0000000001 VMs
//! ENVELOPE VM                            32 hexadecimal digits each, for each envelope: its id, and whose it is
//! VM                                     32 hexadecimal digits, for each sealed VM
//! CHECKSUM                               16 hexadecimal digits, over all before it
//! ```
//!
//! Without the file nothing is sealed here. A file that can't be trusted is kept for what it still names.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::OFlag;
use nix::unistd::geteuid;

const FIRST_LINE: &[u8] = b"virtseal hook index 1\n";
/// `0000000001 envelopes 0000000001 VMs\n`.
const COUNTS: usize = 36;
const ENVELOPE: usize = 66;
const VM: usize = 33;
const TRAILER: usize = 17;
/// Of more than 900,000 envelopes.
const MAX_LENGTH: u64 = 64 * 1024 * 1024;

/// A UUID as 32 lowercase hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Id(pub(crate) [u8; 32]);

impl Id {
    /// Takes what libvirt takes: upper case, without dashes, with spaces.
    pub(crate) fn spelled(text: &str) -> Option<Self> {
        let mut digits = [0; 32];
        let mut count = 0;
        for byte in text
            .bytes()
            .filter(|byte| *byte != b'-' && !byte.is_ascii_whitespace())
        {
            if !byte.is_ascii_hexdigit() {
                return None;
            }
            *digits.get_mut(count)? = byte.to_ascii_lowercase();
            count += 1;
        }
        (count == digits.len()).then_some(Self(digits))
    }

    /// With its dashes, for messages.
    pub(crate) fn dashed(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let parts = [
            &text[..8],
            &text[8..12],
            &text[12..16],
            &text[16..20],
            &text[20..],
        ];
        parts.join("-")
    }
}

/// What the file says.
pub(crate) struct Index(State);

enum State {
    /// There is none.
    Absent,
    /// The file's bytes, checked.
    Whole {
        bytes: Vec<u8>,
        envelopes: usize,
        vms: usize,
    },
    /// Why it can't be trusted, and every id in it, sorted: of envelopes and VMs alike.
    Damaged { why: String, ids: Vec<Id> },
}

impl Index {
    /// Reads the file whole: that it has not been torn shows only then.
    pub(crate) fn read(path: &Path) -> Self {
        match bytes_of(path) {
            Ok(bytes) => Self::parse(bytes, path),
            Err(error) if error.kind() == ErrorKind::NotFound => Self(State::Absent),
            Err(error) => Self(State::Damaged {
                why: format!("{}: {error}", path.display()),
                ids: Vec::new(),
            }),
        }
    }

    fn parse(bytes: Vec<u8>, path: &Path) -> Self {
        match layout(&bytes) {
            Some((envelopes, vms)) => Self(State::Whole {
                bytes,
                envelopes,
                vms,
            }),
            None => Self(State::Damaged {
                why: format!("{} is damaged", path.display()),
                ids: salvage(&bytes),
            }),
        }
    }

    /// Whether nothing is sealed here.
    pub(crate) fn is_empty(&self) -> bool {
        match &self.0 {
            State::Absent => true,
            State::Whole { envelopes, vms, .. } => *envelopes == 0 && *vms == 0,
            State::Damaged { .. } => false,
        }
    }

    /// Why it can't be trusted.
    pub(crate) fn problem(&self) -> Option<&str> {
        match &self.0 {
            State::Damaged { why, .. } => Some(why),
            State::Absent | State::Whole { .. } => None,
        }
    }

    /// Whether this is an envelope or a sealed VM.
    pub(crate) fn knows(&self, id: &Id) -> bool {
        self.owner(id).is_some() || self.is_sealed(id)
    }

    /// The VM that an envelope, and so the secret of the same UUID, belongs to.
    pub(crate) fn owner(&self, envelope: &Id) -> Option<Owner> {
        match &self.0 {
            State::Absent => None,
            State::Whole { bytes, envelopes, .. } => {
                let records = &bytes[FIRST_LINE.len() + COUNTS..];
                let line = find(records, ENVELOPE, *envelopes, envelope)?;
                let owner = line[33..65].try_into().expect("32 of 66 bytes");
                Some(Owner::Vm(Id(owner)))
            }
            State::Damaged { ids, .. } => ids.binary_search(envelope).ok().map(|_| Owner::Unknown),
        }
    }

    /// Whether this VM is sealed.
    pub(crate) fn is_sealed(&self, vm: &Id) -> bool {
        match &self.0 {
            State::Absent => false,
            State::Whole {
                bytes,
                envelopes,
                vms,
            } => {
                let records = &bytes[FIRST_LINE.len() + COUNTS + envelopes * ENVELOPE..];
                find(records, VM, *vms, vm).is_some()
            }
            State::Damaged { ids, .. } => ids.binary_search(vm).is_ok(),
        }
    }
}

/// Whose an envelope is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    Vm(Id),
    /// The index is damaged.
    Unknown,
}

fn bytes_of(path: &Path) -> io::Result<Vec<u8>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    only_root_writes(&metadata)?;
    if let Some(directory) = path.parent() {
        only_root_writes(&fs::metadata(directory)?)
            .map_err(|error| io::Error::other(format!("in {}: {error}", directory.display())))?;
    }
    read(file, metadata.len())
}

fn read(file: File, length: u64) -> io::Result<Vec<u8>> {
    if length > MAX_LENGTH {
        return Err(io::Error::other("it is too long"));
    }
    let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0) + 1);
    file.take(MAX_LENGTH).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn only_root_writes(metadata: &fs::Metadata) -> io::Result<()> {
    // The hook runs as root; in a test it is who runs that.
    let by_root = metadata.uid() == 0 || metadata.uid() == geteuid().as_raw();
    if by_root && metadata.mode() & 0o022 == 0 {
        Ok(())
    } else {
        Err(io::Error::other("others than root may write there"))
    }
}

/// How many envelopes and VMs there are, if the bytes are what a virtseald has written.
fn layout(bytes: &[u8]) -> Option<(usize, usize)> {
    let body = bytes.len().checked_sub(TRAILER)?;
    let (checked, trailer) = bytes.split_at(body);
    if trailer != format!("{:016x}\n", checksum(checked)).as_bytes() {
        return None;
    }
    let counts = checked.strip_prefix(FIRST_LINE)?.get(..COUNTS)?;
    let counts = std::str::from_utf8(counts).ok()?.strip_suffix(" VMs\n")?;
    let (envelopes, vms) = counts.split_once(" envelopes ")?;
    let (envelopes, vms) = (envelopes.parse::<usize>().ok()?, vms.parse::<usize>().ok()?);
    let records = envelopes
        .checked_mul(ENVELOPE)?
        .checked_add(vms.checked_mul(VM)?)?;
    (body == FIRST_LINE.len() + COUNTS + records).then_some((envelopes, vms))
}

/// The record that starts with `id`, among `count` sorted ones of `width` bytes.
fn find<'b>(records: &'b [u8], width: usize, count: usize, id: &Id) -> Option<&'b [u8]> {
    let record = |at: usize| &records[at * width..(at + 1) * width];
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low + (high - low) / 2;
        match record(middle)[..32].cmp(&id.0) {
            std::cmp::Ordering::Equal => return Some(record(middle)),
            std::cmp::Ordering::Less => low = middle + 1,
            std::cmp::Ordering::Greater => high = middle,
        }
    }
    None
}

fn salvage(bytes: &[u8]) -> Vec<Id> {
    let words = bytes.split(u8::is_ascii_whitespace);
    let ids = words.filter_map(|word| Id::spelled(std::str::from_utf8(word).ok()?));
    let mut ids: Vec<_> = ids.collect();
    ids.sort_unstable();
    ids
}

/// Shows a file that was cut, overwritten in part or mixed up. Who may write it may also write this.
fn checksum(bytes: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let step = |sum: u64, word: u64| (sum ^ word).wrapping_mul(ODD).rotate_left(29);
    let words = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    words.fold(bytes.len() as u64, step)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    use super::*;

    const FIRST: &str = "11111111-2222-3333-4444-555555555555";
    const SECOND: &str = "6b2f9b3e-58c3-4fd5-9aa1-0d1f44a3e9b7";
    const WEB: &str = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";
    /// As virtseald writes it; its tests have the same text.
    const GOLDEN: &str = "virtseal hook index 1\n\
        0000000002 envelopes 0000000001 VMs\n\
        11111111222233334444555555555555 aaaaaaaabbbbccccddddeeeeeeeeeeee\n\
        6b2f9b3e58c34fd59aa10d1f44a3e9b7 aaaaaaaabbbbccccddddeeeeeeeeeeee\n\
        aaaaaaaabbbbccccddddeeeeeeeeeeee\n\
        84155179ffaffd66\n";

    fn id(text: &str) -> Id {
        Id::spelled(text).unwrap()
    }

    fn digits(uuid: &str) -> String {
        String::from_utf8(id(uuid).0.to_vec()).unwrap()
    }

    fn text(envelopes: &[(&str, &str)], vms: &[&str]) -> Vec<u8> {
        let mut records: Vec<_> = envelopes
            .iter()
            .map(|(envelope, vm)| format!("{} {}\n", digits(envelope), digits(vm)))
            .collect();
        records.sort();
        let mut sealed: Vec<_> = vms.iter().map(|vm| digits(vm) + "\n").collect();
        sealed.sort();
        let mut text = format!(
            "virtseal hook index 1\n{:010} envelopes {:010} VMs\n{}{}",
            envelopes.len(),
            vms.len(),
            records.concat(),
            sealed.concat()
        );
        text += &format!("{:016x}\n", checksum(text.as_bytes()));
        text.into_bytes()
    }

    pub(crate) fn index(envelopes: &[(&str, &str)], vms: &[&str]) -> Index {
        Index::parse(text(envelopes, vms), "/index".as_ref())
    }

    #[test]
    fn what_virtseald_writes_is_read() {
        let written = text(&[(SECOND, WEB), (FIRST, WEB)], &[WEB]);
        assert_eq!(String::from_utf8(written).unwrap(), GOLDEN);
        let index = Index::parse(GOLDEN.into(), "/index".as_ref());
        assert!(index.problem().is_none() && !index.is_empty());
        assert_eq!(index.owner(&id(FIRST)), Some(Owner::Vm(id(WEB))));
        assert_eq!(index.owner(&id(SECOND)), Some(Owner::Vm(id(WEB))));
        assert_eq!(index.owner(&id(WEB)), None);
        assert!(index.is_sealed(&id(WEB)) && !index.is_sealed(&id(FIRST)));
        assert!(index.knows(&id(WEB)) && index.knows(&id(FIRST)));
    }

    #[test]
    fn every_record_is_found_and_no_other() {
        let uuid = |number: u128| {
            let digits = format!("{:032x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_0c1d));
            id(&digits).dashed()
        };
        for count in [0, 1, 2, 3, 64, 100] {
            let names: Vec<_> = (1..=count).map(uuid).collect();
            let envelopes: Vec<_> = names.iter().map(|name| (name.as_str(), WEB)).collect();
            let vms: Vec<_> = names.iter().map(String::as_str).collect();
            let index = index(&envelopes, &vms);
            assert_eq!(index.is_empty(), count == 0);
            for number in 1..=count {
                assert!(index.owner(&id(&uuid(number))).is_some(), "{number} of {count}");
                assert!(index.is_sealed(&id(&uuid(number))));
            }
            assert!(!index.knows(&id(&uuid(count + 1))));
        }
    }

    #[test]
    fn any_damage_is_noticed_and_what_is_left_still_counts() {
        let good = text(&[(FIRST, WEB), (SECOND, WEB)], &[WEB]);
        let damaged = |bytes: &[u8]| Index::parse(bytes.to_vec(), "/index".as_ref());
        for length in 0..good.len() {
            assert!(damaged(&good[..length]).problem().is_some(), "cut to {length}");
        }
        for at in 0..good.len() {
            for bit in [1, 4, 0x80] {
                let mut bytes = good.clone();
                bytes[at] ^= bit;
                assert!(damaged(&bytes).problem().is_some(), "bit {bit} of byte {at}");
            }
        }
        let cut = damaged(&good[..good.len() - 3]);
        assert_eq!(cut.owner(&id(SECOND)), Some(Owner::Unknown));
        assert!(cut.is_sealed(&id(WEB)) && !cut.knows(&id("f".repeat(32).as_str())));
        assert!(!damaged(b"").is_empty(), "an empty file is no empty index");
    }

    #[test]
    fn only_a_file_that_root_alone_writes_is_believed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hook.index");
        assert!(Index::read(&path).is_empty());
        assert!(Index::read(&directory.path().join("none/hook.index")).is_empty());
        fs::write(&path, text(&[(FIRST, WEB)], &[])).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Index::read(&path).knows(&id(FIRST)));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o620)).unwrap();
        assert!(Index::read(&path).problem().is_some());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        chown(&path, Some(65534), None).unwrap();
        assert!(Index::read(&path).problem().is_some());
        chown(&path, Some(0), None).unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(Index::read(&path).problem().is_some());
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert!(Index::read(&path).problem().is_none());
        let link = directory.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(Index::read(&link).problem().is_some());
        assert!(Index::read(directory.path()).problem().is_some());
    }

    #[test]
    fn a_uuid_is_taken_as_libvirt_takes_it() {
        for spelled in [
            SECOND.to_owned(),
            SECOND.to_uppercase(),
            SECOND.replace('-', ""),
            SECOND.replace('-', " "),
            format!("\n\t {SECOND} \n"),
        ] {
            assert_eq!(Id::spelled(&spelled), Some(id(SECOND)), "{spelled}");
        }
        for other in [
            "",
            "6b2f",
            &SECOND[1..],
            &format!("{SECOND}0"),
            &SECOND.replace('6', "g"),
        ] {
            assert_eq!(Id::spelled(other), None, "{other}");
        }
        assert_eq!(id(SECOND).dashed(), SECOND);
    }
}

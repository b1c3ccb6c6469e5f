//! Whether an image holds data: a guess that errs towards yes.
//!
//! "Empty" lets a caller replace the image, so it takes proof: no snapshot, no backing file, and nothing allocated
//! that is not a hole or zeros. What no table of a qcow2 image knows counts as well: its header may be all that a guest wrote to
//! the start of a raw disk. Looking for proof stops after a fixed amount of reading.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use serde::Serialize;

use super::{Encryption, Header, Span};

/// Whether anything would be lost with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub(crate) enum Data {
    /// It reads as zeros throughout.
    Empty,
    /// It holds data, or that it does not can't be shown.
    HasData,
}

impl Data {
    fn empty_if(empty: bool) -> Self {
        if empty { Self::Empty } else { Self::HasData }
    }
}

/// How much is read of what is allocated, and of L2 tables, before the answer is yes.
const MAX_READ: u64 = 1 << 30;
/// What a search for the next data counts as reading: hostile tables could ask for millions.
const SEEK_COST: u64 = 4096;
const BLOCK: usize = 1 << 18;

const L2_COMPRESSED: u64 = 1 << 62;
const L2_READS_AS_ZEROS: u64 = 1;
const OFFSET_BITS: u64 = 0x00ff_ffff_ffff_fe00;

/// Judges a raw file or block device of `len` bytes.
pub(crate) fn of_raw(file: &File, len: u64) -> io::Result<Data> {
    Zeros::new(file, len).contain(0..len).map(Data::empty_if)
}

/// Judges a qcow2 image of `len` bytes.
pub(crate) fn of_qcow2(file: &File, len: u64, header: &Header) -> io::Result<Data> {
    if header.snapshots > 0 || header.backing.is_some() || header.data_file || header.marked_corrupt {
        return Ok(Data::HasData);
    }
    let mut zeros = Zeros::new(file, len);
    let mut l1 = vec![0; header.l1.len as usize];
    file.read_exact_at(&mut l1, header.l1.offset)?;
    let Some(metadata) = metadata_of(&mut zeros, header, &l1)? else {
        return Ok(Data::HasData);
    };
    if !zeros.contain_all_but(metadata)? {
        return Ok(Data::HasData);
    }
    for l2 in entries(&l1).filter(|entry| *entry != 0) {
        if header.encryption != Encryption::None || header.extended_l2 {
            return Ok(Data::HasData);
        }
        if !l2_is_empty(&mut zeros, header, l2 & OFFSET_BITS)? {
            return Ok(Data::HasData);
        }
    }
    Ok(Data::Empty)
}

/// Where the image keeps its own tables; `None` if they are too many to look at. Whatever lies elsewhere is data that no
/// table knows: of a raw disk whose guest wrote a header to its start, or of clusters that were given up.
fn metadata_of(zeros: &mut Zeros<'_>, header: &Header, l1: &[u8]) -> io::Result<Option<Vec<Range<u64>>>> {
    let cluster = header.cluster_size.bytes();
    let Some(refcounts) = zeros.read(header.refcount_table.offset, header.refcount_table.len)? else {
        return Ok(None);
    };
    let mut spans = vec![
        Span {
            offset: 0,
            len: cluster,
        },
        header.l1,
        header.refcount_table,
    ];
    if let Encryption::Luks(luks) = header.encryption {
        spans.push(luks);
    }
    let tables = entries(l1).chain(entries(&refcounts)).filter(|entry| *entry != 0);
    spans.extend(tables.map(|entry| Span {
        offset: entry & OFFSET_BITS,
        len: cluster,
    }));
    let mut ranges: Vec<_> = spans
        .into_iter()
        .map(|span| span.offset..span.offset.saturating_add(span.len.next_multiple_of(cluster)))
        .collect();
    ranges.sort_by_key(|range| range.start);
    Ok(Some(ranges))
}

fn l2_is_empty(zeros: &mut Zeros<'_>, header: &Header, offset: u64) -> io::Result<bool> {
    let cluster = header.cluster_size.bytes();
    let Some(table) = zeros.read(offset, cluster)? else {
        return Ok(false);
    };
    for entry in entries(&table) {
        let data = entry & OFFSET_BITS;
        if entry & L2_COMPRESSED != 0 {
            return Ok(false);
        }
        if entry & L2_READS_AS_ZEROS == 0 && data != 0 && !zeros.contain(data..data + cluster)? {
            return Ok(false);
        }
    }
    Ok(true)
}

fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table
        .chunks_exact(8)
        .map(|entry| u64::from_be_bytes(entry.try_into().expect("chunks of eight")))
}

/// Looks for anything but zeros, stepping over holes, within a budget.
struct Zeros<'a> {
    file: &'a File,
    len: u64,
    budget: u64,
    /// Known to be a hole.
    hole: Range<u64>,
}

impl<'a> Zeros<'a> {
    fn new(file: &'a File, len: u64) -> Self {
        Self {
            file,
            len,
            budget: MAX_READ,
            hole: 0..0,
        }
    }

    /// Whether `range` is within the file and certainly zero.
    fn contain(&mut self, range: Range<u64>) -> io::Result<bool> {
        if range.end > self.len {
            return Ok(false);
        }
        let mut at = range.start;
        while at < range.end {
            if self.budget < SEEK_COST {
                return Ok(false);
            }
            at = self.skip_hole(at)?;
            if at >= range.end {
                break;
            }
            let want = (range.end - at).min(BLOCK as u64);
            match self.read(at, want)? {
                Some(bytes) if bytes.iter().all(|byte| *byte == 0) => at += want,
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Whether all of the file is certainly zero that lies outside of `skipped`, which is sorted.
    fn contain_all_but(&mut self, skipped: Vec<Range<u64>>) -> io::Result<bool> {
        let mut at = 0;
        for range in skipped {
            if range.start > at && !self.contain(at..range.start.min(self.len))? {
                return Ok(false);
            }
            at = at.max(range.end);
        }
        self.contain(at.min(self.len)..self.len)
    }

    /// `want` bytes at `offset`; `None` past the end of the file or of the budget.
    fn read(&mut self, offset: u64, want: u64) -> io::Result<Option<Vec<u8>>> {
        let inside = offset.checked_add(want).is_some_and(|end| end <= self.len);
        if !inside || want > self.budget {
            return Ok(None);
        }
        self.budget -= want;
        let mut bytes = vec![0; want as usize];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(Some(bytes))
    }

    fn skip_hole(&mut self, at: u64) -> io::Result<u64> {
        if self.hole.contains(&at) {
            return Ok(self.hole.end);
        }
        self.budget -= SEEK_COST;
        let offset = i64::try_from(at).map_err(io::Error::other)?;
        let data = match lseek64(self.file, offset, Whence::SeekData) {
            Ok(data) => data.unsigned_abs(),
            Err(Errno::ENXIO) => self.len,
            // Block devices have no holes to tell of.
            Err(Errno::EINVAL | Errno::EOPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        self.hole = at..data;
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(len: u64, writes: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        for (offset, bytes) in writes {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    #[test]
    fn holes_and_written_zeros_are_empty() {
        assert_eq!(of_raw(&file_of(1 << 40, &[]), 1 << 40).unwrap(), Data::Empty);
        let zeros = vec![0; 1 << 20];
        let file = file_of(10 << 20, &[(3 << 20, &zeros)]);
        assert_eq!(of_raw(&file, 10 << 20).unwrap(), Data::Empty);
    }

    #[test]
    fn one_byte_anywhere_is_data() {
        for at in [0, 4095, 5 << 20, (10 << 20) - 1] {
            let file = file_of(10 << 20, &[(at, &[1])]);
            assert_eq!(of_raw(&file, 10 << 20).unwrap(), Data::HasData, "byte {at}");
        }
    }

    #[test]
    fn past_the_budget_the_answer_is_yes() {
        let file = file_of(1 << 20, &[(0, &[0; 4096])]);
        for budget in [0, SEEK_COST, SEEK_COST + 100] {
            let mut zeros = Zeros::new(&file, 1 << 20);
            zeros.budget = budget;
            assert!(!zeros.contain(0..1 << 20).unwrap());
        }
    }
}

//! The files of a log: `audit.log`, which is written, and `audit.log.1`, `audit.log.2`, …, which are full, the oldest first.
//! A file that has its number keeps it; nothing here deletes one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::chain::MOST_LINE;

/// How much is read at a time, going back.
const BLOCK: usize = 64 * 1024;

/// All of them, in the order of their records; the last one is `path`.
pub(super) fn all(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files: Vec<_> = full(path)?.into_iter().map(|(_, file)| file).collect();
    files.push(path.to_owned());
    Ok(files)
}

/// Those that are full, with their numbers.
pub(super) fn full(path: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let prefix = format!("{}.", name_of(path));
    let mut found = Vec::new();
    for entry in fs::read_dir(directory(path))? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            found.push((number, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Gives `path` the next number, and says which name it has then; whatever it is, its bytes stay.
pub(super) fn put_away(path: &Path) -> io::Result<PathBuf> {
    let last = full(path)?.last().map_or(0, |(number, _)| *number);
    let mut name = OsString::from(path);
    name.push(format!(".{}", last + 1));
    let to = PathBuf::from(name);
    fs::rename(path, &to)?;
    sync_directory(path)?;
    Ok(to)
}

pub(super) fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(directory(path))?.sync_all()
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// The last `count` whole lines of the log at `path`, in their order, of at most `max_bytes` together; none of them twice as
/// long as a record can be. Reads from the end, a block at a time.
pub(super) fn last_lines(path: &Path, count: usize, max_bytes: usize) -> io::Result<Vec<String>> {
    let (mut lines, mut bytes) = (Vec::new(), 0);
    for file in all(path)?.iter().rev() {
        let file = match File::open(file) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        let is_enough = each_line_back(&file, |line| {
            let line = String::from_utf8_lossy(line).into_owned();
            bytes += line.len();
            if lines.len() == count || (bytes > max_bytes && !lines.is_empty()) {
                return false;
            }
            lines.push(line);
            true
        })?;
        if is_enough {
            break;
        }
    }
    lines.reverse();
    Ok(lines)
}

/// Shows `visit` the whole lines of a file from the last to the first, without their newlines, until it says `false`; says
/// whether it did. Of a line that is longer than any record it gets the end.
pub(super) fn each_line_back(file: &File, mut visit: impl FnMut(&[u8]) -> bool) -> io::Result<bool> {
    let mut at = file.metadata()?.len();
    // What is behind the last newline is no whole line.
    let (mut rest, mut is_whole) = (Vec::new(), false);
    while at > 0 {
        let length = BLOCK.min(usize::try_from(at).unwrap_or(BLOCK));
        at -= length as u64;
        let mut block = vec![0; length];
        file.read_exact_at(&mut block, at)?;
        block.extend_from_slice(&rest);
        block.truncate(length + 2 * MOST_LINE);
        while let Some(newline) = block.iter().rposition(|byte| *byte == b'\n') {
            if is_whole && !visit(&block[newline + 1..]) {
                return Ok(true);
            }
            is_whole = true;
            block.truncate(newline);
        }
        rest = block;
    }
    Ok(is_whole && !visit(&rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_read_from_the_end_through_all_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let line = |nth: usize| format!("{nth}:{}", "x".repeat(nth * 7919 % 3000));
        let text = |range: std::ops::Range<usize>| range.map(|nth| line(nth) + "\n").collect::<String>();
        fs::write(dir.path().join("audit.log.9"), text(0..100)).unwrap();
        fs::write(dir.path().join("audit.log.10"), text(100..250)).unwrap();
        fs::write(dir.path().join("audit.log.torn-3.0"), "not one of them\n").unwrap();
        fs::write(&path, text(250..300) + "half a li").unwrap();
        for count in [0, 1, 49, 50, 51, 199, 200, 201, 300, 1000] {
            let found = last_lines(&path, count, usize::MAX).unwrap();
            let expected: Vec<_> = (300 - count.min(300)..300).map(line).collect();
            assert!(found == expected, "{count}: {} lines", found.len());
        }
        let few = last_lines(&path, 1000, 10_000).unwrap();
        assert!(few.len() < 50 && few.last() == Some(&line(299)));
        fs::remove_file(&path).unwrap();
        assert_eq!(last_lines(&path, 1, usize::MAX).unwrap(), [line(249)]);
    }

    #[test]
    fn a_line_without_an_end_costs_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        fs::write(
            &path,
            [b"a\n".to_vec(), vec![b'x'; 3 << 20], b"\nb\n".to_vec()].concat(),
        )
        .unwrap();
        let lines = last_lines(&path, 10, usize::MAX).unwrap();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].len() <= BLOCK + 2 * MOST_LINE, "{}", lines[1].len());
        assert_eq!((lines[0].as_str(), lines[2].as_str()), ("a", "b"));
    }

    #[test]
    fn what_is_put_away_keeps_its_bytes_and_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        for nth in 1..=11 {
            fs::write(&path, nth.to_string()).unwrap();
            let to = put_away(&path).unwrap();
            assert_eq!(to, dir.path().join(format!("audit.log.{nth}")));
        }
        let files = full(&path).unwrap();
        let read = |(_, file): &(u64, PathBuf)| fs::read_to_string(file).unwrap();
        assert_eq!(
            files.iter().map(read).collect::<Vec<_>>().join(" "),
            "1 2 3 4 5 6 7 8 9 10 11"
        );
    }
}

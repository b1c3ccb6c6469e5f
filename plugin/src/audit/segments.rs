//! The files of a log: `audit.log`, which is written, and `audit.log.1`, `audit.log.2`, …, which are full, the oldest first.
//! A file that has its number keeps it; nothing here deletes one.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The most bytes that a line has: every text of an `Event` at its limit, escaped, and room to spare.
pub(super) const MAX_LINE: usize = 128 * 1024;

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

/// Some records, as they are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    /// The oldest first.
    pub lines: Vec<String>,
    /// Where the first of them begins, counted in bytes through all files; `None` at the first record of all. Records that come
    /// meanwhile, and files that get a number, leave it as it is.
    pub before: Option<u64>,
}

/// The last `count` whole lines of the log at `path` or, of that, before a place in it; in their order, of at most `max_bytes`
/// together, but one at least. Reads from the end, a block at a time.
pub(super) fn last_lines(
    path: &Path,
    before: Option<u64>,
    count: usize,
    max_bytes: usize,
) -> io::Result<Shown> {
    let mut files = Vec::new();
    let mut length = 0;
    for file in all(path)? {
        match File::open(&file) {
            Ok(file) => {
                let begin = length;
                length += file.metadata()?.len();
                files.push((begin, length, file));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let before = before.unwrap_or(length);
    let (mut lines, mut bytes, mut first) = (Vec::new(), 0, before);
    for (begin, end, file) in files.iter().rev() {
        let end = before.clamp(*begin, *end) - begin;
        let is_enough = each_line_before(file, end, |line, at| {
            let line = shown(line, max_bytes);
            bytes += in_a_reply(&line);
            if lines.len() == count || (bytes > max_bytes && !lines.is_empty()) {
                return false;
            }
            first = begin + at;
            lines.push(line);
            true
        })?;
        if is_enough {
            break;
        }
    }
    lines.reverse();
    let before = (first > 0 && !lines.is_empty()).then_some(first);
    Ok(Shown { lines, before })
}

/// A line as text; what no record can be long enough for is cut.
fn shown(line: &[u8], max_bytes: usize) -> String {
    // As JSON in JSON no byte of it becomes more than six.
    let line = &line[..line.len().min(MAX_LINE)];
    let line = String::from_utf8_lossy(line).into_owned();
    if in_a_reply(&line) <= max_bytes {
        return line;
    }
    line.chars().take(max_bytes / 6).collect()
}

/// How many bytes it takes as a JSON string among others.
fn in_a_reply(line: &str) -> usize {
    let escaped = |byte: u8| match byte {
        b'"' | b'\\' => 2,
        0..0x20 => 6,
        _ => 1,
    };
    line.bytes().map(escaped).sum::<usize>() + 3
}

/// Shows `visit` the whole lines of a file from the last to the first, without their newlines, until it says `false`; says
/// whether it did. Of a line that is longer than any record it gets the end.
pub(super) fn each_line_back(file: &File, mut visit: impl FnMut(&[u8]) -> bool) -> io::Result<bool> {
    each_line_before(file, file.metadata()?.len(), |line, _| visit(line))
}

/// The same for the file's first `end` bytes, with where in it each line begins.
fn each_line_before(file: &File, end: u64, mut visit: impl FnMut(&[u8], u64) -> bool) -> io::Result<bool> {
    let mut at = end;
    // What is behind the last newline is no whole line.
    let (mut rest, mut is_whole) = (Vec::new(), false);
    while at > 0 {
        let length = BLOCK.min(usize::try_from(at).unwrap_or(BLOCK));
        at -= length as u64;
        let mut block = vec![0; length];
        file.read_exact_at(&mut block, at)?;
        block.extend_from_slice(&rest);
        block.truncate(length + 2 * MAX_LINE);
        while let Some(newline) = block.iter().rposition(|byte| *byte == b'\n') {
            if is_whole && !visit(&block[newline + 1..], at + newline as u64 + 1) {
                return Ok(true);
            }
            is_whole = true;
            block.truncate(newline);
        }
        rest = block;
    }
    Ok(is_whole && !visit(&rest, 0))
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
            let found = last_lines(&path, None, count, usize::MAX).unwrap().lines;
            let expected: Vec<_> = (300 - count.min(300)..300).map(line).collect();
            assert!(found == expected, "{count}: {} lines", found.len());
        }
        let few = last_lines(&path, None, 1000, 10_000).unwrap().lines;
        assert!(few.len() < 50 && few.last() == Some(&line(299)));
        fs::remove_file(&path).unwrap();
        assert_eq!(last_lines(&path, None, 1, usize::MAX).unwrap().lines, [line(249)]);
    }

    #[test]
    fn pages_from_the_end_show_each_line_once_also_while_it_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let line = |nth: usize| format!("{nth}: \"{}\"", "\\".repeat(nth * 7919 % 3000));
        let text = |range: std::ops::Range<usize>| range.map(|nth| line(nth) + "\n").collect::<String>();
        fs::write(dir.path().join("audit.log.1"), text(0..100)).unwrap();
        fs::write(&path, text(100..300) + "half").unwrap();
        let (mut found, mut before, mut pages) = (Vec::new(), None, 0);
        loop {
            let page = last_lines(&path, before, 1000, 40_000).unwrap();
            assert!(serde_json::to_string(&page.lines).unwrap().len() <= 40_000);
            found.splice(0..0, page.lines);
            pages += 1;
            before = page.before;
            // More comes, and the file gets its number.
            if pages == 2 {
                fs::write(&path, text(100..400)).unwrap();
                put_away(&path).unwrap();
                fs::write(&path, text(400..410)).unwrap();
            }
            if before.is_none() {
                break;
            }
        }
        assert!(pages > 10, "{pages}");
        assert!(found == (0..300).map(line).collect::<Vec<_>>());
        assert_eq!(last_lines(&path, Some(0), 10, 40_000).unwrap().lines.len(), 0);
        assert_eq!(
            last_lines(&path, Some(u64::MAX), 1, 40_000).unwrap().lines,
            [line(409)]
        );
        // One that fills more than a page is cut, and no end of the pages.
        fs::write(&path, text(0..1) + &"\u{1}".repeat(100_000) + "\n").unwrap();
        let page = last_lines(&path, None, 1, 40_000).unwrap();
        assert!(serde_json::to_string(&page.lines).unwrap().len() <= 40_000 && page.before.is_some());
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
        let lines = last_lines(&path, None, 10, usize::MAX).unwrap().lines;
        assert_eq!(lines.len(), 3);
        assert!(lines[1].len() <= MAX_LINE, "{}", lines[1].len());
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

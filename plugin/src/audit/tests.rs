use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::*;
use crate::own_process;

const SOON: Duration = Duration::from_secs(20);

fn event(nth: usize) -> Event {
    Event::new("prepare", Outcome::Ok)
        .actor(0)
        .vm(VmId::random(), "web01")
        .envelope(EnvelopeId::random())
        .object("disk vda")
        .provider("main")
        .detail(&format!("number {nth}\nof \"many\""))
}

fn log_of(dir: &tempfile::TempDir, records: usize) -> PathBuf {
    let path = dir.path().join(AuditLog::FILE);
    let log = AuditLog::open(&path).unwrap();
    for nth in 0..records {
        log.record(event(nth)).unwrap();
    }
    log.flush(SOON).unwrap();
    path
}

fn lines(path: &Path) -> Vec<String> {
    fs::read_to_string(path)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect()
}

fn rewrite(path: &Path, lines: &[String]) {
    fs::write(path, lines.join("\n") + "\n").unwrap();
}

fn broken_line(path: &Path) -> u64 {
    match verify(path).unwrap_err() {
        AuditError::Broken { line, .. } => line,
        error => panic!("{error:?}"),
    }
}

#[test]
fn chain_verifies_and_goes_on_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = log_of(&dir, 5);
    assert_eq!(verify(&path).unwrap().records, 5);
    log_of(&dir, 3);
    let verified = verify(&path).unwrap();
    assert_eq!((verified.records, verified.unfinished), (8, 0));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let record: serde_json::Value = serde_json::from_str(&lines(&path)[7]).unwrap();
    assert_eq!(record["seq"], 8);
    assert_eq!(record["op"], "prepare");
    assert_eq!(record["outcome"], "ok");
    assert_eq!(record["detail"], "number 2\nof \"many\"");
    let head = hex::encode(openssl::sha::sha256(lines(&path)[7].as_bytes()));
    assert_eq!(verified.head, head);
}

#[test]
fn flushed_records_are_there_and_dropped_logs_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let log = AuditLog::open(&path).unwrap();
    log.record(event(0)).unwrap();
    log.flush(SOON).unwrap();
    assert_eq!(verify(&path).unwrap().records, 1);
    log.record(event(1)).unwrap();
    drop(log);
    assert_eq!(verify(&path).unwrap().records, 2);
}

#[test]
fn edited_removed_reordered_and_added_lines_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = log_of(&dir, 9);
    let good = lines(&path);

    let mut edited = good.clone();
    edited[3] = edited[3].replace("\"ok\"", "\"refused\"");
    rewrite(&path, &edited);
    assert_eq!(broken_line(&path), 5);

    let mut removed = good.clone();
    removed.remove(3);
    rewrite(&path, &removed);
    assert_eq!(broken_line(&path), 4);

    rewrite(&path, &good[1..]);
    assert_eq!(broken_line(&path), 1);

    let mut reordered = good.clone();
    reordered.swap(3, 4);
    rewrite(&path, &reordered);
    assert_eq!(broken_line(&path), 4);

    let mut doubled = good.clone();
    doubled.insert(3, good[3].clone());
    rewrite(&path, &doubled);
    assert_eq!(broken_line(&path), 5);

    let mut blank = good.clone();
    blank[3] = String::new();
    rewrite(&path, &blank);
    assert_eq!(broken_line(&path), 4);

    rewrite(&path, &good);
    let whole = verify(&path).unwrap();
    rewrite(&path, &good[..8]);
    assert_ne!(verify(&path).unwrap().head, whole.head);
}

#[test]
fn endless_line_is_an_error_and_not_an_allocation() {
    let dir = tempfile::tempdir().unwrap();
    let path = log_of(&dir, 1);
    let mut bytes = fs::read(&path).unwrap();
    bytes.resize(bytes.len() + 3 * chain::MOST_LINE, b'x');
    fs::write(&path, bytes).unwrap();
    assert_eq!(broken_line(&path), 2);
}

#[test]
fn longest_event_fits_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let log = AuditLog::open(&path).unwrap();
    let text = "\u{1}ü".repeat(Event::MOST_TEXT);
    let event = Event::new(&text, Outcome::Refused)
        .vm(VmId::random(), &text)
        .object(&text);
    log.record(event.provider(&text).detail(&text)).unwrap();
    log.flush(SOON).unwrap();
    assert_eq!(verify(&path).unwrap().records, 1);
}

/// Cuts the log `cut` bytes before its end, or as if a power cut had left zeros there.
fn torn_log_goes_on(cut: usize, zeros: bool) {
    let dir = tempfile::tempdir().unwrap();
    let path = log_of(&dir, 4);
    let mut bytes = fs::read(&path).unwrap();
    let whole = lines(&path)[..3].iter().map(|line| line.len() + 1).sum::<usize>();
    bytes.truncate(bytes.len() - cut);
    if zeros {
        bytes[whole..].fill(0);
        bytes.push(b'\n');
    }
    fs::write(&path, &bytes).unwrap();
    let log = AuditLog::open(&path).unwrap();
    let aside = log.torn().unwrap().to_owned();
    assert_eq!(fs::read(&aside).unwrap(), bytes[whole..]);
    log.record(event(9)).unwrap();
    log.flush(SOON).unwrap();
    assert_eq!(verify(&path).unwrap().records, 5);
    let note: serde_json::Value = serde_json::from_str(&lines(&path)[3]).unwrap();
    assert_eq!(note["op"], "audit-torn");
    assert!(note["detail"].as_str().unwrap().contains(aside.to_str().unwrap()));
    drop(log);
    assert!(AuditLog::open(&path).unwrap().torn().is_none());
}

#[test]
fn torn_end_is_kept_aside_and_recorded() {
    for cut in [1, 2, 50, 200] {
        torn_log_goes_on(cut, false);
        torn_log_goes_on(cut, true);
    }
}

#[test]
fn torn_first_record_and_repeated_tears_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    for nth in 0..3 {
        fs::write(&path, format!("{{\"seq\":1,\"time\":\"{nth}")).unwrap();
        let end = tail::open(&path).unwrap();
        let aside = fs::read_to_string(end.torn.unwrap()).unwrap();
        assert!(aside.ends_with(&nth.to_string()));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    drop(AuditLog::open(&path).unwrap());
    assert_eq!(verify(&path).unwrap().records, 0);
}

#[test]
fn foreign_file_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    fs::write(&path, "shopping list\neggs\n").unwrap();
    assert!(matches!(AuditLog::open(&path), Err(AuditError::NotALog { .. })));
    assert_eq!(fs::read(&path).unwrap(), b"shopping list\neggs\n");
}

#[test]
fn one_log_has_one_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let log = AuditLog::open(&path).unwrap();
    assert!(matches!(AuditLog::open(&path), Err(AuditError::InUse { .. })));
    drop(log);
    AuditLog::open(&path).unwrap();
}

#[test]
fn concurrent_callers_share_syncs_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let log = AuditLog::open(&path).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for nth in 0..25 {
                    log.record(event(nth)).unwrap();
                    log.flush(SOON).unwrap();
                }
            });
        }
    });
    assert_eq!(verify(&path).unwrap().records, 16 * 25);
}

#[test]
fn full_disk_reaches_the_caller() {
    let log = AuditLog::open(Path::new("/dev/full")).unwrap();
    log.record(event(0)).unwrap();
    match log.flush(SOON).unwrap_err() {
        AuditError::Write(error) => assert!(error.raw_os_error().is_some(), "{error:?}"),
        error => panic!("{error:?}"),
    }
}

/// A file that may not grow fails in the middle of a line, as a full disk does. In a process of its own, for the
/// limit holds for all files of one.
#[test]
fn writes_go_on_when_there_is_room_again() {
    own_process::run(writes_go_on_after_a_limit);
}

fn writes_go_on_after_a_limit() {
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.unwrap();
    let (_, hard) = getrlimit(Resource::RLIMIT_FSIZE).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let log = AuditLog::open(&path).unwrap();
    setrlimit(Resource::RLIMIT_FSIZE, 3000, hard).unwrap();
    let mut failures = 0;
    for nth in 0..20 {
        log.record(event(nth)).unwrap();
        match log.flush(SOON) {
            Ok(()) => assert_eq!(failures, 0, "a later record can't be there before an earlier one"),
            Err(AuditError::Write(_)) => failures += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!((1..20).contains(&failures));
    let cut_short = verify(&path).unwrap();
    assert!(
        cut_short.records < 20 && cut_short.unfinished > 0,
        "{cut_short:?}"
    );
    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
    log.flush(SOON).unwrap();
    let verified = verify(&path).unwrap();
    assert_eq!((verified.records, verified.unfinished), (20, 0));
}

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

use super::*;
use crate::host::own_process;

const SOON: Duration = Duration::from_secs(20);

fn event(nth: usize) -> Event {
    Event::new("prepare", Outcome::Ok)
        .by(Actor::User(0))
        .vm(VmId::random(), "web01")
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
    match verify(path, None).unwrap_err() {
        AuditError::Broken { line, .. } => line,
        error => panic!("{error:?}"),
    }
}

#[test]
fn chain_verifies_and_goes_on_after_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let path = log_of(&dir, 5);
    assert_eq!(verify(&path, None).unwrap().records, 5);
    log_of(&dir, 3);
    let verified = verify(&path, None).unwrap();
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
    assert_eq!(verify(&path, None).unwrap().records, 1);
    log.record(event(1)).unwrap();
    drop(log);
    assert_eq!(verify(&path, None).unwrap().records, 2);
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
    let whole = verify(&path, None).unwrap();
    rewrite(&path, &good[..8]);
    assert_ne!(verify(&path, None).unwrap().head, whole.head);
}

#[test]
fn endless_line_is_an_error_and_not_an_allocation() {
    let dir = tempfile::tempdir().unwrap();
    let path = log_of(&dir, 1);
    let mut bytes = fs::read(&path).unwrap();
    bytes.resize(bytes.len() + 3 * segments::MAX_LINE, b'x');
    fs::write(&path, bytes).unwrap();
    assert_eq!(broken_line(&path), 2);
}

#[test]
fn longest_event_fits_a_line() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let log = AuditLog::open(&path).unwrap();
    let text = "\u{1}ü".repeat(Event::MAX_TEXT);
    let event = Event::new(&text, Outcome::Refused)
        .vm(VmId::random(), &text)
        .object(&text);
    log.record(event.provider(&text).detail(&text)).unwrap();
    log.flush(SOON).unwrap();
    assert_eq!(verify(&path, None).unwrap().records, 1);
}

fn torn_ends(log: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(log.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    files
        .filter(|file| file.to_str().unwrap().contains("log.torn-"))
        .collect()
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
    let aside = torn_ends(&path).remove(0);
    assert_eq!(fs::read(&aside).unwrap(), bytes[whole..]);
    log.record(event(9)).unwrap();
    log.flush(SOON).unwrap();
    assert_eq!(verify(&path, None).unwrap().records, 5);
    let note: serde_json::Value = serde_json::from_str(&lines(&path)[3]).unwrap();
    assert_eq!(note["op"], "audit-torn");
    assert!(note["detail"].as_str().unwrap().contains(aside.to_str().unwrap()));
    drop(log);
    drop(AuditLog::open(&path).unwrap());
    assert_eq!(torn_ends(&path).len(), 1);
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
        let end = tail::open(&path, None).unwrap();
        let aside = fs::read_to_string(end.torn.unwrap()).unwrap();
        assert!(aside.ends_with(&nth.to_string()));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    drop(AuditLog::open(&path).unwrap());
    assert_eq!(verify(&path, None).unwrap().records, 0);
}

#[test]
fn what_is_no_log_is_put_away_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    fs::write(&path, "shopping list\neggs\n").unwrap();
    let log = AuditLog::open(&path).unwrap();
    assert!(log.problem().unwrap().contains("no audit record"));
    log.flush(SOON).unwrap();
    let put_away = dir.path().join("audit.log.1");
    assert_eq!(fs::read(&put_away).unwrap(), b"shopping list\neggs\n");
    assert_eq!(broken_line(&path), 1);
    // A directory, or a link, in its place.
    drop(log);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/null", &path).unwrap();
    let log = AuditLog::open(&path).unwrap();
    assert!(log.problem().is_some());
    drop(log);
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(AuditLog::open(&path).unwrap().problem().is_some());
}

/// A log whose length is noted in `noted`, as the keystore does.
fn anchored(path: &Path, noted: &Arc<std::sync::Mutex<Option<Position>>>) -> AuditLog {
    let (last, noted) = (*noted.lock().unwrap(), Arc::clone(noted));
    let note = move |at| {
        *noted.lock().unwrap() = Some(at);
        true
    };
    AuditLog::open_anchored(path, last, note).unwrap()
}

fn add(log: &AuditLog, records: usize) {
    for nth in 0..records {
        log.record(event(nth)).unwrap();
    }
    log.flush(SOON).unwrap();
}

#[test]
fn a_log_that_was_cut_emptied_removed_or_rewritten_is_not_whole() {
    type Damage = fn(&Path);
    let cut: Damage = |path| rewrite(path, &lines(path)[..4]);
    let emptied: Damage = |path| fs::write(path, "").unwrap();
    let removed: Damage = |path| fs::remove_file(path).unwrap();
    let forged: Damage = |path| {
        fs::remove_file(path).unwrap();
        let other = AuditLog::open(path).unwrap();
        add(&other, 9);
    };
    let garbage: Damage = |path| fs::write(path, "x\ny\n").unwrap();
    for damage in [cut, emptied, removed, forged, garbage] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(AuditLog::FILE);
        let noted = Arc::default();
        add(&anchored(&path, &noted), 6);
        let at = noted.lock().unwrap().unwrap();
        assert_eq!(at.seq, 6, "its end is noted when it is closed");
        assert_eq!(verify(&path, Some(at)).unwrap().records, 6);
        damage(&path);
        assert!(verify(&path, Some(at)).is_err());
        // The daemon starts all the same, says so, and goes on.
        let log = anchored(&path, &noted);
        assert!(log.problem().is_some());
        add(&log, 3);
        drop(log);
        let first: serde_json::Value = serde_json::from_str(&lines(&path)[0]).unwrap();
        assert_eq!((&first["op"], &first["seq"]), (&"audit-break".into(), &7.into()));
        let at = *noted.lock().unwrap();
        assert_eq!(at.unwrap().seq, 10);
        assert!(verify(&path, at).is_err(), "what is gone stays gone");
        // What came after it is a chain of its own.
        let log = anchored(&path, &noted);
        assert_eq!(log.problem(), None);
    }
}

#[test]
fn damage_under_a_running_daemon_is_recorded() {
    type Damage = fn(&Path);
    let cut: Damage = |path| rewrite_in_place(path, &lines(path)[..2]);
    let grown: Damage = |path| {
        let mut all = lines(path);
        all.push("{}".to_owned());
        rewrite_in_place(path, &all);
    };
    let removed: Damage = |path| fs::remove_file(path).unwrap();
    for damage in [cut, grown, removed] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(AuditLog::FILE);
        let noted = Arc::default();
        let log = anchored(&path, &noted);
        add(&log, 6);
        damage(&path);
        add(&log, 2);
        assert!(log.problem().unwrap().contains("while virtseald wrote it"));
        let records = lines(&path);
        assert!(
            records.len() == 3 && records[0].contains("audit-break"),
            "{records:?}"
        );
        assert!(verify(&path, log.position()).is_err());
    }
}

fn rewrite_in_place(path: &Path, lines: &[String]) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    let text = lines.join("\n") + "\n";
    file.set_len(text.len() as u64).unwrap();
    file.write_all_at(text.as_bytes(), 0).unwrap();
}

/// A crash between a record and its note, and a keystore that is older than the log: no damage.
#[test]
fn a_log_that_is_longer_than_what_was_noted_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let noted = Arc::default();
    add(&anchored(&path, &noted), 4);
    let early = *noted.lock().unwrap();
    add(&anchored(&path, &noted), 700);
    *noted.lock().unwrap() = early;
    let log = anchored(&path, &noted);
    assert_eq!(log.problem(), None);
    assert_eq!(verify(&path, early).unwrap().records, 704);
    // A keystore that was made anew knows nothing of it.
    drop(log);
    *noted.lock().unwrap() = None;
    assert_eq!(anchored(&path, &noted).problem(), None);
}

#[test]
fn the_chain_goes_on_from_file_to_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(AuditLog::FILE);
    let mut written = 0;
    for _ in 0..4 {
        let end = tail::open(&path, None).unwrap();
        let log = AuditLog::start(&path, end, Box::new(|_| true), 4000).unwrap();
        for _ in 0..25 {
            add(&log, 1);
            written += 1;
        }
    }
    let files = segments::all(&path).unwrap();
    assert!(files.len() > 5, "{files:?}");
    assert_eq!(verify(&path, None).unwrap().records, written);
    let shown = AuditLog::last(&path, None, 60, usize::MAX).unwrap().lines;
    let first: serde_json::Value = serde_json::from_str(&shown[0]).unwrap();
    assert_eq!((shown.len(), &first["seq"]), (60, &(written - 59).into()));
    // Died between two files: it goes on from the full one.
    segments::put_away(&path).unwrap();
    add(&AuditLog::open(&path).unwrap(), 1);
    assert_eq!(verify(&path, None).unwrap().records, written + 1);
    // A full file that is gone is missed, also in the middle.
    fs::remove_file(&files[2]).unwrap();
    assert_eq!(broken_line(&path), 1);
}

#[test]
fn a_log_that_can_not_be_opened_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("missing").join(AuditLog::FILE);
    let noted = Arc::default();
    let log = anchored(&path, &noted);
    assert!(log.problem().unwrap().contains("tries again"));
    log.record(event(0)).unwrap();
    assert!(log.flush(SOON).is_err());
    fs::create_dir(path.parent().unwrap()).unwrap();
    log.flush(SOON).unwrap();
    assert_eq!(verify(&path, None).unwrap().records, 1);
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
    assert_eq!(verify(&path, None).unwrap().records, 16 * 25);
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
    let cut_short = verify(&path, None).unwrap();
    assert!(
        cut_short.records < 20 && cut_short.unfinished > 0,
        "{cut_short:?}"
    );
    setrlimit(Resource::RLIMIT_FSIZE, hard, hard).unwrap();
    log.flush(SOON).unwrap();
    let verified = verify(&path, None).unwrap();
    assert_eq!((verified.records, verified.unfinished), (20, 0));
}

//! Storage that may not answer: which one a file is on, and questions that others need not wait for.
//!
//! Who asks a dead disk or NFS server sleeps where no signal reaches it. So a thread asks, and is left behind; while two of them
//! wait for one storage, nobody asks that again.

use std::cell::LazyCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::mounts::Mounts;

/// Enough to tell a file that hangs from storage that does.
const MAX_HUNG: usize = 2;

/// How many threads wait for which storage, left behind by whoever asked.
static HUNG: Mutex<BTreeMap<PathBuf, usize>> = Mutex::new(BTreeMap::new());

fn hung() -> MutexGuard<'static, BTreeMap<PathBuf, usize>> {
    HUNG.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a thread has answered, and whether somebody waits for more.
struct Answers<T> {
    come: Vec<T>,
    has_ended: bool,
    /// The storage that it was left with.
    left_at: Option<PathBuf>,
}

/// Asks of each of these files, one after the other; `None` of those whose storage does not answer within `limit`,
/// or up to twice that where others have answered meanwhile.
pub(crate) fn in_time<T: Send + 'static>(
    paths: BTreeSet<PathBuf>,
    limit: Duration,
    ask: impl Fn(&Path) -> T + Send + Sync + 'static,
) -> Vec<(PathBuf, Option<T>)> {
    // Read only where something hangs.
    let mounts: LazyCell<Arc<Mounts>> = LazyCell::new(Mounts::now);
    let ask = Arc::new(ask);
    let hangs = |path: &PathBuf| {
        let hung = hung();
        let waiting = || hung.get(&mounts.storage_of(path)).copied();
        !hung.is_empty() && waiting().is_some_and(|count| count >= MAX_HUNG)
    };
    let (mut open, mut answers): (Vec<_>, Vec<_>) = (paths.into_iter().collect(), Vec::new());
    while !open.is_empty() {
        let (hang, asked): (Vec<_>, Vec<_>) = open.into_iter().partition(hangs);
        answers.extend(hang.into_iter().map(|path| (path, None)));
        let came = hear(&asked, limit, &mounts, &ask);
        open = asked;
        let unasked = open.split_off((came.len() + 1).min(open.len()));
        let came = came.into_iter().map(Some).chain([None]);
        answers.extend(open.into_iter().zip(came));
        open = unasked;
    }
    answers
}

/// What comes before the first of them that does not answer.
fn hear<T: Send + 'static>(
    paths: &[PathBuf],
    limit: Duration,
    mounts: &LazyCell<Arc<Mounts>>,
    ask: &Arc<impl Fn(&Path) -> T + Send + Sync + 'static>,
) -> Vec<T> {
    let shared = Arc::new((
        Mutex::new(Answers {
            come: Vec::new(),
            has_ended: false,
            left_at: None,
        }),
        Condvar::new(),
    ));
    let asking = Asking(Arc::clone(&shared));
    let (theirs, ask) = (paths.to_owned(), Arc::clone(ask));
    let run = move || {
        for path in theirs {
            if !asking.goes_on_with(ask(&path)) {
                return;
            }
        }
    };
    // Without a thread it has ended.
    let _ = Builder::new().name("storage".to_owned()).spawn(run);
    let (answers, changed) = &*shared;
    let mut answers = answers.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let known = answers.come.len();
        // Not woken by each of thousands.
        let waited = changed.wait_timeout_while(answers, limit, |answers| !answers.has_ended);
        answers = waited.unwrap_or_else(PoisonError::into_inner).0;
        if answers.has_ended || answers.come.len() == paths.len() {
            return std::mem::take(&mut answers.come);
        }
        if answers.come.len() == known {
            let storage = mounts.storage_of(&paths[known]);
            *hung().entry(storage.clone()).or_default() += 1;
            answers.left_at = Some(storage);
            return std::mem::take(&mut answers.come);
        }
    }
}

/// What a thread has of it, however it ends.
struct Asking<T>(Arc<(Mutex<Answers<T>>, Condvar)>);

impl<T> Asking<T> {
    fn goes_on_with(&self, answer: T) -> bool {
        let mut answers = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.left_at.is_none() {
            answers.come.push(answer);
        }
        answers.left_at.is_none()
    }
}

impl<T> Drop for Asking<T> {
    fn drop(&mut self) {
        let mut answers = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        answers.has_ended = true;
        self.0.1.notify_all();
        let Some(storage) = answers.left_at.take() else {
            return;
        };
        let mut hung = hung();
        if let Some(count) = hung.get_mut(&storage) {
            *count -= 1;
            if *count == 0 {
                hung.remove(&storage);
            }
        }
    }
}

/// A file that a thread asks for which nobody can leave behind, until this is dropped.
#[derive(Debug)]
pub(crate) struct Asked(u64);

/// A storage that does not answer those who ask it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Silent(pub(crate) PathBuf);

/// Who asks so now.
#[derive(Debug)]
struct Question {
    number: u64,
    path: PathBuf,
    /// Where that was: it may be unmounted since, and who waits for it waits on.
    storage: PathBuf,
    since: Instant,
}

#[derive(Debug)]
struct Questions {
    open: Vec<Question>,
    next: u64,
}

static ASKED: Mutex<Questions> = Mutex::new(Questions {
    open: Vec::new(),
    next: 0,
});

fn asked() -> MutexGuard<'static, Questions> {
    ASKED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// To be held while `path` is asked, and whatever it is on: a thread that hangs there is lost, and more of them would be.
///
/// # Errors
/// While somebody has waited for this file longer than `limit`, or two for what is on its storage.
pub(crate) fn ask(path: &Path, limit: Duration) -> Result<Asked, Silent> {
    let storage = Mounts::now().storage_of(path);
    let mut asked = asked();
    let late = asked
        .open
        .iter()
        .filter(|question| question.storage == storage && question.since.elapsed() > limit);
    let (mut hung, mut same) = (0, false);
    for question in late {
        hung += 1;
        same |= question.path == path;
    }
    if same || hung >= MAX_HUNG {
        return Err(Silent(storage));
    }
    let number = asked.next;
    asked.next += 1;
    asked.open.push(Question {
        number,
        path: path.to_owned(),
        storage,
        since: Instant::now(),
    });
    Ok(Asked(number))
}

impl Drop for Asked {
    fn drop(&mut self) {
        asked().open.retain(|question| question.number != self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    #[test]
    fn what_hangs_is_left_and_asked_again_when_it_has_answered() {
        let path = |name: &str| PathBuf::from(format!("/dev/storage-test/{name}"));
        let paths = || BTreeSet::from(["a", "hangs", "z"].map(path));
        let (go_on, waits) = mpsc::channel::<()>();
        let waits = Arc::new(Mutex::new(waits));
        let ask = move |path: &Path| {
            if path.ends_with("hangs") {
                let _ = waits.lock().unwrap().recv();
            }
            path.to_owned()
        };
        let known = |name: &str| (path(name), Some(path(name)));
        let told = || {
            let mut told = in_time(paths(), LIMIT, ask.clone());
            told.sort();
            told
        };
        for _ in 0..4 {
            assert_eq!(told(), [known("a"), (path("hangs"), None), known("z")]);
        }
        assert_eq!(hung().get(&path("hangs")), Some(&MAX_HUNG));
        // Whoever was left behind ends.
        drop(go_on);
        while hung().contains_key(&path("hangs")) {
            std::thread::yield_now();
        }
        assert_eq!(told(), ["a", "hangs", "z"].map(known));
    }

    #[test]
    fn few_wait_for_a_storage_that_does_not_answer_and_nobody_is_kept_from_another() {
        let path = |name: &str| PathBuf::from(format!("/proc/storage-test/{name}"));
        let [a, b, c] = ["a", "b", "c"].map(path);
        let hung = (ask(&a, LIMIT).unwrap(), ask(&b, LIMIT).unwrap());
        // It may only be slow.
        drop((ask(&a, LIMIT).unwrap(), ask(&c, LIMIT).unwrap()));
        std::thread::sleep(LIMIT * 2);
        for path in [&a, &b, &c] {
            assert!(
                matches!(ask(path, LIMIT), Err(Silent(at)) if at.starts_with("/proc")),
                "{path:?}"
            );
        }
        drop(ask(Path::new("/dev/storage-test/other"), LIMIT).unwrap());
        // One alone says nothing of the others on its storage.
        let (first, second) = hung;
        drop(second);
        assert!(ask(&a, LIMIT).is_err());
        drop((ask(&b, LIMIT).unwrap(), ask(&c, LIMIT).unwrap()));
        drop(first);
        drop(ask(&a, LIMIT).unwrap());
    }
}

//! Work at what may not answer: images on storage, VMs that libvirt is stuck with. Each piece has a thread of its own and is waited for
//! only so long: one that does not come to an end keeps back nothing but itself, and what is on the same storage.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, Scope};
use std::time::Duration;

use super::lock;
use crate::host::mounts::Mounts;
use crate::model::envelope::EnvelopeId;

/// How many pieces may be late at once.
const MAX_LATE: usize = 16;
/// And on one storage: enough to tell a file that hangs from storage that does.
const MAX_LATE_ON_ONE: usize = 2;

/// The pieces that nobody waits for any more.
#[derive(Debug, Default)]
pub(super) struct Late(Mutex<Vec<Piece>>);

/// What is at work.
#[derive(Clone, Debug)]
struct Piece {
    about: EnvelopeId,
    /// Where its files are: mount points, or block devices. Nothing where it asks libvirt.
    storage: BTreeSet<PathBuf>,
}

/// What becomes of a piece.
enum Turn<T> {
    AtWork,
    Done(T),
    /// Nobody waits for it.
    Late,
}

impl Late {
    /// Has `work` done, which is about this envelope and goes to these files; or says what does not answer. What comes later is
    /// given to `late`.
    pub(super) fn in_time<'scope, T: Send + 'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        (about, paths): (EnvelopeId, &BTreeSet<PathBuf>),
        limit: Duration,
        work: impl FnOnce() -> T + Send + 'scope,
        late: impl FnOnce(T) + Send + 'scope,
    ) -> Result<T, String> {
        let mounts = Mounts::now();
        let storage = paths.iter().map(|path| mounts.storage_of(path)).collect();
        let piece = Piece { about, storage };
        if let Some(refusal) = refusal(&lock(&self.0), &piece) {
            return Err(refusal);
        }
        let turn = Arc::new((Mutex::new(Turn::AtWork), Condvar::new()));
        let theirs = Arc::clone(&turn);
        let run = move || {
            let done = work();
            let (turn, ended) = &*theirs;
            let mut turn = lock(turn);
            if !matches!(*turn, Turn::Late) {
                *turn = Turn::Done(done);
                return ended.notify_all();
            }
            drop(turn);
            lock(&self.0).retain(|piece| piece.about != about);
            late(done);
        };
        Builder::new()
            .name("in time".to_owned())
            .spawn_scoped(scope, run)
            .map_err(|error| format!("there is no thread for it: {error}"))?;
        let (turn, ended) = &*turn;
        let (mut turn, _) = ended
            .wait_timeout_while(lock(turn), limit, |turn| matches!(turn, Turn::AtWork))
            .unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *turn, Turn::Late) {
            Turn::Done(done) => Ok(done),
            Turn::AtWork | Turn::Late => {
                let silent = silent(&piece, limit);
                lock(&self.0).push(piece);
                Err(silent)
            }
        }
    }
}

/// Why a piece is not begun: it is at work already, or would only hang too.
fn refusal(late: &[Piece], piece: &Piece) -> Option<String> {
    let on = |storage: &PathBuf| {
        late.iter()
            .filter(|other| other.storage.contains(storage))
            .count()
    };
    let hangs = piece
        .storage
        .iter()
        .find(|storage| on(storage) >= MAX_LATE_ON_ONE);
    if late.iter().any(|other| other.about == piece.about) {
        return Some(format!("{} does not answer", what(piece)));
    }
    if let Some(storage) = hangs {
        return Some(format!("the storage at {} does not answer", storage.display()));
    }
    (late.len() >= MAX_LATE).then(|| format!("{MAX_LATE} others do not answer"))
}

fn silent(piece: &Piece, limit: Duration) -> String {
    format!("{} does not answer: nothing came for {limit:?}", what(piece))
}

fn what(piece: &Piece) -> String {
    let storage: Vec<_> = piece
        .storage
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    match storage.is_empty() {
        true => "libvirt".to_owned(),
        false => format!("the storage at {}", storage.join(" or ")),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    const LIMIT: Duration = Duration::from_millis(50);

    fn paths(path: &str) -> BTreeSet<PathBuf> {
        BTreeSet::from([path.into()])
    }

    #[test]
    fn two_that_hang_on_one_storage_are_enough_and_others_go_on() {
        let piece = |storage: &str| Piece {
            about: EnvelopeId::random(),
            storage: paths(storage),
        };
        let mut late = vec![piece("/srv/nfs")];
        assert_eq!(refusal(&late, &piece("/srv/nfs")), None);
        assert!(
            refusal(&late, &late[0])
                .unwrap()
                .contains("/srv/nfs does not answer")
        );
        late.push(piece("/srv/nfs"));
        assert!(refusal(&late, &piece("/srv/nfs")).is_some());
        assert_eq!(refusal(&late, &piece("/")), None);
        late.extend((late.len()..MAX_LATE).map(|n| piece(&format!("/srv/{n}"))));
        assert!(refusal(&late, &piece("/")).unwrap().contains("16 others"));
    }

    #[test]
    fn what_hangs_is_left_and_heard_of_when_it_ends() {
        let (late, about) = (Late::default(), EnvelopeId::random());
        let (at, elsewhere) = (paths("/dev/hangs"), paths("/dev/works"));
        let (go_on, hangs) = mpsc::channel();
        let (heard, hear) = mpsc::channel();
        thread::scope(|scope| {
            let left = late.in_time(
                scope,
                (about, &at),
                LIMIT,
                move || hangs.recv().unwrap(),
                move |news| heard.send(news).unwrap(),
            );
            assert!(left.unwrap_err().contains("/dev/hangs does not answer"));
            let refused = late.in_time(scope, (about, &at), LIMIT, || 8, drop);
            assert!(refused.is_err());
            let other = (EnvelopeId::random(), &elsewhere);
            assert_eq!(
                late.in_time(scope, other, Duration::from_secs(60), || 9, drop),
                Ok(9)
            );
            go_on.send(7).unwrap();
            assert_eq!(hear.recv(), Ok(7));
            assert_eq!(
                late.in_time(scope, (about, &at), Duration::from_secs(60), || 8, drop),
                Ok(8)
            );
        });
    }
}

//! Asks whether libvirt answers, once for all who want to know at the same time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::LibvirtError;

type Answer = Result<(), LibvirtError>;

/// Questions one after the other. Who comes while one is asked waits for the next: an answer tells only of the time
/// after its question.
#[derive(Debug, Default)]
pub(super) struct Probe {
    questions: Mutex<Questions>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct Questions {
    /// Whether a thread asks.
    running: bool,
    wanted: u64,
    asked: u64,
    answered: u64,
    last: Option<Answer>,
}

impl Probe {
    /// The answer to a question that is asked from now on, or nothing if there is none within `limit`. `asker` calls
    /// [`Self::run`]; it gets a thread of its own, since nothing can interrupt it, unless one asks already.
    pub(super) fn within(&self, limit: Duration, asker: impl FnOnce() + Send + 'static) -> Option<Answer> {
        let mut questions = self.lock();
        let mine = questions.asked + 1;
        questions.wanted = mine;
        if !questions.running {
            std::thread::Builder::new()
                .name("libvirt".into())
                .spawn(asker)
                .ok()?;
            questions.running = true;
        }
        let (questions, _) = self
            .answered
            .wait_timeout_while(questions, limit, |questions| questions.answered < mine)
            .unwrap_or_else(PoisonError::into_inner);
        let last = questions.last.clone();
        last.filter(|_| questions.answered >= mine)
    }

    /// Asks until nobody wants to know any more.
    pub(super) fn run(&self, ask: impl Fn() -> Answer) {
        let mut questions = self.lock();
        while questions.asked < questions.wanted {
            questions.asked += 1;
            drop(questions);
            // None after a panic, so that those who wait hear of it, and the next question is asked.
            let answer = catch_unwind(AssertUnwindSafe(&ask)).ok();
            questions = self.lock();
            questions.answered = questions.asked;
            questions.last = answer;
            self.answered.notify_all();
        }
        // Still locked: who comes from here on finds nobody asking.
        questions.running = false;
    }

    fn lock(&self) -> MutexGuard<'_, Questions> {
        self.questions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::mpsc::channel;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn those_who_come_during_a_question_share_the_next() {
        let probe = Arc::new(Probe::default());
        let count = Arc::new(AtomicU64::new(0));
        let (begin, begun) = channel();
        let (go_on, gone_on) = channel::<()>();
        let first = {
            let (probe, count) = (Arc::clone(&probe), Arc::clone(&count));
            thread::spawn(move || {
                let asker = Arc::clone(&probe);
                probe.within(LONG, move || {
                    asker.run(|| {
                        if count.fetch_add(1, Ordering::SeqCst) == 0 {
                            begin.send(()).unwrap();
                            gone_on.recv().unwrap();
                        }
                        Ok(())
                    });
                })
            })
        };
        begun.recv().unwrap();
        let others: Vec<_> = (0..8)
            .map(|_| {
                let (probe, count) = (Arc::clone(&probe), Arc::clone(&count));
                thread::spawn(move || {
                    let before = count.load(Ordering::SeqCst);
                    let (asker, counted) = (Arc::clone(&probe), Arc::clone(&count));
                    let answer = probe.within(LONG, move || {
                        asker.run(|| {
                            counted.fetch_add(1, Ordering::SeqCst);
                            Ok(())
                        });
                    });
                    assert!(matches!(answer, Some(Ok(()))));
                    assert!(count.load(Ordering::SeqCst) > before, "asked after it came");
                })
            })
            .collect();
        while probe.lock().wanted < 2 {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(50));
        go_on.send(()).unwrap();
        assert!(matches!(first.join().unwrap(), Some(Ok(()))));
        for other in others {
            other.join().unwrap();
        }
        let asked = count.load(Ordering::SeqCst);
        assert!(asked < 9, "{asked} questions for 9");
    }

    #[test]
    fn silence_ends_with_the_limit_and_the_next_question_is_asked_anew() {
        let probe = Arc::new(Probe::default());
        let (go_on, gone_on) = channel::<()>();
        let asker = Arc::clone(&probe);
        let silent = probe.within(Duration::from_millis(20), move || {
            asker.run(|| {
                gone_on.recv().unwrap();
                Ok(())
            });
        });
        assert!(silent.is_none());
        // That late answer is to the first question, not to this one.
        let late = probe.within(Duration::from_millis(20), || unreachable!("one asks already"));
        assert!(late.is_none());
        go_on.send(()).unwrap();
        go_on.send(()).unwrap();
        while probe.lock().running {
            thread::yield_now();
        }
        let asker = Arc::clone(&probe);
        let answer = probe.within(LONG, move || asker.run(|| Ok(())));
        assert!(matches!(answer, Some(Ok(()))));
    }

    #[test]
    fn a_question_that_panics_leaves_room_for_the_next() {
        let probe = Arc::new(Probe::default());
        let asker = Arc::clone(&probe);
        let none = probe.within(LONG, move || asker.run(|| panic!("on purpose")));
        assert!(none.is_none());
        let asker = Arc::clone(&probe);
        assert!(probe.within(LONG, move || asker.run(|| Ok(()))).is_some());
    }
}

//! A mutex that has a place in an order, so that no two threads wait for each other.
//!
//! A thread takes mutexes in the order of their ranks only. Where debug assertions are on, as in tests, it panics at once when it
//! does not, whether or not another thread is there to deadlock with.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Where something that is held stands among all that can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rank {
    /// Higher ones are taken later.
    pub(super) number: u8,
    /// For the panic.
    pub(super) name: &'static str,
}

thread_local! {
    static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
}

/// What this thread holds, until it is dropped.
#[derive(Debug)]
pub(super) struct Holding(Rank);

impl Holding {
    /// Before it is waited for.
    ///
    /// # Panics
    /// Where debug assertions are on, if this thread holds something that comes later, or the same.
    #[track_caller]
    #[must_use]
    pub(super) fn begin(rank: Rank) -> Self {
        if cfg!(debug_assertions) {
            let last = HELD.with_borrow(|held| held.iter().copied().max_by_key(|held| held.number));
            assert!(
                last.is_none_or(|last| last.number < rank.number),
                "{rank:?} is waited for while {last:?} is held",
            );
            HELD.with_borrow_mut(|held| held.push(rank));
        }
        Self(rank)
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        if cfg!(debug_assertions) {
            // Guards need not go in the order in which they came.
            HELD.with_borrow_mut(|held| {
                if let Some(position) = held.iter().rposition(|held| *held == self.0) {
                    held.remove(position);
                }
            });
        }
    }
}

/// A mutex with a rank.
#[derive(Debug)]
pub(super) struct Ordered<T> {
    rank: Rank,
    value: Mutex<T>,
}

/// What was locked.
#[derive(Debug)]
pub(super) struct Guard<'a, T> {
    value: MutexGuard<'a, T>,
    _holding: Holding,
}

impl<T> Ordered<T> {
    /// Around `value`.
    pub(super) const fn new(rank: Rank, value: T) -> Self {
        Self {
            rank,
            value: Mutex::new(value),
        }
    }

    #[track_caller]
    pub(super) fn lock(&self) -> Guard<'_, T> {
        let _holding = Holding::begin(self.rank);
        Guard {
            // Nothing that a panic could leave half-done is kept behind these.
            value: self.value.lock().unwrap_or_else(PoisonError::into_inner),
            _holding,
        }
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Rank = Rank {
        number: 1,
        name: "first",
    };
    const SECOND: Rank = Rank {
        number: 2,
        name: "second",
    };

    #[test]
    fn what_is_taken_in_the_wrong_order_panics_and_in_the_right_one_does_not() {
        let (first, second) = (Ordered::new(FIRST, 1), Ordered::new(SECOND, 2));
        for _ in 0..2 {
            let (one, mut two) = (first.lock(), second.lock());
            *two += *one;
            // However they go.
            drop(one);
            drop(two);
        }
        let wrong = |held: &Ordered<i32>, waited_for: &Ordered<i32>| {
            std::thread::scope(|scope| {
                let taken = scope.spawn(|| {
                    let _held = held.lock();
                    let _second = waited_for.lock();
                });
                taken.join().is_err()
            })
        };
        assert!(wrong(&second, &first));
        assert!(wrong(&first, &first), "it would wait for itself");
        assert!(!wrong(&first, &second));
        assert_eq!(*second.lock(), 4);
    }
}

//! The locks of the daemon.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that a panic could leave half-done is kept behind these.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! What a provider works by now, until other settings take its place.

use std::sync::{Arc, PoisonError, RwLock};

/// Whoever has it in hand goes on with it.
pub(crate) struct Current<T>(RwLock<Arc<T>>);

impl<T> Current<T> {
    pub(crate) fn new(first: T) -> Self {
        Self(RwLock::new(Arc::new(first)))
    }

    pub(crate) fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nothing takes its place while `work` is at it: a lock reaches the one that counts.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&T) -> R) -> R {
        work(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts `next` in the place of the one that is given to `last`, which nobody has in hand through [`Self::with`] then.
    pub(crate) fn replace(&self, next: T, last: impl FnOnce(&T, &T)) {
        let mut current = self.0.write().unwrap_or_else(PoisonError::into_inner);
        last(&current, &next);
        *current = Arc::new(next);
    }
}

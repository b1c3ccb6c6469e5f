//! What more than one kind of provider is built with.

pub(super) mod address;
pub(crate) mod bound_credential;
pub(super) mod certificate;
mod certificate_request;
pub(crate) mod current;
pub(crate) mod deadline;
pub(crate) mod files;
pub(super) mod gcm;
pub(super) mod identity;
pub(super) mod kek_name;
pub(crate) mod locks;
pub(super) mod race;
pub(super) mod revocation;
pub(super) mod timed;
pub(super) mod tls;
pub(super) mod tpm_key;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// For what stays whole when a thread that holds it panics: plain values that are replaced whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `work` makes of each of `items`, all at the same time; `None` where it panics.
pub(super) fn at_once<I: Sync, T: Send>(items: &[I], work: impl Fn(&I) -> T + Sync) -> Vec<Option<T>> {
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = items.iter().map(|item| scope.spawn(move || work(item))).collect();
        threads.into_iter().map(|thread| thread.join().ok()).collect()
    })
}

/// What a server says, on one line of bounded length and without anything that a terminal would act on.
pub(super) fn printable(text: &str) -> String {
    text.trim()
        .chars()
        .take(300)
        .map(|c| if c.is_control() || turns_text(c) { ' ' } else { c })
        .collect()
}

/// Unicode's marks, embeddings, overrides and isolates of direction: with them a terminal shows another text.
fn turns_text(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{061c}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

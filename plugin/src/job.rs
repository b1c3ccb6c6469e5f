//! Work that outlives a request.
//!
//! [`record`] says what a job is to do, [`runner`] which of them are at work now, [`live`] what is known of these beyond their rows:
//! how fast they go ([`progress`]), and who watches. [`sweep`] is what most do.

pub(crate) mod copies;
pub(crate) mod live;
pub(crate) mod progress;
pub(crate) mod record;
pub(crate) mod runner;
pub(crate) mod sweep;

//! Work that outlives a request.
//!
//! [`record`] says what a job is to do, [`runner`] which of them are at work now, [`live`] what is known of these beyond their rows:
//! how fast they go ([`progress`]), and who watches. [`sweep`] is what most do.

pub mod copies;
pub mod live;
pub mod progress;
pub mod record;
pub mod runner;
pub mod sweep;

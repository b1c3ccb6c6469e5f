//! What virtseal talks about, without I/O.

pub(crate) mod advice;
pub mod envelope;
pub mod finding;
pub mod job;
pub mod kek;
pub mod problem;

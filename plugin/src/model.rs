//! What virtseal talks about, without I/O.

pub(crate) mod act;
pub(crate) mod advice;
pub(crate) mod deadlines;
pub(crate) mod digest;
pub(crate) mod envelope;
pub(crate) mod finding;
pub(crate) mod job;
pub(crate) mod kek;
pub(crate) mod nearest;
pub(crate) mod problem;
pub(crate) mod subject;

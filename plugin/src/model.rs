//! What virtseal talks about, without I/O.

pub mod envelope;
pub mod job;
pub mod problem;

//! What is done to a VM.

pub mod first_runs;
pub mod forgotten;
pub mod marks;
pub mod names;
pub mod running;
pub mod seal;
pub mod side_doors;
pub mod start;
pub mod status;

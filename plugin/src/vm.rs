//! What is done to a VM.

pub mod forgotten;
pub mod seal;
pub mod side_doors;
pub mod start;
pub mod status;

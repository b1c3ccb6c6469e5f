//! What is done to a VM.

pub mod adopt;
pub mod confirmed_formats;
pub mod copies;
pub mod deletion;
pub mod first_runs;
pub mod foreign;
pub mod forget;
pub mod forgotten;
pub mod headers;
pub mod host;
pub mod marks;
pub mod names;
pub mod orphans;
pub mod running;
pub mod seal;
pub mod share;
pub mod shred;
pub mod side_doors;
pub mod start;
pub mod status;
pub mod visible;

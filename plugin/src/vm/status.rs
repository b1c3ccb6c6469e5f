//! How a VM and its objects stand, as `virtseal status` shows them. Decides without I/O; the daemon looks.

pub mod damaged;
pub(crate) mod rivals;
pub mod settings;
pub(crate) mod standing;

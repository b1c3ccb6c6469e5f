//! How a VM and its objects stand, as `virtseal status` shows them. Decides without I/O; the daemon looks.

pub(crate) mod rivals;
pub(crate) mod standing;

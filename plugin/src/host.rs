//! This machine: libvirt, the TPM, processes, clocks, and the paths that root may touch.

pub mod file_error;
pub mod libvirt;
pub mod local_time;
#[cfg(test)]
pub(crate) mod own_process;
pub mod permitted;
pub mod process;
pub mod secure_boot;
pub mod tpm;

//! This machine: libvirt, the TPM, processes, clocks, and the paths that root may touch.

pub(crate) mod boot;
pub(crate) mod file_error;
pub(crate) mod file_stamp;
pub(crate) mod libvirt;
pub(crate) mod local_time;
pub(crate) mod mounts;
#[cfg(test)]
pub(crate) mod own_process;
pub(crate) mod permitted;
pub(crate) mod process;
pub(crate) mod secure_boot;
pub(crate) mod storage;
pub(crate) mod tpm;

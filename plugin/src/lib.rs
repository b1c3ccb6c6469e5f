//! VM encryption for plain libvirt/QEMU hosts.
//!
//! Start reading at [`lifecycle`]: what happens at each step of a VM's life. [`envelope`] is the record that
//! everything else carries about.

pub mod audit;
pub mod config;
pub mod domain;
pub mod envelope;
pub mod failure;
pub mod keystore;
pub mod libvirt;
pub mod lifecycle;
pub mod listener;
pub mod provider;
pub mod secret;
pub mod volume;

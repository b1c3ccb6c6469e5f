//! VM encryption for plain libvirt/QEMU hosts.
//!
//! Start reading at [`lifecycle`]: what happens at each step of a VM's life. [`envelope`] is the record that
//! everything else carries about.

// What is printed goes through `terminal::visible`: see there.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod api;
pub mod audit;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod domain;
pub mod envelope;
pub mod failure;
pub mod forgotten;
pub mod keystore;
pub mod libvirt;
pub mod lifecycle;
pub mod listener;
pub mod local_time;
#[cfg(test)]
mod own_process;
pub mod permitted;
pub mod process;
pub mod provider;
pub mod rotation;
pub mod seal;
pub mod secret;
pub mod secure_boot;
pub mod side_doors;
pub mod sockets;
pub mod state_backup;
pub mod terminal;
pub mod tpm;
pub mod volume;

//! VM encryption for plain libvirt/QEMU hosts.
//!
//! Start reading at [`vm::start`]: what happens at each step of a VM's life. [`model::envelope`] is the record that
//! everything else carries about.

// What is printed goes through `terminal::visible`: see there.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod advice;
pub mod api;
pub mod audit;
pub mod cli;
pub mod config;
mod crypto;
pub mod daemon;
pub mod domain;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod host;
pub mod job;
pub mod model;
pub mod object;
pub mod provider;
pub mod recipients;
pub mod secret;
pub mod state_backup;
pub mod store;
pub mod terminal;
pub mod vm;

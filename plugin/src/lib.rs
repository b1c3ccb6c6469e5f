//! VM encryption for plain libvirt/QEMU hosts.
//!
//! Start reading at `vm::start`: what happens at each step of a VM's life. `model::envelope` is the record that
//! everything else carries about.

// What is printed goes through `terminal::visible`: see there.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

mod advice;
mod api;
mod audit;
mod cli;
mod config;
mod crypto;
mod daemon;
mod domain;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(any(test, feature = "fuzzing"))]
mod fuzz_target;
mod host;
pub mod inside;
mod job;
mod model;
mod object;
mod provider;
mod recipients;
#[cfg(test)]
mod rooms;
mod secret;
mod state_backup;
mod store;
mod terminal;
mod vm;

pub use cli::{commands, main as command_line};
pub use daemon::main as daemon;
pub use secret::heap::WipingHeap;

//! The daemon: its state, its threads, and what each method of the Varlink services does.
//!
//! [`listener`] is the asynchronous edge, [`service`] has a file for each group of methods, `state` what they share. Everything
//! but the edge blocks and runs on worker threads.

mod bell;
mod caller;
pub mod copies;
mod first_runs;
mod gate;
pub mod glance;
mod heard;
pub mod jobs;
pub mod leftovers;
pub mod listener;
mod locks;
pub mod look;
mod moved;
mod ordered;
pub mod overdue;
mod paths;
pub mod pools;
mod records;
pub mod running;
mod saved;
pub mod service;
pub mod sockets;
mod starts;
mod state;
mod storage_pools;

use locks::lock;
pub use starts::HookPolicy;
pub use state::Daemon;

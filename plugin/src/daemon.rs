//! The daemon: its state, its threads, and what each method of the Varlink services does.
//!
//! [`listener`] is the asynchronous edge, [`service`] has a file for each group of methods, `state` what they share. Everything
//! but the edge blocks and runs on worker threads.

mod audit_log;
mod autostart;
mod bell;
mod caller;
mod connection;
mod copies;
mod first_runs;
mod first_unlocks;
mod gate;
mod glance;
mod heard;
mod hook_seen;
mod job_records;
mod jobs;
mod journal;
mod late;
mod leftovers;
pub(crate) mod listener;
mod locks;
mod look;
mod moved;
mod notes;
mod ordered;
mod overdue;
mod overlays;
mod paths;
mod pools;
mod program;
mod records;
mod running;
mod saved;
mod service;
mod settling;
mod sockets;
mod starts;
mod state;
mod storage_pools;
mod unlock_at_start;
mod volumes;

use locks::lock;
pub use program::main;
pub(crate) use starts::HookPolicy;
pub(crate) use state::Daemon;

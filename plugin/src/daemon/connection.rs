//! Keeps the connection to libvirt that starts wait for, so that a start finds it open, and takes away what an earlier daemon has
//! left there.
//!
//! A libvirtd that has just begun accepts connections and may say nothing for long. So this has a thread of its own, and leaves an
//! attempt to connect after its deadline: see [`StartConnection::reach`](crate::host::libvirt::StartConnection::reach).

use super::Daemon;
use crate::host::process::{self, LinkedCode};
use crate::model::backoff::Backoff;
use crate::model::deadlines::libvirt::{CHECK, RECONNECT};
use crate::model::problem::chain;

const BACKOFF: Backoff = Backoff::new(RECONNECT.start, RECONNECT.end);

/// For ever.
pub(super) fn keep(daemon: &Daemon, code: &LinkedCode) {
    let mut failures = 0;
    // Not by who has opened it: a call of somebody else may have.
    let mut swept_at = None;
    let (mut calls_seen, mut calls_released) = (0, 0);
    loop {
        // What a burst of calls has read of the code is given back once there was none for a turn.
        let calls = daemon.calls();
        let idle = calls == calls_seen && calls != calls_released;
        calls_seen = calls;
        if idle {
            calls_released = calls;
        }
        let reached = daemon.libvirt.reach(CHECK);
        let opened = Some(daemon.libvirt.opened());
        let is_new = reached.is_ok() && opened != swept_at;
        let checked = match is_new {
            true => daemon.sweep().map(Some),
            false => reached.map(|()| None),
        };
        process::trim();
        if is_new || idle {
            code.release();
        }
        let wait = match checked {
            Ok(swept) => {
                if let Some(swept) = swept {
                    tracing::info!(swept, "connected to libvirt");
                    swept_at = opened;
                }
                failures = 0;
                CHECK
            }
            Err(error) => {
                tracing::warn!("{}", chain(&error));
                failures += 1;
                BACKOFF.pause(failures)
            }
        };
        std::thread::sleep(wait);
    }
}

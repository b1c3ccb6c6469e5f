//! Threads that nobody else's calls can occupy: `hook` for starts, `admin` for what root asks for, `watch` for readers.
//!
//! | pool | who is served | workers | more |
//! | --- | --- | --- | --- |
//! | `hook` | starts and ends of VMs, at the hook's socket or root's | 64 | the deadline of the hook passes |
//! | `lock` | `provider lock` | 8 | wait for each other |
//! | `admin` | root, and the one look for all who watch a job | 32 | wait for each other |
//! | `watch` | everybody else | 4, of lower priority | wait; `daemon::gate` bounds what one user may have |
//!
//! Each but `lock` has a thread that serves its connections. Who watches has no worker: a task sleeps until something is to be told.

use std::future::Future;
use std::io;
use std::thread::JoinHandle;

use crate::model::deadlines::daemon::{KEEP_ALIVE, LAST_CALLS};
use nix::unistd::{Pid, gettid};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::LocalSet;

/// What of the processor readers leave to others, from 0 to 19: see nice(2).
const NICE_OF_WATCH: libc::c_int = 10;

/// The workers of each pool.
#[derive(Clone, Debug)]
pub(crate) struct Pools {
    pub hook: Handle,
    pub lock: Handle,
    pub admin: Handle,
    pub watch: Handle,
}

/// What the pools are made of. Their workers end with it.
#[derive(Debug)]
pub(crate) struct Runtimes {
    pub hook: Runtime,
    /// Serves no connections.
    pub lock: Runtime,
    pub admin: Runtime,
    pub watch: Runtime,
}

impl Runtimes {
    const HOOKS: usize = 64;
    const LOCKS: usize = 8;
    const ADMINS: usize = 32;
    const WATCHERS: usize = 4;

    /// No thread runs yet.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            hook: runtime(Self::HOOKS).build()?,
            lock: runtime(Self::LOCKS).build()?,
            admin: runtime(Self::ADMINS).build()?,
            watch: runtime(Self::WATCHERS).on_thread_start(step_back).build()?,
        })
    }

    /// To run something on their workers.
    pub(crate) fn pools(&self) -> Pools {
        Pools {
            hook: self.hook.handle().clone(),
            lock: self.lock.handle().clone(),
            admin: self.admin.handle().clone(),
            watch: self.watch.handle().clone(),
        }
    }
}

/// Of one thread, with at most this many workers.
fn runtime(workers: usize) -> Builder {
    let mut builder = Builder::new_current_thread();
    builder
        .enable_all()
        .max_blocking_threads(workers)
        .thread_keep_alive(KEEP_ALIVE);
    builder
}

/// Leaves the processor to the threads of starts.
pub(crate) fn step_back() {
    set_nice(gettid(), NICE_OF_WATCH);
}

/// Somebody who comes before others waits for this thread, which had stepped back. The unit's `LimitNICE` lets it.
pub(crate) fn bring_forward(thread: Pid) {
    set_nice(thread, 0);
}

fn set_nice(thread: Pid, nice: libc::c_int) {
    // SAFETY: it changes a number of a thread. That it is refused matters little.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, thread.as_raw().cast_unsigned(), nice) };
}

/// A thread that serves connections.
#[derive(Debug)]
pub(crate) struct Serving {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Serving {
    /// Starts the thread `name`, which serves what `serve` returns until it is ended; that may spawn local tasks.
    pub(crate) fn start<F: Future>(
        name: &str,
        runtime: Runtime,
        serve: impl FnOnce() -> F + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            LocalSet::new().block_on(&runtime, async {
                tokio::select! {
                    _ = serve() => {}
                    _ = stopped => {}
                }
            });
            // What a worker waits for may never come.
            runtime.shutdown_timeout(LAST_CALLS);
        })?;
        Ok(Self { stop, thread })
    }

    /// Takes no more calls. The thread ends when those in progress have, or after [`LAST_CALLS`].
    pub(crate) fn stop(self) -> JoinHandle<()> {
        // It has ended by itself if nobody listens.
        let _ = self.stop.send(());
        self.thread
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};
    use std::time::Instant;

    use super::*;

    /// Occupies each worker and leaves as many calls waiting, until the barrier is passed.
    fn flood(pool: &Handle, workers: usize, until: &Arc<Barrier>) {
        for call in 0..2 * workers {
            let until = Arc::clone(until);
            pool.spawn_blocking(move || {
                if call < workers {
                    until.wait();
                }
            });
        }
    }

    #[test]
    fn a_start_and_a_lock_wait_for_no_call_that_hangs_and_no_flood_of_watchers() {
        let runtimes = Runtimes::new().unwrap();
        let pools = runtimes.pools();
        let until = Arc::new(Barrier::new(Runtimes::ADMINS + Runtimes::WATCHERS + 1));
        flood(&pools.admin, Runtimes::ADMINS, &until);
        flood(&pools.watch, Runtimes::WATCHERS, &until);
        let stuck = pools.admin.spawn_blocking(|| ());
        for pool in [&pools.hook, &pools.lock] {
            let began = Instant::now();
            let done = pool.spawn_blocking(|| ());
            runtimes.hook.block_on(done).unwrap();
            assert!(began.elapsed() < LAST_CALLS, "it waited");
        }
        assert!(!stuck.is_finished(), "nothing was occupied");
        until.wait();
        runtimes.hook.block_on(stuck).unwrap();
    }
}

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
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::LocalSet;

/// How long a worker waits for more to do before it ends.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// How long calls in progress may still take when the daemon is told to end.
pub const LAST_CALLS: Duration = Duration::from_secs(2);

/// What of the processor readers leave to others, from 0 to 19: see nice(2).
const NICE_OF_WATCH: libc::c_int = 10;

/// The workers of each pool.
#[derive(Clone, Debug)]
pub struct Pools {
    /// For starts.
    pub hook: Handle,
    /// For `provider lock`.
    pub lock: Handle,
    /// For root.
    pub admin: Handle,
    /// For all others.
    pub watch: Handle,
}

/// What the pools are made of. Their workers end with it.
#[derive(Debug)]
pub struct Runtimes {
    /// See [`Pools`].
    pub hook: Runtime,
    /// Serves no connections.
    pub lock: Runtime,
    /// See [`Pools`].
    pub admin: Runtime,
    /// See [`Pools`].
    pub watch: Runtime,
}

impl Runtimes {
    const HOOKS: usize = 64;
    const LOCKS: usize = 8;
    const ADMINS: usize = 32;
    const WATCHERS: usize = 4;

    /// No thread runs yet.
    ///
    /// # Errors
    /// When the kernel refuses what they need.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            hook: runtime(Self::HOOKS).build()?,
            lock: runtime(Self::LOCKS).build()?,
            admin: runtime(Self::ADMINS).build()?,
            watch: runtime(Self::WATCHERS).on_thread_start(step_back).build()?,
        })
    }

    /// To run something on their workers.
    #[must_use]
    pub fn pools(&self) -> Pools {
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
pub fn step_back() {
    // SAFETY: it changes a number of the calling thread, whose id is 0 here. That it is refused matters little.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE_OF_WATCH) };
}

/// A thread that serves connections.
#[derive(Debug)]
pub struct Serving {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Serving {
    /// Starts the thread `name`, which serves what `serve` returns until it is ended; that may spawn local tasks.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start<F: Future>(
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
    pub fn stop(self) -> JoinHandle<()> {
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

//! Threads that nobody else's calls can occupy: `hook` for starts, `admin` for what root asks for, `watch` for readers.
//!
//! Each has a thread that serves connections, and workers for what blocks. A start waits for hooks alone, whatever
//! readers do; locking a provider waits for nobody, so it has workers that do nothing else.

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

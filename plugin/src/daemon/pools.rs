//! Threads that nobody else's calls can occupy: `hook` for starts, `admin` for what root asks for, `watch` for readers.
//!
//! Each pool is a thread that serves connections and workers for what blocks. A start waits for hooks alone, whatever
//! readers do; locking a provider waits for nobody, so it gets a thread each time.

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

/// A runtime of one thread, with at most this many workers for what blocks.
///
/// # Errors
/// When the kernel refuses what it needs.
pub fn runtime(workers: usize) -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(workers)
        .thread_keep_alive(KEEP_ALIVE)
        .build()
}

/// A serving thread and its workers.
#[derive(Debug)]
pub struct Pool {
    handle: Handle,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Pool {
    /// How many starts are decided at once.
    pub const HOOKS: usize = 64;
    /// How many commands of root's.
    pub const ADMINS: usize = 32;
    /// How many of the readers' questions.
    pub const WATCHERS: usize = 4;

    /// Starts the thread `name`, which serves what `serve` returns until it is ended; that may spawn local tasks.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start<F: Future>(
        name: &str,
        workers: usize,
        serve: impl FnOnce() -> F + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel::<()>();
        let runtime = runtime(workers)?;
        let handle = runtime.handle().clone();
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
        Ok(Self { handle, stop, thread })
    }

    /// To run something on its workers.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Takes no more calls. The thread ends when those in progress have, or after [`LAST_CALLS`].
    pub fn stop(self) -> JoinHandle<()> {
        // It has ended by itself if nobody listens.
        let _ = self.stop.send(());
        self.thread
    }
}

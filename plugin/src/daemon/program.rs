//! The program virtseald: its threads, what it does before it is ready, and how it ends.

use std::io;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use crate::config::{Config, ConfigError, LogFilter};
use crate::daemon::journal::Journal;
use crate::daemon::listener::Server;
use crate::daemon::pools::{self, Runtimes, Serving};
use crate::daemon::sockets::Sockets;
use crate::daemon::{
    Daemon, autostart, connection, copies, jobs, leftovers, look, notes, overdue, running, unlock_at_start,
};
use crate::host::process::{self, LinkedCode};
use crate::model::advice::Advice;
use crate::model::deadlines::daemon::LAST_CALLS;
use crate::model::problem::chain;
use crate::terminal::visible;
use anyhow::{Context, anyhow};
use clap::Parser;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_blocking, spawn_local};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The daemon of virtseal: hands VMs their keys when libvirt starts them.
#[derive(Debug, Parser)]
#[command(name = "virtseald", version)]
struct Args {
    /// The configuration; without this option a missing file means all defaults.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Say whether this configuration has a mistake, and do nothing else.
    #[arg(long, value_name = "FILE", conflicts_with = "config")]
    check: Option<PathBuf>,
}

/// Runs until a signal ends it.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let failed = |said: &str, code: ExitCode| {
        let _ = writeln!(io::stderr(), "virtseald: {}", visible(said));
        code
    };
    if let Some(path) = &args.check {
        return match Config::load(path) {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => failed(&chain(&error), error.exit_code()),
        };
    }
    let config = match load(&args) {
        Ok(config) => config,
        Err(error) => {
            let next = Advice::from("mend it").then(Advice::StartAnew);
            return failed(&format!("{}. Next: {next}", chain(&error)), error.exit_code());
        }
    };
    match run(config, &args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&format!("{error:#}"), ExitCode::FAILURE),
    }
}

fn run(config: Config, args: &Args) -> anyhow::Result<()> {
    process::harden().context("can't protect this process")?;
    let code = Arc::new(LinkedCode::of_this_process().context("can't read /proc/self/smaps")?);
    start_log(&config.log)?;
    let sockets = Sockets::open(&config).map_err(|error| anyhow!(chain(&error)))?;
    let daemon = Arc::new(Daemon::open(config)?);
    warn_of_settings(&daemon);
    let runtimes = Runtimes::new()?;
    let server = Server::new(Arc::clone(&daemon), runtimes.pools())?;
    let Runtimes {
        hook,
        lock,
        admin,
        watch,
    } = runtimes;
    let of_hook = server.clone();
    let hook = Serving::start("hook", hook, move || of_hook.serve_hook(sockets.hook))?;
    let (visitors, visiting) = mpsc::unbounded_channel();
    let of_visitors = server.clone();
    let watch = Serving::start("watch", watch, move || {
        pools::step_back();
        of_visitors.serve_visitors(visiting)
    })?;
    let main = server.serve_main(sockets.main, visitors);
    let outcome = LocalSet::new().block_on(&admin, serve(main, Arc::clone(&daemon), code, args));
    // A worker may be stuck in libvirt: the keys go, whatever it waits for.
    daemon.lock_all();
    let serving = [hook.stop(), watch.stop()];
    admin.shutdown_timeout(LAST_CALLS);
    lock.shutdown_background();
    for thread in serving {
        // A panic in it was printed.
        let _ = thread.join();
    }
    daemon.end();
    outcome
}

async fn serve(
    connections: impl Future<Output = ()> + 'static,
    daemon: Arc<Daemon>,
    code: Arc<LinkedCode>,
    args: &Args,
) -> anyhow::Result<()> {
    if cfg!(debug_assertions) {
        tracing::warn!("this is a debug build, for tests: what a passphrase protects is easy to guess");
    }
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    let unlocking = spawn_local(unlock_at_start::try_each(Arc::clone(&daemon), Arc::clone(&code)));
    spawn_local(connections);
    let sweeping = Arc::clone(&daemon);
    spawn_blocking(move || leftovers::sweep_temporaries(&sweeping));
    work_in_background(&daemon, code)?;
    ping_watchdog()?;
    spawn_local(async {
        // One that panicked has tried, too.
        let _ = unlocking.await;
        notify(&[NotifyState::Ready]);
        tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");
    });
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => reload(&daemon, args),
        }
    }
    notify(&[NotifyState::Stopping]);
    tracing::info!("ending");
    Ok(())
}

fn load(args: &Args) -> Result<Config, ConfigError> {
    match &args.config {
        Some(path) => Config::load(path),
        None if Path::new(Config::DEFAULT_PATH).exists() => Config::load(Config::DEFAULT_PATH.as_ref()),
        None => Ok(Config::default()),
    }
}

/// To the journal where systemd says so, else to standard error.
fn start_log(filter: &LogFilter) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(filter.to_string())
        .with_context(|| format!("log: '{filter}' is not a log filter"))?;
    let recipients = tracing_subscriber::registry().with(filter);
    if std::env::var_os("JOURNAL_STREAM").is_some()
        && let Ok(journal) = Journal::connect()
    {
        recipients.with(journal).init();
    } else {
        recipients
            .with(
                tracing_subscriber::fmt::layer()
                    .with_writer(io::stderr)
                    .with_ansi(false),
            )
            .init();
    }
    Ok(())
}

/// Jobs and copies have threads of their own, which end with the process: each step of theirs may be the last.
fn work_in_background(daemon: &Arc<Daemon>, code: Arc<LinkedCode>) -> anyhow::Result<()> {
    type Work = fn(&Daemon);
    for (name, run) in [
        ("jobs", jobs::run as Work),
        ("copies", copies::run),
        ("notes", notes::run),
        ("status", look::run),
        ("running", running::watch),
        ("autostart", autostart::run),
    ] {
        let daemon = Arc::clone(daemon);
        begin(name, move || run(&daemon))?;
    }
    let [of_arms, of_connection] = [daemon, daemon].map(Arc::clone);
    begin("arms", move || overdue::watch(&of_arms))?;
    begin("connection", move || connection::keep(&of_connection, &code))
}

fn begin(name: &str, work: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread
        .spawn(work)
        .map(drop)
        .with_context(|| format!("can't start the thread for {name}"))
}

/// systemd kills who does not say for long that it lives: that is said by a thread that waits for nobody.
fn ping_watchdog() -> anyhow::Result<()> {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return Ok(());
    };
    begin("watchdog", move || {
        loop {
            notify(&[NotifyState::Watchdog]);
            std::thread::sleep(limit / 4);
        }
    })
}

fn reload(daemon: &Arc<Daemon>, args: &Args) {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        notify(&[NotifyState::Reloading, now]);
    }
    match load(args) {
        Ok(config) => {
            for key in daemon.reload(config) {
                tracing::warn!(key, "changes only with a restart of virtseald");
            }
            warn_of_settings(daemon);
            tracing::info!("configuration reloaded");
            notify(&[NotifyState::Status(""), NotifyState::Ready]);
        }
        Err(error) => {
            let next = Advice::from("mend it").then(Advice::ReloadDaemon);
            let said = format!("the old configuration stays: {}. Next: {next}", chain(&error));
            tracing::error!("{said}");
            // What systemctl shows of it, until one is taken.
            notify(&[NotifyState::Status(&said), NotifyState::Ready]);
        }
    }
}

/// What the settings name and this host does not have may come later: no reason not to start.
fn warn_of_settings(daemon: &Daemon) {
    for doubt in daemon.warnings() {
        tracing::warn!("{doubt}");
    }
}

fn notify(state: &[NotifyState<'_>]) {
    // Without systemd there is nobody to tell.
    let _ = sd_notify::notify(state);
}

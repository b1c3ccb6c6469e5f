//! The daemon of virtseal.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, anyhow};
use clap::Parser;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::{LocalSet, spawn_blocking, spawn_local};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use virtseal::audit::Actor;
use virtseal::config::{Config, ConfigError, LogFilter};
use virtseal::daemon::listener::Server;
use virtseal::daemon::pools::{self, LAST_CALLS, Runtimes, Serving};
use virtseal::daemon::service::tpm::{CREDENTIAL, TpmUnlock, Tried};
use virtseal::daemon::service::{cache, provider, tpm};
use virtseal::daemon::sockets::Sockets;
use virtseal::daemon::{Daemon, copies, jobs, leftovers, look, overdue, running};
use virtseal::host::process::{self, LinkedCode};
use virtseal::model::problem::chain;
use virtseal::secret::heap::WipingHeap;
use virtseal::terminal::visible;

#[global_allocator]
static HEAP: WipingHeap = WipingHeap;

/// The daemon of virtseal: hands VMs their keys when libvirt starts them.
#[derive(Debug, Parser)]
#[command(name = "virtseald", version)]
struct Args {
    /// The configuration; without this option a missing file means all defaults.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtseald: {}", visible(&format!("{error:#}")));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<()> {
    process::harden().context("can't protect this process")?;
    let code = Arc::new(LinkedCode::of_this_process().context("can't read /proc/self/smaps")?);
    let config = load(args).map_err(|error| {
        anyhow!(
            "{}. Next: mend it, then systemctl restart virtseald",
            chain(&error)
        )
    })?;
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
    outcome
}

async fn serve(
    connections: impl Future<Output = ()> + 'static,
    daemon: Arc<Daemon>,
    code: Arc<LinkedCode>,
    args: &Args,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    unlock_from_credentials(&daemon);
    for unlock in tpm::to_unlock(&daemon) {
        spawn_local(unlock_by_tpm(
            Arc::clone(&daemon),
            Arc::new(unlock),
            Arc::clone(&code),
        ));
    }
    cache::load_all(&daemon);
    spawn_local(connections);
    spawn_local(watch_libvirt(Arc::clone(&daemon), code));
    let sweeping = Arc::clone(&daemon);
    spawn_blocking(move || leftovers::sweep_temporaries(&sweeping));
    work_in_background(&daemon)?;
    ping_watchdog()?;
    notify(&[NotifyState::Ready]);
    tracing::info!(version = env!("CARGO_PKG_VERSION"), "ready");
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
    let filter =
        EnvFilter::try_new(filter.to_string()).with_context(|| format!("log: '{filter}' is no filter"))?;
    let recipients = tracing_subscriber::registry().with(filter);
    if std::env::var_os("JOURNAL_STREAM").is_some()
        && let Ok(journal) = tracing_journald::layer()
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
fn work_in_background(daemon: &Arc<Daemon>) -> anyhow::Result<()> {
    type Work = fn(&Daemon);
    for (name, run) in [
        ("jobs", jobs::run as Work),
        ("copies", copies::run),
        ("status", look::run),
        ("running", running::watch),
    ] {
        let daemon = Arc::clone(daemon);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || run(&daemon))
            .with_context(|| format!("can't start the thread for {name}"))?;
    }
    let daemon = Arc::clone(daemon);
    std::thread::Builder::new()
        .name("arms".to_owned())
        .spawn(move || overdue::watch(&daemon))
        .context("can't start the thread for arms")?;
    Ok(())
}

/// systemd kills who does not say for long that it lives: that is said by a thread that waits for nobody.
fn ping_watchdog() -> anyhow::Result<()> {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return Ok(());
    };
    let ping = move || {
        loop {
            notify(&[NotifyState::Watchdog]);
            std::thread::sleep(limit / 4);
        }
    };
    std::thread::Builder::new()
        .name("watchdog".to_owned())
        .spawn(ping)
        .context("can't start the thread for the watchdog")?;
    Ok(())
}

/// A failure is logged, not fatal: the admin can still unlock by hand.
fn unlock_from_credentials(daemon: &Arc<Daemon>) {
    let Some(directory) = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from) else {
        return;
    };
    for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
        let file_name = entry.file_name();
        let Some(name) = file_name
            .to_str()
            .and_then(|name| name.strip_prefix(CREDENTIAL))
            .map(str::to_owned)
        else {
            continue;
        };
        let daemon = Arc::clone(daemon);
        spawn_blocking(move || {
            let unlocked = fs::File::open(entry.path())
                .map_err(|error| error.to_string())
                .and_then(|file| {
                    provider::unlock(&daemon, Actor::Virtseald, &name, vec![file.into()])
                        .map_err(|failure| failure.to_string())
                });
            match unlocked {
                Ok(()) => tracing::info!(provider = name, "unlocked by its credential"),
                Err(error) => tracing::error!(provider = name, "its credential does not unlock it: {error}"),
            }
        });
    }
}

/// Tries again for a while: the TPM's driver may come later than this daemon, or others use the TPM first.
async fn unlock_by_tpm(daemon: Arc<Daemon>, unlock: Arc<TpmUnlock>, code: Arc<LinkedCode>) {
    const PATIENCE: Duration = Duration::from_secs(120);
    let mut wait = Duration::from_millis(500);
    while wait < PATIENCE {
        let (daemon, unlock) = (Arc::clone(&daemon), Arc::clone(&unlock));
        if spawn_blocking(move || tpm::try_to_unlock(&daemon, &unlock))
            .await
            .ok()
            != Some(Tried::Again)
        {
            // The library of the TPM is not needed again before long.
            code.release();
            return;
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
}

/// Keeps the connection to libvirt, and takes away what an earlier daemon has left there.
async fn watch_libvirt(daemon: Arc<Daemon>, code: Arc<LinkedCode>) {
    const PATIENCE: std::ops::Range<Duration> = Duration::from_millis(200)..Duration::from_secs(30);
    let mut wait = PATIENCE.start;
    // Not only on a new connection: a call of somebody else may have made that one, or the sweep failed.
    let mut sweep_is_due = true;
    let (mut calls_seen, mut calls_released) = (0, 0);
    loop {
        // What a burst of calls has read of the code is given back once there was none for a turn.
        let calls = daemon.calls();
        let idle = calls == calls_seen && calls != calls_released;
        calls_seen = calls;
        if idle {
            calls_released = calls;
        }
        let (checked, code) = (Arc::clone(&daemon), Arc::clone(&code));
        let checked = spawn_blocking(move || {
            let new = checked.connect()?;
            let swept = (new || sweep_is_due).then(|| checked.sweep()).transpose()?;
            process::trim();
            if new || idle {
                code.release();
            }
            Ok::<_, virtseal::host::libvirt::LibvirtError>(swept)
        })
        .await;
        sweep_is_due = !matches!(checked, Ok(Ok(_)));
        wait = match checked {
            Ok(Ok(swept)) => {
                if let Some(swept) = swept {
                    tracing::info!(swept, "connected to libvirt");
                }
                Duration::from_secs(5)
            }
            Ok(Err(error)) => {
                tracing::warn!("{}", chain(&error));
                (wait * 2).min(PATIENCE.end)
            }
            Err(_) => PATIENCE.end,
        };
        tokio::time::sleep(wait).await;
    }
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
        }
        Err(error) => tracing::error!(
            "the old configuration stays: {}. Next: mend it, then systemctl reload virtseald",
            chain(&error)
        ),
    }
    notify(&[NotifyState::Ready]);
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

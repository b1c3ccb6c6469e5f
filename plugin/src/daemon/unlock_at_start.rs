//! Unlocks providers as virtseald starts, by systemd credentials and the TPM.
//!
//! virtseald is ready once each has been tried, so that `systemctl restart virtseald` returns to a host whose VMs start; a KMS or a
//! TPM that hangs puts that off by [`FIRST_UNLOCKS`] at the most. Nobody else waits, but for a start that would be refused for want
//! of one of them.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::{spawn_blocking, spawn_local};

use super::Daemon;
use super::first_unlocks::Trying;
use super::service::tpm::{CREDENTIAL, TpmUnlock};
use super::service::tpm_credential::Tried;
use super::service::{cache, provider, tpm};
use crate::audit::Actor;
use crate::host::process::LinkedCode;
use crate::model::backoff::Backoff;
use crate::model::deadlines::daemon::FIRST_UNLOCKS;
use crate::model::deadlines::tpm::{AT_START, TRIES_AT_START};

/// Begins to unlock, and returns when each way was tried once, or after [`FIRST_UNLOCKS`].
pub(super) async fn try_each(daemon: Arc<Daemon>, code: Arc<LinkedCode>) {
    let (trying, mut tried) = mpsc::channel(1);
    unlock_from_credentials(&daemon, &trying);
    for unlock in tpm::to_unlock(&daemon) {
        let (daemon, code) = (Arc::clone(&daemon), Arc::clone(&code));
        spawn_local(unlock_by_tpm(daemon, Arc::new(unlock), code, trying.clone()));
    }
    cache::load_all(&daemon, &trying);
    drop(trying);
    if tokio::time::timeout(FIRST_UNLOCKS, tried.recv()).await.is_err() {
        tracing::warn!("a TPM or KMS that is to unlock a provider has not answered yet: ready without it");
    }
    daemon.first_unlocks.end();
}

/// A failure is logged, not fatal: the admin can still unlock by hand.
fn unlock_from_credentials(daemon: &Arc<Daemon>, trying: &Trying) {
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
        let (daemon, trying) = (Arc::clone(daemon), trying.clone());
        spawn_blocking(move || {
            let unlocked = File::open(entry.path())
                .map_err(|error| error.to_string())
                .and_then(|file| {
                    provider::unlock(&daemon, Actor::Virtseald, &name, vec![file.into()])
                        .map_err(|failure| failure.to_string())
                });
            match unlocked {
                Ok(_) => tracing::info!(provider = name, "unlocked by its credential"),
                Err(error) => tracing::error!(provider = name, "its credential does not unlock it: {error}"),
            }
            drop(trying);
        });
    }
}

/// Tries again for a while: the TPM's driver may come later than this daemon, or others use the TPM first.
async fn unlock_by_tpm(daemon: Arc<Daemon>, unlock: Arc<TpmUnlock>, code: Arc<LinkedCode>, trying: Trying) {
    const BACKOFF: Backoff = Backoff::new(AT_START.start, AT_START.end);
    let mut trying = Some(trying);
    for failures in 1..=TRIES_AT_START {
        let (daemon, unlock) = (Arc::clone(&daemon), Arc::clone(&unlock));
        let attempt = move || {
            let tried = tpm::try_to_unlock(&daemon, &unlock);
            cache::load_in_background(&daemon, unlock.provider());
            tried
        };
        let tried = spawn_blocking(attempt).await;
        drop(trying.take());
        if tried.ok() != Some(Tried::Again) {
            // The library of the TPM is not needed again before long.
            code.release();
            return;
        }
        tokio::time::sleep(BACKOFF.pause(failures)).await;
    }
}

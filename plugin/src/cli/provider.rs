//! `virtseal provider …`.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::backup::{BackupArgs, RestoreArgs};
use super::cache::CacheArgs;
use super::client::Client;
use super::job::WatchArgs;
use super::passphrase::{PassphraseArgs, ask, open_file, to_pipe};
use super::print::Printer;
use super::provider_add::AddCommand;
use super::tpm::{TpmArgs, needs_pin};
use super::trust::{CsrArgs, IdentityArgs, TrustArgs};
use super::{backup, cache, job, provider_add, tpm, trust, warn_of_providers};
use crate::api::{HostProxy, Orphans, SweepKind};
use crate::model::problem::{Code, Problem};

#[derive(Debug, Subcommand)]
pub(super) enum ProviderCommand {
    /// Add a provider; the first one becomes the default.
    #[command(subcommand)]
    Add(AddCommand),
    /// List all providers.
    List,
    /// Show one provider.
    Show {
        /// Its name.
        name: String,
    },
    /// Change how long the KEKs of a provider are kept for when its servers don't answer.
    Cache(CacheArgs),
    /// Make new keys go to this provider.
    Default {
        /// Its name.
        name: String,
    },
    /// Unlock a provider, so that its VMs can start: with its passphrase, PIN, token, secret id or client key.
    Unlock {
        /// Its name.
        name: String,
        /// By the TPM of this host, with which it was enrolled; asks for the PIN, if it needs one.
        #[arg(long)]
        tpm: bool,
        #[command(flatten)]
        passphrase: PassphraseArgs,
    },
    /// Let the TPM of this host unlock a native provider when virtseald starts, or no longer.
    Tpm(TpmArgs),
    /// Lock a provider: purge its keys from memory, refuse starts.
    Lock {
        /// Its name.
        name: String,
    },
    /// Show this host to a KMS: a client certificate with its private key.
    Identity(IdentityArgs),
    /// Print the signing request for a client certificate whose private key stays on this host.
    Csr(CsrArgs),
    /// Look at the certificates of a KMS, and trust it.
    Trust(TrustArgs),
    /// Write a password-protected backup that `age -d` opens as well.
    Backup(BackupArgs),
    /// Restore a provider from its backup.
    Restore(RestoreArgs),
    /// Retire the keys in use, and rewrap every envelope with new ones.
    Rotate {
        /// Its name.
        name: String,
        #[command(flatten)]
        passphrase: PassphraseArgs,
        /// Read the PIN that the TPM asks for, so that it unlocks the new root key too, from this file.
        #[arg(long, value_name = "FILE")]
        tpm_pin_file: Option<PathBuf>,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Rewrap every envelope for the providers that new ones are for: the default one, or the recipients of the policy.
    Rekey {
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Move envelopes from one provider to another; VMs may run meanwhile.
    Move {
        /// The provider to leave.
        from: String,
        /// The provider to go to.
        to: String,
        /// Only those of this VM: name or UUID.
        #[arg(long)]
        vm: Option<String>,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Add or remove a provider that can open every envelope.
    #[command(subcommand)]
    Recipients(RecipientsCommand),
    /// Delete a provider that nothing needs.
    Delete {
        /// Its name.
        name: String,
        /// Delete it although VMs need it; asks for its name.
        #[arg(long)]
        force: bool,
        /// The name, typed here instead of at the prompt.
        #[arg(long, value_name = "NAME", requires = "force")]
        yes_delete: Option<String>,
    },
    /// List envelopes and KEKs that no VM uses. Nothing is deleted.
    Orphans,
}

#[derive(Debug, Subcommand)]
pub(super) enum RecipientsCommand {
    /// Give every envelope a stanza of this provider.
    Add {
        /// The provider's name.
        name: String,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Take the stanzas of this provider from every envelope that another one opens.
    Remove {
        /// The provider's name.
        name: String,
        #[command(flatten)]
        watch: WatchArgs,
    },
}

pub(super) async fn run(
    command: ProviderCommand,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    match command {
        ProviderCommand::Add(command) => provider_add::run(command, client, printer).await,
        ProviderCommand::Identity(args) => trust::identity(&args, client, printer).await,
        ProviderCommand::Csr(args) => trust::csr(&args, client, printer).await,
        ProviderCommand::Trust(args) => trust::trust(&args, client, printer).await,
        ProviderCommand::List => printer.providers(
            &client
                .call(async |host| host.list_providers().await)
                .await?
                .providers,
        ),
        ProviderCommand::Show { name } => show(&name, client, printer).await,
        ProviderCommand::Cache(args) => cache::set(&args, client, printer).await,
        ProviderCommand::Default { name } => {
            client
                .call(async |host| host.set_default_provider(&name).await)
                .await?;
            printer.done(&format!("New keys go to '{name}'"))
        }
        ProviderCommand::Unlock {
            name,
            tpm: true,
            passphrase,
        } => unlock_by_tpm(&name, &passphrase, client, printer).await,
        ProviderCommand::Unlock { name, passphrase, .. } => unlock(&name, &passphrase, client, printer).await,
        ProviderCommand::Tpm(args) => tpm::run(&args, client, printer).await,
        ProviderCommand::Lock { name } => {
            client.call(async |host| host.lock_provider(&name).await).await?;
            printer.done(&format!("'{name}' is locked, its keys are out of memory"))
        }
        ProviderCommand::Backup(args) => backup::backup(&args, client, printer).await,
        ProviderCommand::Restore(args) => backup::restore(&args, client, printer).await,
        ProviderCommand::Rotate {
            name,
            passphrase,
            tpm_pin_file,
            watch,
        } => {
            let fds = for_rotation(&name, &passphrase, tpm_pin_file.as_deref(), client).await?;
            let started = client
                .call(async |host| host.rotate_provider(&name, fds).await)
                .await?;
            job::started(&started, &watch, client, printer).await
        }
        ProviderCommand::Rekey { watch } => {
            job::start(
                &job::request(SweepKind::Rekey, None, None, None),
                &watch,
                client,
                printer,
            )
            .await
        }
        ProviderCommand::Move { from, to, vm, watch } => {
            let request = job::request(SweepKind::Move, Some(from), Some(to), vm);
            job::start(&request, &watch, client, printer).await
        }
        ProviderCommand::Recipients(RecipientsCommand::Add { name, watch }) => {
            let request = job::request(SweepKind::AddRecipient, Some(name), None, None);
            job::start(&request, &watch, client, printer).await
        }
        ProviderCommand::Recipients(RecipientsCommand::Remove { name, watch }) => {
            let request = job::request(SweepKind::RemoveRecipient, Some(name), None, None);
            job::start(&request, &watch, client, printer).await
        }
        ProviderCommand::Delete {
            name,
            force,
            yes_delete,
        } => {
            let question = format!("What only '{name}' opens will be lost. Type its name: ");
            let typed = force.then(|| job::typed(yes_delete, &question)).transpose()?;
            let outcome = client
                .call(async |host| host.delete_provider(&name, typed.as_deref()).await)
                .await?;
            printer.outcome(&outcome, false)
        }
        ProviderCommand::Orphans => printer.orphans(&orphans(client).await?),
    }
}

async fn unlock(
    name: &str,
    passphrase: &PassphraseArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let question = match passphrase.is_given() {
        true => String::new(),
        false => prompt(name, client).await?,
    };
    let fds = vec![passphrase.open(&question)?];
    client
        .call(async |host| host.unlock_provider(name, fds).await)
        .await?;
    printer.done(&format!("'{name}' is unlocked"))?;
    warn_of_providers(client, printer).await
}

async fn unlock_by_tpm(
    name: &str,
    pin: &PassphraseArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let needs_pin = needs_pin(name, client).await?;
    let fds = match needs_pin || pin.is_given() {
        true => vec![pin.open(&format!("PIN of '{name}' for the TPM: "))?],
        false => Vec::new(),
    };
    client
        .call(async |host| host.unlock_provider_by_tpm(name, fds).await)
        .await?;
    printer.done(&format!("'{name}' is unlocked"))
}

/// A native provider's passphrase, and the PIN that its TPM asks for. Without anybody to ask it goes on without the PIN: the
/// daemon says what that means.
async fn for_rotation(
    name: &str,
    passphrase: &PassphraseArgs,
    pin_file: Option<&Path>,
    client: &mut Client,
) -> Result<Vec<OwnedFd>, Problem> {
    let mut fds = Vec::new();
    if kind(name, client).await?.as_deref() == Some("native") {
        fds.push(passphrase.open(&format!("Passphrase of '{name}': "))?);
        if let Some(file) = pin_file {
            fds.push(open_file(file)?);
        } else if std::io::stdin().is_terminal() && needs_pin(name, client).await? {
            fds.push(to_pipe(&ask(&format!("PIN of '{name}' for the TPM: "))?)?);
        }
    }
    Ok(fds)
}

async fn kind(name: &str, client: &mut Client) -> Result<Option<String>, Problem> {
    Ok(client.provider(name).await?.map(|provider| provider.kind))
}

/// What to ask for depends on the provider's kind.
async fn prompt(name: &str, client: &mut Client) -> Result<String, Problem> {
    let what = match kind(name, client).await?.as_deref() {
        Some("transit") => "Token or secret id",
        Some("pkcs11") => "PIN of the token",
        _ => "Passphrase",
    };
    Ok(format!("{what} of '{name}': "))
}

async fn show(name: &str, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let mut all = client
        .call(async |host| host.list_providers().await)
        .await?
        .providers;
    all.retain(|provider| provider.name == name);
    if all.is_empty() {
        return Err(
            Problem::new(Code::NotFound, format!("there is no provider '{name}'"))
                .next("virtseal provider list"),
        );
    }
    printer.provider(&all)
}

/// All of them: a reply has a part.
async fn orphans(client: &mut Client) -> Result<Orphans, Problem> {
    let mut all = client.call(async |host| host.orphans(None).await).await?;
    while let Some(after) = all.next.take() {
        let page = client.call(async |host| host.orphans(Some(&after)).await).await?;
        all.envelopes.extend(page.envelopes);
        all.keks.extend(page.keks);
        all.next = page.next;
    }
    Ok(all)
}

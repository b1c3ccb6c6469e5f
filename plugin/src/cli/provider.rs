//! `virtseal provider …`.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::backup::{BackupArgs, RestoreArgs};
use super::cache::CacheArgs;
use super::client::Client;
use super::credential::asked_for;
use super::document::Deed;
use super::job::WatchArgs;
use super::passphrase::{PassphraseArgs, TRIES, ask, open_file, to_pipe};
use super::print::Printer;
use super::provider_add::AddCommand;
use super::provider_set::SetArgs;
use super::tpm::{TpmArgs, needs_pin};
use super::trust::{CsrArgs, IdentityArgs, TrustArgs};
use super::{backup, cache, job, provider_add, provider_set, tpm, trust};
use crate::api::{
    CredentialKind, HostProxy, OrNewer, Orphans, Outcome, ProviderState, ProviderView, SweepKind, words,
};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::provider::kind::{KeysAt, Kind};

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
    /// Change settings of a provider, once this host has connected with them and what is sealed has opened.
    Set(SetArgs),
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
    /// Let the TPM of this host unlock a provider when virtseald starts, or no longer.
    Tpm(TpmArgs),
    /// Lock a provider: purge its keys from memory, refuse starts.
    Lock {
        /// Its name.
        name: String,
    },
    /// Set the client certificate and private key by which a KMS knows this host.
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
        ProviderCommand::List => {
            printer.providers(client.call(async |host| host.list_providers().await).await?)
        }
        ProviderCommand::Show { name } => show(&name, client, printer).await,
        ProviderCommand::Set(args) => provider_set::run(&args, client, printer).await,
        ProviderCommand::Cache(args) => cache::set(&args, client, printer).await,
        ProviderCommand::Default { name } => {
            let set = client
                .call(async |host| host.set_default_provider(&name).await)
                .await?;
            printer.warn_all(&set.warnings);
            let text = format!("New keys go to '{name}'");
            printer.done(Deed::ProviderIsDefault, &name, set.changed, &text)
        }
        ProviderCommand::Unlock {
            name,
            tpm: true,
            passphrase,
        } => unlock_by_tpm(&name, &passphrase, client, printer).await,
        ProviderCommand::Unlock { name, passphrase, .. } => unlock(&name, &passphrase, client, printer).await,
        ProviderCommand::Tpm(args) => tpm::run(&args, client, printer).await,
        ProviderCommand::Lock { name } => {
            let locked = client.call(async |host| host.lock_provider(&name).await).await?;
            let text = format!("'{name}' is locked, its keys are out of memory");
            printer.done(Deed::ProviderLocked, &name, locked.changed, &text)
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
            job::started(started, &watch, client, printer).await
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
            let outcome = delete(&name, force, yes_delete, client, printer).await?;
            printer.outcome(outcome)
        }
        ProviderCommand::Orphans => printer.orphans(orphans(client).await?),
    }
}

async fn unlock(
    name: &str,
    passphrase: &PassphraseArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let known = client.provider(name).await?;
    if !passphrase.is_given() && known.as_ref().is_some_and(needs_no_credential) {
        return is_unlocked(name, false, printer);
    }
    let mut tries = match passphrase.is_given() {
        true => 1,
        false => known.as_ref().map_or(1, tries),
    };
    let unlocked = loop {
        let fds = match passphrase.is_given() {
            true => vec![passphrase.open("")?],
            false => asked_for(name, known.as_ref())?,
        };
        let unlocked = client
            .call(async |host| host.unlock_provider(name, fds).await)
            .await;
        tries -= 1;
        match unlocked {
            Err(problem) if tries > 0 && leads_back(&problem, name) => printer.caution(&problem.message),
            unlocked => break unlocked?,
        }
    };
    is_unlocked(name, unlocked.changed, printer)?;
    warn_of(name, client, printer).await
}

fn is_unlocked(name: &str, changed: bool, printer: &Printer) -> Result<(), Problem> {
    printer.done(
        Deed::ProviderUnlocked,
        name,
        changed,
        &format!("'{name}' is unlocked"),
    )
}

/// How often somebody may type what unlocks it. A token or chip counts wrong PINs: there each try is a command.
fn tries(provider: &ProviderView) -> usize {
    match provider.asks_for.as_ref().and_then(OrNewer::known) {
        Some(CredentialKind::Passphrase | CredentialKind::Token | CredentialKind::SecretId) => TRIES,
        Some(CredentialKind::Pin | CredentialKind::ClientKey) | None => 1,
    }
}

/// Whether the way out of it is the command that it ended: something else must be typed.
fn leads_back(problem: &Problem, name: &str) -> bool {
    let unlock = Advice::UnlockProvider(name.to_owned()).to_string();
    problem
        .advice
        .as_ref()
        .is_some_and(|advice| advice.to_string() == unlock)
}

/// Says what is about to go wrong with it.
async fn warn_of(name: &str, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    if let Some(provider) = client.provider(name).await? {
        printer.warnings(&[provider]);
    }
    Ok(())
}

/// Whether it is unlocked, and what it would be asked for takes nothing else's place.
fn needs_no_credential(provider: &ProviderView) -> bool {
    let is_open = matches!(
        provider.state.known(),
        Some(ProviderState::Ready | ProviderState::NotBackedUp)
    );
    let is_replaced = provider.asks_for.as_ref().and_then(OrNewer::known);
    is_open && !is_replaced.is_some_and(CredentialKind::takes_the_place_of_another)
}

/// With `--force`, who needs it is told before its name is asked for; one that nobody needs goes without.
async fn delete(
    name: &str,
    force: bool,
    typed: Option<String>,
    client: &mut Client,
    printer: &Printer,
) -> Result<Outcome, Problem> {
    let mut call = async |typed: Option<String>| {
        client
            .call(async |host| host.delete_provider(name, typed.as_deref()).await)
            .await
    };
    let typed = match typed {
        Some(typed) => typed,
        None => match call(None).await {
            Err(problem) if force && printer.asks() && may_be_forced(&problem) => {
                printer.caution(&problem.message);
                job::typed(
                    None,
                    &format!("What only '{name}' opens will be lost. Type its name: "),
                )?
            }
            outcome => return outcome,
        },
    };
    call(Some(typed)).await
}

/// Whether a typed name overrules it: it would lose something, or who needs the provider could not be seen.
fn may_be_forced(problem: &Problem) -> bool {
    let other_default = Advice::MakeDefault("OTHER".to_owned()).to_string();
    let is_default = problem
        .advice
        .as_ref()
        .is_some_and(|advice| advice.to_string() == other_default);
    !is_default && ![Code::Busy, Code::NotFound, Code::Denied].contains(&problem.code)
}

async fn unlock_by_tpm(
    name: &str,
    pin: &PassphraseArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let known = client.provider(name).await?;
    if !pin.is_given() && known.as_ref().is_some_and(needs_no_credential) {
        return is_unlocked(name, false, printer);
    }
    let needs_pin = needs_pin(name, client).await?;
    let fds = match needs_pin || pin.is_given() {
        true => vec![pin.open(&format!("PIN of '{name}' for the TPM: "))?],
        false => Vec::new(),
    };
    let unlocked = client
        .call(async |host| host.unlock_provider_by_tpm(name, fds).await)
        .await?;
    is_unlocked(name, unlocked.changed, printer)
}

/// The passphrase that encrypts its root keys, and the PIN that its TPM asks for. Without anybody to ask it goes on without the PIN: the
/// daemon says what that means.
async fn for_rotation(
    name: &str,
    passphrase: &PassphraseArgs,
    pin_file: Option<&Path>,
    client: &mut Client,
) -> Result<Vec<OwnedFd>, Problem> {
    let mut fds = Vec::new();
    let provider = client.provider(name).await?;
    let row = provider.and_then(|provider| Kind::named(&words(&provider.kind)));
    if row.is_some_and(|row| row.keys == KeysAt::Host) {
        fds.push(passphrase.open(&format!("Passphrase of '{name}': "))?);
        if let Some(file) = pin_file {
            fds.push(open_file(file)?);
        } else if std::io::stdin().is_terminal() && needs_pin(name, client).await? {
            fds.push(to_pipe(&ask(&format!("PIN of '{name}' for the TPM: "))?)?);
        }
    }
    Ok(fds)
}

async fn show(name: &str, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    printer.provider(client.existing_provider(name).await?)
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

//! `virtseal provider …`.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::client::Client;
use super::print::Printer;
use super::{
    AddCommand, BackupArgs, ProviderCommand, RecipientsCommand, RestoreArgs, TpmArgs, job, passphrase,
};
use super::{pkcs11, transit, trust};
use crate::api::HostProxy;
use crate::failure::{Code, Failure};

pub(super) async fn run(
    command: ProviderCommand,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Failure> {
    match command {
        ProviderCommand::Add(AddCommand::Native {
            name,
            cache,
            passphrase,
        }) => {
            cache.refuse("native")?;
            let fds = vec![passphrase.open(&format!("New passphrase of '{name}': "))?];
            let added = client
                .call(async |host| host.add_provider(&name, "native", "", fds).await)
                .await?;
            printer.providers(&added.providers)?;
            printer.advise(&format!(
                "It wraps nothing until it is backed up: virtseal provider backup {name} --output FILE"
            ))
        }
        ProviderCommand::Add(AddCommand::Transit(args)) => transit::add(&args, client, printer).await,
        ProviderCommand::Add(AddCommand::Pkcs11(args)) => pkcs11::add(&args, client, printer).await,
        ProviderCommand::Add(AddCommand::Kmip(args)) => trust::add_kmip(&args, client, printer).await,
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
        ProviderCommand::Cache { name, policy } => {
            let policy = policy.to_string();
            let set = client
                .call(async |host| host.set_provider_cache(&name, &policy).await)
                .await?;
            printer.provider(&set.providers)
        }
        ProviderCommand::Default { name } => {
            client
                .call(async |host| host.set_default_provider(&name).await)
                .await?;
            printer.done(&format!("New keys go to '{name}'"))
        }
        ProviderCommand::Unlock { name, tpm: true, .. } => {
            client
                .call(async |host| host.unlock_provider_by_tpm(&name).await)
                .await?;
            printer.done(&format!("'{name}' is unlocked"))
        }
        ProviderCommand::Tpm(args) => tpm(&args, client, printer).await,
        ProviderCommand::Unlock { name, passphrase, .. } => {
            let question = match passphrase.is_given() {
                true => String::new(),
                false => prompt(&name, client).await?,
            };
            let fds = vec![passphrase.open(&question)?];
            client
                .call(async |host| host.unlock_provider(&name, fds).await)
                .await?;
            printer.done(&format!("'{name}' is unlocked"))?;
            super::warn_of_providers(client, printer).await
        }
        ProviderCommand::Lock { name } => {
            client.call(async |host| host.lock_provider(&name).await).await?;
            printer.done(&format!("'{name}' is locked, its keys are out of memory"))
        }
        ProviderCommand::Backup(args) => backup(&args, client, printer).await,
        ProviderCommand::Restore(args) => restore(&args, client, printer).await,
        ProviderCommand::Rotate {
            name,
            passphrase,
            watch,
        } => {
            let fds = match kind(&name, client).await?.as_deref() {
                Some("native") => vec![passphrase.open(&format!("Passphrase of '{name}': "))?],
                _ => Vec::new(),
            };
            let started = client
                .call(async |host| host.rotate_provider(&name, fds).await)
                .await?;
            job::started(&started, &watch, client, printer).await
        }
        ProviderCommand::Rekey { watch } => {
            job::start(&job::request("rekey", None, None, None), &watch, client, printer).await
        }
        ProviderCommand::Move { from, to, vm, watch } => {
            let request = job::request("move", Some(from), Some(to), vm);
            job::start(&request, &watch, client, printer).await
        }
        ProviderCommand::Recipients(RecipientsCommand::Add { name, watch }) => {
            let request = job::request("add-recipient", Some(name), None, None);
            job::start(&request, &watch, client, printer).await
        }
        ProviderCommand::Recipients(RecipientsCommand::Remove { name, watch }) => {
            let request = job::request("remove-recipient", Some(name), None, None);
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
        ProviderCommand::Orphans => printer.orphans(&client.call(async |host| host.orphans().await).await?),
    }
}

/// `None` if there is no such provider.
async fn kind(name: &str, client: &mut Client) -> Result<Option<String>, Failure> {
    let all = client.call(async |host| host.list_providers().await).await?;
    let found = all.providers.into_iter().find(|provider| provider.name == name);
    Ok(found.map(|provider| provider.kind))
}

async fn tpm(args: &TpmArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let name = &args.name;
    if args.remove {
        let gone = client.call(async |host| host.remove_tpm(name).await).await?;
        return printer.done(&match gone.removed {
            true => format!("The TPM does not unlock '{name}' any more, its passphrase does"),
            false => format!("The TPM did not unlock '{name}'"),
        });
    }
    let pcrs = args.pcrs.as_deref();
    client
        .call(async |host| host.enroll_tpm(name, pcrs).await)
        .await?;
    printer.done(&format!(
        "The TPM unlocks '{name}' when virtseald starts, while PCR {} is what it is now. Keep the passphrase: it unlocks \
         '{name}' whatever changes",
        pcrs.unwrap_or("7")
    ))
}

/// What to ask for depends on the provider's kind.
async fn prompt(name: &str, client: &mut Client) -> Result<String, Failure> {
    let what = match kind(name, client).await?.as_deref() {
        Some("transit") => "Token or secret id",
        Some("pkcs11") => "PIN of the token",
        _ => "Passphrase",
    };
    Ok(format!("{what} of '{name}': "))
}

async fn show(name: &str, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let mut all = client
        .call(async |host| host.list_providers().await)
        .await?
        .providers;
    all.retain(|provider| provider.name == name);
    if all.is_empty() {
        return Err(
            Failure::new(Code::NotFound, format!("there is no provider '{name}'"))
                .next("virtseal provider list"),
        );
    }
    printer.provider(&all)
}

async fn backup(args: &BackupArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let name = &args.name;
    let passphrase = match args.no_passphrase {
        true => None,
        false => Some(args.passphrase.open("Passphrase of the backup: ")?),
    };
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&args.output);
    let file = file.map_err(|error| unwritable(&args.output, &error))?;
    let generation = match write_backup(name, file, passphrase, args, client).await {
        Ok(generation) => generation,
        Err(failure) => {
            // Only what this command created, and nothing relies on it yet.
            let _ = fs::remove_file(&args.output);
            return Err(failure);
        }
    };
    client
        .call(async |host| host.confirm_backup(name, generation).await)
        .await
        .map_err(|failure| unconfirmed(failure, args))?;
    if args.no_passphrase {
        printer.warn(&format!(
            "{} holds the root key in the clear: keep it where no one else reads it",
            args.output.display()
        ));
    }
    printer.done(&format!("'{name}' is backed up in {}", args.output.display()))
}

/// Returns once the file and its name are on disk, with the generation to confirm: from the confirmation on the provider
/// wraps keys that this file may be the last way to open.
async fn write_backup(
    name: &str,
    file: File,
    passphrase: Option<OwnedFd>,
    args: &BackupArgs,
    client: &mut Client,
) -> Result<i64, Failure> {
    let copy = file
        .try_clone()
        .map_err(|error| unwritable(&args.output, &error))?;
    let fds = std::iter::once(OwnedFd::from(copy)).chain(passphrase).collect();
    let made = client
        .call(async |host| host.backup_provider(name, fds).await)
        .await?;
    let directory = match args.output.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    file.sync_all()
        .and_then(|()| File::open(directory)?.sync_all())
        .map_err(|error| unwritable(&args.output, &error))?;
    Ok(made.generation)
}

/// The daemon may have noted the backup before it failed to say so: the file stays.
fn unconfirmed(failure: Failure, args: &BackupArgs) -> Failure {
    let (name, output) = (&args.name, args.output.display());
    let said = format!(
        "the backup {output} is complete, but may not be noted: {}",
        failure.message
    );
    Failure::new(failure.code, said).next(format!(
        "keep {output}; virtseal provider show {name}: if it is NotBackedUp, back it up again to another file"
    ))
}

fn unwritable(path: &Path, error: &std::io::Error) -> Failure {
    let failure = Failure::from_error(Code::Failed, format!("can't write {}", path.display()), error);
    match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            failure.next("choose another --output: a backup is never overwritten")
        }
        _ => failure,
    }
}

async fn restore(args: &RestoreArgs, client: &mut Client, printer: &Printer) -> Result<(), Failure> {
    let mut fds = vec![passphrase::open_file(&args.input)?];
    let of_backup = match (&args.backup_passphrase_file, args.backup_passphrase_fd) {
        (Some(path), _) => Some(passphrase::open_file(path)?),
        (None, Some(fd)) => Some(passphrase::inherited(fd)?),
        (None, None) if args.no_backup_passphrase => None,
        (None, None) => Some(passphrase::to_pipe(&passphrase::ask(
            "Passphrase of the backup: ",
        )?)?),
    };
    fds.push(
        args.passphrase
            .open(&format!("New passphrase of '{}': ", args.name))?,
    );
    fds.extend(of_backup);
    let restored = client
        .call(async |host| host.restore_provider(&args.name, fds).await)
        .await?;
    printer.providers(&restored.providers)
}

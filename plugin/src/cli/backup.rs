//! `virtseal provider backup` and `restore`.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use clap::Args;

use super::client::Client;
use super::document::Deed;
use super::new_backup::{NewBackup, absolute};
use super::passphrase::{self, NewPassphraseArgs};
use super::print::Printer;
use crate::api::HostProxy;
use crate::crypto::age_file;
use crate::model::advice::Advice;
use crate::model::finding::{Finding, FindingCode, Subject};
use crate::model::problem::{Code, Problem};

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// The provider's name.
    name: String,
    /// Where to write the backup; must not exist.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Write the root key in the clear: whoever reads the file has every key.
    #[arg(long, conflicts_with_all = ["passphrase_file", "passphrase_fd", "passphrase_credential"])]
    no_passphrase: bool,
    #[command(flatten)]
    passphrase: NewPassphraseArgs,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// What to call the provider here.
    name: String,
    /// The backup.
    #[arg(long, short, value_name = "FILE")]
    input: PathBuf,
    /// The backup was made with --no-passphrase.
    #[arg(long, conflicts_with_all = ["backup_passphrase_file", "backup_passphrase_fd"])]
    no_backup_passphrase: bool,
    /// Read the backup's passphrase from this file; - is standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "backup_passphrase_fd")]
    backup_passphrase_file: Option<PathBuf>,
    /// Read the backup's passphrase from this file descriptor.
    #[arg(long, value_name = "N")]
    backup_passphrase_fd: Option<i32>,
    #[command(flatten)]
    passphrase: NewPassphraseArgs,
}

pub(super) async fn backup(args: &BackupArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let (name, provider) = (&args.name, Subject::Provider(args.name.clone()));
    NewBackup::check(&args.output)?;
    client.existing_provider(name).await?;
    let passphrase = match args.no_passphrase {
        true => None,
        false => {
            let prompt = "Passphrase of the backup: ";
            Some(args.passphrase.open(prompt, &provider, printer)?)
        }
    };
    let generation = write_backup(args, passphrase, client).await?;
    client
        .call(async |host| host.confirm_backup(name, generation).await)
        .await
        .map_err(|failure| unconfirmed(failure, args))?;
    if args.no_passphrase {
        let output = args.output.display();
        let what = format!("{output} holds the root key in the clear: keep it where no one else reads it");
        printer.warn(Finding::warning(
            FindingCode::BackupUnencrypted,
            provider.clone(),
            what,
        ));
    }
    printer.done_with(
        Deed::ProviderBackedUp,
        &provider,
        true,
        Some(absolute(&args.output)?),
        &format!("'{name}' is backed up in {}", args.output.display()),
    )
}

/// Returns once the file and its name are on disk, with the generation to confirm: from the confirmation on the provider
/// wraps keys that this file may be the last way to open.
async fn write_backup(
    args: &BackupArgs,
    passphrase: Option<OwnedFd>,
    client: &mut Client,
) -> Result<i64, Problem> {
    let file = NewBackup::create(&args.output)?;
    let fds = std::iter::once(file.descriptor()?).chain(passphrase).collect();
    let made = client
        .call(async |host| host.backup_provider(&args.name, fds).await)
        .await?;
    file.keep()?;
    Ok(made.generation)
}

/// The daemon may have noted the backup before it failed to say so: the file stays.
fn unconfirmed(failure: Problem, args: &BackupArgs) -> Problem {
    let output = args.output.display();
    let said = format!(
        "the backup {output} is complete, but may not be noted: {}",
        failure.message
    );
    Problem::new(failure.code, said).next(
        Advice::from(format!("keep {output}"))
            .also(Advice::ShowProvider(args.name.clone()))
            .within("if it is not backed up, back it up again to another file"),
    )
}

pub(super) async fn restore(
    args: &RestoreArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
    let backup = passphrase::open_file(&args.input)?;
    refuse_longer_files(&backup, &args.input)?;
    let mut fds = vec![backup];
    if client.provider(&args.name).await?.is_some() {
        let message = format!("there is a provider '{}' already", args.name);
        return Err(Problem::new(Code::Exists, message)
            .about(Subject::Provider(args.name.clone()))
            .next("restore it under another name, or under its own on another host"));
    }
    let of_backup = match (&args.backup_passphrase_file, args.backup_passphrase_fd) {
        (Some(path), _) => Some(passphrase::open_file(path)?),
        (None, Some(fd)) => Some(passphrase::inherited(fd)?),
        (None, None) if args.no_backup_passphrase => None,
        (None, None) => Some(passphrase::to_pipe(&passphrase::ask(
            "Passphrase of the backup: ",
        )?)?),
    };
    let (prompt, provider) = (
        format!("New passphrase of '{}': ", args.name),
        Subject::Provider(args.name.clone()),
    );
    fds.push(args.passphrase.open(&prompt, &provider, printer)?);
    fds.extend(of_backup);
    let restored = client
        .call(async |host| host.restore_provider(&args.name, fds).await)
        .await?;
    printer.providers_after(&args.name, &restored.providers, true)
}

/// Before anybody has to type.
fn refuse_longer_files(file: &OwnedFd, path: &Path) -> Result<(), Problem> {
    let found = nix::sys::stat::fstat(file);
    let length = found.map_or(0, |found| found.st_size);
    if usize::try_from(length).is_ok_and(|length| length <= age_file::MAX_BYTES) {
        return Ok(());
    }
    Err(Problem::usage(format!(
        "{} is too long for the backup of a provider",
        path.display()
    ))
    .next(Advice::from("if it is one of the state").within(Advice::RestoreState)))
}

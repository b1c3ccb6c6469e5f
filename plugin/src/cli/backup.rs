//! `virtseal provider backup` and `restore`.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;

use super::client::Client;
use super::passphrase::{self, NewPassphraseArgs};
use super::print::Printer;
use crate::api::HostProxy;
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
) -> Result<i64, Problem> {
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
fn unconfirmed(failure: Problem, args: &BackupArgs) -> Problem {
    let (name, output) = (&args.name, args.output.display());
    let said = format!(
        "the backup {output} is complete, but may not be noted: {}",
        failure.message
    );
    Problem::new(failure.code, said).next(format!(
        "keep {output}; virtseal provider show {name}: if it is NotBackedUp, back it up again to another file"
    ))
}

fn unwritable(path: &Path, error: &std::io::Error) -> Problem {
    let failure = Problem::from_error(Code::Failed, format!("can't write {}", path.display()), error);
    match error.kind() {
        std::io::ErrorKind::AlreadyExists => {
            failure.next("choose another --output: a backup is never overwritten")
        }
        _ => failure,
    }
}

pub(super) async fn restore(
    args: &RestoreArgs,
    client: &mut Client,
    printer: &Printer,
) -> Result<(), Problem> {
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

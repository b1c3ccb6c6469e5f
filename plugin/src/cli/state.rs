//! `virtseal state backup` and `restore`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use super::client::Client;
use super::document::{Answer, Deed, StateRestored};
use super::job;
use super::new_backup::{NewBackup, absolute};
use super::passphrase::{self, NewPassphraseArgs, PassphraseArgs};
use super::print::Printer;
use crate::api::HostProxy;
use crate::config::Config;
use crate::crypto::age_file::AgeError;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem, chain};
use crate::model::subject::Subject;
use crate::secret::SecretBytes;
use crate::state_backup::{self, Replace, StateError};
use crate::store::StoreError;
use crate::terminal::word;

/// How a backup of the state begins; one of a provider has an armor around that.
const AGE_FILE: &[u8; 19] = b"age-encryption.org/";
/// The most bytes of a passphrase.
const MAX_PASSPHRASE: usize = 32 * 1024;

#[derive(Debug, Subcommand)]
pub(super) enum StateCommand {
    /// Write all that virtseal keeps on this host into one file, encrypted by a passphrase. virtseald goes on.
    Backup(BackupArgs),
    /// Bring it back, while virtseald is stopped.
    Restore(RestoreArgs),
}

#[derive(Debug, Args)]
pub(super) struct BackupArgs {
    /// Where to write it; must not exist.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    passphrase: NewPassphraseArgs,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The backup.
    #[arg(long, short, value_name = "FILE")]
    input: PathBuf,
    /// The configuration that names the state directory.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The state directory, if no configuration names it.
    #[arg(long, value_name = "DIR", conflicts_with = "config")]
    state_dir: Option<PathBuf>,
    /// Replace the state that is there, which is kept beside it: the name of this host.
    #[arg(long, value_name = "NAME")]
    yes_replace: Option<String>,
    #[command(flatten)]
    passphrase: PassphraseArgs,
}

pub(super) async fn backup(args: &BackupArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    NewBackup::check(&args.output)?;
    let passphrase = args
        .passphrase
        .open("Passphrase of the backup: ", &Subject::Host, printer)?;
    let file = NewBackup::create(&args.output)?;
    let fds = vec![file.descriptor()?, passphrase];
    client.call(async |host| host.backup_state(fds).await).await?;
    file.keep()?;
    let shown = args.output.display();
    printer.done_with(
        Deed::StateBackedUp,
        &Subject::Host,
        true,
        Some(absolute(&args.output)?),
        &format!(
            "The state is backed up in {shown}. The passphrases of providers are not in it: keep these, too"
        ),
    )
}

/// Without a daemon: there is none before this.
pub(super) fn restore(args: RestoreArgs, printer: &Printer) -> Result<(), Problem> {
    let dir = state_dir(&args)?;
    let backup = File::from(passphrase::open_file(&args.input)?);
    refuse_other_files(&backup, &args.input)?;
    let typed = job::typed(
        args.yes_replace.clone(),
        &format!(
            "What is in {} would be replaced, and kept beside it. Type the name of this host, or nothing if there is nothing: ",
            dir.display()
        ),
    )?;
    let passphrase = args.passphrase.open("Passphrase of the backup: ")?;
    let mut passphrase = SecretBytes::read_from(File::from(passphrase), MAX_PASSPHRASE)
        .map_err(|error| Problem::from_error(Code::Usage, "can't read the passphrase", &error))?;
    passphrase.trim_newline();
    let replace = match typed.as_str() {
        "" => Replace::Nothing,
        name => Replace::TypedName(name),
    };
    let restored = state_backup::restore(backup, &passphrase, &dir, replace)
        .map_err(|error| failure(&error, &args, &dir))?;
    let mut said = format!(
        "{} holds the state of {} as of {} ({} files)",
        dir.display(),
        restored.manifest.host,
        restored.manifest.made,
        restored.files
    );
    if let Some(before) = &restored.before {
        said += &format!("; what was there is in {}", before.display());
    }
    let told = StateRestored {
        path: dir,
        host: restored.manifest.host,
        made: restored.manifest.made,
        files: restored.files,
        before: restored.before,
        changed: true,
    };
    printer.show(Answer::StateRestored(told), std::iter::once(said.as_str()))?;
    let next = Advice::StartAll.then(Advice::UnlockProvider("NAME".to_owned()));
    printer.advise(&format!(
        "Next: {next}. Keys that changed since come back from domain XML and images when their VMs start"
    ))
}

/// Before anybody has to type. A pipe tells nothing before it is read.
fn refuse_other_files(file: &File, path: &Path) -> Result<(), Problem> {
    let mut begin = [0; AGE_FILE.len()];
    if file.read_exact_at(&mut begin, 0).is_err() || begin == *AGE_FILE {
        return Ok(());
    }
    let of_provider = Advice::RestoreProviderFrom("NAME".to_owned(), path.to_owned());
    Err(
        Problem::usage(format!("{} is no backup of a state", path.display()))
            .next(Advice::from("if it is one of a provider").within(of_provider)),
    )
}

fn state_dir(args: &RestoreArgs) -> Result<PathBuf, Problem> {
    if let Some(dir) = &args.state_dir {
        return std::path::absolute(dir).map_err(|error| {
            Problem::from_error(Code::Usage, format!("--state-dir {}", dir.display()), &error)
        });
    }
    let default = Path::new(Config::DEFAULT_PATH);
    let config = match &args.config {
        Some(path) => Config::load(path),
        None if default.exists() => Config::load(default),
        None => Ok(Config::default()),
    };
    config
        .map(|config| config.state_dir)
        .map_err(|error| Problem::usage(chain(&error)).next("fix it, or give --state-dir DIR"))
}

fn failure(error: &StateError, args: &RestoreArgs, dir: &Path) -> Problem {
    let said = |code| Problem::new(code, format!("nothing was restored: {}", chain(error)));
    match error {
        StateError::Occupied { host, .. } => {
            let (host, from) = (host.clone(), args.input.clone());
            said(Code::WouldLoseKey)
                .next(Advice::RestoreStateOver { host, from }.within("it keeps what is there beside it"))
        }
        StateError::Keystore(StoreError::InUse { .. }) => {
            said(Code::Busy).next(Advice::StopAll.then("try again"))
        }
        StateError::Age(AgeError::WrongPassphrase) => {
            said(Code::Locked).next("try again with its passphrase")
        }
        StateError::MountPoint(_) => said(Code::WouldLoseKey).next(format!(
            "move all that is in {} to another directory, then try again",
            word(dir.display())
        )),
        _ => said(Code::Failed),
    }
}

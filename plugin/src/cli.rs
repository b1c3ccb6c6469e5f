//! The command line: a thin client of virtseald.
//!
//! Every step that touches a key runs in the daemon. What happens here is parsing, asking for passphrases,
//! opening files as the caller, and printing.

mod add_args;
#[cfg(test)]
mod advised;
mod backup;
mod cache;
mod client;
mod colour;
mod credential;
mod document;
#[cfg(test)]
mod documented;
mod examples;
mod job;
mod kmip;
mod new_backup;
mod other_words;
mod out;
mod passphrase;
mod patience;
mod pkcs11;
mod print;
mod provider;
mod provider_add;
mod provider_set;
mod signature;
mod state;
mod status;
pub(crate) mod sums;
mod tpm;
mod transit;
mod trust;
mod unit;
mod vm;
mod volume;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::api::HostProxy;
use crate::config::{Config, parse_duration};
use crate::model::problem::Problem;
use client::Client;
use job::JobsCommand;
use patience::Patience;
use print::Printer;
use provider::ProviderCommand;
use state::StateCommand;
use status::WidthArgs;
use vm::VmCommand;
use volume::VolumeCommand;

/// VM encryption for libvirt hosts.
#[derive(Debug, Parser)]
#[command(
    name = "virtseal",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
pub(crate) struct Cli {
    /// The socket of virtseald.
    #[arg(
        long,
        global = true,
        env = "VIRTSEAL_SOCKET",
        default_value = Config::DEFAULT_SOCKET,
        value_name = "PATH"
    )]
    socket: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
    /// How long to wait for each answer, whatever virtseald is doing. Without it a command waits while virtseald gives signs of life, and
    /// ends when there was none for 5 s.
    #[arg(long, global = true, value_name = "DURATION", value_parser = duration)]
    timeout: Option<Duration>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What needs attention, and how providers, sealed VMs and libvirt are. Exit status 4 where libvirt does not answer.
    Status(WidthArgs),
    /// Key providers.
    #[command(subcommand)]
    Provider(ProviderCommand),
    /// Encrypted disk images.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Sealed VMs.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Work that outlives its command: what runs, what ran, which copies are outdated.
    Jobs {
        #[command(subcommand)]
        command: Option<JobsCommand>,
    },
    /// All that virtseal keeps on this host.
    #[command(subcommand)]
    State(StateCommand),
    /// The audit log.
    #[command(subcommand)]
    Audit(AuditCommand),
}

#[derive(Debug, Subcommand)]
enum AuditCommand {
    /// Print the last records.
    Show {
        /// How many.
        #[arg(long, short = 'n', default_value_t = 20, value_parser = count)]
        records: u32,
    },
    /// Check that no record was changed, removed or reordered.
    Verify,
}

fn duration(text: &str) -> Result<Duration, &'static str> {
    let given = parse_duration(text).filter(|given| !given.is_zero());
    given.ok_or("a time of more than 0 and at most an hour, such as 30s, 500ms or 2m")
}

fn count(text: &str) -> Result<u32, &'static str> {
    let given = text.parse::<u32>().ok().filter(|count| *count > 0);
    given.ok_or("a number from 1 to 4294967295")
}

/// What is wrong with the arguments, without the usage that people are shown.
fn misused(error: &clap::Error) -> Problem {
    let text = error.to_string();
    let told = text.split("\n\n").next().unwrap_or_default();
    let told: Vec<_> = told.trim_start_matches("error: ").split_whitespace().collect();
    let tips = text
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("tip: ").map(str::to_owned));
    let told: Vec<_> = [told.join(" ")].into_iter().chain(tips).collect();
    Problem::usage(told.join("; ")).next("the same command with --help shows what it takes")
}

/// All commands with their options, for man pages and completions, which are written while the package is built.
pub fn commands() -> clap::Command {
    examples::add_to(Cli::command())
}

/// The words before the wrong one, as `provider add`.
fn group_of(error: &clap::Error) -> String {
    let Some(ContextValue::StyledStr(usage)) = error.get(ContextKind::Usage) else {
        return String::new();
    };
    let usage = usage.to_string();
    let words = usage
        .split_whitespace()
        .skip_while(|word| *word != "virtseal")
        .skip(1);
    let words: Vec<_> = words
        .take_while(|word| !word.starts_with(['[', '<', '-']))
        .collect();
    words.join(" ")
}

/// Who leaves out the group of a command, as in `virtseal unlock main`, is told which it is in; and who uses the word of another program,
/// what it is called here.
fn with_its_group(mut error: clap::Error) -> clap::Error {
    let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else {
        return error;
    };
    if let Some(here) = other_words::otherwise(&group_of(&error), word) {
        error.remove(ContextKind::SuggestedSubcommand);
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![here.into()]),
        );
        return error;
    }
    let commands = Cli::command();
    let groups = commands
        .get_subcommands()
        .filter(|group| group.find_subcommand(word).is_some());
    let meant: Vec<_> = groups
        .map(|group| format!("{} {word}", group.get_name()))
        .collect();
    if !meant.is_empty() {
        error.insert(ContextKind::SuggestedSubcommand, ContextValue::Strings(meant));
    }
    error
}

/// Of the arguments of this process.
fn parsed() -> Result<Cli, clap::Error> {
    let mut matches = commands().try_get_matches().map_err(with_its_group)?;
    Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut commands()))
}

/// The program virtseal: does what the arguments of this process ask.
#[tokio::main(flavor = "current_thread")]
pub async fn main() -> ExitCode {
    let cli = match parsed() {
        Ok(cli) => cli,
        // What the arguments ask for is not known: they may be of no use, but for this one.
        Err(error) if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") => {
            return Printer::new(true).end(Err(misused(&error)));
        }
        Err(error) => error.exit(),
    };
    let printer = Printer::new(cli.json);
    let ended = cli.run(&printer).await;
    printer.end(ended)
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    /// What the user should be told, with the exit code.
    async fn run(self, printer: &Printer) -> Result<ExitCode, Problem> {
        let patience = Patience::of(self.timeout);
        if let Command::Volume(VolumeCommand::Info { path }) = &self.command {
            return volume::info(path, patience, printer).map(|()| ExitCode::SUCCESS);
        }
        if let Command::State(StateCommand::Restore(args)) = self.command {
            return state::restore(args, printer).map(|()| ExitCode::SUCCESS);
        }
        let mut client = match &self.command {
            Command::Provider(ProviderCommand::Lock { .. }) => {
                Client::connect_undisturbed(&self.socket, patience).await?
            }
            _ => Client::connect(&self.socket, patience).await?,
        };
        let done = match self.command {
            Command::Status(args) => return status::run(args.width, &mut client, printer).await,
            Command::Provider(command) => provider::run(command, &mut client, printer).await,
            Command::Volume(VolumeCommand::Create(args)) => volume::create(&args, &mut client, printer).await,
            Command::Volume(VolumeCommand::Share(args)) => volume::share(&args, &mut client, printer).await,
            Command::Volume(VolumeCommand::Forget(args)) => volume::forget(args, &mut client, printer).await,
            Command::Volume(VolumeCommand::Adopt { path }) => {
                volume::adopt(&path, &mut client, printer).await
            }
            Command::Volume(VolumeCommand::Check { path }) => {
                volume::check(&path, &mut client, printer).await
            }
            Command::Volume(VolumeCommand::Resize(args)) => volume::resize(args, &mut client, printer).await,
            Command::Volume(VolumeCommand::Info { path }) => volume::info(&path, patience, printer),
            Command::Vm(command) => vm::run(command, &mut client, printer).await,
            Command::Jobs { command } => job::run(command, &mut client, printer).await,
            Command::State(StateCommand::Backup(args)) => state::backup(&args, &mut client, printer).await,
            Command::State(StateCommand::Restore(args)) => state::restore(args, printer),
            Command::Audit(command) => audit(command, &mut client, printer).await,
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

/// The last ones, the oldest first: a reply has a part of them.
async fn audit_lines(records: i64, client: &mut Client) -> Result<Vec<String>, Problem> {
    let (mut lines, mut before) = (Vec::<String>::new(), None);
    loop {
        let left = records - i64::try_from(lines.len()).unwrap_or(i64::MAX);
        let page = client
            .call(async |host| host.show_audit(left, before).await)
            .await?;
        lines.extend(page.lines.into_iter().rev());
        before = page.before;
        if before.is_none() || lines.len() as i64 >= records {
            lines.reverse();
            return Ok(lines);
        }
    }
}

async fn audit(command: AuditCommand, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    match command {
        AuditCommand::Show { records } => printer.audit(&audit_lines(records.into(), client).await?),
        AuditCommand::Verify => {
            printer.audit_verified(client.call(async |host| host.verify_audit().await).await?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_no_number_is_told_in_words() {
        for (line, part) in [
            ("virtseal provider tpm main", "<--enroll|--remove>"),
            ("virtseal vm adopt", "--from <FILE>"),
            ("virtseal jobs watch abc", "the number of a job"),
            ("virtseal jobs resume 0", "the number of a job"),
            ("virtseal audit show -n x", "a number from 1"),
        ] {
            let told = commands()
                .try_get_matches_from(line.split(' '))
                .unwrap_err()
                .to_string();
            assert!(told.contains(part), "{told}");
        }
    }

    #[test]
    fn a_command_without_its_group_is_told_with_it() {
        let told = |arguments: &[&str]| {
            let arguments = [&["virtseal"], arguments].concat();
            with_its_group(commands().try_get_matches_from(arguments).unwrap_err()).to_string()
        };
        assert!(told(&["unlock", "main"]).contains("'provider unlock'"));
        let backup = told(&["backup"]);
        assert!(
            backup.contains("'provider backup'") && backup.contains("'state backup'"),
            "{backup}"
        );
        assert!(told(&["vm", "lock"]).contains("'provider lock'"));
        assert!(told(&["vms"]).contains("'vm'"), "as clap guesses");
        for (arguments, tip) in [
            (&["vm", "list"][..], "here that is: virtseal vm status"),
            (&["list"][..], "here that is: virtseal status"),
            (&["vm", "start", "web01"][..], "as of any other VM: virsh start"),
            (&["start", "web01"][..], "as of any other VM: virsh start"),
            (&["volume", "delete", "/x"][..], "virtseal volume forget"),
            (&["provider", "remove", "main"][..], "virtseal provider delete"),
            (
                &["provider", "add", "vault", "v"][..],
                "virtseal provider add transit",
            ),
        ] {
            let told = told(arguments);
            assert!(told.contains(tip), "{told}");
            assert!(!told.contains("similar"), "{told}");
        }
        let jsons = commands()
            .try_get_matches_from(["virtseal", "vm", "list", "--json"])
            .map_err(with_its_group);
        let jsons = misused(&jsons.unwrap_err()).to_string();
        assert!(
            jsons.contains("'list'; here that is: virtseal vm status"),
            "{jsons}"
        );
        assert!(
            !told(&["vm", "delete", "web01"]).contains("provider delete"),
            "that would be another thing"
        );
    }
}

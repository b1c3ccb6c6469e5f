//! The command line: a thin client of virtseald.
//!
//! Every step that touches a key runs in the daemon. What happens here is parsing, asking for passphrases,
//! opening files as the caller, and printing.

mod add_args;
mod backup;
mod cache;
mod client;
#[cfg(test)]
mod documented;
mod job;
mod kmip;
mod out;
mod passphrase;
mod pkcs11;
mod print;
mod provider;
mod provider_add;
mod state;
mod tpm;
mod transit;
mod trust;
mod vm;
mod volume;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::api::{HostProxy, HostStatus};
use crate::model::problem::Problem;
use client::Client;
use job::JobsCommand;
use print::Printer;
use provider::ProviderCommand;
use state::StateCommand;
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
pub struct Cli {
    /// The socket of virtseald.
    #[arg(
        long,
        global = true,
        env = "VIRTSEAL_SOCKET",
        default_value = "/run/virtseal/virtseald.sock",
        value_name = "PATH"
    )]
    socket: PathBuf,
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Providers, sealed VMs and libvirt at a glance.
    Status,
    /// Key providers.
    #[command(subcommand)]
    Provider(ProviderCommand),
    /// Encrypted disk images.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Sealed VMs.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Sweeps over the envelopes: what runs, what ran, what is behind.
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
        #[arg(long, short = 'n', default_value_t = 20)]
        records: u32,
    },
    /// Check that no record was changed, removed or reordered.
    Verify,
}

/// A problem for scripts: `{"error": {"code": 3, "message": "…", "next": "…"}}`.
#[must_use]
pub fn problem_document(problem: &Problem) -> String {
    let next = problem.advice.as_ref().map(ToString::to_string);
    let error = serde_json::json!({ "code": problem.code as u8, "message": problem.message, "next": next });
    serde_json::json!({ "error": error }).to_string()
}

impl Cli {
    /// Whether a script reads what is printed.
    #[must_use]
    pub fn prints_json(&self) -> bool {
        self.json
    }

    /// Does what was asked.
    ///
    /// # Errors
    /// What the user should be told, with the exit code.
    pub async fn run(self) -> Result<(), Problem> {
        let printer = Printer::new(self.json);
        if let Command::Volume(VolumeCommand::Info { path }) = &self.command {
            return volume::info(path, &printer);
        }
        if let Command::State(StateCommand::Restore(args)) = self.command {
            return state::restore(args, &printer);
        }
        let mut client = match &self.command {
            Command::Provider(ProviderCommand::Lock { .. }) => {
                Client::connect_undisturbed(&self.socket).await?
            }
            _ => Client::connect(&self.socket).await?,
        };
        match self.command {
            Command::Status => printer.status(&status(&mut client).await?),
            Command::Provider(command) => provider::run(command, &mut client, &printer).await,
            Command::Volume(VolumeCommand::Create(args)) => {
                volume::create(&args, &mut client, &printer).await
            }
            Command::Volume(VolumeCommand::Share(args)) => volume::share(&args, &mut client, &printer).await,
            Command::Volume(VolumeCommand::Info { path }) => volume::info(&path, &printer),
            Command::Vm(command) => vm::run(command, &mut client, &printer).await,
            Command::Jobs { command } => job::run(command, &mut client, &printer).await,
            Command::State(StateCommand::Backup(args)) => state::backup(&args, &mut client, &printer).await,
            Command::State(StateCommand::Restore(args)) => state::restore(args, &printer),
            Command::Audit(command) => audit(command, &mut client, &printer).await,
        }
    }
}

/// All of it: a reply has a part of the VMs.
async fn status(client: &mut Client) -> Result<HostStatus, Problem> {
    let mut status = client.call(async |host| host.status(None).await).await?;
    while let Some(after) = status.next_vms.take() {
        let page = client.call(async |host| host.status(Some(&after)).await).await?;
        status.vms.extend(page.vms);
        status.next_vms = page.next_vms;
    }
    Ok(status)
}

/// Says what is about to go wrong with them.
async fn warn_of_providers(client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let known = client.call(async |host| host.list_providers().await).await?;
    printer.warnings(&known.providers);
    Ok(())
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
            printer.audit_verified(&client.call(async |host| host.verify_audit().await).await?)
        }
    }
}

//! `virtseal status`.

use std::process::ExitCode;

use clap::Args;

use super::client::Client;
use super::print::{Printer, Width};
use crate::api::{HostProxy, HostStatus, LibvirtState};
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::model::subject::Subject;

#[derive(Clone, Copy, Debug, Args)]
pub(super) struct WidthArgs {
    /// How much to show of each line.
    #[arg(
        short = 'o',
        long = "output",
        value_enum,
        value_name = "WIDTH",
        default_value = "narrow"
    )]
    pub(super) width: Width,
}

/// Exit status 4 says that libvirt could not be asked, after all else was shown; to people in the table.
pub(super) async fn run(width: Width, client: &mut Client, printer: &Printer) -> Result<ExitCode, Problem> {
    let status = all_of(client).await?;
    let problem = match status.libvirt.known() {
        Some(LibvirtState::NotConnected) => Some(without_libvirt(&status)),
        Some(LibvirtState::Connected) | None => None,
    };
    printer.status(status, width)?;
    match problem {
        Some(problem) if printer.is_for_scripts() => Err(problem),
        Some(problem) => Ok(ExitCode::from(problem.code as u8)),
        None => Ok(ExitCode::SUCCESS),
    }
}

fn without_libvirt(status: &HostStatus) -> Problem {
    let why = status.libvirt_problem.as_deref().unwrap_or("no connection");
    Problem::new(
        Code::Unreachable,
        format!("libvirt does not answer at {}: {why}", status.libvirt_uri),
    )
    .about(Subject::Host)
    .next(Advice::ShowLibvirtd)
}

/// A reply has a part of the VMs.
async fn all_of(client: &mut Client) -> Result<HostStatus, Problem> {
    let mut status = client.call(async |host| host.status(None).await).await?;
    while let Some(after) = status.next_vms.take() {
        let page = client.call(async |host| host.status(Some(&after)).await).await?;
        status.vms.extend(page.vms);
        status.next_vms = page.next_vms;
    }
    Ok(status)
}

//! `virtseal vm …`.

use std::path::PathBuf;

use clap::Subcommand;

use super::client::Client;
use super::job::{self, WatchArgs};
use super::print::Printer;
use super::{passphrase, warn_of_providers};
use crate::api::{HostProxy, SweepKind};
use crate::model::problem::Problem;

#[derive(Debug, Subcommand)]
pub(super) enum VmCommand {
    /// Seal a defined, stopped UEFI VM: its disks, its vTPM, its UEFI variables.
    Seal {
        /// The VM: name or UUID.
        vm: String,
        /// Use this provider instead of the default one.
        #[arg(long, value_name = "NAME")]
        provider: Option<String>,
        /// Confirm the format that the XML declares for a disk whose first bytes look like another one (repeatable).
        #[arg(long, value_name = "TARGET=FORMAT")]
        from_format: Vec<String>,
        /// Print what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Make a VM plain again that has not run since it was sealed.
    Unseal {
        /// The VM: name or UUID.
        vm: String,
        /// Print what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Rewrap the keys of one VM for the providers that new ones are for.
    Rekey {
        /// The VM: name or UUID.
        vm: String,
        #[command(flatten)]
        watch: WatchArgs,
    },
    /// Destroy all keys of a VM that is off: nothing opens its disks again. Prints a receipt.
    Shred {
        /// The VM: name or UUID.
        vm: String,
        /// The VM's name, typed here instead of at the prompt.
        #[arg(long, value_name = "NAME")]
        yes_shred: Option<String>,
        /// The name once more: for a VM that is not defined here, destroy its KEKs at its providers too, and its images on
        /// shared storage. If it runs on another host, it is lost there.
        #[arg(long, value_name = "NAME", requires = "yes_shred")]
        yes_destroy_keks: Option<String>,
    },
    /// Drop this host's records of a VM that is on another host now. No key is destroyed; a file in the state directory brings
    /// them back.
    Forget {
        /// The VM: name or UUID.
        vm: String,
    },
    /// Take keys over that this host does not know: those that came with a VM from another host, as its first start would, or
    /// those in a file.
    Adopt {
        /// The VM: name or UUID.
        #[arg(required_unless_present = "from", conflicts_with = "from")]
        vm: Option<String>,
        /// Also envelopes of format 1, which anyone who can edit the XML or an image may have changed: you know where they
        /// come from.
        #[arg(long = "format-1", conflicts_with = "from")]
        format_1: bool,
        /// The file that `virtseal vm forget` has written.
        #[arg(long, value_name = "FILE")]
        from: Option<PathBuf>,
    },
    /// Show the objects of a VM, or of all sealed VMs.
    Status {
        /// The VM: name or UUID.
        vm: Option<String>,
    },
}

pub(super) async fn run(command: VmCommand, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    match command {
        VmCommand::Seal {
            vm,
            provider,
            from_format,
            dry_run,
        } => {
            let formats = Some(&from_format[..]).filter(|formats| !formats.is_empty());
            let outcome = client
                .call(async |host| host.seal_vm(&vm, provider.as_deref(), formats, dry_run).await)
                .await?;
            printer.outcome(&outcome, dry_run)?;
            warn_of_providers(client, printer).await
        }
        VmCommand::Unseal { vm, dry_run } => {
            let outcome = client
                .call(async |host| host.unseal_vm(&vm, dry_run).await)
                .await?;
            printer.outcome(&outcome, dry_run)
        }
        VmCommand::Rekey { vm, watch } => {
            let request = job::request(SweepKind::Rekey, None, None, Some(vm));
            job::start(&request, &watch, client, printer).await
        }
        VmCommand::Shred {
            vm,
            yes_shred,
            yes_destroy_keks,
        } => {
            let typed = Typed {
                shred: yes_shred,
                destroy_keks: yes_destroy_keks,
            };
            shred(&vm, typed, client, printer).await
        }
        VmCommand::Forget { vm } => {
            let outcome = client.call(async |host| host.forget_vm(&vm).await).await?;
            printer.outcome(&outcome, false)
        }
        VmCommand::Adopt {
            vm,
            format_1,
            from: None,
        } => {
            let vm = vm.unwrap_or_default();
            let outcome = client
                .call(async |host| host.adopt_vm(&vm, format_1).await)
                .await?;
            printer.outcome(&outcome, false)
        }
        VmCommand::Adopt { from: Some(from), .. } => {
            let fds = vec![passphrase::open_file(&from)?];
            let outcome = client.call(async |host| host.adopt_forgotten(fds).await).await?;
            printer.outcome(&outcome, false)
        }
        VmCommand::Status { vm } => {
            let ask = async |client: &mut Client, after: Option<String>| {
                client
                    .call(async |host| host.vm_status(vm.as_deref(), after.as_deref()).await)
                    .await
            };
            let mut shown = ask(client, None).await?;
            while let Some(after) = shown.next.take() {
                let page = ask(client, Some(after)).await?;
                shown.vms.extend(page.vms);
                shown.next = page.next;
            }
            printer.vms(&shown.vms)?;
            warn_of_providers(client, printer).await
        }
    }
}

/// The two words for a shredding, as far as they came as options.
struct Typed {
    shred: Option<String>,
    destroy_keks: Option<String>,
}

/// Asks on a terminal for what was not given, for the second word only where there is something that takes it.
async fn shred(vm: &str, given: Typed, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let preview = client.call(async |host| host.preview_shred(vm).await).await?;
    let name = &preview.name;
    let typed = job::typed(
        given.shred,
        &format!("All keys of {name} will be destroyed. Type its name: "),
    )?;
    let typed_for_keks = match given.destroy_keks {
        None if typed == *name && !preview.kept_for_others.is_empty() => {
            let kept = preview.kept_for_others.join(", ");
            let question = format!(
                "{name} is not defined here. If it is on another host, it is lost there without: {kept}. Type its name once more to \
                 destroy that too, or nothing to leave it: "
            );
            Some(job::typed(None, &question)?).filter(|typed| !typed.is_empty())
        }
        given => given,
    };
    let receipt = client
        .call(async |host| {
            // Of the VM that was looked at, whatever is called so by now.
            host.shred_vm(&preview.vm, Some(&typed), typed_for_keks.as_deref())
                .await
        })
        .await?;
    printer.receipt(&receipt)
}

//! `virtseal vm …`.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};

use super::client::Client;
use super::job::{self, WatchArgs};
use super::passphrase;
use super::print::Printer;
use super::status::WidthArgs;
use crate::api::{DiskFormat, HostProxy, LossPreview, Outcome, SnapshotAct, SweepKind};
use crate::model::act::Tense;
use crate::model::advice::Advice;
use crate::model::problem::{Code, Problem};
use crate::model::subject::Subject;

#[derive(Debug, Args)]
pub(super) struct SealArgs {
    /// The VM: name or UUID.
    vm: String,
    /// Use this provider instead of the default one.
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// Confirm the format that the XML declares for a disk whose first bytes look like another one (repeatable).
    #[arg(long, value_name = "TARGET=FORMAT", value_parser = disk_format)]
    from_format: Vec<DiskFormat>,
    /// Make an object anew that was sealed and is lost: nvram, vtpm, or a disk's target. What was in it stays lost.
    #[arg(long, value_name = "OBJECT", value_delimiter = ',')]
    replace: Vec<String>,
    /// Print what would be done, and all that stands in the way.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum VmCommand {
    /// Seal a defined, stopped UEFI VM: its disks, its vTPM, its UEFI variables.
    Seal(SealArgs),
    /// Make a VM plain again, if it has not run since it was sealed.
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
    /// Free a sealed VM of the plain overlays that `virsh snapshot-create-as --disk-only` has made.
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Deal with the UEFI variables of a sealed VM.
    Nvram {
        #[command(subcommand)]
        command: NvramCommand,
    },
    /// Drop this host's records of a VM that is on another host now. No key is destroyed; a file in the state directory brings
    /// them back.
    Forget {
        /// The VM: name or UUID.
        vm: String,
    },
    /// Take over keys that this host does not know: those that came with a VM from another host, as its first start would, or
    /// those in a file.
    #[command(group(ArgGroup::new("what").required(true).multiple(false)))]
    Adopt {
        /// The VM: name or UUID.
        #[arg(group = "what")]
        vm: Option<String>,
        /// Also envelopes of format 1, which anyone who can edit the XML or an image may have changed: you know where they
        /// come from.
        #[arg(long = "format-1", conflicts_with = "from")]
        format_1: bool,
        /// The file that `virtseal vm forget` has written.
        #[arg(long, value_name = "FILE", group = "what")]
        from: Option<PathBuf>,
    },
    /// Start a sealed VM with this host, in libvirt's place: once after each boot, as soon as libvirt answers and its providers are
    /// ready. One that has run since the boot is left alone.
    Autostart {
        /// The VM: name or UUID.
        vm: String,
        /// Leave it off when the host boots.
        #[arg(long)]
        disable: bool,
    },
    /// Show the objects of a VM, or of all sealed VMs.
    Status {
        /// The VM: name or UUID.
        vm: Option<String>,
        #[command(flatten)]
        args: WidthArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum SnapshotCommand {
    /// Merge them into the sealed disks, while the VM runs or is off: nothing that the guest has written is lost.
    Commit {
        /// The VM: name or UUID.
        vm: String,
        /// Leave the merged files where they are, in plaintext.
        #[arg(long)]
        keep_overlays: bool,
        /// Also where nobody knows whether the sealed disk is newer: what was written to it alone is lost.
        #[arg(long)]
        force: bool,
        /// The VM's name, typed here instead of at the prompt.
        #[arg(long, value_name = "NAME", requires = "force")]
        yes_commit: Option<String>,
        /// Print what would be done.
        #[arg(long)]
        dry_run: bool,
    },
    /// Drop them, with all that the guest has written since the snapshot: its disks are as they were then. The VM must be off.
    Delete {
        /// The VM: name or UUID.
        vm: String,
        /// Leave the dropped files where they are, in plaintext.
        #[arg(long)]
        keep_overlays: bool,
        /// Also where the sealed disk was written to since, which may have been a part of a merge.
        #[arg(long)]
        force: bool,
        /// The VM's name, typed here instead of at the prompt.
        #[arg(long, value_name = "NAME")]
        yes_delete: Option<String>,
        /// Print what would be done, and lost.
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum NvramCommand {
    /// Make the UEFI variables of a VM that is off anew from their template, encrypted as before; the old ones are kept beside them.
    Reset {
        /// The VM: name or UUID.
        vm: String,
        /// The VM's name, typed here instead of at the prompt.
        #[arg(long, value_name = "NAME")]
        yes_reset: Option<String>,
        /// Print what would be done, and lost.
        #[arg(long)]
        dry_run: bool,
    },
}

pub(super) async fn run(command: VmCommand, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    match command {
        VmCommand::Seal(args) => seal(args, client, printer).await,
        VmCommand::Unseal { vm, dry_run } => {
            let outcome = client
                .call(async |host| host.unseal_vm(&vm, dry_run).await)
                .await?;
            printer.outcome(outcome)
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
        VmCommand::Snapshot { command } => snapshot(command, client, printer).await,
        VmCommand::Nvram {
            command:
                NvramCommand::Reset {
                    vm,
                    yes_reset,
                    dry_run,
                },
        } => {
            let preview = client
                .call(async |host| host.preview_nvram_reset(&vm).await)
                .await?;
            if dry_run {
                return printer.loss(preview);
            }
            let typed = word_for(&preview, yes_reset)?;
            let outcome = client
                .call(async |host| host.reset_nvram(&preview.vm, Some(&typed)).await)
                .await?;
            printer.outcome(outcome)
        }
        VmCommand::Forget { vm } => {
            let outcome = client.call(async |host| host.forget_vm(&vm).await).await?;
            printer.outcome(outcome)
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
            printer.outcome(outcome)
        }
        VmCommand::Adopt { from: Some(from), .. } => {
            let fds = vec![passphrase::open_file(&from)?];
            let outcome = client.call(async |host| host.adopt_forgotten(fds).await).await?;
            printer.outcome(outcome)
        }
        VmCommand::Autostart { vm, disable } => {
            let outcome = client
                .call(async |host| match disable {
                    true => host.disable_autostart(&vm).await,
                    false => host.enable_autostart(&vm).await,
                })
                .await?;
            printer.outcome(outcome)
        }
        VmCommand::Status { vm, args } => {
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
            printer.vms(shown, args.width)
        }
    }
}

async fn snapshot(command: SnapshotCommand, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let (vm, act, keep, force, yes, dry_run) = match command {
        SnapshotCommand::Commit {
            vm,
            keep_overlays,
            force,
            yes_commit,
            dry_run,
        } => (vm, SnapshotAct::Commit, keep_overlays, force, yes_commit, dry_run),
        SnapshotCommand::Delete {
            vm,
            keep_overlays,
            force,
            yes_delete,
            dry_run,
        } => (vm, SnapshotAct::Delete, keep_overlays, force, yes_delete, dry_run),
    };
    // What is not asked for is not sent: a virtseald that does not know it would refuse.
    let force = force.then_some(true);
    let preview = client
        .call(async |host| host.preview_snapshot(&vm, act, keep, force).await)
        .await?;
    if dry_run {
        return printer.loss(preview);
    }
    if preview.steps.is_empty() {
        return printer.outcome(Outcome::default());
    }
    let typed = match preview.lost.is_empty() {
        true => None,
        false => Some(word_for(&preview, yes)?),
    };
    let begun = client
        .call(async |host| {
            host.begin_snapshot(&preview.vm, act, keep, force, typed.as_deref())
                .await
        })
        .await?;
    printer.advise(&format!(
        "Job {} does it, and goes on without this command: {}",
        begun.job.id,
        Advice::WatchJob(begun.job.id)
    ))?;
    let ended = job::follow(Some(begun.job.id), client, printer).await?;
    job::judge(&ended)?;
    printer.outcome(Outcome {
        steps: preview.done,
        warnings: begun.warnings,
        changed: true,
        ..Outcome::default()
    })
}

/// The VM's name, as an option or asked for with what would be lost.
fn word_for(preview: &LossPreview, given: Option<String>) -> Result<String, Problem> {
    let name = &preview.name;
    let lost: Vec<_> = preview.lost.iter().map(|lost| lost.what.as_str()).collect();
    let lost = lost.join("; ");
    job::typed(given, &format!("{name} would lose: {lost}. Type its name: "))
}

/// Asks on a terminal whether to make anew what is lost, where nothing else stands in the way.
async fn seal(mut args: SealArgs, client: &mut Client, printer: &Printer) -> Result<(), Problem> {
    let tense = if args.dry_run { Tense::Planned } else { Tense::Done };
    let refused = match ask_to_seal(&args, tense, client).await {
        Ok(outcome) => {
            printer.outcome(outcome.clone())?;
            return refuse_with_obstacles(&args.vm, &outcome, printer);
        }
        Err(problem) if !args.dry_run && problem.code == Code::WouldLoseKey && printer.asks() => problem,
        Err(problem) => return Err(problem),
    };
    let planned = ask_to_seal(&args, Tense::Planned, client).await?;
    let lost: Vec<_> = planned
        .obstacles
        .iter()
        .filter_map(|obstacle| obstacle.replace.clone())
        .collect();
    if lost.len() < planned.obstacles.len() {
        return Err(refused);
    }
    for obstacle in planned.obstacles {
        printer.caution(&Problem::from(obstacle.problem).to_string());
    }
    let question = format!(
        "To make {} anew, without what was in it, type the VM's name as above: ",
        lost.join(" and ")
    );
    if job::typed(None, &question)? != args.vm {
        return Err(refused);
    }
    args.replace.extend(lost);
    printer.outcome(ask_to_seal(&args, Tense::Done, client).await?)
}

async fn ask_to_seal(args: &SealArgs, tense: Tense, client: &mut Client) -> Result<Outcome, Problem> {
    let formats = Some(&args.from_format[..]).filter(|formats| !formats.is_empty());
    let replace = Some(&args.replace[..]).filter(|objects| !objects.is_empty());
    let call = async |host: &mut _| {
        HostProxy::seal_vm(
            host,
            &args.vm,
            args.provider.as_deref(),
            formats,
            replace,
            tense == Tense::Planned,
        )
        .await
    };
    client.call(call).await
}

fn disk_format(text: &str) -> Result<DiskFormat, &'static str> {
    let given = text.split_once('=').and_then(|(target, format)| {
        Some(DiskFormat {
            target: target.to_owned(),
            format: format.parse().ok()?,
        })
    });
    given.ok_or("TARGET=raw or TARGET=qcow2 is expected, such as vda=raw")
}

/// Ends a dry run as the seal itself would end, where something stands in the way.
fn refuse_with_obstacles(vm: &str, outcome: &Outcome, printer: &Printer) -> Result<(), Problem> {
    let obstacles = outcome.obstacles.iter();
    let mut obstacles = obstacles.map(|obstacle| Problem::from(obstacle.problem.clone()));
    let Some(first) = obstacles.next() else {
        return Ok(());
    };
    let others: Vec<_> = obstacles.collect();
    if others.is_empty() {
        return Err(first);
    }
    for obstacle in std::iter::once(&first).chain(&others) {
        printer.caution(&obstacle.to_string());
    }
    let count = others.len() + 1;
    let what = format!("{vm} can't be sealed yet: {count} obstacles");
    Err(Problem::new(first.code, what)
        .about(Subject::Vm(vm.to_owned()))
        .next(Advice::from("clear them, the first one first").then(Advice::SealVm(vm.to_owned()))))
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
    printer.receipt(receipt)
}

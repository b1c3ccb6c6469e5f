//! The README's way from nothing to a sealed VM, line by line as it is printed.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{Accelerator, DomainState, Host, SealedHost, require_programs};

const IMAGE: &str = "debian-12-genericcloud-amd64.qcow2";
const PASSPHRASES: [&str; 2] = [SealedHost::PASSPHRASE, SealedHost::PASSPHRASE];
/// Counted by who has never seen virtseal: installing it is the first.
const MOST_COMMANDS: usize = 7;

/// The commands of the first block below the heading.
fn block(heading: &str) -> Result<Vec<String>> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md"))?;
    let (_, text) = readme.split_once(heading).context("no such heading")?;
    let lines = text.lines().skip_while(|line| !line.starts_with("    "));
    let block = lines.take_while(|line| line.starts_with("    "));
    Ok(block.map(|line| line.trim().to_owned()).collect())
}

#[test]
fn seven_commands_lead_from_nothing_to_a_sealed_vm_that_runs() -> Result<()> {
    require_programs(&[("virt-install", "virtinst")])?;
    let commands = block("## Seal a VM")?;
    ensure!(commands.len() <= MOST_COMMANDS, "{commands:#?}");
    let (install, commands) = commands.split_first().context("an empty block")?;
    // By `make test-deb` and `make test-systemd`: this host has the programs that were just built.
    ensure!(install.starts_with("apt install "), "{install}");

    let sealed = SealedHost::start_without_provider(Host::builder())?;
    let virtualization = Accelerator::of_this_machine().domain_type();
    let home = Path::new("/var/lib/libvirt/images/download");
    fs::create_dir_all(sealed.host().path(home))?;
    let guest = sealed.host().guest_disk("guest")?;
    let download = home.join(IMAGE);
    let names = [&guest, &download].map(|path| path.display().to_string());
    sealed
        .host()
        .run(&[
            "qemu-img", "convert", "-f", "raw", "-O", "qcow2", &names[0], &names[1],
        ])?
        .succeeded()?;
    for command in commands {
        // As virt-install chooses by itself, except where there is a /dev/kvm that does not work.
        let install = format!("virt-install --virt-type {virtualization} ");
        let command = command.replace("virt-install ", &install);
        let line = format!("cd {} && {command}", home.display());
        let output = sealed.at_a_terminal(&line, &PASSPHRASES)?;
        ensure!(
            output.status.success(),
            "`{line}`: {}{}",
            output.stdout,
            output.stderr
        );
    }
    ensure!(sealed.host().state("web01")? == DomainState::Running);
    let status = sealed.run(&["vm", "status", "web01"])?;
    for object in ["disk vda", "nvram", "vtpm"] {
        let row = status.lines().find(|line| line.contains(object));
        let row = row.with_context(|| format!("no {object}: {status}"))?;
        ensure!(row.contains("sealed"), "{status}");
    }
    Ok(())
}

//! What the other stories rely on: hosts are private, run side by side, and leave nothing behind.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{DomainSpec, DomainState, Host, wait_until};

const SMALL_DISK_BYTES: u64 = 1 << 20;
const END_DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn hosts_run_side_by_side_and_leave_nothing() -> Result<()> {
    let (first, second) = (Host::start()?, Host::start()?);
    start_paused(&first, "same-name")?;
    ensure!(
        second
            .virsh(&["list", "--all", "--name"])?
            .succeeded()?
            .is_empty(),
        "a host sees another's VMs"
    );
    start_paused(&second, "same-name")?;

    let directory = first.directory().to_owned();
    ensure!(
        !processes_naming(&directory)?.is_empty(),
        "a host has no processes"
    );
    drop(first);
    ensure!(!directory.exists(), "{} is still there", directory.display());
    ensure!(
        processes_naming(&directory)?.is_empty(),
        "processes of a dropped host still run"
    );
    ensure!(
        second.state("same-name")? == DomainState::Paused,
        "dropping one host reached another"
    );
    Ok(())
}

#[test]
fn libvirtd_restart_keeps_vms_and_finds_hooks() -> Result<()> {
    let mut host = Host::start()?;
    start_paused(&host, "kept")?;
    let hook = host.directory().join("hook");
    fs::write(&hook, "#!/bin/sh\necho \"$1 $2 $3\" >>/var/log/hook-calls\n")?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    host.install_hook(&hook)?;
    host.restart_libvirtd()?;
    ensure!(host.state("kept")? == DomainState::Paused);

    start_paused(&host, "hooked")?;
    host.virsh(&["destroy", "hooked"])?.succeeded()?;
    let calls = fs::read_to_string(host.path("/var/log/hook-calls"))?;
    let of_start: Vec<_> = calls
        .lines()
        .filter_map(|line| line.strip_prefix("hooked "))
        .collect();
    ensure!(
        of_start
            == [
                "prepare begin",
                "start begin",
                "started begin",
                "stopped end",
                "release end"
            ],
        "{calls}"
    );
    Ok(())
}

#[test]
fn many_vms_start_at_once() -> Result<()> {
    let host = Host::builder().libvirtd_conf("max_workers = 20").start()?;
    let names: Vec<_> = (1..=24).map(|number| format!("vm{number:02}")).collect();
    for name in &names {
        host.define(&DomainSpec::minimal(
            name,
            &host.empty_disk(name, SMALL_DISK_BYTES)?,
        ))?;
    }
    thread::scope(|scope| {
        let starts: Vec<_> = names
            .iter()
            .map(|name| scope.spawn(|| host.virsh(&["start", "--paused", name])?.succeeded()))
            .collect();
        starts
            .into_iter()
            .try_for_each(|start| start.join().expect("no start panics").map(drop))
    })?;
    for name in &names {
        ensure!(host.state(name)? == DomainState::Paused, "{name} did not start");
    }
    Ok(())
}

#[test]
fn killed_test_leaves_no_process_and_no_file() -> Result<()> {
    let mut victim = Command::new(env!("CARGO_BIN_EXE_private-host"))
        .args(["bash", "-c", "echo $VIRTSEAL_E2E_DIRECTORY; exec sleep 1000"])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(victim.stdout.take().context("no output")?).read_line(&mut line)?;
    let directory = PathBuf::from(line.trim_end());
    ensure!(
        directory.exists(),
        "{} is not where the host lives",
        directory.display()
    );
    ensure!(
        !processes_naming(&directory)?.is_empty(),
        "the host has no processes"
    );
    victim.kill()?;
    victim.wait()?;
    wait_until(END_DEADLINE, "the end of a killed test's host", || {
        Ok((!directory.exists() && processes_naming(&directory)?.is_empty()).then_some(()))
    })
}

fn start_paused(host: &Host, name: &str) -> Result<()> {
    let vm = DomainSpec::minimal(name, &host.empty_disk(name, SMALL_DISK_BYTES)?);
    host.define(&vm)?;
    host.virsh(&["start", "--paused", name])?.succeeded()?;
    host.wait_for_state(name, &DomainState::Paused, END_DEADLINE)
}

/// The processes that have one of `directory`'s files mounted: every process of the namespace it backs.
fn processes_naming(directory: &Path) -> Result<Vec<String>> {
    let name = directory.to_string_lossy().into_owned();
    let processes = fs::read_dir("/proc")?.filter_map(Result::ok).filter(|entry| {
        fs::read_to_string(entry.path().join("mountinfo")).is_ok_and(|mounts| mounts.contains(&name))
    });
    Ok(processes
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect())
}

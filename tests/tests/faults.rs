//! Full disks and commands that run into each other: a clear answer, nothing lost, and it works once there is room.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, NVRAM, Rig, STATE};
use virtseal_testkit::{DomainSpec, DomainState, built_program, expect_names, pin_log, wait_until};

/// Rounds of a race.
const ROUNDS: u32 = 12;
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn volume_create_on_a_full_disk_can_be_repeated_when_there_is_room() -> Result<()> {
    let rig = Rig::start()?;
    let source = format!("{IMAGES}/source.raw");
    fs::write(rig.host().path(&source), vec![0x5a; 4 << 20])?;
    let ways = [
        ("/var/lib/libvirt/small1", ["--size", "8M"]),
        ("/var/lib/libvirt/small2", ["--from", &source]),
    ];
    for (directory, how) in ways {
        let small = Small::mount(&rig, directory, "64k")?;
        let vm = Uuid::new_v4();
        let uuid = vm.to_string();
        let image = format!("{directory}/image.qcow2");
        let command = [&["volume", "create", &image, "--vm", &uuid], &how[..]].concat();
        // First not even the headers fit, then the data does not.
        for size in ["64k", "1500k"] {
            small.resize(size)?;
            if size == "1500k" && how[0] == "--size" {
                continue;
            }
            let said = rig.sealed.virtseal(&command)?.refused()?;
            ensure!(said.contains("No space left") && said.contains(&image), "{said}");
            ensure!(!rig.host().path(&image).exists(), "half an image");
            ensure!(
                fs::read_dir(rig.host().path(small.path))?.count() < 2,
                "something is left"
            );
        }
        small.resize("32m")?;
        rig.sealed.virtseal(&command)?.succeeded()?;
        rig.expect_active(&vm, &["disk"])?;
    }
    Ok(())
}

#[test]
fn vm_seal_on_a_full_disk_can_be_repeated_when_there_is_room() -> Result<()> {
    for full in [IMAGES, NVRAM] {
        let rig = Rig::start()?;
        fs::create_dir_all(rig.host().path(NVRAM))?;
        let small = Small::mount(&rig, full, "260k")?;
        let spec = define_empty(&rig, "full01")?;
        let before = rig
            .host()
            .virsh(&["dumpxml", "--inactive", &spec.name])?
            .succeeded()?;
        let said = rig.sealed.virtseal(&["vm", "seal", &spec.name])?.refused()?;
        // The plan sees it before anything is written.
        ensure!(said.contains("KiB free") && said.contains(full), "{said}");
        let after = rig
            .host()
            .virsh(&["dumpxml", "--inactive", &spec.name])?
            .succeeded()?;
        ensure!(before == after, "the domain was changed: {after}");
        rig.expect_openable(&spec.uuid)?;
        rig.expect_no_temporaries()?;
        small.resize("32m")?;
        rig.sealed.virtseal(&["vm", "seal", &spec.name])?.succeeded()?;
        rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])?;
        rig.sealed.expect_start(&spec.name)?;
    }
    Ok(())
}

/// The VM has what it had, and starts with it.
#[test]
fn vm_unseal_on_a_full_disk_can_be_repeated_when_there_is_room() -> Result<()> {
    for full in [IMAGES, NVRAM] {
        let rig = Rig::start()?;
        fs::create_dir_all(rig.host().path(NVRAM))?;
        Small::mount(&rig, full, "32m")?;
        let spec = define_empty(&rig, "full01")?;
        let mut variables = fs::read(rig.host().path(&spec.firmware.variables))?;
        variables[4096] ^= 1;
        fs::write(rig.host().path(spec.nvram()), &variables)?;
        let unseal = ["vm", "unseal", &spec.name];
        rig.sealed.run(&["vm", "seal", &spec.name])?;
        let before = rig.sealed.dumpxml(&spec.name)?;
        // Not the plain files, of which one would have room, but nothing at all.
        let ballast = rig.host().path(full).join("ballast");
        ensure!(fs::write(&ballast, vec![0; 32 << 20]).is_err(), "it is not full");
        let said = rig.sealed.refused(1, &unseal)?;
        expect_names(&said, &["No space left", full])?;
        ensure!(
            rig.sealed.dumpxml(&spec.name)? == before,
            "the domain was changed"
        );
        ensure!(fs::read(rig.host().path(spec.nvram()))?.starts_with(b"LUKS"));
        rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])?;
        rig.expect_openable(&spec.uuid)?;
        rig.expect_no_temporaries()?;

        fs::remove_file(ballast)?;
        rig.sealed.run(&unseal)?;
        ensure!(fs::read(rig.host().path(spec.nvram()))? == variables);
        rig.expect_no_temporaries()?;
        rig.sealed.expect_start(&spec.name)?;
    }
    Ok(())
}

#[test]
fn full_state_directory_refuses_new_keys_and_still_starts_vms() -> Result<()> {
    let mut rig = Rig::start()?;
    // The same state, on a disk of its own.
    rig.sealed.stop_daemon(nix::sys::signal::Signal::SIGTERM)?;
    rig.host().run(&["cp", "-a", STATE, "/run/state"])?.succeeded()?;
    Small::mount(&rig, STATE, "1m")?;
    rig.host()
        .run(&["sh", "-c", "cp -a /run/state/. /var/lib/virtseal/"])?
        .succeeded()?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock()?;
    let spec = DomainSpec {
        tpm: true,
        ..spec("state01")
    };
    rig.sealed.seal_empty(&spec)?;
    rig.sealed.expect_start(&spec.name)?;
    rig.sealed.expect_start(&spec.name)?;

    let pinned = pin_log(&rig.sealed)?;
    let ballast = rig.host().path(STATE).join("ballast");
    let filled = fs::write(&ballast, vec![0; 2 << 20]);
    ensure!(filled.is_err(), "the state directory is not full");
    let (vm, image) = (Uuid::new_v4(), format!("{IMAGES}/state.qcow2"));
    let create = [
        "volume",
        "create",
        &image,
        "--size",
        "8M",
        "--vm",
        &vm.to_string(),
    ];
    let passphrase = rig.passphrase()?;
    let add = [
        "provider",
        "add",
        "native",
        "second",
        "--passphrase-file",
        &passphrase,
    ];
    for command in [&create[..], &add[..]] {
        let said = rig.sealed.virtseal(command)?.refused()?;
        let is_full = said.contains("full") || said.contains("No space left");
        ensure!(is_full && said.contains(STATE), "{said}");
    }
    ensure!(!rig.host().path(&image).exists(), "an image without an envelope");
    ensure!(rig.state_of("second")?.is_none(), "half a provider");
    // A host whose log can't be written still has to run its VMs.
    rig.sealed.expect_start(&spec.name)?;

    fs::remove_file(ballast)?;
    drop(pinned);
    rig.sealed.virtseal(&create)?.succeeded()?;
    rig.expect_active(&vm, &["disk"])?;
    rig.sealed.virtseal(&add)?.succeeded()?;
    rig.sealed.virtseal(&["audit", "verify"])?.succeeded()?;
    rig.restart()?;
    rig.sealed.unlock_provider("second")?;
    rig.sealed.unlock_provider("main")?;
    rig.sealed.expect_start(&spec.name)
}

#[test]
fn volume_that_can_not_be_made_leaves_no_envelope() -> Result<()> {
    let rig = Rig::start()?;
    let uuid = Uuid::new_v4();
    let (vm, image) = (uuid.to_string(), format!("{IMAGES}/never.qcow2"));
    for (image, options) in [
        ("/nodir/never.qcow2", &["--size", "8M"][..]),
        (&image, &["--size", "0"]),
        (&image, &["--from", "/nonexistent.qcow2"]),
    ] {
        let create = [&["volume", "create", image, "--vm", &vm], options].concat();
        ensure!(!rig.sealed.virtseal(&create)?.status.success(), "{create:?}");
    }
    let provider = rig.sealed.json(&["provider", "show", "main"])?;
    ensure!(provider["provider"]["envelopes"] == 0, "{provider}");
    rig.sealed
        .virtseal(&["volume", "create", &image, "--size", "8M", "--vm", &vm])?
        .succeeded()?;
    rig.expect_active(&uuid, &["disk"])?;
    // No libvirt knows this VM, and its keys can be ended all the same.
    let receipt = rig
        .sealed
        .virtseal(&["vm", "shred", &vm, "--yes-shred", &vm])?
        .succeeded()?;
    ensure!(receipt.contains("keyslots made dead"), "{receipt}");
    rig.expect_no_temporaries()
}

#[test]
fn one_of_two_volume_creates_wins() -> Result<()> {
    let mut rig = Rig::start()?;
    for round in 0..ROUNDS {
        let (vm, image) = (Uuid::new_v4(), format!("{IMAGES}/race-{round}.qcow2"));
        let command = [
            "volume",
            "create",
            &image,
            "--size",
            "8M",
            "--vm",
            &vm.to_string(),
        ];
        let mut won = 0;
        for (ok, said) in both_at_once(&mut rig, &command)? {
            ensure!(
                ok || said.contains("exists") || said.contains("is being made"),
                "{said}"
            );
            won += u32::from(ok);
        }
        ensure!(won == 1, "{won} of two have made {image}");
        rig.expect_active(&vm, &["disk"])?;
        rig.expect_no_temporaries()?;
    }
    Ok(())
}

#[test]
fn two_seals_of_one_vm_make_one() -> Result<()> {
    let mut rig = Rig::start()?;
    for round in 0..ROUNDS / 2 {
        let spec = define_empty(&rig, &format!("twice{round}"))?;
        let command = ["vm", "seal", &spec.name];
        for (ok, said) in both_at_once(&mut rig, &command)? {
            ensure!(ok, "{said}");
        }
        rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])?;
        rig.sealed.expect_start(&spec.name)?;
    }
    Ok(())
}

/// Whoever wins: a VM never runs on files that have lost their name, which would be lost with it.
#[test]
fn seal_during_a_start_takes_no_file_from_the_vm() -> Result<()> {
    let mut rig = Rig::start()?;
    // Behind virtseal's hook, so that a start waits in the middle until it is told to go on.
    let hold = "#!/bin/sh\n[ \"$2\" = prepare ] || exit 0\n: >/run/held\nread go </run/go\nexit 0\n";
    let hook = rig.host().path("/etc/libvirt/hooks/qemu.d/zz-hold");
    fs::write(&hook, hold)?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    rig.host().run(&["mkfifo", "/run/go"])?.succeeded()?;
    rig.sealed.host_mut().restart_libvirtd()?;
    let (mut sealed, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        let spec = define_empty(&rig, &format!("race{round}"))?;
        let mut starting = rig.host().command("virsh");
        starting.args(["--connect", "qemu:///system", "start", "--paused", &spec.name]);
        let starting = piped(&mut starting)?;
        let held = rig.host().path("/run/held");
        wait_until(PATIENCE, "the start to be held", || {
            Ok(held.exists().then_some(()))
        })?;
        fs::remove_file(&held)?;
        let sealing = start(&rig, &["vm", "seal", &spec.name])?;
        wait_until(PATIENCE, "the seal to wait for its answer", || {
            Ok(waits_for_an_answer(&sealing)?.then_some(()))
        })?;
        // From here on they run side by side, one of them with a head start.
        sleep(Duration::from_millis(u64::from(round) * 12));
        rig.host().run(&["sh", "-c", "echo go >/run/go"])?.succeeded()?;
        let (ok, said) = end(sealing)?;
        let (started, _) = end(starting)?;
        println!("round {round}: started {started}, sealed {ok} {said}");
        if ok {
            sealed += 1;
        } else {
            refused += 1;
            ensure!(said.contains(&spec.name) || said.contains("in use"), "{said}");
        }
        if rig.host().state(&spec.name)? == DomainState::Paused {
            for file in [&spec.disk, &spec.nvram()] {
                ensure!(
                    is_open_by_qemu(&rig, file)?,
                    "QEMU has another {} than is there",
                    file.display()
                );
            }
            rig.host().virsh(&["destroy", &spec.name])?.succeeded()?;
        }
        rig.expect_openable(&spec.uuid)?;
        // Nothing was written by the guest, so the seal goes on from wherever it was.
        rig.sealed.virtseal(&["vm", "seal", &spec.name])?.succeeded()?;
        rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])?;
    }
    println!("sealed {sealed}, refused {refused}");
    Ok(())
}

/// A file system that is as large as it is told.
struct Small<'a> {
    rig: &'a Rig,
    path: &'static str,
}

impl<'a> Small<'a> {
    fn mount(rig: &'a Rig, path: &'static str, size: &str) -> Result<Small<'a>> {
        fs::create_dir_all(rig.host().path(path))?;
        let options = format!("size={size},mode=0700");
        rig.host()
            .run(&["mount", "-t", "tmpfs", "-o", &options, "small", path])?
            .succeeded()?;
        Ok(Self { rig, path })
    }

    fn resize(&self, size: &str) -> Result<()> {
        let options = format!("remount,size={size}");
        self.rig
            .host()
            .run(&["mount", "-o", &options, self.path])?
            .succeeded()
            .map(drop)
    }
}

fn spec(name: &str) -> DomainSpec {
    DomainSpec {
        disk_format: "qcow2",
        ..DomainSpec::minimal(name, &PathBuf::from(format!("{IMAGES}/{name}.qcow2")))
    }
}

/// A plain VM with an empty disk.
fn define_empty(rig: &Rig, name: &str) -> Result<DomainSpec> {
    let spec = spec(name);
    let disk = spec.disk.to_str().context("a UTF-8 path")?;
    rig.host()
        .run(&["qemu-img", "create", "-q", "-f", "qcow2", disk, "8M"])?
        .succeeded()?;
    rig.host().define(&spec)?;
    Ok(spec)
}

fn start(rig: &Rig, arguments: &[&str]) -> Result<Child> {
    piped(rig.host().command(built_program("virtseal")?).args(arguments))
}

fn piped(command: &mut Command) -> Result<Child> {
    Ok(command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?)
}

/// Runs a command twice at once: the daemon stands still until it has both requests.
fn both_at_once(rig: &mut Rig, command: &[&str]) -> Result<[(bool, String); 2]> {
    rig.sealed.daemon()?.signal(Signal::SIGSTOP)?;
    let both = [start(rig, command)?, start(rig, command)?];
    for child in &both {
        wait_until(PATIENCE, "both to wait for their answer", || {
            Ok(waits_for_an_answer(child)?.then_some(()))
        })?;
    }
    rig.sealed.daemon()?.signal(Signal::SIGCONT)?;
    let [first, second] = both;
    Ok([end(first)?, end(second)?])
}

/// Whether the command that nsenter runs has a connection and sleeps, as it does once it has asked.
fn waits_for_an_answer(child: &Child) -> Result<bool> {
    let nsenter = child.id();
    let children = fs::read_to_string(format!("/proc/{nsenter}/task/{nsenter}/children"))?;
    let Some(pid) = children.split_whitespace().next() else {
        return Ok(false);
    };
    let is_asleep = || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S'))
    };
    let is_connected = || {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        let sockets = descriptors.filter(|entry| {
            fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
        });
        // tokio has a pair of its own for signals.
        sockets.count() > 2
    };
    // Not in the moment between two calls.
    let seen = (0..4).all(|_| {
        sleep(Duration::from_millis(15));
        is_connected() && is_asleep()
    });
    Ok(seen)
}

fn end(child: Child) -> Result<(bool, String)> {
    let output = child.wait_with_output()?;
    Ok((
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    ))
}

/// Whether a QEMU of the host has open what `file` is the name of now.
fn is_open_by_qemu(rig: &Rig, file: &Path) -> Result<bool> {
    let named = fs::metadata(rig.host().path(file))?;
    for process in fs::read_dir(rig.host().path("/proc"))?.filter_map(Result::ok) {
        let command = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
        if !command.contains("qemu-system") {
            continue;
        }
        for fd in fs::read_dir(process.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let found = fs::metadata(fd.path());
            if found.is_ok_and(|found| (found.dev(), found.ino()) == (named.dev(), named.ino())) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

//! Volumes that a job fills.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::{IMAGES, Rig, STATE};
use virtseal_testkit::{DomainSpec, SealedHost, built_program, expect_names, wait_until};

use super::PATIENCE;

/// One that takes long, because its `qemu-img` is stopped: nobody else waits for it, whoever is killed.
#[test]
fn a_volume_in_the_making_outlives_its_client_and_its_daemon_and_holds_up_nobody_else() -> Result<()> {
    let mut rig = Rig::start()?;
    let source = format!("{IMAGES}/source.raw");
    fs::write(rig.host().path(&source), vec![0x5a; 256 << 20])?;
    let (vm, image) = (uuid::Uuid::from_u128(0x7001), format!("{IMAGES}/long.qcow2"));
    let uuid = vm.to_string();
    let create = ["volume", "create", &image, "--from", &source, "--vm", &uuid];
    let mut client = begin(&rig, &create)?;
    let held = held_qemu_img(&mut rig)?;
    client.kill()?;
    client.wait()?;

    let job = rig.sealed.last_job()?;
    ensure!(
        job["kind"] == "create_volume" && job["state"] == "running" && job["unit"] == "bytes",
        "{job}"
    );
    ensure!(
        job["path"] == image && job["vm"] == uuid && job["total"] == 256 << 20,
        "{job}"
    );
    let id = job["id"].to_string();
    let again = rig.sealed.refused(9, &create)?;
    expect_names(
        &again,
        &[&image, "works on", &format!("virtseal jobs watch {id}")],
    )?;
    let empty = ["volume", "create", &image, "--size", "8M", "--vm", &uuid];
    expect_names(&rig.sealed.refused(9, &empty)?, &["works on"])?;
    let shred = [
        "vm",
        "shred",
        &uuid,
        "--yes-shred",
        &uuid,
        "--yes-destroy-keks",
        &uuid,
    ];
    expect_names(&rig.sealed.refused(9, &shred)?, &[&format!("job {id} runs")])?;

    // No other VM waits: not its seal, start, shred or status, nor a job of its own.
    rig.sealed.seal_new("other")?;
    rig.sealed.expect_start("other")?;
    ensure!(rig.sealed.run(&["status"])?.contains("other"));
    rig.sealed.run(&["vm", "rekey", "other", "--watch"])?;
    let (small, beside) = (format!("{IMAGES}/small.raw"), format!("{IMAGES}/beside.qcow2"));
    fs::write(rig.host().path(&small), vec![1; 1 << 20])?;
    let other = "00000000-0000-4000-8000-000000007002";
    let made = rig
        .sealed
        .json(&["volume", "create", &beside, "--from", &small, "--vm", other])?;
    ensure!(made["path"] == beside && made["size"] == 1 << 20, "{made}");
    ensure!(made["envelope"].is_string(), "{made}");
    rig.sealed
        .run(&["vm", "shred", "other", "--yes-shred", "other"])?;

    // The daemon dies, and what it had begun with it; the job begins again as soon as the keys are there.
    rig.sealed.stop_daemon(Signal::SIGKILL)?;
    ensure!(!std::path::Path::new(&format!("/proc/{held}/exe")).exists() || is_gone(held)?);
    rig.sealed.start_daemon()?;
    rig.expect_no_temporaries()?;
    let waiting = wait_until(PATIENCE, "the job to say what it waits for", || {
        let job = rig.sealed.json(&["jobs"])?["jobs"][0].clone();
        Ok(job["waiting"].as_str().map(str::to_owned))
    })?;
    expect_names(
        &waiting,
        &["provider 'main' is locked", "virtseal provider unlock main"],
    )?;
    rig.sealed.unlock()?;
    let ended = rig.sealed.run(&["jobs", "watch", &id])?;
    expect_names(&ended, &[&image, "done", "256.00 MiB of 256.00 MiB"])?;
    rig.expect_active(&vm, &["disk"])?;
    let envelopes = rig.envelopes(&vm)?;
    rig.root
        .expect_pattern(rig.host(), &envelopes[0], 0x5a, 256 << 20)?;
    rig.expect_no_temporaries()
}

#[test]
fn a_volume_in_the_making_can_be_aborted_and_resumed() -> Result<()> {
    let mut rig = Rig::start()?;
    let source = format!("{IMAGES}/source.raw");
    fs::write(rig.host().path(&source), vec![0x5a; 256 << 20])?;
    let (vm, image) = (uuid::Uuid::from_u128(0x7101), format!("{IMAGES}/ended.qcow2"));
    let uuid = vm.to_string();
    let create = ["volume", "create", &image, "--from", &source, "--vm", &uuid];
    let mut client = begin(&rig, &create)?;
    let held = held_qemu_img(&mut rig)?;
    let id = rig.sealed.last_job()?["id"].to_string();
    expect_names(&rig.sealed.run(&["jobs", "abort", &id])?, &["aborted"])?;
    ensure!(!client.wait()?.success(), "the command took it for done");
    // What can't go on ends as well.
    wait_until(PATIENCE, "the envelope to be taken back", || {
        Ok(rig.envelopes(&vm)?.is_empty().then_some(()))
    })?;
    ensure!(is_gone(held)?);
    ensure!(!rig.host().path(&image).exists());
    rig.expect_no_temporaries()?;
    // Who resumes it at once is told to wait until it has ended, and not that it was stopped.
    let mut client = begin(&rig, &["jobs", "resume", &id, "--watch"])?;
    held_qemu_img(&mut rig)?;
    rig.sealed.run(&["jobs", "abort", &id])?;
    ensure!(!client.wait()?.success());
    wait_until(PATIENCE, "the job to be resumed", || {
        match begin(&rig, &["jobs", "resume", &id, "--watch"])?.wait()?.code() {
            Some(0) => Ok(Some(())),
            Some(9) => Ok(None),
            other => anyhow::bail!("it ended with {other:?}"),
        }
    })?;
    rig.expect_active(&vm, &["disk"])?;
    expect_names(&rig.sealed.run(&["jobs", "resume", &id])?, &["done"])?;

    // Aborted while it waits for a key: what it had is taken back at once, and kept aside.
    let (vm, image) = (uuid::Uuid::from_u128(0x7102), format!("{IMAGES}/waiting.qcow2"));
    let uuid = vm.to_string();
    let create = ["volume", "create", &image, "--from", &source, "--vm", &uuid];
    let mut client = begin(&rig, &create)?;
    held_qemu_img(&mut rig)?;
    client.kill()?;
    client.wait()?;
    rig.sealed.kill_and_restart()?;
    ensure!(rig.envelopes(&vm)?.len() == 1);
    wait_until(PATIENCE, "the job to wait", || {
        Ok(rig.sealed.last_job()?["waiting"].is_string().then_some(()))
    })?;
    // An image that a seal makes with that envelope is not what the job was to make.
    let spec = DomainSpec {
        uuid: vm,
        disk: PathBuf::from(&image),
        ..SealedHost::spec("waiting")
    };
    fs::File::create(rig.host().path(&image))?.set_len(1 << 20)?;
    rig.host().define(&spec)?;
    expect_names(
        &rig.sealed.refused(9, &["vm", "seal", "waiting"])?,
        &[&image, "works on", "virtseal jobs watch"],
    )?;
    rig.host().undefine("waiting")?;
    fs::remove_file(rig.host().path(&image))?;
    rig.sealed.run(&["jobs", "abort"])?;
    ensure!(rig.envelopes(&vm)?.is_empty(), "its envelope stays");
    ensure!(rig.host().path(STATE).join("forgotten").read_dir()?.count() > 0);
    Ok(())
}

/// What can't be made says so at the end, as the command and as the job, and leaves nothing.
#[test]
fn a_volume_that_fails_half_way_says_why_and_can_be_resumed() -> Result<()> {
    let rig = Rig::start()?;
    let source = format!("{IMAGES}/source.raw");
    fs::write(rig.host().path(&source), vec![0x5a; 8 << 20])?;
    let small = "/var/lib/libvirt/small";
    let mount = |options: &str| {
        let mount = format!("mkdir -p {small} && mount -t tmpfs -o {options} small {small}");
        rig.host().run(&["sh", "-c", &mount])?.succeeded()
    };
    mount("size=4m,mode=0700")?;
    let (vm, image) = (uuid::Uuid::from_u128(0x7201), format!("{small}/full.qcow2"));
    let uuid = vm.to_string();
    let create = ["volume", "create", &image, "--from", &source, "--vm", &uuid];
    let said = rig.sealed.refused(1, &create)?;
    expect_names(&said, &["No space left", &image])?;
    ensure!(rig.envelopes(&vm)?.is_empty() && !rig.host().path(&image).exists());
    let job = rig.sealed.last_job()?;
    ensure!(job["state"] == "failed", "{job}");
    expect_names(
        job["problem"]["message"].as_str().unwrap_or_default(),
        &["No space left"],
    )?;
    let id = job["id"].to_string();
    mount("remount,size=32m")?;
    rig.sealed.run(&["jobs", "resume", &id, "--watch"])?;
    rig.expect_active(&vm, &["disk"])
}

fn begin(rig: &Rig, arguments: &[&str]) -> Result<std::process::Child> {
    let mut command = rig.host().command(built_program("virtseal")?);
    Ok(command
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()?)
}

/// Stops the daemon's `qemu-img` as soon as there is one.
fn held_qemu_img(rig: &mut Rig) -> Result<nix::unistd::Pid> {
    let daemon = rig.sealed.daemon()?.outside_pid()?;
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        for task in fs::read_dir(format!("/proc/{daemon}/task"))? {
            let children = fs::read_to_string(task?.path().join("children")).unwrap_or_default();
            for child in children.split_whitespace() {
                let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
                if name.trim() == "qemu-img" {
                    let pid = nix::unistd::Pid::from_raw(child.parse()?);
                    nix::sys::signal::kill(pid, Signal::SIGSTOP)?;
                    return Ok(pid);
                }
            }
        }
    }
    anyhow::bail!("there is no qemu-img")
}

/// It may be a zombie until somebody has waited for it.
fn is_gone(pid: nix::unistd::Pid) -> Result<bool> {
    wait_until(PATIENCE, "qemu-img to die with its daemon", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        Ok((stat.is_empty() || stat.contains(") Z ")).then_some(true))
    })
}

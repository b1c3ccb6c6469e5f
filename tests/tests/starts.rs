//! Keys are in libvirt while a VM starts, and at no other time: whatever else starts, fails, dies or restarts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{DomainState, Host, SealedHost, edited, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
/// Waits at `start begin`, when libvirt has the keys and QEMU does not run yet.
const GATE: &str = "#!/bin/sh
[ \"$2\" = start ] && [ -e /run/gate ] || exit 0
: >/run/at-the-gate
while [ -e /run/gate ]; do sleep 0.05; done
";

#[test]
fn twenty_four_vms_start_at_once() -> Result<()> {
    let sealed = SealedHost::start_on(Host::builder().libvirtd_conf("max_workers = 20"))?;
    // The point is that nothing blocks; two slow cores must not make it a question of time.
    configure(&sealed, "hook.conf", "deadline = 120s\n")?;
    configure(&sealed, "virtseald.yaml", "hook_deadline: 120s\n")?;
    let names: Vec<_> = (1..=24).map(|number| format!("vm{number:02}")).collect();
    for name in &names {
        sealed.seal_new(name)?;
    }
    let mut sealed = sealed;
    sealed.daemon()?.signal(Signal::SIGHUP)?;
    let host = sealed.host();
    // libvirt makes its directory for swtpm at the first start, and fails when two starts make it at once.
    host.virsh(&["start", "--paused", &names[0]])?.succeeded()?;
    host.virsh(&["destroy", &names[0]])?.succeeded()?;
    std::thread::scope(|scope| {
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
    expect_disarmed(&sealed)
}

#[test]
fn secrets_are_gone_after_a_failed_start() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    let good = sealed.dumpxml("web01")?;

    let qemu_refuses = edited(
        &edited(
            &good,
            "<domain type=",
            "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0' type=",
        )?,
        "</domain>",
        "<qemu:commandline><qemu:arg value='-no-such-option'/></qemu:commandline></domain>",
    )?;
    sealed.host().define_xml(&qemu_refuses)?;
    let said = sealed.host().virsh(&["start", "--paused", "web01"])?.refused()?;
    ensure!(
        said.contains("no-such-option"),
        "failed for another reason: {said}"
    );
    expect_disarmed(&sealed)?;

    sealed.host().define_xml(&edited(
        &good,
        "</devices>",
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/nonexistent.raw'/>\
         <target dev='vdb' bus='virtio'/><readonly/></disk></devices>",
    )?)?;
    let said = sealed.host().virsh(&["start", "--paused", "web01"])?.refused()?;
    ensure!(
        said.contains("/nonexistent.raw"),
        "failed for another reason: {said}"
    );
    expect_disarmed(&sealed)?;

    sealed.host().undefine("web01")?;
    sealed.host().define_xml(&good)?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;
    expect_disarmed(&sealed)
}

#[test]
fn next_daemon_sweeps_what_a_killed_one_left() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    install_gate(&mut sealed)?;
    sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    let at_the_gate = start_and_kill_daemon(&mut sealed, "web01")?;
    ensure!(at_the_gate.len() == 3, "{at_the_gate:?}");
    ensure!(
        sealed.secrets()?.len() == 3,
        "nothing was left: {:?}",
        sealed.secrets()?
    );

    sealed.start_daemon()?;
    wait_until(PATIENCE, "the sweep", || {
        Ok(sealed.secrets()?.is_empty().then_some(()))
    })?;
    ensure!(sealed.host().state("web01")? == DomainState::Paused);

    // Without a daemon to sweep, a restart of libvirtd ends them: they are on no disk.
    sealed.unlock()?;
    start_and_kill_daemon(&mut sealed, "web02")?;
    ensure!(!sealed.secrets()?.is_empty());
    sealed.host_mut().restart_libvirtd()?;
    sealed.expect_no_secrets()?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    for name in ["web01", "web02"] {
        ensure!(sealed.host().state(name)? == DomainState::Paused);
        sealed.destroy(name)?;
        sealed.start_paused(name)?;
    }
    expect_disarmed_of_running(&sealed)
}

#[test]
fn virtseald_outlives_libvirtd() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.host_mut().restart_libvirtd()?;
    // At once: the first start after it must not meet the dead connection.
    sealed.start_paused("web01")?;
    sealed.host_mut().stop_libvirtd()?;
    expect_libvirt(&sealed, "is down", |libvirt| libvirt != "connected")?;
    let refused = sealed.virtseal(&["vm", "seal", "web01"])?;
    ensure!(refused.code() == Some(4), "{refused:?}");
    sealed.host_mut().restart_libvirtd()?;
    // It asks QEMU, so it waits for libvirtd to have found the VM again: one that is destroyed before that has not been running.
    let asked = sealed.host().virsh(&["domblkstat", "web01", "vda"])?;
    asked.succeeded()?;
    sealed.destroy("web01")?;
    sealed.start_paused("web01")?;
    expect_libvirt(&sealed, "is back", |libvirt| libvirt == "connected")
}

/// What `status` says of libvirt may be two seconds old.
fn expect_libvirt(sealed: &SealedHost, what: &str, is_so: impl Fn(&str) -> bool) -> Result<()> {
    wait_until(
        Duration::from_secs(10),
        &format!("status to say that libvirt {what}"),
        || {
            // It ends with 4 while libvirt is down, and answers all the same.
            let answer = sealed.virtseal(&["status", "--json"])?;
            let status: serde_json::Value = serde_json::from_str(&answer.stdout)?;
            Ok(status["libvirt"].as_str().is_some_and(&is_so).then_some(()))
        },
    )
}

/// Starts `vm` up to the gate, kills virtseald there, and lets the start go on. Returns the secrets at the gate.
fn start_and_kill_daemon(sealed: &mut SealedHost, vm: &str) -> Result<Vec<String>> {
    fs::write(sealed.host().path("/run/gate"), "")?;
    let _ = fs::remove_file(sealed.host().path("/run/at-the-gate"));
    let mut start = sealed
        .host()
        .command("virsh")
        .args(["--quiet", "--connect", "qemu:///system", "start", "--paused", vm])
        .spawn()?;
    wait_until(PATIENCE, "the gate", || {
        Ok(sealed.host().path("/run/at-the-gate").exists().then_some(()))
    })?;
    let secrets = sealed.secrets()?;
    sealed.stop_daemon(Signal::SIGKILL)?;
    fs::remove_file(sealed.host().path("/run/gate"))?;
    ensure!(start.wait()?.success(), "{vm} did not start");
    Ok(secrets)
}

fn install_gate(sealed: &mut SealedHost) -> Result<()> {
    let gate = sealed.host().path("/etc/libvirt/hooks/qemu.d/zz-gate");
    fs::write(&gate, GATE)?;
    fs::set_permissions(&gate, fs::Permissions::from_mode(0o755))?;
    sealed.host_mut().restart_libvirtd()
}

fn configure(sealed: &SealedHost, file: &str, text: &str) -> Result<()> {
    let path = sealed.host().path("/etc/virtseal").join(file);
    fs::write(&path, text).with_context(|| format!("{}", path.display()))
}

/// Neither libvirt nor virtseald has anything left of a start, and no tmpfs is left either.
fn expect_disarmed(sealed: &SealedHost) -> Result<()> {
    expect_disarmed_of_running(sealed)?;
    if sealed.host().virsh(&["list", "--name"])?.succeeded()?.is_empty() {
        let mounts = sealed.host().run(&["cat", "/proc/self/mountinfo"])?.succeeded()?;
        ensure!(!mounts.contains(" virtseal:"), "a tmpfs is left: {mounts}");
    }
    Ok(())
}

fn expect_disarmed_of_running(sealed: &SealedHost) -> Result<()> {
    sealed.expect_no_secrets()?;
    let status = sealed.json(&["status"])?;
    ensure!(status["armed"] == 0, "{status}");
    Ok(())
}

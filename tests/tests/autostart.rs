//! VMs that start with their host. A monolithic libvirtd autostarts before it answers anybody, so no key can reach it then:
//! virtseald starts sealed VMs, once in each boot.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{DomainSpec, DomainState, SealedHost, expect_names, wait_until};

/// libvirt autostarts once after a boot: this file says that it has.
const AUTOSTARTED: &str = "/run/libvirt/qemu/autostarted";
const PATIENCE: Duration = Duration::from_secs(60);
/// Several looks of virtseald.
const A_WHILE: Duration = Duration::from_secs(8);

/// Ends virtseald, and starts it on what the kernel calls another boot; every provider is locked then.
fn boot(sealed: &mut SealedHost) -> Result<()> {
    sealed.stop_daemon(Signal::SIGKILL)?;
    let script = "cat /proc/sys/kernel/random/uuid >/run/boot_id
        grep -q boot_id /proc/self/mounts || mount --bind /run/boot_id /proc/sys/kernel/random/boot_id";
    sealed.host().run(&["sh", "-c", script])?.succeeded()?;
    sealed.start_daemon()
}

fn expect_running(sealed: &SealedHost, vm: &str) -> Result<()> {
    sealed
        .host()
        .wait_for_state(vm, &DomainState::Running, PATIENCE)
        .with_context(|| format!("the log has: {}", log(sealed)))
}

fn expect_off_for_a_while(sealed: &SealedHost, vm: &str) -> Result<()> {
    std::thread::sleep(A_WHILE);
    ensure!(
        sealed.host().state(vm)? == DomainState::ShutOff,
        "{vm} was started"
    );
    Ok(())
}

fn log(sealed: &SealedHost) -> String {
    fs::read_to_string(sealed.host().path("/var/log/virtseald.out")).unwrap_or_default()
}

fn autostart(sealed: &SealedHost, vm: &str) -> Result<String> {
    let seen = sealed.json(&["vm", "status", vm])?;
    seen["vms"][0]["autostart"]
        .as_str()
        .map(str::to_owned)
        .context("no autostart")
}

fn libvirt_autostarts(sealed: &SealedHost, vm: &str) -> Result<bool> {
    let info = sealed.host().virsh(&["dominfo", vm])?.succeeded()?;
    Ok(info
        .lines()
        .any(|line| line.starts_with("Autostart:") && line.contains("enable")))
}

fn wait_for_warning(sealed: &SealedHost, vm: &str, parts: &[&str]) -> Result<()> {
    let what = format!("a warning with {parts:?}");
    wait_until(PATIENCE, &what, || {
        let said = sealed.virtseal(&["vm", "status", vm])?.stderr;
        Ok(parts.iter().all(|part| said.contains(part)).then_some(()))
    })
}

#[test]
fn a_vm_starts_once_in_a_boot_when_its_provider_is_unlocked_and_nobody_has_stopped_it() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.seal_new("other01")?;
    let said = sealed.run(&["vm", "autostart", "web01"])?;
    expect_names(&said, &["start web01 with this host from the next boot on"])?;
    ensure!(
        sealed
            .run(&["vm", "autostart", "web01"])?
            .contains("Nothing to do")
    );
    expect_off_for_a_while(&sealed, "web01")?;

    // Its provider comes up later than the host.
    boot(&mut sealed)?;
    let unlock = "virtseal provider unlock main";
    wait_for_warning(
        &sealed,
        "web01",
        &["waits for provider 'main', which is locked", unlock],
    )?;
    sealed.unlock()?;
    expect_running(&sealed, "web01")?;
    sealed.expect_no_secrets()?;
    ensure!(sealed.host().state("other01")? == DomainState::ShutOff);

    // Somebody has stopped it: it stays off, whatever becomes of virtseald and the provider.
    sealed.destroy("web01")?;
    sealed.lock()?;
    sealed.unlock()?;
    expect_off_for_a_while(&sealed, "web01")?;
    sealed.kill_and_restart()?;
    sealed.unlock()?;
    expect_off_for_a_while(&sealed, "web01")?;

    // In the next boot somebody is faster than virtseald, and stops it before virtseald sees that.
    boot(&mut sealed)?;
    sealed.host_mut().stop_libvirtd()?;
    sealed.unlock()?;
    sealed.host_mut().restart_libvirtd()?;
    let _ = sealed.host().virsh(&["start", "--paused", "web01"])?;
    sealed.destroy("web01")?;
    expect_off_for_a_while(&sealed, "web01")?;

    // libvirt comes later than virtseald and its provider.
    sealed.host_mut().stop_libvirtd()?;
    boot(&mut sealed)?;
    sealed.unlock()?;
    sealed.host_mut().restart_libvirtd()?;
    expect_running(&sealed, "web01")?;
    sealed.run(&["vm", "autostart", "web01", "--disable"])?;
    sealed.destroy("web01")?;
    boot(&mut sealed)?;
    sealed.unlock()?;
    expect_off_for_a_while(&sealed, "web01")
}

#[test]
fn a_start_that_is_refused_is_told_and_tried_again() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let disk = sealed.seal_new("late01")?.disk;
    sealed.run(&["vm", "autostart", "late01"])?;
    let disk = sealed.host().path(&disk);
    let elsewhere = disk.with_extension("away");
    fs::rename(&disk, &elsewhere)?;
    boot(&mut sealed)?;
    sealed.unlock()?;
    wait_for_warning(
        &sealed,
        "late01",
        &["late01 was to start with this host, and did not: late01 stays off"],
    )?;
    // Its storage comes late.
    fs::rename(&elsewhere, &disk)?;
    expect_running(&sealed, "late01")?;
    let said = sealed.virtseal(&["vm", "status", "late01"])?;
    ensure!(!said.stderr.contains("was to start"), "{}", said.stderr);
    let audit = sealed.run(&["audit", "show", "--json"])?;
    ensure!(
        audit
            .lines()
            .any(|line| line.contains(r#""autostart""#) && line.contains("late01")),
        "{audit}"
    );
    Ok(())
}

/// By then it counts as started, so that no stop is ever undone.
#[test]
fn a_start_that_fails_once_its_keys_are_armed_is_tried_again() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("late01")?;
    sealed.run(&["vm", "autostart", "late01"])?;
    // Something that QEMU needs comes late.
    let hook = sealed.host().path("/etc/libvirt/hooks/qemu.d/zz-late");
    fs::write(&hook, "#!/bin/sh\n[ \"$2\" != start ] || [ ! -e /run/late ]\n")?;
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))?;
    fs::write(sealed.host().path("/run/late"), "")?;
    sealed.host_mut().restart_libvirtd()?;
    boot(&mut sealed)?;
    sealed.unlock()?;
    wait_for_warning(
        &sealed,
        "late01",
        &["late01 was to start with this host, and did not: "],
    )?;
    sealed.expect_no_secrets()?;
    fs::remove_file(sealed.host().path("/run/late"))?;
    expect_running(&sealed, "late01")?;
    sealed.destroy("late01")?;
    expect_off_for_a_while(&sealed, "late01")
}

#[test]
fn who_starts_a_vm_is_told_and_changes_with_its_seal() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = SealedHost::spec("new01");
    sealed
        .host()
        .run(&[
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            &spec.disk.display().to_string(),
            "64M",
        ])?
        .succeeded()?;
    sealed.host().define(&spec)?;
    let plain = sealed.refused(2, &["vm", "autostart", "new01"])?;
    expect_names(&plain, &["not sealed", "virsh autostart new01"])?;
    sealed.host().virsh(&["autostart", "new01"])?.succeeded()?;
    sealed.run(&["vm", "seal", "new01"])?;
    ensure!(autostart(&sealed, "new01")? == "libvirt");
    wait_for_warning(
        &sealed,
        "new01",
        &["libvirt autostarts new01", "virtseal vm autostart new01"],
    )?;
    sealed.run(&["vm", "autostart", "new01"])?;
    ensure!(autostart(&sealed, "new01")? == "virtseald" && !libvirt_autostarts(&sealed, "new01")?);
    let status = sealed.virtseal(&["vm", "status", "new01"])?;
    expect_names(&status.stdout, &["virtseald starts with this host: new01"])?;
    ensure!(!status.stderr.contains("autostart"), "{}", status.stderr);

    // A plain VM is libvirt's to start.
    let said = sealed.run(&["vm", "unseal", "new01"])?;
    expect_names(&said, &["left it to libvirt to start it with this host"])?;
    ensure!(libvirt_autostarts(&sealed, "new01")?);
    sealed.run(&["vm", "seal", "new01"])?;
    sealed.run(&["vm", "autostart", "new01"])?;
    sealed.run(&["vm", "autostart", "new01", "--disable"])?;
    ensure!(autostart(&sealed, "new01")? == "no" && !libvirt_autostarts(&sealed, "new01")?);
    Ok(())
}

#[test]
fn libvirts_own_autostart_is_refused_with_advice_and_libvirtd_comes_up() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let mut spec = DomainSpec::minimal("auto01", Path::new("/var/lib/libvirt/images/auto01.qcow2"));
    spec.disk_format = "qcow2";
    sealed.seal_empty(&spec)?;
    sealed.host().virsh(&["autostart", "auto01"])?.succeeded()?;
    let warned = sealed.virtseal(&["vm", "seal", "auto01", "--dry-run"])?;
    ensure!(
        warned.stderr.contains("virtseal vm autostart auto01"),
        "{}",
        warned.stderr
    );

    sealed.host_mut().stop_libvirtd()?;
    fs::remove_file(sealed.host().path(AUTOSTARTED)).context("has libvirt moved its marker?")?;
    let began = Instant::now();
    sealed.host_mut().restart_libvirtd()?;
    ensure!(
        began.elapsed() < Duration::from_secs(20),
        "libvirtd took {:?}",
        began.elapsed()
    );

    sealed
        .host()
        .wait_for_state("auto01", &DomainState::ShutOff, Duration::from_secs(20))?;
    let log = fs::read_to_string(sealed.host().path("/var/log/libvirt/libvirtd.log"))?;
    let advice = "auto01 stays off: libvirt (qemu:///system) did not answer";
    ensure!(
        log.contains(advice) && log.contains("virtseal vm autostart auto01"),
        "no advice in libvirtd's log: {log}"
    );
    // Once libvirtd answers, the VM starts as ever.
    sealed
        .host()
        .virsh(&["start", "--paused", "auto01"])?
        .succeeded()?;
    sealed.expect_no_secrets()?;

    // With both, the host comes up as with virtseald alone.
    sealed.run(&["vm", "autostart", "auto01"])?;
    sealed.host().virsh(&["autostart", "auto01"])?.succeeded()?;
    sealed.destroy("auto01")?;
    sealed.host_mut().stop_libvirtd()?;
    fs::remove_file(sealed.host().path(AUTOSTARTED)).context("has libvirt moved its marker?")?;
    boot(&mut sealed)?;
    sealed.unlock()?;
    sealed.host_mut().restart_libvirtd()?;
    expect_running(&sealed, "auto01")
}

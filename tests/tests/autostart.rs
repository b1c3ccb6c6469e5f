//! A monolithic libvirtd autostarts VMs before it answers anybody, so no key can reach it then.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{DomainSpec, DomainState, SealedHost};

/// libvirt autostarts once after a boot: this file says that it has.
const AUTOSTARTED: &str = "/run/libvirt/qemu/autostarted";

#[test]
fn libvirts_own_autostart_is_refused_with_advice_and_libvirtd_comes_up() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let mut spec = DomainSpec::minimal("auto01", Path::new("/var/lib/libvirt/images/auto01.qcow2"));
    spec.disk_format = "qcow2";
    sealed.seal_empty(&spec)?;
    sealed.host().virsh(&["autostart", "auto01"])?.succeeded()?;
    let warned = sealed.virtseal(&["vm", "seal", "auto01", "--dry-run"])?;
    ensure!(
        warned.stderr.contains("virsh autostart --disable auto01"),
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
        log.contains(advice) && log.contains("virsh autostart --disable auto01"),
        "no advice in libvirtd's log: {log}"
    );
    // Once libvirtd answers, the VM starts as ever.
    sealed
        .host()
        .virsh(&["start", "--paused", "auto01"])?
        .succeeded()?;
    sealed.expect_no_secrets()
}

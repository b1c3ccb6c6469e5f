//! What leads plaintext of a sealed VM past its objects while it runs, where no hook is asked.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use virtseal_e2e::{SealedHost, expect_names};

const TO_ITSELF: &str = "qemu+unix:///system?socket=/run/libvirt/libvirt-sock";

#[test]
fn a_vm_that_must_not_leave_without_tls_starts_only_where_libvirt_sees_to_that() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    sealed.configure("policy:\n  vms:\n    web01: {migration_tls: yes}\n")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    let why = [
        "web01",
        "demands TLS",
        "migrate_tls_force = 1",
        "migration_tls: no",
    ];
    expect_names(&sealed.refused_start("web01")?, &why)?;
    let status = sealed.json(&["vm", "status", "web01"])?;
    expect_names(&status[0]["warnings"].to_string(), &why)?;
    // Nothing is demanded for the other one.
    sealed.expect_start("web02")?;

    let conf = sealed.host().path("/etc/libvirt/qemu.conf");
    let text = std::fs::read_to_string(&conf)?;
    std::fs::write(&conf, format!("{text}\nmigrate_tls_force = 1\n"))?;
    sealed.host_mut().restart_libvirtd()?;
    sealed.start_paused("web01")?;
    // libvirt does what the policy takes for granted.
    let refused = sealed
        .host()
        .virsh(&["migrate", "--live", "--unsafe", "web01", TO_ITSELF])?
        .refused()?;
    ensure!(refused.contains("VIR_MIGRATE_TLS"), "{refused}");
    Ok(())
}

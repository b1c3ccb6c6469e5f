//! The main job: a sealed UEFI guest starts through plain virsh, keeps what it writes, and what it writes is nowhere
//! on the host in plaintext.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{
    BOOT_DEADLINE, DomainSpec, DomainState, Guest, SealedHost, expect_names, guest_image,
};

const STOP_DEADLINE: Duration = Duration::from_secs(60);
const DISK_MARKER: &str = "disk-marker-71e4";
const TPM_MARKER: &str = "tpm-marker-0c9d";
const VARIABLE_MARKER: &str = "variable-marker-b58a";

/// One guest all along: each of its three boots costs half a minute under emulation.
#[test]
fn sealed_guest_boots_and_persists() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let mut spec = DomainSpec::bootable("web01", Path::new("/var/lib/libvirt/images/web01.qcow2"));
    spec.disk_format = "qcow2";
    sealed.seal_from(&spec, &guest_image()?)?;

    sealed.host().virsh(&["start", "web01"])?.succeeded()?;
    sealed.expect_no_secrets()?;
    let mut guest = Guest::attach(sealed.host(), "web01")?;
    guest.wait_for_boot(BOOT_DEADLINE)?;
    guest.write_disk(DISK_MARKER)?;
    guest.write_tpm(TPM_MARKER)?;
    guest.write_variable(VARIABLE_MARKER)?;
    expect_markers(&mut guest)?;

    sealed.host_mut().restart_libvirtd()?;
    expect_markers(&mut guest).context("after a restart of libvirtd")?;

    sealed.stop_daemon(Signal::SIGTERM)?;
    expect_markers(&mut guest).context("without virtseald")?;
    sealed.start_daemon()?;
    ensure!(sealed.json(&["provider", "show", "main"])?["provider"]["state"] == "locked");
    expect_markers(&mut guest).context("after a restart of virtseald")?;

    sealed.host().virsh(&["managedsave", "web01"])?.succeeded()?;
    // A refused restore keeps the saved state.
    expect_names(
        &sealed.refused_start("web01")?,
        &["web01", "is locked", "virtseal provider unlock main"],
    )?;
    sealed.unlock()?;
    sealed.host().virsh(&["start", "web01"])?.succeeded()?;
    sealed.expect_no_secrets()?;
    let mut guest = Guest::attach(sealed.host(), "web01")?;
    guest.ping()?;
    expect_markers(&mut guest).context("after managedsave and restore")?;

    sealed.host().virsh(&["reset", "web01"])?.succeeded()?;
    guest.wait_for_boot(BOOT_DEADLINE)?;
    expect_markers(&mut guest).context("after a reset")?;

    guest.power_off()?;
    let host = sealed.host();
    host.wait_for_state("web01", &DomainState::ShutOff, STOP_DEADLINE)?;
    for file in [&spec.disk, &spec.tpm_state(), &spec.nvram()] {
        let bytes = fs::read(host.path(file)).with_context(|| format!("{}", file.display()))?;
        for marker in [DISK_MARKER, TPM_MARKER, VARIABLE_MARKER] {
            ensure!(
                !contains(&bytes, marker),
                "{marker} is in plaintext in {}",
                file.display()
            );
        }
    }

    host.virsh(&["start", "web01"])?.succeeded()?;
    sealed.expect_no_secrets()?;
    let mut guest = Guest::attach(host, "web01")?;
    guest.wait_for_boot(BOOT_DEADLINE)?;
    expect_markers(&mut guest).context("after a stop and a start")
}

fn expect_markers(guest: &mut Guest) -> Result<()> {
    for (found, written) in [
        (guest.read_disk()?, DISK_MARKER),
        (guest.read_tpm()?, TPM_MARKER),
        (guest.read_variable()?, VARIABLE_MARKER),
    ] {
        ensure!(
            found == written,
            "the guest reads {found:?}, it wrote {written:?}"
        );
    }
    Ok(())
}

fn contains(haystack: &[u8], needle: &str) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle.as_bytes())
}

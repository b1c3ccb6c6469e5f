//! The stage itself: a plain UEFI guest with a vTPM keeps what it wrote across a stop. Sealed guests are held against this.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use virtseal_testkit::{BOOT_DEADLINE, DomainSpec, DomainState, Guest, Host};

const STOP_DEADLINE: Duration = Duration::from_secs(30);
const DISK_MARKER: &str = "disk-marker-5f1c";
const TPM_MARKER: &str = "tpm-marker-9a27";
const VARIABLE_MARKER: &str = "variable-marker-c3d0";

#[test]
fn plain_guest_boots_and_persists() -> Result<()> {
    let host = Host::start()?;
    println!("{}", host.versions()?);
    let vm = DomainSpec::bootable("plain01", &host.guest_disk("plain01")?);
    host.define(&vm)?;

    let mut guest = boot(&host, &vm.name)?;
    guest.write_disk(DISK_MARKER)?;
    guest.write_tpm(TPM_MARKER)?;
    guest.write_variable(VARIABLE_MARKER)?;
    stop(&host, &vm.name, guest)?;

    // A plain VM shows all three on the host: the search that must fail on a sealed VM can succeed.
    for (file, marker) in [
        (&vm.disk, DISK_MARKER),
        (&vm.tpm_state(), TPM_MARKER),
        (&vm.nvram(), VARIABLE_MARKER),
    ] {
        ensure!(
            contains(&fs::read(host.path(file))?, marker),
            "{marker} is not in {}",
            file.display()
        );
    }

    let mut guest = boot(&host, &vm.name)?;
    ensure!(guest.read_disk()? == DISK_MARKER);
    ensure!(guest.read_tpm()? == TPM_MARKER);
    ensure!(guest.read_variable()? == VARIABLE_MARKER);
    stop(&host, &vm.name, guest)
}

#[test]
fn plain_guest_survives_libvirtd_restart_managedsave_and_reset() -> Result<()> {
    let mut host = Host::start()?;
    let vm = DomainSpec::bootable("plain02", &host.guest_disk("plain02")?);
    host.define(&vm)?;
    let mut guest = boot(&host, &vm.name)?;
    guest.write_tpm(TPM_MARKER)?;

    host.restart_libvirtd()?;
    guest.ping()?;

    host.virsh(&["managedsave", &vm.name])?.succeeded()?;
    host.virsh(&["start", &vm.name])?.succeeded()?;
    let mut guest = Guest::attach(&host, &vm.name)?;
    guest.ping()?;

    host.virsh(&["reset", &vm.name])?.succeeded()?;
    guest.wait_for_boot(BOOT_DEADLINE)?;
    ensure!(guest.read_tpm()? == TPM_MARKER);
    guest.reboot(BOOT_DEADLINE)?;
    stop(&host, &vm.name, guest)
}

fn boot(host: &Host, name: &str) -> Result<Guest> {
    let start = Instant::now();
    host.virsh(&["start", name])?.succeeded()?;
    println!("virsh start: {:?}", start.elapsed());
    let mut guest = Guest::attach(host, name)?;
    guest.wait_for_boot(BOOT_DEADLINE)?;
    println!("guest is up: {:?}", start.elapsed());
    Ok(guest)
}

fn stop(host: &Host, name: &str, mut guest: Guest) -> Result<()> {
    guest.power_off()?;
    host.wait_for_state(name, &DomainState::ShutOff, STOP_DEADLINE)
}

fn contains(haystack: &[u8], needle: &str) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle.as_bytes())
}

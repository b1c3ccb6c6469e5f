//! The main job: a sealed UEFI guest starts through virsh, and is refused while its provider is locked.

use std::path::Path;

use anyhow::{Result, ensure};
use virtseal_e2e::{BOOT_DEADLINE, DomainSpec, Guest, SealedHost, guest_image};

#[test]
fn sealed_guest_boots_and_persists() -> Result<()> {
    let sealed = SealedHost::start()?;
    let mut spec = DomainSpec::bootable("web01", Path::new("/var/lib/libvirt/images/web01.qcow2"));
    spec.disk_format = "qcow2";
    sealed.seal_from(&spec, &guest_image()?)?;
    let started = sealed.host().virsh(&["start", "web01"])?;
    println!("{}", sealed.virtseal(&["status"])?.succeeded()?);
    println!("{}", sealed.host().virsh(&["dumpxml", "web01"])?.succeeded()?);
    started.succeeded()?;
    sealed.expect_no_secrets()?;
    let mut guest = Guest::attach(sealed.host(), "web01")?;
    guest.wait_for_boot(BOOT_DEADLINE)?;
    guest.write_disk("hello")?;
    ensure!(guest.read_disk()? == "hello");
    Ok(())
}

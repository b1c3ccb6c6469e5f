//! What leads plaintext of a sealed VM past its objects while it runs, where no hook is asked.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::{DomainSpec, SealedHost, Way, expect_names, wait_until};

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
    expect_names(&status["vms"][0]["warnings"].to_string(), &why)?;
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

/// Much less than the daemon takes for a round without any event.
const BY_EVENT: Duration = Duration::from_secs(12);

const IMAGES: &str = "/var/lib/libvirt/images";

/// What was found of a VM while it ran, as `virtseal status` lists it, with what leads out; not what its XML has anyway.
fn warnings(sealed: &SealedHost, vm: &str) -> Result<Vec<String>> {
    let status = sealed.json(&["status"])?;
    let vms = status["vms"].as_array().context("no VMs")?;
    let found = vms.iter().find(|found| found["name"] == vm);
    let warnings = found.and_then(|found| found["warnings"].as_array());
    let texts = warnings.into_iter().flatten().filter_map(|found| {
        let what = found["what"]
            .as_str()
            .filter(|what| what.contains("seen first at"))?;
        Some(format!(
            "{what}. Next: {}",
            found["next"].as_str().unwrap_or_default()
        ))
    });
    Ok(texts.collect())
}

/// Waits until a warning has all of `parts`.
fn wait_for(sealed: &SealedHost, vm: &str, parts: &[&str]) -> Result<()> {
    let what = format!("{vm} to be warned of {parts:?}");
    let found = wait_until(BY_EVENT, &what, || {
        let warnings = warnings(sealed, vm)?;
        let has_all = |text: &String| parts.iter().all(|part| text.contains(part));
        Ok(warnings.iter().any(has_all).then_some(()))
    });
    found.with_context(|| format!("{:?}", warnings(sealed, vm)))
}

fn write(sealed: &SealedHost, name: &str, text: &str) -> Result<String> {
    let path = format!("/run/{name}");
    fs::write(sealed.host().path(&path), text)?;
    Ok(path)
}

fn virsh(sealed: &SealedHost, arguments: &[&str]) -> Result<String> {
    sealed.host().virsh(arguments)?.succeeded()
}

fn attach_raw(sealed: &SealedHost, vm: &str, image: &str) -> Result<()> {
    let raw = ["--driver", "qemu", "--subdriver", "raw", "--live"];
    virsh(sealed, &[&["attach-disk", vm, image, "vdb"], &raw[..]].concat()).map(drop)
}

#[test]
fn a_sealed_image_that_is_attached_as_raw_is_found_in_any_vm() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    let victim = sealed.seal_new("victim01")?;
    let empty = sealed.host().empty_disk("plain01", 1 << 20)?;
    sealed.host().define(&DomainSpec::minimal("plain01", &empty))?;
    for vm in ["web01", "web02"] {
        sealed.start_paused(vm)?;
    }
    virsh(&sealed, &["start", "--paused", "plain01"])?;
    ensure!(
        warnings(&sealed, "plain01")?.is_empty(),
        "{:?}",
        warnings(&sealed, "plain01")?
    );
    ensure!(
        warnings(&sealed, "web01")?.is_empty(),
        "{:?}",
        warnings(&sealed, "web01")?
    );

    // Another VM's, and one of its own, that libvirt would open with its key if only the XML said so.
    let own = format!("{IMAGES}/own.qcow2");
    sealed.run(&["volume", "create", &own, "--size", "1M", "--vm", "web01"])?;
    let image = victim.disk.to_str().context("a UTF-8 path")?;
    for (vm, image, owner) in [("plain01", image, "victim01"), ("web01", &own, "web01")] {
        attach_raw(&sealed, vm, image)?;
        let parts = ["disk vdb", image, owner, "as raw", "virtseal volume info"];
        wait_for(&sealed, vm, &parts)?;
    }
    // A plain disk leads the guest's data out of a sealed VM; those of a plain one are its own affair.
    let other = sealed.host().empty_disk("other", 1 << 20)?;
    let other = other.to_str().context("a UTF-8 path")?;
    attach_raw(&sealed, "web02", other)?;
    wait_for(
        &sealed,
        "web02",
        &["disk vdb", other, "in plaintext", "Next: detach it"],
    )?;
    let of_plain = warnings(&sealed, "plain01")?;
    ensure!(of_plain.len() == 1, "{of_plain:?}");
    // What ended stays: in the status as long as the daemon runs, and in the audit log.
    for vm in ["plain01", "web01"] {
        sealed.destroy(vm)?;
        wait_for(&sealed, vm, &["disk vdb", "as raw"])?;
        expect_names(
            &sealed.json(&["vm", "status", vm])?["vms"][0]["warnings"].to_string(),
            &["as raw"],
        )?;
    }
    let log = sealed.run(&["audit", "show"])?;
    ensure!(log.matches("as raw").count() == 2, "{log}");
    Ok(())
}

/// A secret of an admin's own, and an empty qcow2 image that it encrypts.
fn encrypted_target(sealed: &SealedHost, name: &str, secret: &str) -> Result<String> {
    let xml = format!(
        "<secret ephemeral='yes' private='yes'><uuid>{secret}</uuid><usage type='volume'><volume>{name}</volume></usage></secret>"
    );
    virsh(sealed, &["secret-define", &write(sealed, "secret.xml", &xml)?])?;
    let passphrase = write(sealed, "backup-passphrase", "an admin's own")?;
    virsh(
        sealed,
        &["secret-set-value", secret, "--file", &passphrase, "--plain"],
    )?;
    let path = format!("{IMAGES}/{name}");
    let object = format!("secret,id=s,file={passphrase}");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    sealed
        .host()
        .run(&[
            "qemu-img", "create", "-q", "--object", &object, "-f", "qcow2", "-o", options, &path, "64M",
        ])?
        .succeeded()?;
    Ok(path)
}

fn encryption(secret: &str) -> String {
    format!(
        "<encryption format='luks' engine='qemu'><secret type='passphrase' uuid='{secret}'/></encryption>"
    )
}

fn backup(sealed: &SealedHost, flags: &[&str], xml: &str) -> Result<()> {
    let xml = write(
        sealed,
        "backup.xml",
        &format!("<domainbackup {xml}</domainbackup>"),
    )?;
    virsh(sealed, &[&["backup-begin", "web01", &xml], flags].concat()).map(drop)
}

fn wait_for_the_job(sealed: &SealedHost) -> Result<()> {
    wait_until(Duration::from_secs(30), "the backup to end", || {
        Ok(virsh(sealed, &["domjobinfo", "web01"])?
            .contains("None")
            .then_some(()))
    })
}

/// Does what is found nothing wrong with: again, with a virtseald that has forgotten, where it was over before anybody saw
/// where to, as with a disk as small and empty as this on a busy machine.
fn seen_while_it_lasts(sealed: &mut SealedHost, run: impl Fn(&SealedHost) -> Result<()>) -> Result<()> {
    for _ in 0..5 {
        run(sealed)?;
        std::thread::sleep(Duration::from_secs(2));
        let found = warnings(sealed, "web01")?;
        if found.is_empty() {
            return Ok(());
        }
        let unseen = |text: &String| text.contains("had ended before it was seen");
        ensure!(found.iter().all(unseen), "{found:?}");
        sealed.kill_and_restart()?;
        sealed.unlock()?;
    }
    anyhow::bail!("it was never seen while it lasted")
}

#[test]
fn copies_and_backups_to_plain_files_are_found_and_to_encrypted_ones_are_not() -> Result<()> {
    const SECRETS: [&str; 2] = [
        "6f0d9b5e-2f0e-4a5e-9a55-000000000001",
        "6f0d9b5e-2f0e-4a5e-9a55-000000000002",
    ];
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;

    // To encrypted files: nothing is found.
    let target = encrypted_target(&sealed, "sealed-backup.qcow2", SECRETS[0])?;
    let disk = format!(
        "<disk name='vda' backup='yes' type='file'><driver type='qcow2'/><target file='{target}'>{}</target></disk>",
        encryption(SECRETS[0])
    );
    seen_while_it_lasts(&mut sealed, |sealed| {
        backup(
            sealed,
            &["--reuse-external"],
            &format!("mode='push'><disks>{disk}</disks>"),
        )?;
        wait_for_the_job(sealed)
    })?;
    let target = encrypted_target(&sealed, "sealed-copy.qcow2", SECRETS[1])?;
    let copy = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{target}'>{}</source><target dev='vda'/></disk>",
        encryption(SECRETS[1])
    );
    let copy = write(&sealed, "copy.xml", &copy)?;
    seen_while_it_lasts(&mut sealed, |sealed| {
        let blockcopy = [
            "blockcopy",
            "web01",
            "vda",
            "--xml",
            &copy,
            "--reuse-external",
            "--transient-job",
            "--wait",
            "--finish",
        ];
        virsh(sealed, &blockcopy).map(drop)
    })?;

    // To plain ones. The job is over at once, with a disk as small and empty as this.
    virsh(
        &sealed,
        &[
            "blockcopy",
            "web01",
            "vda",
            "--dest",
            &format!("{IMAGES}/copy.raw"),
            "--format",
            "raw",
            "--transient-job",
            "--wait",
            "--finish",
        ],
    )?;
    wait_for(&sealed, "web01", &["disk vda", "copied"])?;
    let disk = format!(
        "<disk name='vda' backup='yes' type='file'><driver type='qcow2'/><target file='{IMAGES}/backup.qcow2'/></disk>"
    );
    backup(&sealed, &[], &format!("mode='push'><disks>{disk}</disks>"))?;
    wait_for_the_job(&sealed)?;
    wait_for(&sealed, "web01", &["back", "plaintext"])?;
    // These go on until they are ended.
    let copy = format!("{IMAGES}/mirror.raw");
    let blockcopy = [
        "blockcopy",
        "web01",
        "vda",
        "--dest",
        &copy,
        "--format",
        "raw",
        "--transient-job",
    ];
    virsh(&sealed, &blockcopy)?;
    wait_for(
        &sealed,
        "web01",
        &["mirror.raw", "virsh blockjob --abort web01 vda"],
    )?;
    let told = warnings(&sealed, "web01")?.join("\n");
    Way::that_begins("virsh blockjob --abort", &told)?
        .after("remove the copy")
        .take(&sealed)?;
    wait_for_the_job(&sealed)?;
    backup(
        &sealed,
        &[],
        "mode='pull'><server transport='unix' socket='/run/backup.sock'/><disks><disk name='vda' backup='yes' type='file'><scratch file='/var/lib/libvirt/images/scratch.qcow2'/></disk></disks>",
    )?;
    let parts = [
        "disk vda",
        "scratch.qcow2",
        "plaintext",
        "Next: virsh domjobabort web01",
    ];
    wait_for(&sealed, "web01", &parts)?;
    let told = warnings(&sealed, "web01")?.join("\n");
    Way::that_begins("virsh domjobabort", &told)?.take(&sealed)?;
    wait_for_the_job(&sealed)?;
    wait_for(&sealed, "web01", &["scratch.qcow2"])?;
    let dump = ["dump", "--memory-only", "web01", "/run/memory.dump"];
    virsh(&sealed, &dump)?;
    wait_for(&sealed, "web01", &["memory", "virsh dump"])?;

    // A plain overlay has no event: who asks sees it; to commit it is no copy to a plain file.
    virsh(
        &sealed,
        &[
            "snapshot-create-as",
            "web01",
            "s1",
            "--disk-only",
            "--no-metadata",
        ],
    )?;
    let shown = sealed.json(&["vm", "status", "web01"])?["vms"][0]["warnings"].to_string();
    expect_names(&shown, &["disk vda", "web01.s1"])?;
    let before = warnings(&sealed, "web01")?.len();
    virsh(
        &sealed,
        &["blockcommit", "web01", "vda", "--active", "--wait", "--pivot"],
    )?;
    std::thread::sleep(Duration::from_secs(1));
    let after = warnings(&sealed, "web01")?;
    ensure!(after.len() == before, "{after:?}");
    virsh(&sealed, &["save", "web01", "/run/memory.save"])?;
    wait_for(&sealed, "web01", &["memory", "virsh save"])
}

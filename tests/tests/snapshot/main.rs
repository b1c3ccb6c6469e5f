//! `virsh snapshot-create-as --disk-only` lays a plain file over a sealed disk. What is printed then leads to a VM that runs, with all
//! that its guest has written, or to one as it was at the snapshot.

mod pivots;

use std::fs;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::{IMAGES, Rig, words};
use virtseal_testkit::{DomainSpec, SealedHost, Tracer, edited, expect_names, wait_until};

const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);
const MIB: u64 = 1 << 20;

fn virsh(rig: &Rig, arguments: &[&str]) -> Result<String> {
    rig.host().virsh(arguments)?.succeeded()
}

/// Writes to the disk of a VM that is paused, as its guest would.
fn write(rig: &Rig, vm: &str, byte: u8, offset: u64, length: u64) -> Result<()> {
    let device = "/machine/peripheral/virtio-disk0/virtio-backend";
    let command = format!("qemu-io -d {device} \"write -P {byte} {offset} {length}\"");
    let said = virsh(rig, &["qemu-monitor-command", vm, "--hmp", &command])?;
    ensure!(said.trim().is_empty() || said.contains("wrote"), "{said}");
    // On the disk, whatever ends QEMU.
    virsh(
        rig,
        &[
            "qemu-monitor-command",
            vm,
            "--hmp",
            &format!("qemu-io -d {device} flush"),
        ],
    )
    .map(drop)
}

/// Lays a file over the disk of a VM that runs.
fn overlay(rig: &Rig, vm: &str, name: &str, options: &[&str]) -> Result<PathBuf> {
    virsh(
        rig,
        &[&["snapshot-create-as", vm, name, "--disk-only"], options].concat(),
    )?;
    Ok(PathBuf::from(format!("{IMAGES}/{vm}.{name}")))
}

/// A sealed VM with two files over its disk: its first two MiB are 0x42, and were 0x41 before.
fn overlaid(rig: &Rig, vm: &str) -> Result<(DomainSpec, [PathBuf; 2])> {
    let spec = rig.sealed.seal_new(vm)?;
    let overlays = lay_over(rig, &spec)?;
    Ok((spec, overlays))
}

fn lay_over(rig: &Rig, spec: &DomainSpec) -> Result<[PathBuf; 2]> {
    let vm = &spec.name;
    rig.sealed.start_paused(vm)?;
    write(rig, vm, 0x41, 0, 2 * MIB)?;
    let first = overlay(rig, vm, "s1", &[])?;
    write(rig, vm, 0x42, 0, MIB)?;
    let second = overlay(rig, vm, "s2", &[])?;
    write(rig, vm, 0x42, MIB, MIB)?;
    Ok([second, first])
}

fn expect_data(rig: &Rig, spec: &DomainSpec, byte: u8) -> Result<()> {
    let envelopes = rig.envelopes(&spec.uuid)?;
    let is_it = |location: &str| std::path::Path::new(location) == spec.disk;
    let disk = envelopes
        .iter()
        .find(|envelope| is_it(&envelope.location))
        .context("no disk")?;
    rig.root.open_object(rig.host(), disk)?;
    rig.root.expect_pattern(rig.host(), disk, byte, 2 * MIB)
}

/// It starts with its sealed disk alone, and nothing of the snapshots is left.
fn expect_free(rig: &Rig, spec: &DomainSpec, overlays: &[PathBuf]) -> Result<()> {
    let xml = rig.sealed.dumpxml(&spec.name)?;
    ensure!(
        xml.contains(&spec.disk.display().to_string()) && !xml.contains("backingStore"),
        "{xml}"
    );
    for overlay in overlays {
        ensure!(!xml.contains(&overlay.display().to_string()), "{xml}");
        ensure!(
            !rig.host().path(overlay).exists(),
            "{} is left",
            overlay.display()
        );
    }
    let snapshots = virsh(rig, &["snapshot-list", "--name", &spec.name])?;
    ensure!(snapshots.trim().is_empty(), "{snapshots}");
    rig.sealed.expect_start(&spec.name)
}

#[test]
fn an_overlay_is_merged_while_the_vm_runs() -> Result<()> {
    let rig = Rig::start()?;
    let (spec, overlays) = overlaid(&rig, "web01")?;
    let would = rig
        .sealed
        .run(&["vm", "snapshot", "commit", "--dry-run", "web01"])?;
    for overlay in &overlays {
        expect_names(
            &would,
            &[
                "would merge",
                "would remove",
                &overlay.display().to_string(),
                "s1",
                "s2",
            ],
        )?;
    }
    // A VM beside it is none of its business.
    rig.sealed.seal_new("db01")?;
    let refused = rig
        .sealed
        .refused(9, &["vm", "snapshot", "delete", "--yes-delete=web01", "web01"])?;
    expect_names(&refused, &["web01 is running", "virsh shutdown web01"])?;
    let done = rig.sealed.virtseal(&["vm", "snapshot", "commit", "web01"])?;
    ensure!(done.status.success(), "{done:?}");
    expect_names(&done.stderr, &["in plaintext"])?;
    rig.sealed.expect_no_secrets()?;
    let live = virsh(&rig, &["dumpxml", "web01"])?;
    ensure!(
        live.contains(&spec.disk.display().to_string()) && !live.contains("backingStore type"),
        "{live}"
    );
    // It goes on with the sealed disk.
    write(&rig, "web01", 0x42, 0, 2 * MIB)?;
    rig.sealed.destroy("web01")?;
    expect_free(&rig, &spec, &overlays)?;
    expect_data(&rig, &spec, 0x42)?;
    // What is reached is no failure.
    let again = rig.sealed.json(&["vm", "snapshot", "commit", "web01"])?;
    ensure!(again["changed"] == false, "{again}");
    Ok(())
}

#[test]
fn an_overlay_of_a_vm_that_is_off_is_merged_as_the_refusals_say() -> Result<()> {
    let rig = Rig::start()?;
    let (spec, overlays) = overlaid(&rig, "web01")?;
    rig.sealed.destroy("web01")?;
    let top = overlays[0].display().to_string();
    let told = [
        "web01 stays off",
        &top,
        "virtseal vm snapshot commit web01",
        "virtseal vm snapshot delete web01",
    ];
    expect_names(&rig.sealed.refused_start("web01")?, &told)?;
    // libvirt starts a VM that is off for this, and that is a start like any other.
    expect_names(
        &rig.host().virsh(&["snapshot-delete", "web01", "s2"])?.refused()?,
        &told,
    )?;
    rig.sealed.lock()?;
    expect_names(
        &rig.sealed.refused(3, &["vm", "snapshot", "commit", "web01"])?,
        &["web01", "is locked"],
    )?;
    rig.sealed.unlock()?;
    // Who has an image open keeps it.
    let image = format!(
        "json:{{\"driver\":\"qcow2\",\"backing\":null,\"file\":{{\"driver\":\"file\",\"filename\":\"{top}\"}}}}"
    );
    let reading = [
        "stdbuf",
        "-oL",
        "qemu-io",
        "-r",
        "-c",
        "read 0 512",
        "-c",
        "sleep 600000",
        &image,
    ];
    let mut reader = rig.host().spawn("reader", &reading)?;
    wait_until(PATIENCE, "the image to be open", || {
        Ok(reader.output().contains("bytes at offset").then_some(()))
    })?;
    let refused = rig.sealed.refused(9, &["vm", "snapshot", "commit", "web01"])?;
    expect_names(&refused, &[&top, "is open in another process"])?;
    reader.signal(Signal::SIGKILL)?;
    reader.wait(PATIENCE)?;

    rig.sealed.run(&["vm", "snapshot", "commit", "web01"])?;
    expect_free(&rig, &spec, &overlays)?;
    expect_data(&rig, &spec, 0x42)?;
    let log = rig.sealed.run(&["audit", "show"])?;
    expect_names(&log, &["snapshot-commit", "job-start"])
}

#[test]
fn an_overlay_on_a_sealed_image_that_has_one_below_is_merged() -> Result<()> {
    let rig = Rig::start()?;
    let golden = format!("{IMAGES}/golden.raw");
    fs::write(rig.host().path(&golden), vec![0x42; 4 << 20])?;
    let spec = SealedHost::spec("web01");
    let (disk, vm) = (spec.disk.display().to_string(), spec.uuid.to_string());
    let backing = [
        "--backing",
        &golden,
        "--backing-format",
        "raw",
        "--cluster-size",
        "1M",
    ];
    rig.sealed
        .run(&[&["volume", "create", &disk, "--vm", &vm], &backing[..]].concat())?;
    rig.host().define(&spec)?;
    rig.sealed.run(&["vm", "seal", "web01"])?;
    rig.sealed.start_paused("web01")?;
    let overlays = [overlay(&rig, "web01", "s1", &["--no-metadata"])?];
    // A part of a cluster of the sealed image: the rest of it comes from below.
    write(&rig, "web01", 0x41, MIB + 65536, 65536)?;
    write(&rig, "web01", 0x42, MIB + 65536, 65536)?;
    rig.sealed.destroy("web01")?;
    rig.sealed.run(&["vm", "snapshot", "commit", "web01"])?;
    let xml = rig.sealed.dumpxml("web01")?;
    ensure!(!xml.contains("web01.s1"), "{xml}");
    ensure!(!rig.host().path(&overlays[0]).exists());
    expect_data(&rig, &spec, 0x42)?;
    ensure!(
        fs::read(rig.host().path(&golden))? == vec![0x42; 4 << 20],
        "what is below was written to"
    );
    rig.sealed.expect_start("web01")
}

/// Who writes what is below a disk puts another VM's sealed image there: root's merge copies none of it up.
#[test]
fn what_is_below_a_disk_is_opened_for_the_vm_whose_it_is_alone() -> Result<()> {
    let rig = Rig::start()?;
    let victim = rig.sealed.seal_new("web02")?;
    let golden = format!("{IMAGES}/golden.qcow2");
    let spec = SealedHost::spec("web01");
    let (disk, vm) = (spec.disk.display().to_string(), spec.uuid.to_string());
    rig.host()
        .run(&["qemu-img", "create", "-q", "-f", "qcow2", &golden, "4M"])?
        .succeeded()?;
    let backing = ["--backing", &golden, "--backing-format", "qcow2"];
    rig.sealed
        .run(&[&["volume", "create", &disk, "--vm", &vm], &backing[..]].concat())?;
    rig.host().define(&spec)?;
    rig.sealed.run(&["vm", "seal", "web01"])?;
    rig.sealed.start_paused("web01")?;
    let left = overlay(&rig, "web01", "s1", &["--no-metadata"])?;
    rig.sealed.destroy("web01")?;
    let below = rig.host().path(&golden);
    let empty = fs::read(&below)?;
    fs::copy(rig.host().path(&victim.disk), &below)?;
    let refused = rig.sealed.refused(1, &["vm", "snapshot", "commit", "web01"])?;
    expect_names(
        &refused,
        &[&golden, &victim.uuid.to_string(), "does not share it"],
    )?;
    ensure!(rig.host().path(&left).exists());
    // With its own below it goes through.
    fs::write(&below, empty)?;
    rig.sealed.run(&["vm", "snapshot", "commit", "web01"])?;
    rig.sealed.expect_start("web01")
}

/// Who lays images beside each other names what is below them: what is not an image of VMs is not looked at, nor told whether it is there.
#[test]
fn a_branch_is_followed_where_images_may_be_and_nowhere_else() -> Result<()> {
    let rig = Rig::start()?;
    let spec = rig.sealed.seal_new("web01")?;
    rig.sealed.start_paused("web01")?;
    let left = overlay(&rig, "web01", "s1", &[])?.display().to_string();
    rig.sealed.destroy("web01")?;
    let base = spec.disk.display().to_string();
    let size = rig.sealed.json(&["volume", "info", &base])?["virtual_size"].to_string();
    let lay = |image: &str| {
        let create = [
            "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &base, image, &size,
        ];
        rig.host().run(&create)?.succeeded()
    };
    // The VM has gone on from the sealed image in another way.
    let top = format!("{IMAGES}/web01.top");
    lay(&top)?;
    rig.host()
        .define_xml(&edited(&rig.sealed.dumpxml("web01")?, &left, &top)?)?;
    let commit = ["vm", "snapshot", "commit", "--dry-run", "web01"];
    let refused = rig.sealed.refused(8, &commit)?;
    expect_names(&refused, &[&left, "of snapshot s1 is on the same sealed image"])?;
    let secrets = "/run/secrets";
    fs::create_dir(rig.host().path(secrets))?;
    fs::set_permissions(rig.host().path(secrets), fs::Permissions::from_mode(0o700))?;
    lay(&format!("{secrets}/image"))?;
    let told = ["image", "none"].map(|name| -> Result<String> {
        let below = format!("{secrets}/{name}");
        let rebase = ["qemu-img", "rebase", "-u", "-F", "qcow2", "-b", &below, &left];
        rig.host().run(&rebase)?.succeeded()?;
        Ok(rig.sealed.refused(6, &commit)?.replace(&below, "PATH"))
    });
    let [image, none] = told;
    let image = image?;
    expect_names(&image, &[&left, "of snapshot s1", "PATH", "image_dirs"])?;
    let none = none?;
    ensure!(image == none, "{image}\n{none}");

    // Nor is one taken for none because it is out of sight itself.
    let moved = format!("{IMAGES}/moved");
    fs::rename(rig.host().path(&left), rig.host().path(&moved))?;
    symlink(&moved, rig.host().path(&left))?;
    lchown(rig.host().path(&left), Some(12_345), None)?;
    let refused = rig.sealed.refused(6, &commit)?;
    expect_names(&refused, &[&left, "of snapshot s1", "leads through the link"])
}

#[test]
fn every_disk_of_a_vm_is_freed() -> Result<()> {
    let rig = Rig::start()?;
    let spec = rig.sealed.seal_new("web01")?;
    let data = format!("{IMAGES}/data.qcow2");
    rig.sealed
        .run(&["volume", "create", &data, "--size", "16M", "--vm", "web01"])?;
    let qcow2 = ["--driver", "qemu", "--subdriver", "qcow2", "--config"];
    virsh(
        &rig,
        &[&["attach-disk", "web01", &data, "vdb"], &qcow2[..]].concat(),
    )?;
    rig.sealed.run(&["vm", "seal", "web01"])?;
    let overlays = lay_over(&rig, &spec)?;
    rig.sealed.destroy("web01")?;
    for name in ["s1", "s2"] {
        ensure!(rig.host().path(format!("{IMAGES}/data.{name}")).exists());
    }
    rig.sealed.run(&["vm", "snapshot", "commit", "web01"])?;
    expect_data(&rig, &spec, 0x42)?;
    expect_free(&rig, &spec, &overlays)?;
    ensure!(rig.sealed.dumpxml("web01")?.contains(&data));
    for name in ["s1", "s2"] {
        ensure!(!rig.host().path(format!("{IMAGES}/data.{name}")).exists());
    }
    Ok(())
}

#[test]
fn an_overlay_is_dropped_with_a_word_for_it() -> Result<()> {
    let rig = Rig::start()?;
    let (spec, overlays) = overlaid(&rig, "web01")?;
    rig.sealed.destroy("web01")?;
    let would = rig
        .sealed
        .run(&["vm", "snapshot", "delete", "--dry-run", "web01"])?;
    expect_names(
        &would,
        &[
            "would let disk vda be",
            "would lose what was written to disk vda since",
        ],
    )?;
    for words in [
        &["vm", "snapshot", "delete", "web01"][..],
        &["vm", "snapshot", "delete", "--yes-delete=db01", "web01"],
    ] {
        let refused = rig.sealed.refused(8, words)?;
        expect_names(
            &refused,
            &[
                "would be lost",
                "virtseal vm snapshot delete --yes-delete=web01 web01",
            ],
        )?;
    }
    ensure!(rig.host().path(&overlays[0]).exists());
    rig.sealed
        .run(&["vm", "snapshot", "delete", "--yes-delete=web01", "web01"])?;
    expect_data(&rig, &spec, 0x41)?;
    expect_free(&rig, &spec, &overlays)?;

    // The files may stay.
    let (spec, overlays) = overlaid(&rig, "web02")?;
    rig.sealed.destroy("web02")?;
    let delete = [
        "vm",
        "snapshot",
        "delete",
        "--keep-overlays",
        "--yes-delete=web02",
        "web02",
    ];
    // As an aborted `virsh blockcommit` leaves it.
    let base = fs::File::options()
        .write(true)
        .open(rig.host().path(&spec.disk))?;
    base.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(60))?;
    let refused = rig.sealed.refused(8, &delete)?;
    let told = [
        "virtseal vm snapshot commit web02",
        "virtseal vm snapshot delete --force --yes-delete=web02 web02",
    ];
    expect_names(&refused, &told)?;
    rig.sealed.run(&[&delete[..], &["--force"]].concat())?;
    expect_data(&rig, &spec, 0x41)?;
    ensure!(overlays.iter().all(|overlay| rig.host().path(overlay).exists()));
    rig.sealed.expect_start("web02")
}

#[test]
fn a_merge_can_be_killed_at_every_change_and_goes_on() -> Result<()> {
    let mut rig = Rig::start()?;
    let vm = |nth: usize| format!("web{nth:02}");
    let made = std::cell::RefCell::new(None);
    let steps = rig.at_each_change(
        |rig, nth| {
            made.replace(Some(overlaid(rig, &vm(nth))?));
            rig.sealed.destroy(&vm(nth))?;
            words(&["vm", "snapshot", "commit", &vm(nth)])
        },
        |rig, nth, command| {
            let made = made.borrow();
            let (spec, overlays) = made.as_ref().context("nothing was made")?;
            rig.sealed.unlock()?;
            let is_done = || -> Result<bool> {
                let xml = rig.sealed.dumpxml(&vm(nth))?;
                Ok(!xml.contains(&overlays[0].display().to_string()))
            };
            // Until it is through the VM reads through what it had, and nothing but the merge leads on.
            let last = rig.sealed.last_job();
            let has_begun = last.is_ok_and(|job| job["vm"] == spec.uuid.to_string());
            if !is_done()? && has_begun {
                let word = format!("--yes-delete={}", vm(nth));
                let refused = rig
                    .sealed
                    .virtseal(&["vm", "snapshot", "delete", &word, &vm(nth)])?;
                ensure!(!refused.status.success() || is_done()?, "{refused:?}");
            }
            let jobs = rig.sealed.json(&["jobs"])?["jobs"].clone();
            let running = jobs
                .as_array()
                .into_iter()
                .flatten()
                .find(|job| job["state"] == "running")
                .cloned();
            match running {
                Some(job) => drop(rig.sealed.virtseal(&["jobs", "watch", &job["id"].to_string()])?),
                None if is_done()? => {}
                None => drop(rig.sealed.run(command)?),
            }
            expect_data(rig, spec, 0x42)?;
            expect_free(rig, spec, overlays)
        },
    )?;
    ensure!(
        steps.iter().any(|step| step.call.starts_with("unlink")),
        "{steps:?}"
    );
    Ok(())
}

#[test]
fn a_merge_of_a_running_vm_goes_on_after_virtseald_was_killed_in_it() -> Result<()> {
    let mut rig = Rig::start()?;
    let (mut nth, mut killed) = (1, true);
    while killed {
        let (spec, overlays) = overlaid(&rig, &format!("web{nth:02}"))?;
        let daemon = rig.sealed.daemon()?.outside_pid()?;
        let tracer = Tracer::kill_at_change(daemon, nth)?;
        let commit = ["vm", "snapshot", "commit", &spec.name];
        let tried = rig.sealed.virtseal(&commit)?;
        killed = tracer.finish()?.killed;
        if killed {
            rig.sealed.daemon()?.wait(PATIENCE)?;
            rig.sealed.start_daemon()?;
            rig.sealed.unlock()?;
            wait_until(PATIENCE, "the job to end", || {
                let jobs = rig.sealed.json(&["jobs"])?["jobs"].clone();
                let is_over = jobs
                    .as_array()
                    .is_some_and(|jobs| jobs.iter().all(|job| job["state"] == "done"));
                Ok(is_over.then_some(()))
            })?;
            let xml = virsh(&rig, &["dumpxml", &spec.name])?;
            if xml.contains(&overlays[0].display().to_string()) {
                rig.sealed.run(&commit)?;
            }
        } else {
            tried.succeeded()?;
        }
        rig.sealed.expect_no_secrets()?;
        rig.sealed.destroy(&spec.name)?;
        expect_data(&rig, &spec, 0x42)?;
        expect_free(&rig, &spec, &overlays)?;
        rig.host().undefine(&spec.name)?;
        nth += 1;
    }
    ensure!(nth > 5, "only {nth} changes");
    Ok(())
}

#[test]
fn a_merge_that_was_aborted_leaves_no_way_but_its_end() -> Result<()> {
    let mut rig = Rig::start()?;
    for nth in 1..20 {
        let (spec, overlays) = overlaid(&rig, &format!("web{nth:02}"))?;
        rig.sealed.destroy(&spec.name)?;
        let daemon = rig.sealed.daemon()?.outside_pid()?;
        let tracer = Tracer::kill_at_change(daemon, nth)?;
        let commit = ["vm", "snapshot", "commit", &spec.name];
        rig.sealed.virtseal(&commit)?;
        ensure!(tracer.finish()?.killed, "no job was left by any kill");
        rig.sealed.daemon()?.wait(PATIENCE)?;
        rig.sealed.start_daemon()?;
        let jobs = rig.sealed.json(&["jobs"])?["jobs"].clone();
        let running = jobs
            .as_array()
            .and_then(|jobs| jobs.iter().find(|job| job["state"] == "running"));
        let Some(job) = running else {
            rig.sealed.unlock()?;
            continue;
        };
        // It waits for its key.
        rig.sealed.run(&["jobs", "abort", &job["id"].to_string()])?;
        rig.sealed.unlock()?;
        let word = format!("--yes-delete={}", spec.name);
        let refused = rig
            .sealed
            .refused(8, &["vm", "snapshot", "delete", &word, &spec.name])?;
        let told = format!("virtseal vm snapshot commit {}", spec.name);
        expect_names(&refused, &["has begun to merge it", &told])?;
        expect_names(&rig.sealed.refused_start(&spec.name)?, &[&told])?;
        rig.sealed.run(&commit)?;
        expect_data(&rig, &spec, 0x42)?;
        return expect_free(&rig, &spec, &overlays);
    }
    anyhow::bail!("no job was left by any kill")
}

#[test]
fn a_merge_that_meets_a_full_disk_goes_on_once_there_is_room() -> Result<()> {
    let rig = Rig::start()?;
    let small = "/var/lib/libvirt/small";
    let mount = |options: &str| {
        let mount = format!("mkdir -p {small} && mount -t tmpfs -o {options} small {small}");
        rig.host().run(&["sh", "-c", &mount])?.succeeded()
    };
    mount("size=2m,mode=0700")?;
    let spec = DomainSpec {
        disk: format!("{small}/web01.qcow2").into(),
        ..SealedHost::spec("web01")
    };
    rig.sealed.seal_empty(&spec)?;
    rig.sealed.start_paused("web01")?;
    let top = format!("{IMAGES}/web01.s1");
    overlay(&rig, "web01", "s1", &["--diskspec", &format!("vda,file={top}")])?;
    write(&rig, "web01", 0x42, 0, 2 * MIB)?;
    rig.sealed.destroy("web01")?;
    let commit = ["vm", "snapshot", "commit", "web01"];
    expect_names(&rig.sealed.refused(1, &commit)?, &["No space left", &top])?;
    let told = "virtseal vm snapshot commit web01";
    expect_names(&rig.sealed.refused_start("web01")?, &[told])?;
    let delete = ["vm", "snapshot", "delete", "--yes-delete=web01", "web01"];
    expect_names(&rig.sealed.refused(8, &delete)?, &["has begun to merge it", told])?;
    mount("remount,size=32m")?;
    rig.sealed.run(&commit)?;
    expect_data(&rig, &spec, 0x42)?;
    expect_free(&rig, &spec, &[top.into()])
}

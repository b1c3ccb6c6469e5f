//! `virtseal status` is triage: what needs somebody comes first with its next command, then a line a VM says whether it would start. A
//! start is decided by the same, so that what the status says is what `virsh start` then does.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtseal_testkit::{SealedHost, Way, expect_names, wait_until};

/// The line of a VM.
fn line_of(sealed: &SealedHost, vm: &str) -> Result<String> {
    let status = sealed.run(&["status"])?;
    let line = status.lines().rfind(|line| line.starts_with(&format!("{vm} ")));
    Ok(line
        .with_context(|| format!("{vm} is not in {status}"))?
        .to_owned())
}

/// What a status shows may be two seconds old where looking takes long.
fn expect_line(sealed: &SealedHost, vm: &str, names: &[&str]) -> Result<()> {
    let what = format!("{vm} to have {names:?} in its line");
    wait_until(Duration::from_secs(10), &what, || {
        Ok(expect_names(&line_of(sealed, vm)?, names).ok())
    })
}

fn expect_to_start(sealed: &SealedHost, name: &str) -> Result<()> {
    let what = format!("{name} to be told as one that starts");
    wait_until(Duration::from_secs(10), &what, || {
        Ok((vm(sealed, name)?["starts"]["outlook"] == "yes").then_some(()))
    })
}

fn vm(sealed: &SealedHost, name: &str) -> Result<Value> {
    let mut status = sealed.json(&["status"])?;
    let vms = status["vms"].as_array_mut().context("no VMs")?;
    let vm = vms.iter_mut().find(|vm| vm["name"] == name);
    Ok(vm.with_context(|| format!("no {name}"))?.take())
}

/// What the status gives as the reason is in what libvirt shows.
fn expect_refused_as_told(sealed: &SealedHost, name: &str) -> Result<()> {
    let told = vm(sealed, name)?;
    ensure!(told["starts"]["outlook"] == "no", "{told}");
    let part = |key: &str| told["starts"][key].as_str().unwrap_or_default().to_owned();
    expect_names(&sealed.refused_start(name)?, &[&part("why"), &part("next")])
}

#[test]
fn what_keeps_vms_off_comes_first_and_its_next_command_leads_out() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.seal_new("web02")?;
    let status = sealed.run(&["status"])?;
    ensure!(!status.contains("critical: "), "{status}");
    ensure!(line_of(&sealed, "web01")?.ends_with("  off    yes"));

    sealed.lock()?;
    let status = sealed.run(&["status"])?;
    let first: Vec<_> = status.lines().take(2).collect();
    ensure!(
        first
            == [
                "critical: 2 VMs can't start: provider 'main' is locked (web01, web02)",
                "  Next: virtseal provider unlock main"
            ],
        "{status}"
    );
    ensure!(line_of(&sealed, "web01")?.ends_with("no: provider 'main' is locked"));
    let told = vm(&sealed, "web01")?;
    expect_names(
        &sealed.refused_start("web01")?,
        &[
            "provider 'main' is locked",
            told["starts"]["next"].as_str().context("no next")?,
        ],
    )?;
    sealed.unlock()?;
    expect_to_start(&sealed, "web01")?;

    // Each for a reason of its own.
    let host = sealed.host();
    let disk = host.path(SealedHost::spec("web01").disk);
    let away = disk.with_extension("away");
    fs::rename(&disk, &away)?;
    expect_line(&sealed, "web01", &["no: disk vda: ", "does not exist"])?;
    expect_refused_as_told(&sealed, "web01")?;
    host.run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        &SealedHost::spec("web01").disk.display().to_string(),
        "64M",
    ])?
    .succeeded()?;
    expect_line(&sealed, "web01", &["no: disk vda: ", "is not encrypted"])?;
    expect_refused_as_told(&sealed, "web01")?;
    fs::rename(&away, &disk)?;
    expect_to_start(&sealed, "web01")?;
    sealed.expect_start("web01")?;

    // At a terminal it fits, whatever there is to say.
    sealed.lock()?;
    let shown = sealed.virtseal_at_a_terminal(&["status"], &[])?.stdout;
    expect_names(&shown, &["critical: ", "  Next: virtseal provider unlock main"])?;
    let too_long: Vec<_> = shown
        .lines()
        .filter(|line| line.trim_end().chars().count() > 80)
        .collect();
    ensure!(too_long.is_empty(), "{too_long:?}");
    // Paths and UUIDs where they are asked for.
    let path = SealedHost::spec("web01").disk.display().to_string();
    ensure!(!sealed.run(&["vm", "status", "web01"])?.contains(&path));
    expect_names(&sealed.run(&["vm", "status", "web01", "-o", "wide"])?, &[&path])?;
    let uuid = vm(&sealed, "web01")?["uuid"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    expect_names(&sealed.run(&["status", "-o", "wide"])?, &[&uuid])
}

#[test]
fn what_many_vms_have_alike_is_one_thing() -> Result<()> {
    let sealed = SealedHost::start()?;
    for number in 1..=5 {
        let spec = sealed.seal_new(&format!("web0{number}"))?;
        // As whatever manages VMs defines them again.
        sealed.host().define(&spec)?;
    }
    let told = |sealed: &SealedHost| -> Result<Vec<String>> {
        let status = sealed.run(&["status"])?;
        let lines = status
            .lines()
            .filter(|line| line.starts_with("critical: ") || line.contains("vm seal"));
        Ok(lines.map(str::to_owned).collect())
    };
    let lines = told(&sealed)?;
    let [what, next] = &lines[..] else {
        anyhow::bail!("{lines:?}");
    };
    let others = "the same of 4 more VMs: web02, web03, web04, web05";
    expect_names(what, &["critical: ", "web01", others])?;
    Way::that_begins("virtseal vm seal", next)?.take(&sealed)?;
    Way::that_begins("and so for the others", next)?
        .through("virtseal vm status")?
        .take(&sealed)?;
    sealed.run(&["vm", "seal", "web02"])?;
    let lines = told(&sealed)?;
    ensure!(lines.len() == 6, "{lines:?}");
    sealed.expect_start("web01")
}

#[test]
fn a_saved_vm_and_its_memory_in_plaintext_are_named() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    host.virsh(&["managedsave", "web01"])?.succeeded()?;
    expect_line(&sealed, "web01", &["saved  yes"])?;
    expect_names(
        &sealed.run(&["status"])?,
        &[
            "web01 has a managed save: its memory is in plaintext",
            "Next: virsh start web01",
        ],
    )?;
    host.virsh(&["start", "--paused", "web01"])?.succeeded()?;
    ensure!(!sealed.run(&["status"])?.contains("has a managed save"));

    host.virsh(&["save", "web01", "/run/web01.save"])?.succeeded()?;
    let told =
        virtseal_testkit::wait_until(std::time::Duration::from_secs(20), "the file to be noted", || {
            let status = sealed.run(&["status"])?;
            Ok(status.contains("web01 was saved to a file").then_some(status))
        })?;
    Way::that_begins("virsh restore", &told)?
        .with("FILE", "/run/web01.save")
        .after("delete that file")
        .take(&sealed)?;
    ensure!(!sealed.run(&["status"])?.contains("was saved to a file"));
    Ok(())
}

#[test]
fn a_transient_vm_that_runs_is_running() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    sealed.seal_new("web01")?;
    let xml = sealed.dumpxml("web01")?;
    host.virsh(&["undefine", "web01", "--keep-nvram", "--keep-tpm"])?
        .succeeded()?;
    expect_line(&sealed, "web01", &["undefined", "no: it is not defined here"])?;
    // It may be on another host: that is no trouble of this one.
    ensure!(!sealed.run(&["status"])?.contains("critical: "));
    fs::write(host.path("/run/web01.xml"), xml)?;
    host.virsh(&["create", "--paused", "/run/web01.xml"])?
        .succeeded()?;
    expect_line(&sealed, "web01", &["running"])?;
    ensure!(vm(&sealed, "web01")?["state"] == "sealed");
    Ok(())
}

#[test]
fn without_libvirt_nothing_is_said_of_vms() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.host_mut().stop_libvirtd()?;
    let answer = sealed.virtseal(&["status"])?;
    ensure!(answer.code() == Some(4), "{answer:?}");
    expect_names(
        &answer.stdout,
        &[
            "critical: nothing is known of VMs",
            "Next: systemctl status libvirtd",
            "web01",
        ],
    )?;
    let answer = sealed.virtseal(&["status", "--json"])?;
    ensure!(answer.code() == Some(4), "{answer:?}");
    let status: Value = serde_json::from_str(&answer.stdout)?;
    let web = &status["vms"][0];
    ensure!(
        web["power"] == "unknown" && web["state"] == "unknown" && web["starts"]["outlook"] == "unknown",
        "{web}"
    );
    // What the VMs bring may have been encrypted by a later root key.
    let passphrase = sealed.passphrase_file()?.display().to_string();
    let rotate = ["provider", "rotate", "main", "--passphrase-file", &passphrase];
    expect_names(&sealed.refused(4, &rotate)?, &["'main' is not rotated"])?;
    sealed.host_mut().restart_libvirtd()?;
    virtseal_testkit::wait_until(
        std::time::Duration::from_secs(60),
        "libvirt to be seen again",
        || Ok((sealed.virtseal(&["status"])?.code() == Some(0)).then_some(())),
    )
}

#[test]
fn a_disk_where_root_does_not_look_is_not_called_plain() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    fs::create_dir_all(host.path("/run/elsewhere"))?;
    let disk = "/run/elsewhere/disk.qcow2";
    host.run(&["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"])?
        .succeeded()?;
    let spec = virtseal_testkit::DomainSpec {
        disk: disk.into(),
        ..SealedHost::spec("plain01")
    };
    host.define(&spec)?;
    let shown = sealed.json(&["vm", "status", "plain01"])?;
    let object = shown["vms"][0]["objects"].as_array().context("no objects")?;
    let object = object.iter().find(|object| object["object"] == "disk vda");
    let object = object.context("no disk")?;
    ensure!(object["state"] == "not_looked_at", "{object}");
    expect_names(
        &sealed.run(&["vm", "status", "plain01"])?,
        &["not looked at: /run/elsewhere/disk.qcow2"],
    )
}

#[test]
fn a_libvirtd_that_has_not_seen_the_hook_is_told() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    let plain = spec.xml();
    let is_told = |sealed: &SealedHost| -> Result<bool> {
        let status = sealed.run(&["status"])?;
        let told = ["does not call it yet", "Next: systemctl reload libvirtd"];
        Ok(told.iter().all(|part| status.contains(part)))
    };
    ensure!(
        !is_told(&sealed)?,
        "libvirtd was started after the hook was there"
    );
    // As an installation does while libvirtd runs.
    sealed
        .host()
        .install_hook(&virtseal_testkit::built_program("virtseal-hook")?)?;
    ensure!(is_told(&sealed)?);
    sealed
        .host()
        .install_daemon_hook(&virtseal_testkit::built_program("virtseal-hook")?)?;
    sealed
        .host_mut()
        .libvirtd()?
        .signal(nix::sys::signal::Signal::SIGHUP)?;
    let seen = || Ok((!is_told(&sealed)?).then_some(()));
    virtseal_testkit::wait_until(std::time::Duration::from_secs(20), "the reload to be seen", seen)?;

    // Without a hook nothing keeps an old XML from being started: then at least that is told.
    fs::remove_file(sealed.host().path("/etc/libvirt/hooks/qemu.d/virtseal"))?;
    // A reload, so that virtseald goes on hearing its events.
    sealed
        .host_mut()
        .libvirtd()?
        .signal(nix::sys::signal::Signal::SIGHUP)?;
    expect_names(
        &sealed.run(&["status"])?,
        &["libvirt has no hook of virtseal", "Next: install virtseal again"],
    )?;
    let host = sealed.host();
    host.virsh(&["undefine", "web01", "--keep-nvram", "--keep-tpm"])?
        .succeeded()?;
    let nvram = host.path(spec.nvram());
    fs::rename(&nvram, nvram.with_extension("away"))?;
    let disk = &spec.disk;
    fs::rename(host.path(disk), host.path(disk.with_extension("away")))?;
    host.run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        &disk.display().to_string(),
        "64M",
    ])?
    .succeeded()?;
    host.define_xml(&plain)?;
    // A start that began before virtseald did is not judged: its hook may have asked an earlier one.
    std::thread::sleep(std::time::Duration::from_secs(10));
    // Until it has read again what hooks there are, it fails at the one that is gone.
    virtseal_testkit::wait_until(std::time::Duration::from_secs(20), "libvirt to start it", || {
        Ok(host
            .virsh(&["start", "--paused", "web01"])?
            .code()
            .filter(|code| *code == 0))
    })?;
    virtseal_testkit::wait_until(std::time::Duration::from_secs(60), "the start to be told", || {
        let status = sealed.run(&["status"])?;
        Ok(status
            .contains("libvirt has not called virtseal's hook")
            .then_some(()))
    })
}

//! A sealed VM may be undefined and defined again, renamed, and moved to a host that knows nothing of it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{HostBuilder, SealedHost, Way, edited, expect_names, wait_until};

const COPIES_DEADLINE: Duration = Duration::from_secs(30);

#[test]
fn sealed_vm_can_be_defined_again_from_its_dumpxml() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;
    // Its first start is noted in its envelopes, and their copies follow.
    wait_until(COPIES_DEADLINE, "the copies", || {
        Ok((sealed.json(&["jobs"])?["stale_copies"] == 0).then_some(()))
    })?;
    let dumped = sealed.dumpxml("web01")?;

    sealed.host().undefine("web01")?;
    // Its keys are not forgotten with it.
    let status = sealed.json(&["vm", "status", "web01"])?;
    ensure!(status["vms"][0]["power"] == "undefined", "{status}");
    ensure!(
        status["vms"][0]["objects"]
            .as_array()
            .is_some_and(|objects| objects.len() == 3)
    );

    sealed.host().define_xml(&dumped)?;
    let now = sealed.dumpxml("web01")?;
    // libvirt indents metadata that was set while the VM is defined when it reads it again.
    let lines = |xml: &str| {
        xml.lines()
            .map(str::trim)
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    ensure!(
        lines(&now) == lines(&dumped),
        "the XML did not survive: {dumped} became {now}"
    );
    sealed.start_paused("web01")
}

#[test]
fn sealed_vm_can_be_renamed() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;
    sealed.host().virsh(&["domrename", "web01", "www"])?.succeeded()?;
    sealed.start_paused("www")?;
    let status = sealed.json(&["vm", "status"])?;
    ensure!(
        status["vms"].as_array().is_some_and(|vms| vms.len() == 1),
        "{status}"
    );
    ensure!(
        status["vms"][0]["name"] == "www" && status["vms"][0]["state"] == "sealed",
        "{status}"
    );

    sealed.lock()?;
    sealed.destroy("www")?;
    expect_names(&sealed.refused_start("www")?, &["www stays off", "is locked"])
}

#[test]
fn keystore_learns_where_a_disk_has_moved() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    let moved = spec.disk.with_file_name("moved.qcow2");
    fs::rename(sealed.host().path(&spec.disk), sealed.host().path(&moved))?;
    let (from, to) = (spec.disk.display().to_string(), moved.display().to_string());
    let xml = edited(&sealed.dumpxml("web01")?, &from, &to)?;
    sealed.host().define_xml(&xml)?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;

    // Without XML the keystore alone tells where its disk is.
    sealed.host().undefine("web01")?;
    wait_until(COPIES_DEADLINE, "the disk's new place", || {
        let status = sealed.json(&["vm", "status", "web01"])?;
        let objects = status["vms"][0]["objects"].as_array().context("no objects")?;
        Ok(objects.iter().any(|object| object["path"] == to).then_some(()))
    })
}

#[test]
fn seal_and_adopt_have_the_keystore_follow_a_disk_that_has_moved() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    let mut from = spec.disk.clone();
    for (command, to) in [("seal", "first.qcow2"), ("adopt", "second.qcow2")] {
        let to = spec.disk.with_file_name(to);
        fs::rename(sealed.host().path(&from), sealed.host().path(&to))?;
        let (old, new) = (from.display().to_string(), to.display().to_string());
        let xml = edited(&sealed.dumpxml("web01")?, &old, &new)?;
        sealed.host().define_xml(&xml)?;
        let done = sealed.json(&["vm", command, "web01"])?;
        ensure!(done["changed"] == true, "{done}");
        let again = sealed.json(&["vm", command, "web01"])?;
        ensure!(again["changed"] == false, "{again}");
        from = to;
    }

    // A copy moves nothing, as long as the disk is at its old place.
    let copy = spec.disk.with_file_name("copy.qcow2");
    fs::copy(sealed.host().path(&from), sealed.host().path(&copy))?;
    let (old, new) = (from.display().to_string(), copy.display().to_string());
    sealed
        .host()
        .define_xml(&edited(&sealed.dumpxml("web01")?, &old, &new)?)?;
    for command in ["seal", "adopt"] {
        let done = sealed.json(&["vm", command, "web01"])?;
        ensure!(done["changed"] == false, "{done}");
    }

    sealed.host().undefine("web01")?;
    let status = sealed.json(&["vm", "status", "web01"])?;
    let objects = status["vms"][0]["objects"].as_array().context("no objects")?;
    ensure!(objects.iter().any(|object| object["path"] == old), "{status}");
    Ok(())
}

#[test]
fn another_host_adopts_a_vm_from_its_xml() -> Result<()> {
    let old = SealedHost::start()?;
    let spec = old.seal_new("web01")?;
    old.start_paused("web01")?;
    old.destroy("web01")?;
    let xml = old.dumpxml("web01")?;
    let generation = |sealed: &SealedHost| -> Result<Vec<_>> {
        let status = sealed.json(&["vm", "status", "web01"])?;
        let objects = status["vms"][0]["objects"]
            .as_array()
            .cloned()
            .context("no objects")?;
        Ok(objects
            .into_iter()
            .map(|object| (object["envelope"].clone(), object["generation"].clone()))
            .collect())
    };
    let envelopes = generation(&old)?;

    let new = SealedHost::start_without_provider(HostBuilder::default())?;
    for file in [&spec.disk, &spec.nvram(), &spec.tpm_state()] {
        carry(&old, &new, file)?;
    }
    new.host().define_xml(&xml)?;
    let told = new.refused_start("web01")?;
    expect_names(
        &told,
        &["web01", "disk vda", "provider 'main'", "not known on this host"],
    )?;

    let backup = "/var/lib/virtseal/main.age";
    carry(&old, &new, Path::new(backup))?;
    Way::that_begins("virtseal provider restore main", &told)?
        .with("FILE", backup)
        .typing(&[SealedHost::PASSPHRASE; 3])
        .take(&new)?;
    // The XML has the only copies here, and whoever changed one is found out before anything learns of it.
    new.host().define_xml(&tampered(&xml)?)?;
    expect_names(
        &new.refused_start("web01")?,
        &["web01 stays off", "disk vda", "provider 'main'", "tampered"],
    )?;
    ensure!(new.json(&["provider", "show", "main"])?["provider"]["envelopes"] == 0);

    new.host().define_xml(&xml)?;
    new.start_paused("web01")?;
    ensure!(
        generation(&new)? == envelopes,
        "other envelopes than on the old host"
    );
    ensure!(new.json(&["provider", "show", "main"])?["provider"]["envelopes"] == 3);
    // Now the keystore has them: the copies may go.
    new.destroy("web01")?;
    new.host().define_xml(&tampered(&xml)?)?;
    new.start_paused("web01")
}

fn carry(old: &SealedHost, new: &SealedHost, file: &Path) -> Result<()> {
    let to = new.host().path(file);
    fs::create_dir_all(to.parent().context("a file is in a directory")?)?;
    fs::copy(old.host().path(file), to).with_context(|| format!("{}", file.display()))?;
    Ok(())
}

/// One character of the disk's wrapped key is another one.
fn tampered(xml: &str) -> Result<String> {
    let disk = xml.find("\"kind\":\"disk\"").context("no disk's envelope")?;
    let body = xml[disk..].find("\"body\":\"").context("no stanza")?;
    let at = disk + body + "\"body\":\"".len() + 20;
    let other = if &xml[at..=at] == "A" { "B" } else { "A" };
    Ok(format!("{}{other}{}", &xml[..at], &xml[at + 1..]))
}

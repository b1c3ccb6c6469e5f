//! What was damaged, lost or swapped refuses the start with the object's name and what to do, and arms nothing. Put
//! back, it starts.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use virtseal_testkit::{SealedHost, edit_keystore, edited, expect_names, wait_until};

/// All on a VM that has started before, so that nothing remembered hides the damage.
#[test]
fn damaged_objects_refuse_start() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    let other = sealed.seal_new("web02")?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;

    let disk = spec.disk.display().to_string();
    let state_dir = spec.tpm_state();
    let state_dir = state_dir.parent().context("a file is in a directory")?;
    let refused = |parts: &[&str]| -> Result<()> {
        let message = sealed.refused_start("web01")?;
        println!("{message}");
        expect_names(&message, &[&["web01 stays off"], parts].concat())?;
        expect_command(&message)
    };

    with(
        &sealed,
        &spec.disk,
        |file| fs::remove_file(file).map_err(Into::into),
        || refused(&["disk vda", &disk, "does not exist", "backup"]),
    )?;
    with(&sealed, &spec.disk, truncate_in_luks_header, || {
        refused(&["disk vda", &disk])
    })?;
    with(&sealed, &spec.disk, plain_qcow2, || {
        refused(&["disk vda", &disk, "is not encrypted"])
    })?;
    let others_disk = sealed.host().path(&other.disk);
    with(
        &sealed,
        &spec.disk,
        |file| copy(&others_disk, file),
        || refused(&["disk vda", &disk, "another"]),
    )?;
    with(
        &sealed,
        &spec.disk,
        |file| copy_luks_header(&others_disk, file),
        || refused(&["disk vda", &disk, "another"]),
    )?;

    let nvram = spec.nvram().display().to_string();
    with(
        &sealed,
        &spec.nvram(),
        |file| fs::remove_file(file).map_err(Into::into),
        || refused(&["nvram", &nvram, "does not exist", "backup"]),
    )?;
    let template = sealed.host().path(&spec.firmware.variables);
    with(
        &sealed,
        &spec.nvram(),
        |file| copy(&template, file),
        || refused(&["nvram", &nvram, "is not encrypted"]),
    )?;

    with(
        &sealed,
        &spec.tpm_state(),
        |file| fs::remove_file(file).map_err(Into::into),
        || refused(&["vtpm", "gone", &state_dir.display().to_string(), "backup"]),
    )?;
    with(
        &sealed,
        &spec.tpm_state(),
        |file| flip_byte(file, 200),
        || refused(&["vtpm", &state_dir.display().to_string(), "backup"]),
    )?;

    sealed.start_paused("web01")
}

#[test]
fn lost_and_swapped_envelopes_refuse_start() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = SealedHost::spec("web01");
    let (first, second) = (spec.disk.clone(), spec.disk.with_file_name("web01-data.qcow2"));
    let ids = [&first, &second].map(|disk| create_volume(&sealed, disk, &spec.uuid.to_string()));
    let [first_id, second_id] = ids;
    let (first_id, second_id) = (first_id?, second_id?);
    let xml = edited(
        &spec.xml(),
        "<controller type='usb'",
        &format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
         <target dev='vdb' bus='virtio'/></disk><controller type='usb'",
            second.display()
        ),
    )?;
    sealed.host().define_xml(&xml)?;
    sealed.virtseal(&["vm", "seal", "web01"])?.succeeded()?;
    let others = sealed.seal_new("web02")?;
    let others_id = envelope_of(&sealed, "web02", "disk vda")?;
    let tpm_id = envelope_of(&sealed, "web01", "vtpm")?;
    let good = sealed.dumpxml("web01")?;
    let secret = |id: &str| format!("<secret type='passphrase' uuid='{id}'/>");
    let redefined = |xml: &str| -> Result<String> {
        sealed.host().define_xml(xml)?;
        let message = sealed.refused_start("web01")?;
        println!("{message}");
        expect_names(&message, &["web01 stays off"])?;
        expect_command(&message)?;
        Ok(message)
    };

    let unknown = "0d2f0a5c-6f8e-4a53-9a3e-6f1f0c1f7b11";
    let lost = redefined(&edited(&good, &secret(&second_id), &secret(unknown))?)?;
    expect_names(
        &lost,
        &[
            "disk vdb",
            unknown,
            "neither in the keystore nor in the domain XML",
        ],
    )?;

    let swapped = good
        .replace(&secret(&first_id), "SECOND")
        .replace(&secret(&second_id), &secret(&first_id))
        .replace("SECOND", &secret(&second_id));
    ensure!(swapped != good);
    expect_names(&redefined(&swapped)?, &["disk vd", "another"])?;

    let of_tpm = redefined(&edited(&good, &secret(&second_id), &secret(&tpm_id))?)?;
    expect_names(&of_tpm, &["disk vdb", &tpm_id, "vtpm", "swapped"])?;

    let of_other_vm = redefined(&edited(&good, &secret(&second_id), &secret(&others_id))?)?;
    expect_names(&of_other_vm, &["disk vdb", &others_id, &others.uuid.to_string()])?;

    // With its image as well: a disk of another VM stays closed.
    let stolen = edited(
        &edited(&good, &secret(&second_id), &secret(&others_id))?,
        &second.display().to_string(),
        &others.disk.display().to_string(),
    )?;
    expect_names(
        &redefined(&stolen)?,
        &["disk vdb", &others_id, &others.uuid.to_string()],
    )?;

    let plain = edited(
        &good,
        "</devices>",
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/var/lib/libvirt/images/p.raw'/>\
         <target dev='vdc' bus='virtio'/></disk></devices>",
    )?;
    sealed.host().empty_disk("p", 1 << 20)?;
    expect_names(&redefined(&plain)?, &["disk vdc", "not encrypted"])?;

    // The keystore has every envelope, so copies missing from the XML are no loss.
    let begin = good
        .find("<virtseal:envelope")
        .context("no envelope in the XML")?;
    let end = good.find("</virtseal:vm>").context("no metadata in the XML")?;
    sealed
        .host()
        .define_xml(&format!("{}{}", &good[..begin], &good[end..]))?;
    sealed.start_paused("web01")
}

/// Of which there is no copy: nothing but its own object is lost by it, and nothing else has to wait for a backup.
#[test]
fn a_record_that_nobody_can_read_stops_nothing_else() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let (web, other) = (sealed.seal_new("web01")?, sealed.seal_new("web02")?);
    sealed.seal_new("web03")?;
    let tpms = ["web01", "web02"].map(|vm| envelope_of(&sealed, vm, "vtpm"));
    sealed.stop_daemon(nix::sys::signal::Signal::SIGTERM)?;
    edit_keystore(&sealed, |keystore| {
        for tpm in tpms {
            let changed = keystore.execute("UPDATE envelopes SET json = x'ff00' WHERE id = ?1", [tpm?])?;
            ensure!(changed == 1, "{changed} rows");
        }
        Ok(())
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    for vm in ["web01", "web02"] {
        // What the XML still has would mend it.
        let xml = sealed.dumpxml(vm)?;
        let begin = xml.find("<virtseal:envelope").context("no envelope in the XML")?;
        let end = xml.find("</virtseal:vm>").context("no metadata in the XML")?;
        sealed
            .host()
            .define_xml(&format!("{}{}", &xml[..begin], &xml[end..]))?;
    }
    sealed.expect_start("web03")?;
    let passphrase = sealed.passphrase_file()?.display().to_string();

    // It is left out, and the others go on.
    let rotated = sealed.virtseal(&["provider", "rotate", "main", "--passphrase-file", &passphrase])?;
    expect_names(&format!("{rotated:?}"), &["left out", "is damaged"])?;
    rotated.succeeded()?;
    sealed.run(&[
        "provider",
        "backup",
        "main",
        "--output",
        "/run/main.age",
        "--passphrase-file",
        &passphrase,
    ])?;
    wait_until(Duration::from_secs(30), "the sweep is through", || {
        Ok((sealed.last_job()?["state"] == "incomplete").then_some(()))
    })?;
    sealed.expect_start("web03")?;

    // Shredded, it says what it could not see.
    let shred = ["vm", "shred", "web01", "--yes-shred", "web01"];
    let receipt = sealed.json(&shred)?.to_string();
    expect_names(
        &receipt,
        &[
            "keyslots made dead",
            "the damaged record of envelope",
            "is not known",
        ],
    )?;
    ensure!(sealed.host().path(&web.disk).exists());

    // Forgotten, its bytes are kept.
    sealed.host().undefine("web02")?;
    fs::remove_file(sealed.host().path(other.nvram()))?;
    let said = sealed.virtseal(&["vm", "forget", "web02"])?;
    expect_names(
        &format!("{said:?}"),
        &["is damaged", "what nothing else opens is lost"],
    )?;
    said.succeeded()?;
    let kept: Vec<_> =
        fs::read_dir(sealed.host().path("/var/lib/virtseal/forgotten"))?.collect::<Result<_, _>>()?;
    let text = fs::read_to_string(kept[0].path())?;
    expect_names(&text, &["\"damaged\"", "\"hex\": \"ff00\""])?;
    let status = sealed.run(&["status"])?;
    ensure!(!status.contains("damaged"), "{status}");
    sealed.expect_start("web03")
}

/// Whose it is says the envelope that is in it: its disk would be shredded with the other VM.
#[test]
fn a_record_in_which_another_vm_stands_is_not_shredded_with_that() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    let (web, other) = (sealed.seal_new("web01")?, sealed.seal_new("web02")?);
    let disk = envelope_of(&sealed, "web02", "disk vda")?;
    sealed.stop_daemon(nix::sys::signal::Signal::SIGTERM)?;
    edit_keystore(&sealed, |keystore| {
        let sql = "UPDATE envelopes SET vm = ?2 WHERE id = ?1";
        ensure!(keystore.execute(sql, [&disk, &web.uuid.to_string()])? == 1);
        Ok(())
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    let shred = ["vm", "shred", "web01", "--yes-shred", "web01"];
    let owner = other.uuid.to_string();
    let said = sealed.refused(8, &shred)?;
    expect_names(
        &said,
        &[
            "web01 stays",
            &disk,
            &owner,
            &format!("virtseal vm adopt {owner}"),
        ],
    )?;
    sealed.run(&["vm", "adopt", &owner])?;
    sealed.run(&shred)?;
    sealed.expect_start("web02")
}

/// Does `harm` to the file `inside`, runs `check`, and puts the file back.
fn with(
    sealed: &SealedHost,
    inside: &Path,
    harm: impl FnOnce(&Path) -> Result<()>,
    check: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let file = sealed.host().path(inside);
    let kept = PathBuf::from(format!("{}.kept", file.display()));
    fs::copy(&file, &kept)?;
    harm(&file).with_context(|| format!("{} could not be harmed", inside.display()))?;
    check()?;
    fs::rename(&kept, &file)?;
    Ok(())
}

fn truncate_in_luks_header(file: &Path) -> Result<()> {
    Ok(fs::File::options().write(true).open(file)?.set_len(300_000)?)
}

fn plain_qcow2(file: &Path) -> Result<()> {
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(file)
        .arg("64M")
        .status()?;
    ensure!(made.success(), "qemu-img failed");
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to)?;
    Ok(())
}

/// Both images have their LUKS header in the same place: they were made alike.
fn copy_luks_header(from: &Path, to: &Path) -> Result<()> {
    const MAGIC: &[u8] = b"LUKS\xba\xbe\x00\x01";
    const HEADER_AND_KEYSLOTS: usize = 2_068_480;
    let bytes = fs::read(from)?;
    let at = bytes
        .windows(MAGIC.len())
        .position(|window| window == MAGIC)
        .context("no LUKS header")?;
    let header = &bytes[at..bytes.len().min(at + HEADER_AND_KEYSLOTS)];
    let target = fs::File::options().read(true).write(true).open(to)?;
    let mut found = [0; MAGIC.len()];
    target.read_exact_at(&mut found, at as u64)?;
    ensure!(found == MAGIC, "the LUKS headers are in different places");
    Ok(target.write_all_at(header, at as u64)?)
}

fn flip_byte(file: &Path, at: u64) -> Result<()> {
    let file = fs::File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    Ok(file.write_all_at(&[byte[0] ^ 1], at)?)
}

fn create_volume(sealed: &SealedHost, disk: &Path, vm: &str) -> Result<String> {
    let disk = disk.display().to_string();
    let made = sealed.json(&["volume", "create", &disk, "--size", "64M", "--vm", vm])?;
    Ok(made["envelope"].as_str().context("no envelope")?.to_owned())
}

fn envelope_of(sealed: &SealedHost, vm: &str, object: &str) -> Result<String> {
    let status = sealed.json(&["vm", "status", vm])?;
    let objects = status["vms"][0]["objects"].as_array().context("no objects")?;
    let found = objects
        .iter()
        .find(|found| found["object"] == object)
        .with_context(|| format!("no {object} in {status}"))?;
    Ok(found["envelope"].as_str().context("no envelope")?.to_owned())
}

/// The message says what to run or to do.
fn expect_command(message: &str) -> Result<()> {
    let advises = [
        "virtseal vm ",
        "virtseal volume ",
        "virsh ",
        "qemu-img ",
        "from a backup",
    ]
    .iter()
    .any(|advice| message.contains(advice));
    ensure!(advises, "no next command: {message}");
    Ok(())
}

//! The ways back that `vm seal` prints, each followed to a VM that starts, or to a loss that was stated before.

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtseal_testkit::rig::{IMAGES, Rig, words};
use virtseal_testkit::{DomainSpec, SealedHost, codes, edited, expect_names, kept_envelopes};

/// The last command in what was said that begins so, as a shell would take it apart.
fn advised(said: &str, begin: &str) -> Result<Vec<String>> {
    let at = said
        .rfind(begin)
        .with_context(|| format!("no {begin} in {said}"))?;
    let rest = &said[at..];
    let end = rest
        .find([';', '\n'])
        .into_iter()
        .chain(rest.find(", "))
        .min()
        .unwrap_or(rest.len());
    Ok(rest[..end].split_whitespace().map(str::to_owned).collect())
}

/// Runs a command of virtseal that was advised.
fn follow(sealed: &SealedHost, said: &str, begin: &str) -> Result<String> {
    let words = advised(said, begin)?;
    let words: Vec<_> = words.iter().skip(1).map(String::as_str).collect();
    sealed.run(&words)
}

fn state_of(sealed: &SealedHost, vm: &str, object: &str) -> Result<String> {
    let status = sealed.json(&["vm", "status", vm])?;
    let objects = status["vms"][0]["objects"].as_array().context("no objects")?;
    let found = objects.iter().find(|found| found["object"] == object);
    let found = found.with_context(|| format!("no {object} in {status}"))?;
    Ok(found["state"].as_str().context("no state")?.to_owned())
}

/// A VM that has run since it was sealed.
fn used(sealed: &SealedHost, name: &str) -> Result<DomainSpec> {
    let spec = sealed.seal_new(name)?;
    sealed.expect_start(name)?;
    Ok(spec)
}

/// Some KiB that no store and no disk begins with.
fn noise(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at % 251) as u8).collect()
}

#[test]
fn a_dry_run_lists_all_obstacles_disks_first() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = DomainSpec {
        tpm: true,
        ..DomainSpec::minimal("web01", &host.empty_disk("web01", 1 << 20)?)
    };
    let cd = "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk><controller type='usb'";
    host.define_xml(&edited(&spec.xml(), "<controller type='usb'", cd)?)?;
    let told = sealed.json(&["vm", "seal", "web01", "--dry-run"])?;
    let steps = told["steps"].to_string();
    ensure!(
        told["steps"][0]["object"]["name"] == "disk vda"
            && ["replace_by_encrypted", "encrypt"].map(|code| codes(&told["steps"]).contains(&code))
                == [true; 2],
        "{steps}"
    );
    expect_names(
        &steps,
        &["would replace the empty", "would encrypt the state of the TPM"],
    )?;
    let notes = told["notes"].to_string();
    ensure!(
        codes(&told["notes"]) == ["wrap_for", "set_format", "leave_as_is"],
        "{notes}"
    );
    expect_names(
        &notes,
        &["provider 'main'", "raw now, and qcow2 then", "sda stays as it is"],
    )?;
    ensure!(told["obstacles"] == Value::Array(Vec::new()), "{told}");

    fs::write(host.path(&spec.disk), noise(1 << 20))?;
    fs::create_dir_all(host.path("/var/lib/libvirt/qemu/nvram"))?;
    fs::write(host.path(spec.nvram()), "no whole sectors")?;
    sealed.lock()?;
    let refused = sealed.refused(8, &["vm", "seal", "web01", "--dry-run"])?;
    let of = |part: &str| {
        refused
            .find(part)
            .with_context(|| format!("no {part} in {refused}"))
    };
    ensure!(of("web01: disk vda:")? < of("web01: nvram:")?, "{refused}");
    ensure!(of("web01: nvram:")? < of("is locked")?, "{refused}");
    expect_names(&refused, &["3 obstacles", "virtseal provider unlock main"])?;
    let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
    expect_names(&refused, &["web01: disk vda:", "holds data", "all 3 obstacles"])?;
    ensure!(refused.trim_end().lines().count() == 1, "{refused}");
    let listed = sealed.virtseal(
        &advised(&refused, "virtseal vm seal --dry-run")?
            .iter()
            .skip(1)
            .map(String::as_str)
            .collect::<Vec<_>>(),
    )?;
    expect_names(&listed.stderr, &["3 obstacles"])
}

#[test]
fn what_was_done_is_told_as_done_and_leads_to_the_start() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let disk = host.empty_disk("web01", 1 << 20)?;
    host.define(&DomainSpec::minimal("web01", &disk))?;
    let planned = sealed.run(&["vm", "seal", "web01", "--dry-run"])?;
    expect_names(&planned, &["would create the encrypted UEFI variable store"])?;
    let done = sealed.run(&["vm", "seal", "web01"])?;
    expect_names(
        &done,
        &[
            "created the encrypted",
            "added a TPM",
            "web01 is sealed. Next: virsh start web01",
        ],
    )?;
    ensure!(!done.contains("would"), "{done}");
    sealed.start_paused("web01")?;
    // Its goal is reached, running or not.
    let again = sealed.run(&["vm", "seal", "web01"])?;
    expect_names(&again, &["Nothing to do", "web01 is sealed"])
}

#[test]
fn a_store_that_is_lost_is_made_anew_where_nothing_is_lost_by_it_or_root_says_so() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    // Never used: nothing was in it.
    let fresh = sealed.seal_new("fresh01")?;
    let good = sealed.dumpxml("fresh01")?;
    for xml in [good, fresh.xml()] {
        fs::remove_file(host.path(fresh.nvram()))?;
        host.define_xml(&xml)?;
        let healed = sealed.run(&["vm", "seal", "fresh01"])?;
        expect_names(&healed, &["created the encrypted UEFI variable store"])?;
    }
    sealed.expect_start("fresh01")?;

    // virsh undefine --nvram --tpm, and the XML of before the seal defined again: recovery without a backup.
    let spec = used(&sealed, "web01")?;
    host.virsh(&["undefine", "--nvram", "--tpm", "web01"])?
        .succeeded()?;
    host.define(&spec)?;
    let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
    expect_names(
        &refused,
        &["from a backup", "boot entries", "BitLocker", "all 2 obstacles"],
    )?;
    let healed = follow(&sealed, &refused, "virtseal vm seal --replace=nvram,vtpm")?;
    expect_names(
        &healed,
        &[
            "adopted",
            "created the encrypted",
            "a new TPM 2.0",
            "web01 is sealed",
        ],
    )?;
    sealed.expect_start("web01")?;
    // The new TPM is guarded as the old one was.
    fs::remove_file(host.path(spec.tpm_state()))?;
    expect_names(&sealed.refused_start("web01")?, &["vtpm", "gone"])
}

#[test]
fn a_lost_tpm_is_made_anew_where_root_says_so() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    let unused = sealed.dumpxml("web01")?;
    sealed.expect_start("web01")?;
    let (state, kept) = (host.path(spec.tpm_state()), host.path("/var/lib/libvirt/kept"));
    fs::rename(&state, &kept)?;
    let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
    let last = refused
        .rfind("--replace=vtpm")
        .context("no way without a backup")?;
    ensure!(
        refused.find("from a backup").is_some_and(|first| first < last),
        "{refused}"
    );
    expect_names(&refused, &["BitLocker asks for its recovery key"])?;
    // The first way.
    fs::rename(&kept, &state)?;
    expect_names(&sealed.run(&["vm", "seal", "web01"])?, &["Nothing to do"])?;
    sealed.expect_start("web01")?;
    // What is whole stays, whatever was given up.
    let xml = sealed.dumpxml("web01")?;
    sealed.run(&["vm", "seal", "web01", "--replace", "vtpm,nvram,vda"])?;
    ensure!(sealed.dumpxml("web01")? == xml);
    sealed.refused(2, &["vm", "seal", "web01", "--replace", "tpm"])?;

    // The last one, at a terminal.
    fs::rename(&state, &kept)?;
    let wrong = sealed.virtseal_at_a_terminal(&["vm", "seal", "web01"], &["web02"])?;
    ensure!(wrong.code() == Some(8), "{wrong:?}");
    let asked = sealed.virtseal_at_a_terminal(&["vm", "seal", "web01"], &["web01"])?;
    ensure!(asked.status.success(), "{asked:?}");
    expect_names(
        &asked.stdout,
        &["BitLocker", "type the VM's name", "web01 is sealed"],
    )?;
    ensure!(state_of(&sealed, "web01", "vtpm")? == "not_used_yet");
    let forgotten = fs::read_dir(host.path("/var/lib/virtseal/forgotten"))?.count();
    ensure!(forgotten == 1, "{forgotten} files for the old one's envelope");
    // Who died before it was defined, or has defined an older XML again, gets the new one, and never both.
    for (old, command) in [
        (&unused, &["vm", "seal", "web01"][..]),
        (&xml, &["vm", "seal", "--replace=vtpm", "web01"]),
    ] {
        host.define_xml(old)?;
        sealed.run(command)?;
        let known = kept_envelopes(&host.path("/var/lib/virtseal"))?;
        let vtpms: Vec<_> = known.iter().filter(|known| known.kind == "vtpm").collect();
        ensure!(vtpms.len() == 1 && vtpms[0].state == "active", "{vtpms:?}");
        ensure!(sealed.dumpxml("web01")?.contains(&vtpms[0].id));
    }
    sealed.expect_start("web01")
}

#[test]
fn a_sealed_disk_that_a_plain_one_replaced_comes_back_or_is_given_up() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = used(&sealed, "web01")?;
    let good = sealed.dumpxml("web01")?;
    let (disk, kept) = (
        host.path(&spec.disk),
        host.path("/var/lib/libvirt/images/kept.qcow2"),
    );
    let shown = spec.disk.display().to_string();
    let plain = |size: &str| {
        let created = host.run(&["qemu-img", "create", "-q", "-f", "qcow2", &shown, size])?;
        created.succeeded().map(drop)
    };
    // By the XML that names the key, and by an old one that does not.
    for xml in [&good, &spec.xml()] {
        fs::rename(&disk, &kept)?;
        plain("64M")?;
        host.define_xml(xml)?;
        let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
        expect_names(
            &refused,
            &["disk vda", "is a plain image", "put the sealed image back"],
        )?;
        ensure!(!refused.contains("not by virtseal"), "{refused}");
        fs::rename(&kept, &disk)?;
        sealed.run(&["vm", "seal", "web01"])?;
        sealed.expect_start("web01")?;
    }
    // Given up.
    fs::rename(&disk, &kept)?;
    plain("64M")?;
    let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
    expect_names(&refused, &["the data of disk vda is lost"])?;
    follow(&sealed, &refused, "virtseal vm seal --replace=vda")?;
    sealed.expect_start("web01")?;

    // The same where nothing is in its place.
    fs::remove_file(&disk)?;
    expect_names(
        &sealed.refused_start("web01")?,
        &["disk vda", "virtseal vm seal web01"],
    )?;
    let refused = sealed.refused(7, &["vm", "seal", "web01"])?;
    let create = advised(&refused, "virtseal volume create")?;
    let create: Vec<_> = create
        .iter()
        .skip(1)
        .map(|word| word.replace("SIZE", "64M"))
        .collect();
    sealed.run(&create.iter().map(String::as_str).collect::<Vec<_>>())?;
    follow(&sealed, &refused, "virtseal vm seal")?;
    sealed.expect_start("web01")?;

    // A plain one that holds data is copied into a new volume, whose key the XML does not name yet.
    fs::remove_file(&disk)?;
    plain("1M")?;
    let wrote = host.run(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", &shown])?;
    wrote.succeeded()?;
    let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
    let create = advised(&refused, "virtseal volume create")?;
    let new = shown.replace("web01.qcow2", "new.qcow2");
    let create: Vec<_> = create
        .iter()
        .skip(1)
        .map(|word| word.replace("NEW", &new))
        .collect();
    sealed.run(&create.iter().map(String::as_str).collect::<Vec<_>>())?;
    host.define_xml(&edited(&sealed.dumpxml("web01")?, &shown, &new)?)?;
    let healed = follow(&sealed, &refused, "virtseal vm seal")?;
    expect_names(&healed, &[&format!("adopted {new}"), "in place of"])?;
    sealed.start_paused("web01")
}

#[test]
fn a_vm_that_lost_its_uuid_is_told_which_it_was() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = used(&sealed, "web01")?;
    let undefine = ["undefine", "--keep-nvram", "--keep-tpm", "web01"];
    host.virsh(&undefine)?.succeeded()?;
    let uuid = format!("<uuid>{}</uuid>", spec.uuid);
    host.define_xml(&edited(&spec.xml(), &uuid, "")?)?;
    let refused = sealed.refused(1, &["vm", "seal", "web01"])?;
    expect_names(&refused, &["was made for VM", "define it again with", &uuid])?;
    let words = advised(&refused, "virsh undefine")?;
    let words: Vec<_> = words.iter().skip(1).map(String::as_str).collect();
    host.virsh(&words)?.succeeded()?;
    host.define_xml(&spec.xml())?;
    follow(&sealed, &refused, &format!("virtseal vm seal {}", spec.uuid))?;
    sealed.start_paused("web01")
}

#[test]
fn a_vm_that_was_unsealed_is_sealed_for_the_provider_of_now() -> Result<()> {
    let sealed = SealedHost::start()?;
    sealed.add_provider("second")?;
    sealed.seal_new("web01")?;
    sealed.run(&["vm", "unseal", "web01"])?;
    sealed.run(&["provider", "default", "second"])?;
    let planned = sealed.run(&["vm", "seal", "web01", "--dry-run"])?;
    expect_names(&planned, &["new keys are for provider 'second'"])?;
    sealed.run(&["vm", "seal", "web01"])?;
    expect_providers(&sealed, &["second"])?;
    sealed.run(&["vm", "unseal", "web01"])?;
    sealed.run(&["vm", "seal", "web01", "--provider", "main"])?;
    expect_providers(&sealed, &["main"])?;
    sealed.start_paused("web01")
}

#[test]
fn a_vm_that_was_unsealed_runs_in_peace_and_keeps_its_variables() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    sealed.seal_new("web01")?;
    sealed.run(&["vm", "unseal", "web01"])?;
    sealed.start_paused("web01")?;
    let status = sealed.json(&["vm", "status", "web01"])?;
    let warnings = status["vms"][0]["warnings"].as_array().context("no warnings")?;
    ensure!(warnings.is_empty(), "{status}");
    host.virsh(&["destroy", "web01"])?.succeeded()?;
    // Its TPM has run in plaintext, and is all that is in the way.
    let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
    ensure!(
        !refused.contains("nvram") && !refused.contains("obstacles"),
        "{refused}"
    );
    let words = advised(&refused, "mv ")?;
    let words: Vec<_> = words.iter().map(String::as_str).collect();
    host.run(&words)?.succeeded()?;
    follow(&sealed, &refused, "virtseal vm seal web01")?;
    sealed.start_paused("web01")
}

fn expect_providers(sealed: &SealedHost, expected: &[&str]) -> Result<()> {
    let status = sealed.json(&["vm", "status", "web01"])?;
    let objects = status["vms"][0]["objects"].as_array().context("no objects")?;
    ensure!(objects.len() == 3, "{status}");
    for object in objects {
        let providers: Vec<_> = object["providers"].as_array().into_iter().flatten().collect();
        ensure!(providers == expected, "{object}");
    }
    Ok(())
}

/// What docs/recovery.md says of a domain XML that is lost, on the host that has it in its keystore.
#[test]
fn the_xml_is_lost_and_the_image_is_not() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = used(&sealed, "web01")?;
    host.virsh(&["undefine", "--keep-nvram", "--keep-tpm", "web01"])?
        .succeeded()?;
    let info = sealed.json(&["volume", "info", &spec.disk.display().to_string()])?;
    ensure!(info["envelope"]["vm"] == spec.uuid.to_string(), "{info}");
    // With another name, and firmware that libvirt chooses.
    let xml = spec.xml().replace("<name>web01</name>", "<name>again01</name>");
    let (begin, end) = (
        xml.find("<loader").context("no loader")?,
        xml.find("</os>").context("no os")?,
    );
    let xml = format!("{}{}", &xml[..begin], &xml[end..]);
    host.define_xml(&edited(&xml, "<os>", "<os firmware='efi'>")?)?;
    let healed = sealed.run(&["vm", "seal", "again01"])?;
    expect_names(
        &healed,
        &[
            "adopted",
            "took the encrypted UEFI variable store",
            "again01 is sealed",
        ],
    )?;
    sealed.start_paused("again01")?;
    ensure!(!Path::new(&host.path("/var/lib/libvirt/qemu/nvram/again01_VARS.fd")).exists());
    Ok(())
}

/// Whenever virtseald dies, what root has kept of the old objects opens by an envelope of the keystore or of `forgotten/`.
#[test]
fn what_is_made_anew_can_be_killed_at_every_change() -> Result<()> {
    let mut rig = Rig::start()?;
    let spec = used(&rig.sealed, "web01")?;
    let kept = format!("{IMAGES}/kept.qcow2");
    let old = RefCell::new(Vec::new());
    rig.at_each_change(
        |rig, _| {
            old.replace(rig.envelopes(&spec.uuid)?);
            let host = rig.host();
            fs::rename(host.path(&spec.disk), host.path(&kept))?;
            fs::remove_file(host.path(spec.nvram()))?;
            fs::remove_file(host.path(spec.tpm_state()))?;
            let shown = spec.disk.display().to_string();
            host.run(&["qemu-img", "create", "-q", "-f", "qcow2", &shown, "1M"])?
                .succeeded()?;
            words(&["vm", "seal", "--replace=nvram,vtpm,vda", "web01"])
        },
        |rig, _, command| {
            let forgotten = forgotten(rig)?;
            let known = rig.envelopes(&spec.uuid)?;
            for old in old.borrow().iter() {
                let is_known = known.iter().any(|found| found.id == old.id);
                ensure!(
                    is_known || forgotten.contains(&old.id),
                    "the envelope of the old {} is nowhere",
                    old.kind
                );
                if old.kind == "disk" {
                    let mut moved = old.clone();
                    moved.location.clone_from(&kept);
                    rig.root.open_object(rig.host(), &moved)?;
                }
            }
            rig.sealed.unlock()?;
            rig.sealed.run(command)?;
            rig.expect_active(&spec.uuid, &["disk", "nvram", "vtpm"])?;
            rig.expect_no_temporaries()?;
            rig.sealed.expect_start("web01")
        },
    )?;
    Ok(())
}

/// The ids of the envelopes in `forgotten/`, each in a whole file.
fn forgotten(rig: &Rig) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    for entry in fs::read_dir(rig.host().path("/var/lib/virtseal/forgotten"))
        .into_iter()
        .flatten()
    {
        let path = entry?.path();
        // One that did not get its name.
        if path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with('.'))
        {
            continue;
        }
        let text: Value = serde_json::from_slice(&fs::read(path)?)?;
        let objects = text["objects"].as_array().context("no objects")?;
        ids.extend(
            objects
                .iter()
                .filter_map(|object| object["envelope"]["id"].as_str().map(str::to_owned)),
        );
    }
    Ok(ids)
}

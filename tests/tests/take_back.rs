//! An older XML is defined again, as configuration management does: `vm status` looks at the objects and not at the XML alone,
//! and `vm seal` takes the VM back.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use virtseal_testkit::{DomainSpec, SealedHost, expect_names, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
const NOT_IN_XML: &str = "not_in_xml";

/// The VM's envelopes, by its status.
fn envelopes(sealed: &SealedHost, vm: &str) -> Result<Vec<String>> {
    let objects = status(sealed, vm)?["objects"].take();
    let objects = objects.as_array().context("no objects")?;
    let mut ids: Vec<_> = objects
        .iter()
        .filter_map(|object| object["envelope"].as_str().map(str::to_owned))
        .collect();
    ids.sort();
    Ok(ids)
}

fn status(sealed: &SealedHost, vm: &str) -> Result<Value> {
    Ok(sealed.json(&["vm", "status", vm])?["vms"][0].take())
}

fn state_of(status: &Value, object: &str) -> Result<String> {
    let objects = status["objects"].as_array().context("no objects")?;
    let found = objects.iter().find(|found| found["object"] == object);
    let found = found.with_context(|| format!("no {object} in {status}"))?;
    Ok(found["state"].as_str().context("no state")?.to_owned())
}

fn without(xml: &str, from: &str, to: &str) -> Result<String> {
    let begin = xml.find(from).with_context(|| format!("no {from}"))?;
    let end = begin + xml[begin..].find(to).with_context(|| format!("no {to}"))? + to.len();
    Ok(format!("{}{}", &xml[..begin], &xml[end..]))
}

/// As an admin's tool would define it: the XML of before the seal.
fn as_before(spec: &DomainSpec) -> DomainSpec {
    DomainSpec {
        disk_format: "raw",
        ..spec.clone()
    }
}

#[test]
fn a_vm_whose_xml_was_defined_anew_is_taken_back() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;
    let good = sealed.dumpxml("web01")?;
    let before = envelopes(&sealed, "web01")?;
    ensure!(before.len() == 3, "{before:?}");
    ensure!(good.contains("persistent_state='yes'") || good.contains("persistent_state=\"yes\""));

    // Everything is gone from the XML, the TPM too.
    host.define(&as_before(&spec))?;
    let seen = status(&sealed, "web01")?;
    ensure!(seen["state"] == NOT_IN_XML, "{seen}");
    ensure!(state_of(&seen, "disk vda")? == NOT_IN_XML, "{seen}");
    ensure!(state_of(&seen, "nvram")? == NOT_IN_XML, "{seen}");
    ensure!(state_of(&seen, "vtpm")? == "detached", "{seen}");
    expect_names(&seen["warnings"].to_string(), &["virtseal vm seal web01"])?;
    let listed = sealed.json(&["vm", "status"])?;
    ensure!(listed["vms"][0]["name"] == "web01" && listed["vms"][0]["state"] == NOT_IN_XML);
    let taken = sealed.run(&["vm", "seal", "web01"])?;
    expect_names(&taken, &["adopt", "UEFI variable store", "TPM back"])?;
    ensure!(envelopes(&sealed, "web01")? == before);
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;

    // Only the metadata; then, with it, only one object.
    let [disk, vtpm] = [
        without(&good, "<metadata>", "</metadata>")?,
        without(&good, "<encryption secret=", "/>")?,
    ];
    for xml in [disk, vtpm] {
        host.define_xml(&xml)?;
        ensure!(status(&sealed, "web01")?["state"] == NOT_IN_XML);
        sealed.run(&["vm", "seal", "web01"])?;
        ensure!(envelopes(&sealed, "web01")? == before);
        let again = sealed.json(&["vm", "seal", "web01"])?;
        ensure!(again["changed"] == false, "{again}");
        sealed.start_paused("web01")?;
        sealed.destroy("web01")?;
    }
    // Each object is opened first: another's key does not do.
    host.define(&as_before(&spec))?;
    sealed.lock()?;
    expect_names(
        &sealed.refused(3, &["vm", "seal", "web01"])?,
        &["web01", "is locked"],
    )?;
    sealed.unlock()?;
    ensure!(status(&sealed, "web01")?["state"] == NOT_IN_XML);
    sealed.run(&["vm", "seal", "web01"])?;
    sealed.start_paused("web01")
}

#[test]
fn what_the_guest_has_written_to_is_never_made_anew() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    sealed.destroy("web01")?;
    // The next start is what finds the state.
    sealed.expect_start("web01")?;
    host.define(&as_before(&spec))?;

    let (nvram, kept) = (host.path(spec.nvram()), host.path("/var/lib/libvirt/kept"));
    fs::rename(&nvram, &kept)?;
    let plain = host.path(&spec.firmware.variables);
    for put in [None, Some(&plain)] {
        if let Some(plain) = put {
            fs::copy(plain, &nvram)?;
        }
        let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
        expect_names(&refused, &[&spec.nvram().display().to_string(), "from a backup"])?;
    }
    fs::copy(&kept, &nvram)?;

    let disk = host.path(&spec.disk);
    fs::rename(&disk, &kept)?;
    ensure!(state_of(&status(&sealed, "web01")?, "disk vda")? == "file_missing");
    let refused = sealed.refused(7, &["vm", "seal", "web01"])?;
    expect_names(&refused, &["was sealed", "put", "back"])?;
    fs::rename(&kept, &disk)?;

    // The same where the XML is as it should be: what can't start is not called sealed.
    let state = host.path(spec.tpm_state());
    for _ in ["old XML", "sealed XML"] {
        fs::rename(&state, &kept)?;
        let refused = sealed.refused(8, &["vm", "seal", "web01"])?;
        expect_names(&refused, &["TPM is gone", "from a backup"])?;
        fs::rename(&kept, &state)?;
        sealed.run(&["vm", "seal", "web01"])?;
    }
    fs::rename(&state, &kept)?;
    ensure!(state_of(&status(&sealed, "web01")?, "vtpm")? == "state_gone");
    expect_names(&sealed.refused_start("web01")?, &["vtpm", "gone"])?;
    fs::rename(&kept, &state)?;
    sealed.start_paused("web01")
}

#[test]
fn status_tells_what_is_wrong_with_objects_and_xml() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    let good = sealed.dumpxml("web01")?;

    // Another VM names the sealed image as its own plain disk.
    let thief = DomainSpec {
        disk: spec.disk.clone(),
        ..SealedHost::spec("db01")
    };
    host.define(&thief)?;
    let seen = status(&sealed, "db01")?;
    ensure!(state_of(&seen, "disk vda")? == "of_another_vm", "{seen}");
    ensure!(seen["objects"][0]["detail"] == spec.uuid.to_string(), "{seen}");
    expect_names(
        &sealed.run(&["vm", "status", "db01"])?,
        &[&format!("of another VM ({})", spec.uuid)],
    )?;
    wait_until(PATIENCE, "the list to be of both", || {
        let listed = sealed.json(&["vm", "status"])?;
        Ok(listed["vms"]
            .as_array()
            .is_some_and(|vms| vms.len() == 2)
            .then_some(()))
    })?;
    host.undefine("db01")?;
    // One that has nothing to do with virtseal is in no list.
    host.define(&DomainSpec::minimal(
        "plain01",
        &host.empty_disk("plain01", 1 << 20)?,
    ))?;
    // It may be two seconds old.
    wait_until(PATIENCE, "the list to be of web01 alone", || {
        let listed = sealed.json(&["vm", "status"])?;
        Ok(listed["vms"]
            .as_array()
            .is_some_and(|vms| vms.len() == 1)
            .then_some(()))
    })?;
    ensure!(status(&sealed, "plain01")?["state"] == "plain");

    // What an earlier virtseal has sealed.
    let earlier = good
        .replace(" persistent_state='yes'", "")
        .replace(" persistent_state=\"yes\"", "");
    host.define_xml(&earlier)?;
    let seen = status(&sealed, "web01")?;
    ensure!(seen["state"] == "sealed", "{seen}");
    expect_names(
        &seen["warnings"].to_string(),
        &["persistent_state", "virtseal vm seal web01"],
    )?;
    sealed.run(&["vm", "seal", "web01"])?;
    ensure!(sealed.dumpxml("web01")? == good);
    let warnings = status(&sealed, "web01")?["warnings"].to_string();
    ensure!(!warnings.contains("persistent_state"), "{warnings}");

    // A copy of an envelope that can't be read is passed over.
    let id = envelopes(&sealed, "web01")?;
    let begin = good.find("<virtseal:envelope").context("no envelope")?;
    let broken = without(&good, "<virtseal:envelope", "</virtseal:envelope>")?;
    let broken = format!(
        "{}<virtseal:envelope id='{}'>{{</virtseal:envelope>{}",
        &broken[..begin],
        id[0],
        &broken[begin..]
    );
    host.define_xml(&broken)?;
    let seen = status(&sealed, "web01")?;
    ensure!(seen["state"] == "sealed", "{seen}");
    expect_names(&seen["warnings"].to_string(), &[&id[0], "can't be read"])?;

    // XML that can't be read is an error; in the list it hides nobody else, and its objects are those of the keystore.
    let many: String = (0..300).map(|nth| format!(" a{nth}=''")).collect();
    let foreign = format!("<other:tool xmlns:other='urn:other'{many}/><virtseal:vm");
    host.define_xml(&good.replacen("<virtseal:vm", &foreign, 1))?;
    let refused = sealed.refused(1, &["vm", "status", "web01"])?;
    expect_names(&refused, &["web01", "can't be read", "virsh define FILE"])?;
    let listed = sealed.json(&["vm", "status"])?;
    ensure!(
        listed["vms"][0]["objects"]
            .as_array()
            .is_some_and(|objects| objects.len() == 3),
        "{listed}"
    );
    host.define_xml(&good)?;
    sealed.start_paused("web01")
}

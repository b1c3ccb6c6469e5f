//! A vTPM was given up for a new one: where a copy of its envelope turns up, that is said, and what is printed leads on.

use std::fs;

use anyhow::{Context, Result, ensure};
use uuid::Uuid;
use virtseal_testkit::{SealedHost, Way, edited, expect_names, kept_envelopes};

const GIVEN_UP: &str = "of a vTPM that was given up";

/// An older XML of the VM is defined again, before and after the new TPM has run.
#[test]
fn a_copy_of_a_vtpm_that_was_given_up_leads_to_the_new_one() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;
    sealed.wait_for_copies(0)?;
    let old = sealed.dumpxml("web01")?;
    fs::remove_file(host.path(spec.tpm_state()))?;
    sealed.run(&["vm", "seal", "--replace=vtpm", "web01"])?;
    let adopt = || {
        host.define_xml(&old)?;
        let refused = sealed.refused(1, &["vm", "adopt", "web01"])?;
        expect_names(&refused, &[GIVEN_UP, "/var/lib/virtseal/forgotten/"])?;
        Way::that_begins("virtseal vm seal web01", &refused)
    };
    // The old one has run, and a state may be in a backup.
    let lost = adopt()?.refused(&sealed)?;
    Way::that_begins("virtseal vm seal --replace=vtpm", &lost)?.take(&sealed)?;
    sealed.expect_start("web01")?;

    adopt()?.take(&sealed)?;
    sealed.expect_start("web01")?;
    host.define_xml(&old)?;
    let refused = sealed.refused_start("web01")?;
    Way::that_begins("virtseal vm seal web01", &refused)?.take(&sealed)?;
    sealed.expect_start("web01")?;

    // Its provider goes, and what was given up with it goes to another.
    sealed.add_provider("spare")?;
    sealed.run(&["provider", "default", "spare"])?;
    host.define_xml(&old)?;
    let moved = sealed.virtseal(&["provider", "move", "main", "spare"])?;
    expect_names(&moved.stderr, &["left out", GIVEN_UP, "virtseal vm seal web01"])?;
    moved.succeeded()?;
    sealed.wait_for_copies(0)?;
    let refused = sealed.refused(8, &["provider", "delete", "main"])?;
    expect_names(&refused, &[&format!("the XML of web01, {GIVEN_UP}")])?;
    let mut refused = Way::that_begins("virtseal vm seal web01", &refused)?.refused(&sealed)?;
    // The old one, and the new one that was given up before it had run.
    for nth in 1..=2 {
        let adopt = Way::that_begins("virtseal vm adopt --from", &refused)?;
        adopt.through("virtseal provider move")?.take(&sealed)?;
        sealed.wait_for_copies(0)?;
        let deleted = sealed.virtseal(&["provider", "delete", "main"])?;
        refused = match nth {
            1 => deleted.refused()?,
            _ => deleted.succeeded()?,
        };
    }
    sealed.expect_start("web01")?;

    // All are known now.
    host.define_xml(&old)?;
    let refused = sealed.refused_start("web01")?;
    Way::that_begins("virtseal vm seal web01", &refused)?.take(&sealed)?;
    sealed.expect_start("web01")
}

/// It came with the XML, by a provider that is not here: nobody else may have its key.
#[test]
fn a_vtpm_of_elsewhere_that_is_given_up_is_kept() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;
    sealed.wait_for_copies(0)?;
    let known = kept_envelopes(&host.path("/var/lib/virtseal"))?;
    let vtpm = known
        .iter()
        .find(|known| known.kind == "vtpm")
        .context("no vTPM")?;
    let xml = sealed.dumpxml("web01")?;
    let begin = xml
        .find(&format!("<virtseal:envelope id=\"{}\"", vtpm.id))
        .context(xml.clone())?;
    let end = "</virtseal:envelope>";
    let end = begin + xml[begin..].find(end).context("no end")? + end.len();

    let disk = host.empty_disk("web02", 1 << 20)?;
    let plain = virtseal_testkit::DomainSpec::minimal("web02", &disk);
    let id = Uuid::new_v4().to_string();
    let provider = sealed.provider("main")?["id"]
        .as_str()
        .context("no id")?
        .to_owned();
    let envelope = xml[begin..end]
        .replace(&vtpm.id, &id)
        .replace(&spec.uuid.to_string(), &plain.uuid.to_string())
        .replace(&provider, &Uuid::new_v4().to_string());
    let uuid = format!("<uuid>{}</uuid>", plain.uuid);
    let metadata = format!(
        "{uuid}<metadata><virtseal:vm xmlns:virtseal='urn:virtseal:vm:1'>{envelope}</virtseal:vm></metadata>"
    );
    let tpm = format!(
        "<tpm model='tpm-crb'><backend type='emulator' version='2.0'><encryption secret='{id}'/></backend></tpm><controller type='usb'"
    );
    let foreign = edited(
        &edited(&plain.xml(), &uuid, &metadata)?,
        "<controller type='usb'",
        &tpm,
    )?;
    host.define_xml(&foreign)?;

    let lost = sealed.refused(8, &["vm", "seal", "web02"])?;
    let replace = Way::that_begins("virtseal vm seal --replace=vtpm", &lost)?;
    replace.take(&sealed)?;
    ensure!(!sealed.dumpxml("web02")?.contains(&id));
    sealed.expect_start("web02")?;
    // Once, however often it is given up.
    host.define_xml(&foreign)?;
    sealed.run(&["vm", "seal", "--replace=vtpm", "web02"])?;
    let mut kept = fs::read_dir(host.path("/var/lib/virtseal/forgotten"))?;
    let file = kept.next().context("it is not kept")??;
    ensure!(kept.next().is_none());
    ensure!(fs::read_to_string(file.path())?.contains(&id));
    Ok(())
}

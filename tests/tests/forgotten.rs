//! A VM that has left is forgotten here, and neither its keys nor the way back are lost.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, MAX_STEPS, NVRAM, Rig, STATE};
use virtseal_testkit::{Tracer, expect_names};

const SWTPM: &str = "/var/lib/libvirt/swtpm";

/// What `vm forget` has kept, the oldest first.
fn forgotten(rig: &Rig) -> Result<Vec<PathBuf>> {
    let dir = rig.host().path(STATE).join("forgotten");
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(Vec::new());
    };
    let mut files: Vec<_> = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.retain(|file| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        !name.starts_with('.')
    });
    files.sort();
    Ok(files)
}

fn inside(path: &std::path::Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("{STATE}/forgotten/{name}")
}

#[test]
fn a_vm_that_has_left_is_forgotten_and_comes_back() -> Result<()> {
    let rig = Rig::start()?;
    let spec = rig.sealed.seal_new("my vm")?;
    rig.sealed.expect_start("my vm")?;
    let xml = rig.sealed.dumpxml("my vm")?;
    let said = rig.sealed.refused(8, &["vm", "forget", "my vm"])?;
    expect_names(&said, &["it is defined here", "virsh undefine --keep-nvram"])?;
    rig.host().undefine("my vm")?;

    // What leads there advises nothing that destroys.
    let orphans = rig.sealed.run(&["provider", "orphans"])?;
    expect_names(&orphans, &["virtseal vm forget 'my vm'"])?;
    ensure!(!orphans.contains("shred"), "{orphans}");
    let said = rig
        .sealed
        .refused(8, &["vm", "shred", "my vm", "--yes-shred", "my"])?;
    expect_names(&said, &["virtseal vm forget 'my vm', if it is on another host"])?;

    // Its variables and its TPM are here, and nothing else has their envelopes.
    let said = rig.sealed.refused(8, &["vm", "forget", "my vm"])?;
    expect_names(&said, &["nvram", "vtpm", "the only copy", "move that to where"])?;
    ensure!(!said.contains("disk"), "the image has a copy: {said}");
    ensure!(rig.envelopes(&spec.uuid)?.len() == 3);

    // As if their storage were not mounted: no proof that they are gone.
    let away = rig.host().path("/run/away");
    fs::create_dir(&away)?;
    let places = [
        rig.host().path(NVRAM),
        rig.host().path(SWTPM).join(spec.uuid.to_string()),
    ];
    for place in &places {
        fs::rename(place, away.join(place.file_name().context("no name")?))
            .or_else(|_| copy_away(place, &away))?;
    }
    let outcome = rig.sealed.virtseal(&["vm", "forget", "my vm"])?;
    expect_names(
        &outcome.stderr,
        &["nothing is there of", "virtseal vm adopt --from"],
    )?;
    expect_names(&outcome.succeeded()?, &["3 envelopes", "no key was destroyed"])?;
    ensure!(rig.envelopes(&spec.uuid)?.is_empty());
    rig.sealed.refused(7, &["vm", "forget", "my vm"])?;
    let file = forgotten(&rig)?.pop().context("nothing was kept")?;
    let mode = |path: &std::path::Path| {
        use std::os::unix::fs::PermissionsExt;
        Ok::<_, std::io::Error>(fs::metadata(path)?.permissions().mode() & 0o777)
    };
    ensure!(mode(&file)? == 0o600 && mode(file.parent().context("no parent")?)? == 0o700);

    // Its provider is not deleted behind its back.
    rig.sealed.add_provider("spare")?;
    rig.sealed.run(&["provider", "default", "spare"])?;
    let said = rig.sealed.refused(8, &["provider", "delete", "main"])?;
    expect_names(&said, &["my vm, forgotten in", "virtseal vm adopt --from"])?;

    // And it comes back, but only as what its provider has wrapped.
    for place in &places {
        let name = place.file_name().context("no name")?;
        if !place.exists() {
            rig.host().run(&["mkdir", "-p", "/run/none"])?.succeeded()?;
        }
        let from = format!("/run/away/{}", name.to_string_lossy());
        let to = match place.ends_with("nvram") {
            true => NVRAM.to_owned(),
            false => format!("{SWTPM}/{}", spec.uuid),
        };
        rig.host().run(&["rm", "-rf", &to])?.succeeded()?;
        rig.host().run(&["mv", &from, &to])?.succeeded()?;
    }
    let adopt = ["vm", "adopt", "--from", &inside(&file)];
    rig.sealed.run(&["provider", "lock", "main"])?;
    expect_names(
        &rig.sealed.refused(3, &adopt)?,
        &["my vm is not adopted", "is locked"],
    )?;
    ensure!(rig.envelopes(&spec.uuid)?.is_empty());
    rig.sealed.unlock()?;
    let forged = fs::read_to_string(&file)?.replace(&spec.uuid.to_string(), &Uuid::new_v4().to_string());
    fs::write(rig.host().path("/run/forged.json"), forged)?;
    let said = rig
        .sealed
        .virtseal(&["vm", "adopt", "--from", "/run/forged.json"])?
        .refused()?;
    expect_names(&said, &["not adopted"])?;
    rig.sealed.run(&adopt)?;
    rig.expect_openable(&spec.uuid)?;
    rig.host().define_xml(&xml)?;
    rig.sealed.expect_start("my vm")
}

/// A rename does not leave a mount.
fn copy_away(place: &std::path::Path, away: &std::path::Path) -> std::io::Result<()> {
    let name = place.file_name().unwrap_or_default();
    let output = std::process::Command::new("cp")
        .arg("-a")
        .arg(place)
        .arg(away.join(name))
        .status()?;
    if !output.success() {
        return Err(std::io::Error::other("cp failed"));
    }
    for entry in fs::read_dir(place)? {
        let entry = entry?.path();
        if entry.is_dir() {
            fs::remove_dir_all(entry)?;
        } else {
            fs::remove_file(entry)?;
        }
    }
    Ok(())
}

/// The last way to open a provider that is unused here goes by a typed name alone.
#[test]
fn an_unused_provider_can_be_brought_back() -> Result<()> {
    let rig = Rig::start()?;
    rig.sealed.add_provider("spare")?;
    let id = rig.sealed.provider("spare")?["id"].clone();
    fs::remove_file(rig.host().path(STATE).join("spare.age"))?;
    let deleted = rig.sealed.virtseal(&["provider", "delete", "spare"])?;
    expect_names(
        &deleted.stderr,
        &["may be needed elsewhere", "virtseal provider restore spare -i"],
    )?;
    deleted.succeeded()?;
    let file = forgotten(&rig)?.pop().context("nothing was kept")?;
    let passphrase = rig.passphrase()?;
    rig.sealed.run(&[
        "provider",
        "restore",
        "spare",
        "-i",
        &inside(&file),
        "--backup-passphrase-file",
        &passphrase,
        "--passphrase-file",
        &passphrase,
    ])?;
    ensure!(rig.sealed.provider("spare")?["id"] == id);

    // A shredding needs no unlock where there is nothing to destroy, and says what it could not see.
    let path = format!("{IMAGES}/old.qcow2");
    let vm = Uuid::from_u128(7).to_string();
    rig.sealed
        .run(&["volume", "create", &path, "--size", "8M", "--vm", &vm])?;
    rig.sealed.lock()?;
    let receipt = rig.sealed.json(&["vm", "shred", &vm, "--yes-shred", &vm])?;
    expect_names(
        &receipt.to_string(),
        &["derived from the root key", "1 keyslots made dead"],
    )
}

/// Whenever the daemon dies, the keystore or a file that is whole has the envelope; and it is dropped only after the file, its
/// name and its directory are on stable storage.
#[test]
fn what_is_forgotten_is_kept_before_it_is_dropped() -> Result<()> {
    let mut rig = Rig::start()?;
    for nth in 1..MAX_STEPS {
        let vm = Uuid::from_u128(0x4000 + nth as u128);
        let (name, path) = (vm.to_string(), format!("{IMAGES}/left{nth}.qcow2"));
        rig.sealed
            .run(&["volume", "create", &path, "--size", "8M", "--vm", &name])?;
        let envelope = rig.envelopes(&vm)?.pop().context("no envelope")?;
        let tracer = Tracer::kill_at_change(rig.sealed.daemon()?.outside_pid()?, nth)?;
        let output = rig.sealed.virtseal(&["vm", "forget", &name])?;
        let trace = tracer.finish()?;
        if trace.killed {
            rig.sealed.daemon()?.wait(std::time::Duration::from_secs(20))?;
            rig.sealed.start_daemon()?;
            rig.sealed.unlock()?;
        }
        let is_known = !rig.envelopes(&vm)?.is_empty();
        let mut is_kept = false;
        for file in forgotten(&rig)? {
            let text: Value = serde_json::from_slice(&fs::read(&file)?)?;
            is_kept |= text["objects"][0]["envelope"]["id"] == envelope.id.as_str();
        }
        let what = format!("killed at step {nth}, {:?}", trace.steps.last());
        ensure!(is_known || is_kept, "{what}: envelope {} is nowhere", envelope.id);
        if trace.killed {
            continue;
        }
        output.succeeded()?;
        println!("{} steps: {:?}", trace.steps.len(), trace.steps);
        ensure!(!is_known && is_kept);
        let at = |wanted: &dyn Fn(&str) -> bool| {
            let found = trace.steps.iter().position(|step| wanted(&step.to_string()));
            found.with_context(|| format!("a step is missing: {:?}", trace.steps))
        };
        let written = at(&|step| step.starts_with("fsync(") && step.contains(".json"))?;
        let named = at(&|step| step.starts_with("link"))?;
        let synced = at(&|step| step == "fsync(forgotten)")?;
        let dropped = at(&|step| step.starts_with("pwrite64(keystore.db-wal"))?;
        ensure!(
            written < named && named < synced && synced < dropped,
            "{written} {named} {synced} {dropped}: {:?}",
            trace.steps
        );
        return Ok(());
    }
    anyhow::bail!("it does not get through in {MAX_STEPS} steps")
}

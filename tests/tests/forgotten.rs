//! A VM that has left is forgotten here, and neither its keys nor the way back are lost.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, MAX_STEPS, NVRAM, Rig, STATE};
use virtseal_testkit::{DomainSpec, Tracer, Way, edited, expect_names};

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
    let told = outcome.stderr.clone();
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
    Way::named("virtseal vm adopt --from", &told)?.take(&rig.sealed)?;
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
        // Something else may be written down before. That nothing is dropped by that is seen by each kill.
        let mut steps = trace.steps.iter();
        let dropped = steps
            .rposition(|step| step.to_string().starts_with("pwrite64(keystore.db-wal"))
            .context("nothing is dropped")?;
        ensure!(
            written < named && named < synced && synced < dropped,
            "{written} {named} {synced} {dropped}: {:?}",
            trace.steps
        );
        return Ok(());
    }
    anyhow::bail!("it does not get through in {MAX_STEPS} steps")
}

/// Where nobody looks for an image; on the same mount.
const AWAY: &str = "/var/lib/libvirt/images/away.bin";

/// A VM that has a second sealed disk.
struct Two {
    rig: Rig,
    spec: DomainSpec,
    data: String,
    envelope: String,
}

impl Two {
    fn start() -> Result<Self> {
        let rig = Rig::start()?;
        let spec = rig.sealed.seal_new("web01")?;
        let data = format!("{IMAGES}/data.qcow2");
        let vm = spec.uuid.to_string();
        let made = rig
            .sealed
            .json(&["volume", "create", &data, "--size", "8M", "--vm", &vm])?;
        let envelope = made["envelope"].as_str().context("no envelope")?.to_owned();
        let two = Self {
            rig,
            spec,
            data,
            envelope,
        };
        two.attach()?;
        Ok(two)
    }

    /// Has the XML name the disk, and seal the VM as it is then.
    fn attach(&self) -> Result<()> {
        let disk = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/><target dev='vdb' bus='virtio'/></disk>\
             <controller type='usb'",
            self.data
        );
        let xml = self.rig.sealed.dumpxml("web01")?;
        let xml = edited(&xml, "<controller type='usb'", &disk)?;
        self.rig.host().define_xml(&xml)?;
        self.rig.sealed.run(&["vm", "seal", "web01"]).map(drop)
    }

    fn detach(&self) -> Result<()> {
        let detach = ["detach-disk", "--config", "web01", "vdb"];
        self.rig.host().virsh(&detach)?.succeeded().map(drop)
    }

    fn is_known(&self) -> Result<bool> {
        let envelopes = self.rig.envelopes(&self.spec.uuid)?;
        Ok(envelopes.iter().any(|envelope| envelope.id == self.envelope))
    }

    fn is_in_xml(&self) -> Result<bool> {
        Ok(self.rig.sealed.dumpxml("web01")?.contains(&self.envelope))
    }
}

/// The record of a disk that was deleted goes by what is printed, stands in nobody's way from then on, and comes back with the disk.
#[test]
fn a_deleted_image_is_forgotten_and_blocks_nothing() -> Result<()> {
    let two = Two::start()?;
    let (sealed, host) = (&two.rig.sealed, two.rig.host());
    let forget = ["volume", "forget", &two.data];
    // It is there, and in use.
    let said = sealed.refused(8, &forget)?;
    expect_names(&said, &["web01 has it in its XML, as vdb", "data.qcow2 is there"])?;
    ensure!(two.is_known()? && two.is_in_xml()?);

    fs::rename(host.path(&two.data), host.path(AWAY))?;
    expect_names(&sealed.refused_start("web01")?, &["disk vdb", &two.data])?;
    // A rotation can't bring a copy up to date that nobody has.
    let passphrase = two.rig.passphrase()?;
    sealed.run(&["provider", "rotate", "main", "--passphrase-file", &passphrase])?;
    let backup = [
        "provider",
        "backup",
        "main",
        "--output",
        "/var/lib/virtseal/rotated.age",
    ];
    sealed.run(&[&backup[..], &["--passphrase-file", &passphrase]].concat())?;
    sealed.wait_for_copies(1)?;
    let said = sealed.refused(8, &forget)?;
    ensure!(!said.contains("is there"), "{said}");
    // With the wrong name, or another VM's, it stays.
    let said = sealed.refused(
        8,
        &["volume", "forget", "--force", "--yes-forget", "db01", &two.data],
    )?;
    expect_names(&said, &["'db01' was typed", "web01"])?;
    let said = sealed.refused(8, &forget)?;
    ensure!(two.is_known()?);
    let printed = Way::that_begins("virsh detach-disk", &said)?
        .through("virtseal volume forget")?
        .take(sealed)?;
    expect_names(
        &printed,
        &["kept in /var/lib/virtseal/forgotten/", "no key was destroyed"],
    )?;
    ensure!(!two.is_known()? && !two.is_in_xml()?);
    sealed.wait_for_copies(0)?;
    sealed.refused(7, &forget)?;
    sealed.expect_start("web01")?;

    // Nor is its provider needed for it.
    sealed.add_provider("spare")?;
    sealed.run(&["provider", "default", "spare"])?;
    sealed.run(&["provider", "move", "main", "spare", "--watch"])?;
    sealed.wait_for_copies(0)?;
    let deleted = sealed.virtseal(&["provider", "delete", "main"])?;
    expect_names(
        &deleted.stderr,
        &["should an image turn up", "virtseal provider restore main -i"],
    )?;
    deleted.succeeded()?;
    sealed.expect_start("web01")?;

    // It turns up after all.
    fs::rename(host.path(AWAY), host.path(&two.data))?;
    let adopt = ["volume", "adopt", &two.data];
    let said = sealed.virtseal(&adopt)?.refused()?;
    expect_names(
        &said,
        &["is not known on this host", "virtseal provider restore main"],
    )?;
    let kept = forgotten(&two.rig)?;
    let root = kept
        .iter()
        .find(|file| file.extension().is_some_and(|found| found == "age"));
    let root = inside(root.context("the root keys were not kept")?);
    sealed.run(&[
        "provider",
        "restore",
        "main",
        "-i",
        &root,
        "--backup-passphrase-file",
        &passphrase,
        "--passphrase-file",
        &passphrase,
    ])?;
    let adopted = sealed.run(&adopt)?;
    expect_names(&adopted, &[&two.envelope, &two.data])?;
    ensure!(two.is_known()?);
    two.attach()?;
    sealed.expect_start("web01")
}

/// What no VM names and no file is of is listed, with what drops it; and a volume that was moved is found again.
#[test]
fn a_volume_that_no_vm_has_is_listed_once_its_image_is_gone() -> Result<()> {
    let two = Two::start()?;
    let (sealed, host) = (&two.rig.sealed, two.rig.host());
    two.detach()?;
    ensure!(two.is_in_xml()?, "libvirt takes nothing out of the metadata");
    let orphans = sealed.run(&["provider", "orphans"])?;
    ensure!(!orphans.contains(&two.data), "it is there: {orphans}");
    let moved = format!("{IMAGES}/moved.qcow2");
    fs::rename(host.path(&two.data), host.path(&moved))?;
    let orphans = sealed.run(&["provider", "orphans"])?;
    expect_names(
        &orphans,
        &[
            &format!("{} (missing)", two.data),
            &format!("virtseal volume forget {}", two.data),
        ],
    )?;
    ensure!(!orphans.contains("not defined here"), "{orphans}");

    let adopted = sealed.run(&["volume", "adopt", &moved])?;
    expect_names(&adopted, &["data.qcow2 is at", &moved])?;
    let orphans = sealed.run(&["provider", "orphans"])?;
    ensure!(!orphans.contains(".qcow2"), "{orphans}");
    let again = sealed.json(&["volume", "adopt", &moved])?;
    ensure!(again["changed"] == false, "{again}");
    // A copy is not the volume, and what is no volume is none.
    fs::copy(host.path(&moved), host.path(&two.data))?;
    let copy = sealed.json(&["volume", "adopt", &two.data])?;
    expect_names(&copy.to_string(), &["is a copy of", &moved])?;
    host.run(&[
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "/run/plain.qcow2",
        "1M",
    ])?
    .succeeded()?;
    let said = sealed
        .virtseal(&["volume", "adopt", "/run/plain.qcow2"])?
        .refused()?;
    expect_names(&said, &["plain.qcow2 is not encrypted"])?;

    // Its data is there: whoever means it types the name of its VM.
    let said = sealed.refused(8, &["volume", "forget", &moved])?;
    expect_names(&said, &["moved.qcow2 is there", "virtseal volume forget --force"])?;
    let asked = sealed.virtseal_at_a_terminal(&["volume", "forget", "--force", &moved], &["web01"])?;
    expect_names(&asked.stdout, &["Type the name of its VM"])?;
    asked.succeeded()?;
    ensure!(!two.is_known()? && !two.is_in_xml()?);
    // The image may be needed, so its provider is.
    sealed.add_provider("spare")?;
    sealed.run(&["provider", "default", "spare"])?;
    sealed.run(&["provider", "move", "main", "spare", "--watch"])?;
    sealed.wait_for_copies(0)?;
    let said = sealed.refused(8, &["provider", "delete", "main"])?;
    expect_names(&said, &["forgotten in"])?;
    sealed.run(&["volume", "adopt", &moved])?;
    ensure!(two.is_known()?);
    sealed.run(&["vm", "status", "web01"]).map(drop)
}

/// Whenever the daemon dies, the keystore or a file that is whole has the envelope, and the command can be repeated.
#[test]
fn what_a_volume_forgets_is_kept_before_it_is_dropped() -> Result<()> {
    let mut two = Two::start()?;
    for nth in 1..MAX_STEPS {
        if !two.is_known()? {
            fs::rename(two.rig.host().path(AWAY), two.rig.host().path(&two.data))?;
            two.rig.sealed.run(&["volume", "adopt", &two.data])?;
            two.attach()?;
            two.detach()?;
        } else if nth == 1 {
            two.detach()?;
        }
        let image = two.rig.host().path(&two.data);
        if image.exists() {
            fs::rename(image, two.rig.host().path(AWAY))?;
        }
        let tracer = Tracer::kill_at_change(two.rig.sealed.daemon()?.outside_pid()?, nth)?;
        let output = two.rig.sealed.virtseal(&["volume", "forget", &two.data])?;
        let trace = tracer.finish()?;
        if trace.killed {
            two.rig
                .sealed
                .daemon()?
                .wait(std::time::Duration::from_secs(20))?;
            two.rig.sealed.start_daemon()?;
            two.rig.sealed.unlock()?;
        }
        let mut is_kept = false;
        for file in forgotten(&two.rig)? {
            let text: Value = serde_json::from_slice(&fs::read(&file)?)?;
            is_kept |= text["objects"][0]["envelope"]["id"] == two.envelope.as_str();
        }
        let what = format!("killed at step {nth}, {:?}", trace.steps.last());
        let is_known = two.is_known()?;
        ensure!(is_known || is_kept, "{what}: the envelope is nowhere");
        ensure!(
            is_known || !two.is_in_xml()?,
            "{what}: a copy that nobody knows is in the XML"
        );
        if trace.killed {
            continue;
        }
        output.succeeded()?;
        println!("{} steps: {:?}", trace.steps.len(), trace.steps);
        ensure!(!is_known && is_kept);
        return Ok(());
    }
    anyhow::bail!("it does not get through in {MAX_STEPS} steps")
}

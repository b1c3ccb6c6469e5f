//! Keys change while VMs go on: rotated, moved, given to a second provider, taken back, and destroyed only on purpose.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtseal_e2e::{KeptEnvelope, RootKey, SealedHost, Tracer, expect_names, kept_envelopes, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
const STATE: &str = "/var/lib/virtseal";
const IMAGES: &str = "/var/lib/libvirt/images";
/// No move of one envelope has as many steps.
const MOST_STEPS: usize = 120;

/// A host with the native providers `main` and `spare`, and what opens each.
struct Rig {
    sealed: SealedHost,
    roots: BTreeMap<String, RootKey>,
}

impl Rig {
    fn start() -> Result<Self> {
        let sealed = SealedHost::start()?;
        sealed.add_provider("spare")?;
        let mut roots = BTreeMap::new();
        for name in ["main", "spare"] {
            roots.insert(id_of(&sealed, name)?, root_of(&sealed, name)?);
        }
        Ok(Self { sealed, roots })
    }

    fn virtseal(&self, arguments: &[&str]) -> Result<String> {
        self.sealed.virtseal(arguments)?.succeeded()
    }

    /// What a command says that is refused with this exit code.
    fn refused(&self, code: i32, arguments: &[&str]) -> Result<String> {
        let output = self.sealed.virtseal(arguments)?;
        ensure!(
            output.status.code() == Some(code),
            "{} ended with {:?}, not {code}: {}{}",
            output.command,
            output.status.code(),
            output.stdout,
            output.stderr
        );
        Ok(output.stderr)
    }

    fn unlock(&self, name: &str) -> Result<()> {
        let file = self.sealed.passphrase_file()?;
        let file = file.to_str().context("a UTF-8 path")?;
        self.virtseal(&["provider", "unlock", name, "--passphrase-file", file])
            .map(drop)
    }

    fn kill_and_restart(&mut self) -> Result<()> {
        self.sealed.stop_daemon(Signal::SIGKILL)?;
        self.sealed.start_daemon()
    }

    /// The DEK of each envelope, by the first of its stanzas.
    fn deks(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut deks = BTreeMap::new();
        for envelope in kept_envelopes(&self.sealed.host().path(STATE))? {
            deks.insert(envelope.id.clone(), self.root(&envelope)?.dek(&envelope)?);
        }
        Ok(deks)
    }

    fn root(&self, envelope: &KeptEnvelope) -> Result<&RootKey> {
        let provider = envelope.stanza("provider")?;
        self.roots
            .get(provider)
            .with_context(|| format!("no root key of {provider}"))
    }

    /// Every object opens with what the keystore has for it.
    fn expect_objects_open(&self) -> Result<()> {
        for envelope in kept_envelopes(&self.sealed.host().path(STATE))? {
            self.root(&envelope)?.open_object(self.sealed.host(), &envelope)?;
        }
        Ok(())
    }

    /// Until no copy is behind.
    fn wait_for_copies(&self) -> Result<()> {
        wait_until(PATIENCE, "the copies to follow", || {
            Ok((self.stale()? == 0).then_some(()))
        })
    }

    fn stale(&self) -> Result<i64> {
        let jobs = self.sealed.json(&["jobs"])?;
        jobs["stale_copies"].as_i64().context("no stale_copies")
    }

    fn volume(&self, name: &str, nth: u128) -> Result<String> {
        let path = format!("{IMAGES}/{name}.qcow2");
        let vm = uuid(nth);
        self.virtseal(&["volume", "create", &path, "--size", "8M", "--vm", &vm])?;
        Ok(path)
    }

    /// The envelope that an image carries.
    fn carried(&self, path: &str) -> Result<Value> {
        let info = self.sealed.json(&["volume", "info", path])?;
        ensure!(info["envelope"].is_object(), "no envelope in {path}: {info}");
        Ok(info["envelope"].clone())
    }

    fn xml(&self, arguments: &[&str]) -> Result<String> {
        self.sealed
            .host()
            .virsh(&[&["dumpxml"], arguments].concat())?
            .succeeded()
    }

    fn job(&self) -> Result<Value> {
        let jobs = self.sealed.json(&["jobs"])?;
        jobs["jobs"]
            .as_array()
            .and_then(|jobs| jobs.last())
            .cloned()
            .context("no job")
    }
}

#[test]
fn vms_move_to_another_provider_while_they_run() -> Result<()> {
    let rig = Rig::start()?;
    for name in ["off01", "run01"] {
        rig.sealed.seal_new(name)?;
    }
    rig.sealed.start_paused("run01")?;
    let before = rig.deks()?;
    let image = |name: &str| format!("{IMAGES}/{name}.qcow2");
    let spare = id_of(&rig.sealed, "spare")?;

    let moved = rig
        .sealed
        .virtseal(&["provider", "move", "main", "spare", "--watch"])?;
    expect_names(&moved.stderr, &["new VMs still go to 'main'"])?;
    expect_names(
        &moved.succeeded()?,
        &["move from 'main' to 'spare'", "done", "6 changed, 0 left"],
    )?;
    ensure!(rig.deks()? == before, "a DEK has changed");

    // The XML follows at once, that of now too; so does the image of the VM that is off.
    wait_until(PATIENCE, "all copies but one to follow", || {
        Ok((rig.stale()? == 1).then_some(()))
    })?;
    for xml in [
        rig.xml(&["--inactive", "off01"])?,
        rig.xml(&["--inactive", "run01"])?,
        rig.xml(&["run01"])?,
    ] {
        ensure!(xml.matches(&spare).count() == 3, "{xml}");
        ensure!(xml.matches("\"generation\":2").count() == 3, "{xml}");
        ensure!(xml.contains("xmlns:virtseal=\"urn:virtseal:vm:1\""), "{xml}");
    }
    ensure!(rig.carried(&image("off01"))?["generation"] == 2);
    ensure!(rig.carried(&image("run01"))?["generation"] == 1);
    let copies = rig.sealed.json(&["jobs"])?["copies"].clone();
    ensure!(
        copies[0]["vm"] == "run01" && copies[0]["place"] == "image",
        "{copies}"
    );
    expect_names(
        copies[0]["reason"].as_str().unwrap_or_default(),
        &["is open in another"],
    )?;

    // Nothing needs main but that copy, and it says so.
    rig.virtseal(&["provider", "default", "spare"])?;
    let said = rig.refused(8, &["provider", "delete", "main"])?;
    expect_names(
        &said,
        &["'main' stays", "1 copies that are behind", "virtseal jobs"],
    )?;
    rig.sealed.destroy("run01")?;
    rig.wait_for_copies()?;
    ensure!(rig.carried(&image("run01"))?["generation"] == 2);
    rig.virtseal(&["provider", "delete", "main"])?;

    rig.expect_objects_open()?;
    for name in ["off01", "run01"] {
        rig.sealed.start_paused(name)?;
        rig.sealed.destroy(name)?;
    }
    Ok(())
}

#[test]
fn a_rotated_native_provider_waits_for_its_backup() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    let file = rig.sealed.passphrase_file()?;
    let file = file.to_str().context("a UTF-8 path")?.to_owned();
    fs::write(rig.sealed.host().path("/run/wrong"), "wrong")?;
    let wrong = ["provider", "rotate", "main", "--passphrase-file", "/run/wrong"];
    expect_names(&rig.refused(3, &wrong)?, &["does not accept this passphrase"])?;

    let rotated = rig
        .sealed
        .virtseal(&["provider", "rotate", "main", "--passphrase-file", &file])?;
    expect_names(&rotated.stderr, &["root key 2", "virtseal provider backup main"])?;
    rotated.succeeded()?;
    ensure!(state_of(&rig.sealed, "main")? == "NotBackedUp");
    let again = ["provider", "rotate", "main", "--passphrase-file", &file];
    expect_names(&rig.refused(9, &again)?, &["one runs at a time"])?;

    // What was sealed still starts, also after a restart; nothing new is sealed.
    rig.sealed.start_paused("web01")?;
    rig.sealed.destroy("web01")?;
    rig.kill_and_restart()?;
    rig.unlock("main")?;
    rig.sealed.start_paused("web01")?;
    rig.sealed.destroy("web01")?;
    let path = format!("{IMAGES}/new.qcow2");
    let vm = uuid(1);
    let create = ["volume", "create", &path, "--size", "8M", "--vm", &vm];
    expect_names(&rig.refused(8, &create)?, &["has not been backed up"])?;
    ensure!(!rig.sealed.host().path(&path).exists());
    wait_until(PATIENCE, "the job to say what it waits for", || {
        let waiting = rig.job()?["waiting"].as_str().unwrap_or_default().to_owned();
        Ok(waiting.contains("provider backup main").then_some(()))
    })?;

    let backup = "/run/second.age";
    rig.virtseal(&[
        "provider",
        "backup",
        "main",
        "--output",
        backup,
        "--passphrase-file",
        &file,
    ])?;
    rig.virtseal(&["jobs", "watch", "1"])?;
    ensure!(rig.job()?["changed"] == 3, "{}", rig.job()?);
    for envelope in kept_envelopes(&rig.sealed.host().path(STATE))? {
        ensure!(envelope.stanza("kek")?.starts_with("v2:vm:"));
    }
    rig.roots
        .insert(id_of(&rig.sealed, "main")?, root_of(&rig.sealed, "main")?);
    rig.wait_for_copies()?;
    rig.expect_objects_open()?;

    // The backup alone brings every generation to a new host.
    let xml = rig.sealed.dumpxml("web01")?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    fs::remove_dir_all(rig.sealed.host().path(STATE))?;
    rig.sealed.start_daemon()?;
    rig.virtseal(&[
        "provider",
        "restore",
        "main",
        "--input",
        backup,
        "--backup-passphrase-file",
        &file,
        "--passphrase-file",
        &file,
    ])?;
    rig.sealed.host().define_xml(&xml)?;
    rig.sealed.start_paused("web01")
}

#[test]
fn a_second_recipient_opens_what_the_first_can_not() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    let status = rig.virtseal(&["vm", "status"])?;
    expect_names(&status, &["1 VM hangs on provider 'main' alone: web01"])?;
    let added = rig
        .sealed
        .virtseal(&["provider", "recipients", "add", "spare", "--watch"])?;
    expect_names(&added.stderr, &["new VMs do not get a stanza of 'spare'"])?;
    added.succeeded()?;
    ensure!(!rig.virtseal(&["status"])?.contains("alone"));

    // The policy gives one to new VMs as well, or seals nothing.
    configure(&rig.sealed, "recipients: [main, spare]\n")?;
    rig.sealed.daemon()?.signal(Signal::SIGHUP)?;
    let path = format!("{IMAGES}/half.qcow2");
    rig.virtseal(&["provider", "lock", "spare"])?;
    let vm = uuid(7);
    let create = ["volume", "create", &path, "--size", "8M", "--vm", &vm];
    wait_until(PATIENCE, "the policy to be read", || {
        let output = rig.sealed.virtseal(&create)?;
        if output.status.success() {
            fs::remove_file(rig.sealed.host().path(&path))?;
        }
        Ok((output.status.code() == Some(3)).then_some(()))
    })?;
    ensure!(!rig.sealed.host().path(&path).exists());
    rig.unlock("spare")?;
    rig.sealed.seal_new("web02")?;
    rig.virtseal(&["provider", "lock", "main"])?;
    for name in ["web01", "web02"] {
        rig.sealed.start_paused(name)?;
        rig.sealed.destroy(name)?;
    }

    // spare may go where main opens, which is locked now; and main may not go where nobody else opens.
    let remove = ["provider", "recipients", "remove", "spare"];
    rig.virtseal(&remove)?;
    wait_until(PATIENCE, "the job to wait for main", || {
        let waiting = rig.job()?["waiting"].as_str().unwrap_or_default().to_owned();
        Ok(waiting.contains("provider 'main' is locked").then_some(()))
    })?;
    rig.sealed.start_paused("web01")?;
    rig.sealed.destroy("web01")?;
    rig.unlock("main")?;
    let id = rig.job()?["id"].to_string();
    rig.virtseal(&["jobs", "watch", &id])?;
    let said = rig.refused(8, &["provider", "recipients", "remove", "main"])?;
    expect_names(
        &said,
        &[
            "can be opened by nobody else",
            "web01",
            "web02",
            "provider move main",
        ],
    )
}

#[test]
fn nothing_that_is_needed_is_deleted_by_accident() -> Result<()> {
    let rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    rig.sealed.seal_new("web02")?;
    let said = rig.refused(8, &["provider", "delete", "main"])?;
    expect_names(
        &said,
        &["it is the default provider", "virtseal provider default"],
    )?;
    rig.virtseal(&["provider", "default", "spare"])?;
    let said = rig.refused(8, &["provider", "delete", "main"])?;
    expect_names(
        &said,
        &[
            "6 objects of 2 VMs (web01, web02)",
            "6 of them have no other",
            "virtseal provider move main spare",
        ],
    )?;
    for typed in [&["--yes-delete", "mian"][..], &[]] {
        let command = [&["provider", "delete", "main", "--force"], typed].concat();
        rig.refused(8, &command)?;
    }

    // A VM that is gone leaves its keys, and they can be found.
    rig.sealed.host().undefine("web02")?;
    let orphans = rig.sealed.json(&["provider", "orphans"])?;
    let of = |part: &str| orphans[part].as_array().map(Vec::len);
    ensure!((of("envelopes"), of("keks")) == (Some(3), Some(1)), "{orphans}");
    ensure!(orphans["envelopes"][0]["vm"] == "web02", "{orphans}");

    let command = ["provider", "delete", "main", "--force", "--yes-delete", "main"];
    let deleted = rig.sealed.virtseal(&command)?;
    expect_names(&deleted.stderr, &["6 objects of 2 VMs"])?;
    deleted.succeeded()?;
    let status = rig.virtseal(&["vm", "status", "web01"])?;
    expect_names(&status, &["locked: provider 'main' was deleted"])?;
    let said = rig.sealed.refused_start("web01")?;
    expect_names(
        &said,
        &["web01 stays off", "'main'", "virtseal provider restore main"],
    )?;

    // Its backup brings it back, and the VM with it.
    let file = rig.sealed.passphrase_file()?;
    let file = file.to_str().context("a UTF-8 path")?;
    rig.virtseal(&[
        "provider",
        "restore",
        "main",
        "--input",
        "/var/lib/virtseal/main.age",
        "--backup-passphrase-file",
        file,
        "--passphrase-file",
        file,
    ])?;
    rig.sealed.start_paused("web01")
}

#[test]
fn a_shredded_vm_opens_for_nobody() -> Result<()> {
    let rig = Rig::start()?;
    rig.sealed.seal_new("doomed")?;
    rig.sealed.seal_new("kept")?;
    rig.sealed.start_paused("doomed")?;
    expect_names(
        &rig.refused(9, &["vm", "shred", "doomed", "--yes-shred", "doomed"])?,
        &["doomed is running"],
    )?;
    rig.sealed.destroy("doomed")?;
    let said = rig.refused(8, &["vm", "shred", "doomed"])?;
    expect_names(&said, &["would be lost for ever", "--yes-shred doomed"])?;
    let path = rig.sealed.host().path(format!("{IMAGES}/doomed.qcow2"));
    let before = fs::read(&path)?;
    let deks: Vec<_> = kept_envelopes(&rig.sealed.host().path(STATE))?
        .into_iter()
        .filter(|envelope| envelope.location.contains("doomed"))
        .map(|envelope| Ok((rig.root(&envelope)?.dek(&envelope)?, envelope)))
        .collect::<Result<_>>()?;
    ensure!(deks.len() == 2, "{deks:?}");

    let receipt = rig
        .sealed
        .json(&["vm", "shred", "doomed", "--yes-shred", "doomed"])?;
    let text = receipt.to_string();
    expect_names(
        &text,
        &[
            "1 keyslots made dead",
            "removed from its metadata",
            "3 envelopes removed",
            "derived from the root key",
            "backups",
        ],
    )?;
    // Even who has the DEK opens nothing.
    for (_, envelope) in &deks {
        ensure!(
            rig.root(envelope)?
                .open_object(rig.sealed.host(), envelope)
                .is_err(),
            "{} still opens",
            envelope.location
        );
    }
    let after = fs::read(&path)?;
    ensure!(before.len() == after.len());
    ensure!(
        !contains(&after, b"\"stanzas\""),
        "the envelope is still in the image"
    );
    for file in ["keystore.db", "keystore.db-wal"] {
        let kept = fs::read(rig.sealed.host().path(STATE).join(file)).unwrap_or_default();
        for (_, envelope) in &deks {
            ensure!(!contains(&kept, envelope.id.as_bytes()), "still in {file}");
        }
    }
    let said = rig.sealed.host().virsh(&["start", "--paused", "doomed"])?;
    ensure!(!said.status.success(), "a shredded VM starts");
    rig.sealed.expect_no_secrets()?;
    rig.sealed.start_paused("kept")
}

#[test]
fn a_sweep_survives_being_killed_again_and_again() -> Result<()> {
    let mut rig = Rig::start()?;
    configure(&rig.sealed, "batch_size: 1\ninterval: 30ms\n")?;
    rig.kill_and_restart()?;
    rig.unlock("main")?;
    rig.unlock("spare")?;
    for nth in 0..24 {
        rig.volume(&format!("swept{nth}"), 0x1000 + nth)?;
    }
    let before = rig.deks()?;
    rig.virtseal(&["provider", "move", "main", "spare"])?;
    let began = Instant::now();
    let mut kills = 0;
    while rig.job()?["state"] == "running" {
        ensure!(began.elapsed() < 4 * PATIENCE, "it never ends: {}", rig.job()?);
        std::thread::sleep(Duration::from_millis(40 + 37 * kills % 150));
        rig.sealed.stop_daemon(Signal::SIGKILL)?;
        ensure!(rig.deks()? == before, "a DEK was lost by kill {kills}");
        rig.sealed.start_daemon()?;
        rig.unlock("main")?;
        rig.unlock("spare")?;
        kills += 1;
    }
    println!("{kills} kills");
    ensure!(kills >= 5, "only {kills} kills");
    ensure!(rig.job()?["changed"] == 24, "{}", rig.job()?);
    rig.wait_for_copies()?;
    for nth in 0..24 {
        ensure!(rig.carried(&format!("{IMAGES}/swept{nth}.qcow2"))?["generation"] == 2);
    }
    ensure!(rig.deks()? == before);
    rig.expect_objects_open()
}

#[test]
fn a_move_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    let image = rig.volume("stepped", 0x2000)?;
    let before = rig.deks()?;
    for nth in 1..MOST_STEPS {
        let (from, to) = if nth % 2 == 1 {
            ("main", "spare")
        } else {
            ("spare", "main")
        };
        let at = kept_envelopes(&rig.sealed.host().path(STATE))?;
        let at = at[0].stanza("provider")?.to_owned();
        if at != id_of(&rig.sealed, from)? {
            // The kill before was after the end of the move: start from there.
            rig.virtseal(&["provider", "move", to, from, "--watch"])?;
            rig.wait_for_copies()?;
        }
        let daemon = rig.sealed.daemon()?.outside_pid()?;
        let tracer = Tracer::kill_at(daemon, nth)?;
        let output = rig.sealed.virtseal(&["provider", "move", from, to, "--watch"])?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while output.status.success() && !tracer.process_is_gone() && Instant::now() < deadline {
            // The image follows after the job's end.
            if rig
                .sealed
                .virtseal(&["jobs"])
                .is_ok_and(|jobs| !jobs.stdout.contains("behind"))
            {
                break;
            }
        }
        let trace = tracer.finish()?;
        if !trace.killed {
            println!("{} steps: {:?}", trace.steps.len(), trace.steps);
            ensure!(trace.steps.len() > 10, "too few steps: {:?}", trace.steps);
            ensure!(
                trace.steps.iter().any(|step| step.contains("stepped")),
                "the image is not among them: {:?}",
                trace.steps
            );
            return Ok(());
        }
        let what = || format!("killed at step {nth}, {:?}", trace.steps.last());
        rig.sealed.daemon()?.wait(PATIENCE)?;
        ensure!(rig.deks()? == before, "{}", what());
        rig.sealed.start_daemon().with_context(what)?;
        rig.unlock("main")?;
        rig.unlock("spare")?;
        if rig.sealed.json(&["jobs"])?["jobs"]
            .as_array()
            .is_some_and(|jobs| !jobs.is_empty())
        {
            let id = rig.job()?["id"].to_string();
            rig.virtseal(&["jobs", "watch", &id]).with_context(what)?;
        }
        rig.wait_for_copies().with_context(what)?;
        let kept = &kept_envelopes(&rig.sealed.host().path(STATE))?[0];
        ensure!(
            rig.carried(&image)?["stanzas"][0]["provider"] == kept.stanza("provider")?,
            "{}",
            what()
        );
        ensure!(rig.deks()? == before, "{}", what());
        rig.expect_objects_open().with_context(what)?;
    }
    bail!("the move does not get through in {MOST_STEPS} steps")
}

fn configure(sealed: &SealedHost, settings: &str) -> Result<()> {
    let directory = sealed.host().path("/etc/virtseal");
    fs::create_dir_all(&directory)?;
    Ok(fs::write(directory.join("virtseald.yaml"), settings)?)
}

fn provider(sealed: &SealedHost, name: &str, field: &str) -> Result<String> {
    let listed = sealed.json(&["provider", "list"])?;
    let found = listed
        .as_array()
        .and_then(|listed| listed.iter().find(|provider| provider["name"] == name));
    let found = found.with_context(|| format!("no provider {name} in {listed}"))?;
    Ok(found[field].as_str().context("no such field")?.to_owned())
}

fn id_of(sealed: &SealedHost, name: &str) -> Result<String> {
    provider(sealed, name, "id")
}

fn state_of(sealed: &SealedHost, name: &str) -> Result<String> {
    provider(sealed, name, "state")
}

/// The newest root key of a native provider.
fn root_of(sealed: &SealedHost, name: &str) -> Result<RootKey> {
    let file = format!("/run/{name}-root.json");
    let _ = fs::remove_file(sealed.host().path(&file));
    sealed
        .virtseal(&["provider", "backup", name, "--output", &file, "--no-passphrase"])?
        .succeeded()?;
    RootKey::from_backup(&fs::read(sealed.host().path(Path::new(&file)))?)
}

fn uuid(nth: u128) -> String {
    let digits = format!("{nth:032x}");
    let (a, b, c, d, e) = (
        &digits[..8],
        &digits[8..12],
        &digits[12..16],
        &digits[16..20],
        &digits[20..],
    );
    format!("{a}-{b}-{c}-{d}-{e}")
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

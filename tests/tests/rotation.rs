//! Keys change while VMs go on: rotated, moved, given to a second provider, taken back, and destroyed only on purpose.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, STATE, root_of};
use virtseal_testkit::{
    KeptEnvelope, RootKey, SealedHost, Tracer, Way, expect_durable, expect_names, kept_envelopes, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// Where a root key is for a moment.
const ROOT: &str = "/run/root.json";
/// No move of one envelope has as many steps.
const MAX_STEPS: usize = 120;

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
            roots.insert(id_of(&sealed, name)?, root_of(&sealed, name, ROOT)?);
        }
        Ok(Self { sealed, roots })
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

    fn volume(&self, name: &str, nth: u128) -> Result<String> {
        let path = format!("{IMAGES}/{name}.qcow2");
        let vm = Uuid::from_u128(nth).to_string();
        self.sealed
            .run(&["volume", "create", &path, "--size", "8M", "--vm", &vm])?;
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
    rig.sealed.wait_for_copies(1)?;
    for xml in [
        rig.xml(&["--inactive", "off01"])?,
        rig.xml(&["--inactive", "run01"])?,
        rig.xml(&["run01"])?,
    ] {
        ensure!(xml.matches(&spare).count() == 3, "{xml}");
        // That the VM has run is a change of its vTPM's envelope.
        let seen = xml.matches("\"seen\":true").count();
        ensure!(xml.matches("\"generation\":2").count() == 3 - seen, "{xml}");
        ensure!(xml.matches("\"generation\":3").count() == seen, "{xml}");
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
    rig.sealed.run(&["provider", "default", "spare"])?;
    let said = rig.sealed.refused(8, &["provider", "delete", "main"])?;
    expect_names(
        &said,
        &["'main' stays", "an outdated copy needs it", "virtseal jobs"],
    )?;
    rig.sealed.destroy("run01")?;
    rig.sealed.wait_for_copies(0)?;
    ensure!(rig.carried(&image("run01"))?["generation"] == 2);
    rig.sealed.run(&["provider", "delete", "main"])?;

    rig.expect_objects_open()?;
    for name in ["off01", "run01"] {
        rig.sealed.expect_start(name)?;
    }
    Ok(())
}

/// A move to a provider that is locked waits, and holds up nobody who needs another one: it ends with all that is left, and goes on when it is
/// told to.
#[test]
fn a_job_that_waits_gives_way_and_is_taken_up_again() -> Result<()> {
    let rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    rig.sealed.run(&["provider", "lock", "spare"])?;
    rig.sealed.run(&["provider", "move", "main", "spare"])?;
    let waiting = wait_until(PATIENCE, "the move waits", || {
        let job = rig.sealed.last_job()?;
        Ok(job["waiting"].is_string().then_some(job))
    })?;
    let id = waiting["id"].to_string();
    // What could not work either does not end it.
    rig.sealed
        .refused(9, &["provider", "recipients", "add", "spare"])?;

    let rekey = rig.sealed.virtseal(&["vm", "rekey", "web01", "--watch"])?;
    let resume = format!("virtseal jobs resume {id}");
    expect_names(
        &rekey.stderr,
        &[&format!("job {id}, which waited"), "left", &resume],
    )?;
    rekey.succeeded()?;
    rig.sealed.expect_start("web01")?;
    let jobs = rig.sealed.json(&["jobs"])?;
    let all = jobs["jobs"].as_array().context("no jobs")?;
    let ended = all
        .iter()
        .find(|job| job["id"] == waiting["id"])
        .context("the move")?;
    ensure!(ended["state"] == "incomplete" && ended["left"] != 0, "{ended}");
    ensure!(
        ended["reasons"].to_string().contains("'spare' is locked"),
        "{ended}"
    );

    rig.sealed.unlock_provider("spare")?;
    rig.sealed.run(&["jobs", "resume", &id, "--watch"])?;
    rig.sealed.run(&["provider", "lock", "main"])?;
    rig.sealed.expect_start("web01")
}

#[test]
fn a_rotated_native_provider_waits_for_its_backup() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    let file = rig.sealed.passphrase_file()?;
    let file = file.to_str().context("a UTF-8 path")?.to_owned();
    fs::write(rig.sealed.host().path("/run/wrong"), "wrong")?;
    let wrong = ["provider", "rotate", "main", "--passphrase-file", "/run/wrong"];
    expect_names(
        &rig.sealed.refused(3, &wrong)?,
        &["does not accept this passphrase"],
    )?;

    let rotated = rig
        .sealed
        .virtseal(&["provider", "rotate", "main", "--passphrase-file", &file])?;
    expect_names(&rotated.stderr, &["root key 2", "virtseal provider backup main"])?;
    rotated.succeeded()?;
    ensure!(rig.sealed.provider("main")?["state"] == "not_backed_up");
    let attention = rig.sealed.run(&["status"])?;
    expect_names(
        &attention,
        &["'main' wraps no key until", "Next: virtseal provider backup main"],
    )?;
    let again = ["provider", "rotate", "main", "--passphrase-file", &file];
    expect_names(&rig.sealed.refused(9, &again)?, &["one runs at a time"])?;

    // What was sealed still starts, also after a restart; nothing new is sealed.
    rig.sealed.expect_start("web01")?;
    rig.sealed.kill_and_restart()?;
    rig.sealed.unlock_provider("main")?;
    rig.sealed.expect_start("web01")?;
    let path = format!("{IMAGES}/new.qcow2");
    let vm = Uuid::from_u128(1).to_string();
    let create = ["volume", "create", &path, "--size", "8M", "--vm", &vm];
    expect_names(&rig.sealed.refused(8, &create)?, &["has not been backed up"])?;
    ensure!(!rig.sealed.host().path(&path).exists());
    wait_until(PATIENCE, "the job to say what it waits for", || {
        let waiting = rig.sealed.last_job()?["waiting"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Ok(waiting.contains("provider backup main").then_some(()))
    })?;

    let backup = "/run/second.age";
    rig.sealed.run(&[
        "provider",
        "backup",
        "main",
        "--output",
        backup,
        "--passphrase-file",
        &file,
    ])?;
    rig.sealed.run(&["jobs", "watch", "1"])?;
    ensure!(
        rig.sealed.last_job()?["changed"] == 3,
        "{}",
        rig.sealed.last_job()?
    );
    for envelope in kept_envelopes(&rig.sealed.host().path(STATE))? {
        ensure!(envelope.stanza("kek")?.starts_with("v2:vm:"));
    }
    rig.roots
        .insert(id_of(&rig.sealed, "main")?, root_of(&rig.sealed, "main", ROOT)?);
    rig.sealed.wait_for_copies(0)?;
    rig.expect_objects_open()?;

    // On a new host, the backup from before opens nothing of it, and no second root key 2 is made.
    let xml = rig.sealed.dumpxml("web01")?;
    let state = rig.sealed.host().path(STATE);
    fs::copy(state.join("main.age"), rig.sealed.host().path("/run/first.age"))?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    fs::remove_dir_all(state)?;
    rig.sealed.start_daemon()?;
    let restore = |backup: &str| {
        let from = ["provider", "restore", "main", "--input", backup];
        let by = ["--backup-passphrase-file", &file, "--passphrase-file", &file];
        rig.sealed.run(&[&from[..], &by].concat())
    };
    restore("/run/first.age")?;
    rig.sealed.host().define_xml(&xml)?;
    expect_names(&rig.sealed.refused_start("web01")?, &["does not know KEK v2:vm:"])?;
    let said = rig.sealed.refused(8, &again)?;
    expect_names(&said, &["has root key 1", "the XML of web01", "newer backup"])?;

    // The newest backup alone brings every generation.
    rig.sealed
        .run(&["provider", "delete", "main", "--force", "--yes-delete", "main"])?;
    restore(backup)?;
    rig.sealed.start_paused("web01")
}

#[test]
fn a_second_recipient_opens_what_the_first_can_not() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    let status = rig.sealed.run(&["vm", "status"])?;
    expect_names(&status, &["1 VM depends on provider 'main' alone: web01"])?;
    let added = rig
        .sealed
        .virtseal(&["provider", "recipients", "add", "spare", "--watch"])?;
    expect_names(&added.stderr, &["new VMs do not get a stanza of 'spare'"])?;
    added.succeeded()?;
    ensure!(!rig.sealed.run(&["status"])?.contains("alone"));

    // The policy gives one to new VMs as well, or seals nothing.
    rig.sealed.configure("recipients: [main, spare]\n")?;
    rig.sealed.daemon()?.signal(Signal::SIGHUP)?;
    let path = format!("{IMAGES}/half.qcow2");
    rig.sealed.run(&["provider", "lock", "spare"])?;
    let vm = Uuid::from_u128(7).to_string();
    let create = ["volume", "create", &path, "--size", "8M", "--vm", &vm];
    wait_until(PATIENCE, "the policy to be read", || {
        let output = rig.sealed.virtseal(&create)?;
        if output.status.success() {
            fs::remove_file(rig.sealed.host().path(&path))?;
        }
        Ok((output.status.code() == Some(3)).then_some(()))
    })?;
    ensure!(!rig.sealed.host().path(&path).exists());
    rig.sealed.unlock_provider("spare")?;
    rig.sealed.seal_new("web02")?;
    rig.sealed.run(&["provider", "lock", "main"])?;
    for name in ["web01", "web02"] {
        rig.sealed.expect_start(name)?;
    }

    // spare may go where main opens, which is locked now; and main may not go where nobody else opens.
    let remove = ["provider", "recipients", "remove", "spare"];
    rig.sealed.run(&remove)?;
    wait_until(PATIENCE, "the job to wait for main", || {
        let waiting = rig.sealed.last_job()?["waiting"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Ok(waiting.contains("provider 'main' is locked").then_some(()))
    })?;
    rig.sealed.expect_start("web01")?;
    rig.sealed.unlock_provider("main")?;
    let id = rig.sealed.last_job()?["id"].to_string();
    rig.sealed.run(&["jobs", "watch", &id])?;
    let said = rig
        .sealed
        .refused(8, &["provider", "recipients", "remove", "main"])?;
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
    let said = rig.sealed.refused(8, &["provider", "delete", "main"])?;
    expect_names(
        &said,
        &["it is the default provider", "virtseal provider default"],
    )?;
    Way::that_begins("virtseal provider default", &said)?
        .with("OTHER", "spare")
        .take(&rig.sealed)?;
    let said = rig.sealed.refused(8, &["provider", "delete", "main"])?;
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
        rig.sealed.refused(8, &command)?;
    }
    let force = ["provider", "delete", "main", "--force"];
    let asked = rig.sealed.virtseal_at_a_terminal(&force, &["mian"])?;
    ensure!(asked.code() == Some(8), "{asked:?}");
    let (lost, question) = asked.stdout.split_once("Type its name").context("no question")?;
    expect_names(lost, &["6 objects of 2 VMs (web01, web02) need it"])?;
    expect_names(question, &["'mian' was typed"])?;

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
    let status = rig.sealed.run(&["vm", "status", "web01"])?;
    expect_names(&status, &["locked: provider 'main' was deleted"])?;
    let said = rig.sealed.refused_start("web01")?;
    expect_names(
        &said,
        &["web01 stays off", "'main'", "virtseal provider restore main"],
    )?;

    // Its backup brings it back, and the VM with it.
    let file = rig.sealed.passphrase_file()?;
    let file = file.to_str().context("a UTF-8 path")?;
    rig.sealed.run(&[
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
        &rig.sealed
            .refused(9, &["vm", "shred", "doomed", "--yes-shred", "doomed"])?,
        &["doomed is running"],
    )?;
    rig.sealed.destroy("doomed")?;
    let said = rig.sealed.refused(8, &["vm", "shred", "doomed"])?;
    expect_names(&said, &["would be lost for ever", "--yes-shred=doomed"])?;
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
            "left as it is: encrypted with a key that is gone",
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
    rig.sealed.configure("batch_size: 1\ninterval: 30ms\n")?;
    rig.sealed.kill_and_restart()?;
    rig.sealed.unlock_provider("main")?;
    rig.sealed.unlock_provider("spare")?;
    for nth in 0..24 {
        rig.volume(&format!("swept{nth}"), 0x1000 + nth)?;
    }
    let before = rig.deks()?;
    rig.sealed.run(&["provider", "move", "main", "spare"])?;
    let began = Instant::now();
    let mut kills = 0;
    while rig.sealed.last_job()?["state"] == "running" {
        ensure!(
            began.elapsed() < 4 * PATIENCE,
            "it never ends: {}",
            rig.sealed.last_job()?
        );
        std::thread::sleep(Duration::from_millis(40 + 37 * kills % 150));
        rig.sealed.stop_daemon(Signal::SIGKILL)?;
        ensure!(rig.deks()? == before, "a DEK was lost by kill {kills}");
        rig.sealed.start_daemon()?;
        rig.sealed.unlock_provider("main")?;
        rig.sealed.unlock_provider("spare")?;
        kills += 1;
    }
    println!("{kills} kills");
    ensure!(kills >= 5, "only {kills} kills");
    ensure!(
        rig.sealed.last_job()?["changed"] == 24,
        "{}",
        rig.sealed.last_job()?
    );
    rig.sealed.wait_for_copies(0)?;
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
    for nth in 1..MAX_STEPS {
        let (from, to) = if nth % 2 == 1 {
            ("main", "spare")
        } else {
            ("spare", "main")
        };
        let at = kept_envelopes(&rig.sealed.host().path(STATE))?;
        let at = at[0].stanza("provider")?.to_owned();
        if at != id_of(&rig.sealed, from)? {
            // The kill before was after the end of the move: start from there.
            rig.sealed.run(&["provider", "move", to, from, "--watch"])?;
            rig.sealed.wait_for_copies(0)?;
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
                .is_ok_and(|jobs| !jobs.stdout.contains("Outdated"))
            {
                break;
            }
        }
        let trace = tracer.finish()?;
        if !trace.killed {
            println!("{} steps: {:?}", trace.steps.len(), trace.steps);
            expect_durable(&trace.steps)?;
            ensure!(trace.steps.len() > 10, "too few steps: {:?}", trace.steps);
            ensure!(
                trace.steps.iter().any(|step| step.file.contains("stepped")),
                "the image is not among them: {:?}",
                trace.steps
            );
            return Ok(());
        }
        let what = || format!("killed at step {nth}, {:?}", trace.steps.last());
        rig.sealed.daemon()?.wait(PATIENCE)?;
        ensure!(rig.deks()? == before, "{}", what());
        rig.sealed.start_daemon().with_context(what)?;
        rig.sealed.unlock_provider("main")?;
        rig.sealed.unlock_provider("spare")?;
        if rig.sealed.json(&["jobs"])?["jobs"]
            .as_array()
            .is_some_and(|jobs| !jobs.is_empty())
        {
            let id = rig.sealed.last_job()?["id"].to_string();
            rig.sealed.run(&["jobs", "watch", &id]).with_context(what)?;
        }
        rig.sealed.wait_for_copies(0).with_context(what)?;
        let kept = &kept_envelopes(&rig.sealed.host().path(STATE))?[0];
        ensure!(
            rig.carried(&image)?["stanzas"][0]["provider"] == kept.stanza("provider")?,
            "{}",
            what()
        );
        ensure!(rig.deks()? == before, "{}", what());
        rig.expect_objects_open().with_context(what)?;
    }
    bail!("the move does not get through in {MAX_STEPS} steps")
}

fn id_of(sealed: &SealedHost, provider: &str) -> Result<String> {
    let shown = sealed.provider(provider)?;
    Ok(shown["id"].as_str().context("no id")?.to_owned())
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

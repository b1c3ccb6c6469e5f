//! Key changes that are killed on their way, or run out of space, lose nothing and can be repeated.
//!
//! A first round counts the steps of a command, see [`virtseal_testkit::Tracer`]; the others kill virtseald before some of them,
//! spread over all. `rotation.rs` does so at every step of a move.

mod volumes;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::{IMAGES, Rig, STATE, done_or, root_of};
use virtseal_testkit::{
    KeptEnvelope, Output, RootKey, Trace, Tracer, edit_keystore, edited, expect_durable, expect_names,
    kept_envelopes, pin_log, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);
/// The rounds of a story: one that only counts, then those with a kill.
struct Rounds {
    steps: Vec<usize>,
    next: usize,
    kills: usize,
}

impl Rounds {
    fn new() -> Self {
        Self {
            steps: vec![usize::MAX],
            next: 0,
            kills: 0,
        }
    }

    fn next(&mut self) -> Option<(usize, usize)> {
        let round = self.next;
        self.next += 1;
        Some((round, *self.steps.get(round)?))
    }

    /// One of the others has killed it.
    fn killed(&mut self, nth: usize, trace: &Trace) {
        println!("killed at step {nth}, {:?}", trace.steps.last());
        self.kills += 1;
    }

    /// Most of the rounds did kill it: how many steps there are may differ a little.
    fn expect_kills(&self) -> Result<()> {
        let rounds = self.steps.len() - 1;
        ensure!(2 * self.kills > rounds, "{} kills in {rounds} rounds", self.kills);
        Ok(())
    }

    /// What the first round has seen; so many others follow.
    fn counted(&mut self, trace: &Trace, names: &str, kills: usize) -> Result<()> {
        println!("{} steps: {:?}", trace.steps.len(), trace.steps);
        ensure!(!trace.killed, "killed at a step that nobody has asked for");
        let is_there = trace.steps.iter().any(|step| step.file.contains(names));
        expect_durable(&trace.steps)?;
        ensure!(is_there, "{names} is not among them: {:?}", trace.steps);
        let last = trace.steps.len();
        let spread = (0..kills).map(|kill| 1 + kill * (last - 1) / (kills - 1));
        self.steps.extend(spread);
        Ok(())
    }
}

fn volume(rig: &Rig, name: &str, nth: u32) -> Result<String> {
    let (path, vm) = (
        format!("{IMAGES}/{name}.qcow2"),
        format!("00000000-0000-4000-8000-{nth:012}"),
    );
    let create = ["volume", "create", &path, "--size", "8M", "--vm", &vm];
    rig.sealed.run(&create)?;
    Ok(path)
}

fn kept(rig: &Rig) -> Result<Vec<KeptEnvelope>> {
    kept_envelopes(&rig.host().path(STATE))
}

/// The DEK of each envelope, by the one of `roots` (the oldest first) that its KEK names.
fn deks(rig: &Rig, roots: &[&RootKey]) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut deks = BTreeMap::new();
    for envelope in kept(rig)? {
        let generation: usize = envelope
            .stanza("kek")?
            .trim_start_matches('v')
            .split(':')
            .next()
            .context("a KEK without a generation")?
            .parse()?;
        let root = roots
            .get(generation - 1)
            .with_context(|| format!("no root key {generation}"))?;
        root.open_object(rig.host(), &envelope)?;
        deks.insert(envelope.id.clone(), root.dek(&envelope)?);
    }
    Ok(deks)
}

/// Does `work`, which goes on behind the command until `is_over`, and kills the daemon before its `nth` step.
fn kill_at(
    rig: &mut Rig,
    nth: usize,
    command: &[&str],
    is_over: impl Fn(&Rig) -> Result<bool>,
) -> Result<(Output, Trace)> {
    let tracer = Tracer::kill_at_change(rig.sealed.daemon()?.outside_pid()?, nth)?;
    let output = rig.sealed.virtseal(command)?;
    let began = Instant::now();
    while output.status.success()
        && !tracer.process_is_gone()
        && began.elapsed() < PATIENCE
        && !is_over(rig).unwrap_or(false)
    {}
    let trace = tracer.finish()?;
    if trace.killed {
        rig.sealed.daemon()?.wait(PATIENCE)?;
    }
    Ok((output, trace))
}

/// No job runs, and no copy is behind.
fn is_quiet(rig: &Rig) -> Result<bool> {
    let jobs = rig.sealed.json(&["jobs"])?;
    let running = jobs["jobs"]
        .as_array()
        .is_some_and(|jobs| jobs.iter().any(|job| job["state"] == "running"));
    Ok(!running && jobs["stale_copies"] == 0)
}

fn wait_until_quiet(rig: &Rig) -> Result<()> {
    wait_until(PATIENCE, "the job and the copies", || {
        Ok(is_quiet(rig)?.then_some(()))
    })
}

#[test]
fn a_shredding_can_be_killed_on_its_way() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("kept")?;
    let before = deks(&rig, &[&rig.root])?;
    let mut rounds = Rounds::new();
    while let Some((round, nth)) = rounds.next() {
        let name = format!("doomed{round}");
        rig.sealed.seal_new(&name)?;
        let mut doomed = kept(&rig)?;
        doomed.retain(|envelope| envelope.location.contains(&name));
        ensure!(doomed.len() == 2, "{doomed:?}");
        let shred = ["vm", "shred", &name, "--yes-shred", &name];
        let (output, trace) = kill_at(&mut rig, nth, &shred, |_| Ok(true))?;
        let what = || format!("killed at step {nth}, {:?}", trace.steps.last());
        if round == 0 {
            output.succeeded()?;
            rounds.counted(&trace, "doomed0.qcow2", 6)?;
        } else if trace.killed {
            rounds.killed(nth, &trace);
            rig.sealed.start_daemon().with_context(what)?;
            rig.sealed.unlock()?;
            let again = rig.sealed.virtseal(&shred)?;
            println!("{}\n{}{}", what(), again.stdout, again.stderr);
            ensure!(!again.stdout.contains("left alone: it is"), "{}", again.stdout);
            done_or(again, "has no keys here").with_context(what)?;
        }
        for envelope in &doomed {
            let opens = rig.root.open_object(rig.host(), envelope).is_ok();
            ensure!(!opens, "{} still opens, {}", envelope.location, what());
        }
        ensure!(deks(&rig, &[&rig.root])? == before, "{}", what());
    }
    rounds.expect_kills()?;
    rig.sealed.start_paused("kept")
}

#[test]
fn a_native_rotation_can_be_killed_on_its_way() -> Result<()> {
    let mut rig = Rig::start()?;
    volume(&rig, "spun", 1)?;
    let file = rig.passphrase()?;
    let rotate = ["provider", "rotate", "main", "--passphrase-file", &file];
    let mut roots = vec![root_of(&rig.sealed, "main", "/run/0.json")?];
    let before = deks(&rig, &roots.iter().collect::<Vec<_>>())?;
    let mut rounds = Rounds::new();
    while let Some((round, nth)) = rounds.next() {
        let (output, trace) = kill_at(&mut rig, nth, &rotate, |_| Ok(true))?;
        let what = || format!("killed at step {nth}, {:?}", trace.steps.last());
        if round == 0 {
            output.succeeded()?;
            rounds.counted(&trace, "keystore.db-wal", 4)?;
        } else if trace.killed {
            rounds.killed(nth, &trace);
            let known = roots.iter().collect::<Vec<_>>();
            ensure!(deks(&rig, &known)? == before, "{}", what());
            rig.sealed.start_daemon().with_context(what)?;
            rig.sealed.unlock_provider("main")?;
            done_or(rig.sealed.virtseal(&rotate)?, "one runs at a time").with_context(what)?;
        }
        // Repeated, it has made one root key and no more. Its backup lets the job go on.
        roots.push(root_of(&rig.sealed, "main", "/run/next.json")?);
        wait_until_quiet(&rig).with_context(what)?;
        ensure!(
            rig.sealed.last_job()?["state"] == "done",
            "{}",
            rig.sealed.last_job()?
        );
        let kek = kept(&rig)?[0].stanza("kek")?.to_owned();
        ensure!(
            kek.starts_with(&format!("v{}:", roots.len())),
            "{kek}, {}",
            what()
        );
        ensure!(
            deks(&rig, &roots.iter().collect::<Vec<_>>())? == before,
            "{}",
            what()
        );
    }
    rounds.expect_kills()
}

#[test]
fn the_removal_of_a_recipient_can_be_killed_on_its_way() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.add_provider("spare")?;
    rig.sealed.seal_new("lent")?;
    let image = format!("{IMAGES}/lent.qcow2");
    let spare = rig.sealed.provider("spare")?["id"]
        .as_str()
        .context("no id")?
        .to_owned();
    let before = deks(&rig, &[&rig.root])?;
    let mut rounds = Rounds::new();
    while let Some((round, nth)) = rounds.next() {
        let add = ["provider", "recipients", "add", "spare", "--watch"];
        rig.sealed.run(&add)?;
        wait_until_quiet(&rig)?;
        let remove = ["provider", "recipients", "remove", "spare", "--watch"];
        let (output, trace) = kill_at(&mut rig, nth, &remove, is_quiet)?;
        let what = || format!("killed at step {nth}, {:?}", trace.steps.last());
        if round == 0 {
            output.succeeded()?;
            rounds.counted(&trace, "lent.qcow2", 4)?;
        } else if trace.killed {
            rounds.killed(nth, &trace);
            ensure!(deks(&rig, &[&rig.root])? == before, "{}", what());
            rig.sealed.start_daemon().with_context(what)?;
            rig.sealed.unlock_provider("main")?;
            wait_until_quiet(&rig).with_context(what)?;
            // A job that was not begun yet.
            rig.sealed.run(&remove)?;
            rig.sealed.unlock_provider("spare")?;
        }
        wait_until_quiet(&rig).with_context(what)?;
        let carried = rig.sealed.json(&["volume", "info", &image])?["envelope"].clone();
        let stanzas = carried["stanzas"].as_array().map(Vec::len);
        ensure!(stanzas == Some(1), "{carried}, {}", what());
        let xml = rig.sealed.dumpxml("lent")?;
        ensure!(!xml.contains(&spare), "{xml}, {}", what());
        ensure!(deks(&rig, &[&rig.root])? == before, "{}", what());
    }
    rounds.expect_kills()
}

#[test]
fn a_rotation_waits_while_the_state_directory_is_full() -> Result<()> {
    let mut rig = Rig::start()?;
    let settings = rig.host().path("/etc/virtseal");
    fs::create_dir_all(&settings)?;
    fs::write(
        settings.join("virtseald.yaml"),
        "batch_size: 1\ninterval: 250ms\n",
    )?;
    // The same state, on a small disk of its own.
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    let small = "cp -a /var/lib/virtseal /run/state && mount -t tmpfs -o size=2m,mode=0700 small /var/lib/virtseal && \
                 cp -a /run/state/. /var/lib/virtseal/";
    rig.host().run(&["sh", "-c", small])?.succeeded()?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock_provider("main")?;
    for nth in 1..=6 {
        volume(&rig, &format!("full{nth}"), nth)?;
    }
    let pinned = pin_log(&rig.sealed)?;
    let before = deks(&rig, &[&rig.root])?;
    let file = rig.passphrase()?;
    let rotate = ["provider", "rotate", "main", "--passphrase-file", &file];
    let ballast = rig.host().path(STATE).join("ballast");
    // To the last byte, whatever a checkpoint has freed since.
    let fill = || {
        let file = fs::File::options().create(true).append(true).open(&ballast)?;
        ensure_full((&file).write_all(&vec![0; 4 << 20]))
    };

    // Neither a root key nor a job begins without room.
    fill()?;
    let said = rig.sealed.virtseal(&rotate)?.refused()?;
    expect_names(&said, &["no space left", STATE])?;
    ensure!(
        rig.state_of("main")?.as_deref() == Some("ready"),
        "half a rotation"
    );
    fs::remove_file(&ballast)?;
    rig.sealed.run(&rotate)?;

    // The disk fills up while the job is at work.
    let newer = root_of(&rig.sealed, "main", "/run/newer.json")?;
    let roots = [&rig.root, &newer];
    wait_until(PATIENCE, "the first envelope", || {
        Ok((rig.sealed.last_job()?["seen"].as_i64() > Some(0)).then_some(()))
    })?;
    fill()?;
    let waiting = wait_until(PATIENCE, "the job to say that the disk is full", || {
        fill()?;
        let waiting = rig.sealed.last_job()?["waiting"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Ok(waiting.contains("no space left").then_some(waiting))
    })?;
    expect_names(&waiting, &[STATE, "free some"])?;
    let seen = rig.sealed.last_job()?["seen"].as_i64().unwrap_or_default();
    ensure!((1..6).contains(&seen), "{}", rig.sealed.last_job()?);
    ensure!(deks(&rig, &roots)? == before);

    // Also when it dies there, and without help once there is room.
    rig.sealed.stop_daemon(Signal::SIGKILL)?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock_provider("main")?;
    ensure!(deks(&rig, &roots)? == before);
    wait_until(PATIENCE, "the job to say so again", || {
        fill()?;
        let waiting = rig.sealed.last_job()?["waiting"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Ok(waiting.contains("no space left").then_some(()))
    })?;
    fs::remove_file(&ballast)?;
    drop(pinned);
    wait_until_quiet(&rig)?;
    let job = rig.sealed.last_job()?;
    ensure!(job["state"] == "done" && job["changed"] == 6, "{job}");
    ensure!(job["waiting"].is_null(), "{job}");
    ensure!(deks(&rig, &roots)? == before);
    let all_new = kept(&rig)?
        .iter()
        .all(|envelope| envelope.stanza("kek").is_ok_and(|kek| kek.starts_with("v2:")));
    ensure!(all_new, "not all are rotated");
    Ok(())
}

/// As if the daemon had died between two sectors of it, and an admin had moved the image before the next start.
#[test]
fn a_header_that_is_half_written_is_completed_where_the_image_is_now() -> Result<()> {
    const CLUSTER: usize = 64 << 10;
    let mut rig = Rig::start()?;
    rig.sealed.add_provider("spare")?;
    rig.sealed.seal_new("moved01")?;
    let (from, to) = (
        format!("{IMAGES}/moved01.qcow2"),
        format!("{IMAGES}/elsewhere.qcow2"),
    );
    let header = || Ok::<_, std::io::Error>(fs::read(rig.host().path(&from))?[..CLUSTER].to_vec());
    let old = header()?;
    rig.sealed
        .run(&["provider", "recipients", "add", "spare", "--watch"])?;
    wait_until_quiet(&rig)?;
    let new = header()?;
    let differs: Vec<usize> = (0..CLUSTER).filter(|at| old[*at] != new[*at]).collect();
    let (first, last) = (differs[0] / 512, differs[differs.len() - 1] / 512);
    ensure!(first < last, "the header changes in one sector: {first}");

    let mut image = fs::read(rig.host().path(&from))?;
    image[(first + 1) * 512..CLUSTER].copy_from_slice(&old[(first + 1) * 512..]);
    fs::write(rig.host().path(&to), image)?;
    fs::remove_file(rig.host().path(&from))?;
    let xml = edited(&rig.sealed.dumpxml("moved01")?, &from, &to)?;
    rig.host().define_xml(&xml)?;
    let mut journal = 0_u64.to_be_bytes().to_vec();
    journal.extend(u32::try_from(CLUSTER)?.to_be_bytes());
    journal.extend(old.iter().chain(&new));
    let envelope = kept(&rig)?
        .into_iter()
        .find(|envelope| envelope.kind == "disk")
        .context("no envelope")?
        .id;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    let row = format!(
        "INSERT INTO header_journal (envelope, path, patch) VALUES ('{envelope}', '{from}', x'{}')",
        hex::encode(journal)
    );
    edit_keystore(&rig.sealed, |keystore| Ok(keystore.execute(&row, [])?))?;
    rig.sealed.start_daemon()?;
    wait_until(PATIENCE, "the header", || {
        let image = fs::read(rig.host().path(&to))?;
        Ok((image[..CLUSTER] == new).then_some(()))
    })?;
    rig.sealed.unlock_provider("spare")?;
    rig.sealed.expect_start("moved01")
}

fn ensure_full(written: std::io::Result<()>) -> Result<()> {
    ensure!(written.is_err(), "the state directory is not full");
    Ok(())
}

//! What the hook knows without a daemon: killed at any step that writes it, or unable to write it, virtseald never leaves it with
//! less than is sealed here.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, Rig, STATE, done_or};
use virtseal_testkit::{DomainSpec, SealedHost, Tracer, expect_names, kept_envelopes, kept_sealed_vms};

const INDEX: &str = "hook.index";
const END: Duration = Duration::from_secs(20);
/// No command here writes it as often.
const MAX_KILLS: usize = 60;

/// What the file says, or the keystore would have it say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Named {
    envelopes: BTreeSet<String>,
    vms: BTreeSet<String>,
}

impl Named {
    /// The file, which is whole: its first lines count what follows, and its last is the checksum.
    fn in_file(rig: &Rig) -> Result<Self> {
        let text = fs::read_to_string(rig.host().path(STATE).join(INDEX))?;
        let mut named = Self::default();
        let lines: Vec<_> = text.lines().collect();
        ensure!(lines.len() >= 3 && text.ends_with('\n'), "cut: {text}");
        for line in &lines[2..lines.len() - 1] {
            match line.split_once(' ') {
                Some((envelope, _)) => named.envelopes.insert(envelope.to_owned()),
                None => named.vms.insert((*line).to_owned()),
            };
        }
        let counts = format!(
            "{:010} envelopes {:010} VMs",
            named.envelopes.len(),
            named.vms.len()
        );
        ensure!(lines[1] == counts, "{} is not {counts}", lines[1]);
        Ok(named)
    }

    fn in_keystore(rig: &Rig) -> Result<Self> {
        let state = rig.host().path(STATE);
        let bare = |id: &str| id.replace('-', "");
        Ok(Self {
            envelopes: kept_envelopes(&state)?
                .iter()
                .map(|envelope| bare(&envelope.id))
                .collect(),
            vms: kept_sealed_vms(&state)?.iter().map(|vm| bare(vm)).collect(),
        })
    }
}

/// The file names all that is sealed, with the daemon dead as it is.
fn expect_no_less(rig: &Rig) -> Result<()> {
    let (file, keystore) = (Named::in_file(rig)?, Named::in_keystore(rig)?);
    ensure!(
        file.envelopes.is_superset(&keystore.envelopes) && file.vms.is_superset(&keystore.vms),
        "{file:?} has less than {keystore:?}"
    );
    Ok(())
}

/// Kills the daemon at each step that writes the index in what `command` does to what `prepare` makes. `after` looks, with the
/// daemon started again, and repeats the command.
fn at_each_write(
    rig: &mut Rig,
    prepare: impl Fn(&Rig, usize) -> Result<Vec<String>>,
    after: impl Fn(&Rig, &[&str]) -> Result<()>,
) -> Result<()> {
    for nth in 1..MAX_KILLS {
        let command = prepare(rig, nth)?;
        let command: Vec<_> = command.iter().map(String::as_str).collect();
        let tracer = Tracer::kill_at_file(rig.sealed.daemon()?.outside_pid()?, nth, INDEX)?;
        let output = rig.sealed.virtseal(&command)?;
        let trace = tracer.finish()?;
        if !trace.killed {
            output.succeeded()?;
            println!("{command:?}: {} kills", nth - 1);
            ensure!(nth > 4, "it was written in {} steps: {:?}", nth - 1, trace.steps);
            ensure!(Named::in_file(rig)? == Named::in_keystore(rig)?);
            return after(rig, &command);
        }
        let what = format!("{command:?} killed at step {nth}, {:?}", trace.steps.last());
        rig.sealed.daemon()?.wait(END)?;
        expect_no_less(rig).with_context(|| what.clone())?;
        rig.sealed.start_daemon()?;
        // It answers once it has read its keystore.
        rig.sealed.unlock()?;
        let (file, keystore) = (Named::in_file(rig)?, Named::in_keystore(rig)?);
        ensure!(
            file == keystore,
            "not mended at the start: {file:?}, {keystore:?}, {what}"
        );
        after(rig, &command).context(what)?;
    }
    bail!("it does not get through")
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// An image of a VM that nobody has defined.
fn image_of(rig: &Rig, nth: usize, series: u128) -> Result<String> {
    let vm = Uuid::from_u128(series + nth as u128).to_string();
    let path = format!("{IMAGES}/{vm}.qcow2");
    rig.sealed
        .run(&["volume", "create", &path, "--size", "8M", "--vm", &vm])?;
    Ok(vm)
}

fn forgotten_file(rig: &Rig) -> Result<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(rig.host().path(STATE).join("forgotten"))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            names.push((entry.metadata()?.modified()?, name));
        }
    }
    names.sort();
    let (_, last) = names.pop().context("nothing was kept")?;
    Ok(format!("{STATE}/forgotten/{last}"))
}

#[test]
fn a_kill_at_any_write_of_the_index_leaves_all_that_is_sealed_in_it() -> Result<()> {
    let mut rig = Rig::start()?;
    at_each_write(
        &mut rig,
        |_, nth| {
            let vm = Uuid::from_u128(0x1000 + nth as u128).to_string();
            let path = format!("{IMAGES}/{vm}.qcow2");
            Ok(words(&["volume", "create", &path, "--size", "8M", "--vm", &vm]))
        },
        |rig, create| done_or(rig.sealed.virtseal(create)?, "exists"),
    )?;
    at_each_write(
        &mut rig,
        |rig, nth| Ok(words(&["vm", "forget", &image_of(rig, nth, 0x2000)?])),
        |rig, forget| done_or(rig.sealed.virtseal(forget)?, "knows no VM"),
    )?;
    at_each_write(
        &mut rig,
        |rig, nth| {
            rig.sealed.run(&["vm", "forget", &image_of(rig, nth, 0x3000)?])?;
            Ok(words(&["vm", "adopt", "--from", &forgotten_file(rig)?]))
        },
        |rig, adopt| rig.sealed.run(adopt).map(drop),
    )?;
    at_each_write(
        &mut rig,
        |rig, nth| {
            let vm = image_of(rig, nth, 0x4000)?;
            Ok(words(&["vm", "shred", &vm, "--yes-shred", &vm]))
        },
        |rig, shred| done_or(rig.sealed.virtseal(shred)?, "has no keys here"),
    )
}

#[test]
fn a_kill_while_a_vm_is_sealed_or_unsealed_leaves_it_in_the_index() -> Result<()> {
    let mut rig = Rig::start()?;
    let defined = |rig: &Rig, name: String| -> Result<DomainSpec> {
        let spec = SealedHost::spec(&name);
        let (disk, vm) = (spec.disk.display().to_string(), spec.uuid.to_string());
        rig.sealed
            .run(&["volume", "create", &disk, "--size", "8M", "--vm", &vm])?;
        rig.host().define(&spec)?;
        Ok(spec)
    };
    at_each_write(
        &mut rig,
        |rig, nth| {
            let spec = defined(rig, format!("sealed{nth}"))?;
            Ok(words(&["vm", "seal", &spec.name]))
        },
        |rig, seal| {
            let repeated = rig.sealed.virtseal(seal)?;
            repeated.succeeded()?;
            ensure!(Named::in_file(rig)? == Named::in_keystore(rig)?);
            Ok(())
        },
    )?;
    at_each_write(
        &mut rig,
        |rig, nth| {
            let spec = defined(rig, format!("plain{nth}"))?;
            rig.sealed.run(&["vm", "seal", &spec.name])?;
            Ok(words(&["vm", "unseal", &spec.name]))
        },
        |rig, unseal| done_or(rig.sealed.virtseal(unseal)?, "not sealed"),
    )
}

/// Not the other way around: what can't be written into the index is not committed, what is to leave it may stay.
#[test]
fn what_the_index_can_not_take_is_not_sealed() -> Result<()> {
    let mut rig = Rig::start()?;
    let kept = image_of(&rig, 1, 0x5000)?;
    let spec = SealedHost::spec("late01");
    let (disk, vm) = (spec.disk.display().to_string(), spec.uuid.to_string());
    rig.sealed
        .run(&["volume", "create", &disk, "--size", "8M", "--vm", &vm])?;
    rig.host().define(&spec)?;
    let before = Named::in_keystore(&rig)?;
    // Where only the index has no room: its next version can't be made.
    let blocked = rig.host().path(STATE).join(".hook.index.new");
    fs::create_dir(&blocked)?;

    let path = format!("{IMAGES}/never.qcow2");
    let create = ["volume", "create", &path, "--size", "8M", "--vm", &kept];
    let said = rig.sealed.virtseal(&create)?.refused()?;
    expect_names(&said, &["write the hook's index", INDEX])?;
    let said = rig.sealed.virtseal(&["vm", "seal", "late01"])?.refused()?;
    expect_names(&said, &["write the hook's index"])?;
    ensure!(!rig.host().path(&path).exists() && Named::in_keystore(&rig)? == before);
    ensure!(Named::in_file(&rig)? == before);

    // What goes, goes; the file has it for a while.
    rig.sealed.run(&["vm", "shred", &kept, "--yes-shred", &kept])?;
    expect_no_less(&rig)?;
    ensure!(Named::in_file(&rig)? == before, "it was written all the same");
    fs::remove_dir(&blocked)?;
    rig.restart()?;
    rig.sealed.unlock()?;
    ensure!(Named::in_file(&rig)? == Named::in_keystore(&rig)?);

    rig.sealed.run(&["vm", "seal", "late01"])?;
    ensure!(Named::in_file(&rig)? == Named::in_keystore(&rig)?);
    Ok(())
}

//! A `volume create` that fails takes its envelope back. One that dies between the two leaves it, and what is done next decides: the
//! next failure takes it back, into a file first, and the next success uses it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use uuid::Uuid;
use virtseal_testkit::rig::{IMAGES, MAX_STEPS, Rig, STATE};
use virtseal_testkit::{Tracer, expect_names};

const END: Duration = Duration::from_secs(20);

#[test]
fn a_failing_volume_create_that_is_killed_leaves_nothing_that_the_next_one_can_not_use_or_take_back()
-> Result<()> {
    let mut rig = Rig::start()?;
    let mut kills_with_envelope = [0, 0];
    for nth in 1..MAX_STEPS {
        let vm = Uuid::from_u128(0x6000 + nth as u128);
        // Its directory is missing: that is found when the envelope is there.
        let (dir, name) = (format!("{IMAGES}/missing{nth}"), vm.to_string());
        let path = format!("{dir}/new.qcow2");
        let create = ["volume", "create", &path, "--size", "8M", "--vm", &name];
        let tracer = Tracer::kill_at_change(rig.sealed.daemon()?.outside_pid()?, nth)?;
        let output = rig.sealed.virtseal(&create)?;
        let trace = tracer.finish()?;
        let said = output.refused()?;
        let what = format!("killed at step {nth}, {:?}", trace.steps.last());
        if !trace.killed {
            expect_names(&said, &[&dir])?;
            ensure!(rig.envelopes(&vm)?.is_empty(), "it was not taken back");
            println!("{} steps: {:?}", trace.steps.len(), trace.steps);
            ensure!(
                kills_with_envelope.iter().all(|kills| *kills > 0),
                "not killed before it took it back: {kills_with_envelope:?}, {:?}",
                trace.steps
            );
            return Ok(());
        }
        rig.sealed.daemon()?.wait(END)?;
        rig.sealed.start_daemon()?;
        rig.sealed.unlock()?;
        let left = rig.envelopes(&vm)?;
        ensure!(
            left.len() <= 1 && left.iter().all(|envelope| envelope.state == "pending"),
            "{what}: {left:?}"
        );
        let turn = nth % 2;
        kills_with_envelope[turn] += left.len();
        if turn == 0 {
            fails_again(
                &rig,
                &vm,
                &create,
                left.first().map(|envelope| envelope.id.as_str()),
            )
        } else {
            succeeds(
                &rig,
                &vm,
                &create,
                &dir,
                left.first().map(|envelope| envelope.id.as_str()),
            )
        }
        .context(what)?;
    }
    bail!("it does not get through in {MAX_STEPS} steps")
}

/// The envelope of a try that nobody knows the end of is in a file before it goes.
fn fails_again(rig: &Rig, vm: &Uuid, create: &[&str], left: Option<&str>) -> Result<()> {
    rig.sealed.virtseal(create)?.refused()?;
    ensure!(rig.envelopes(vm)?.is_empty(), "it is there for good");
    let Some(left) = left else { return Ok(()) };
    let kept = fs::read_dir(rig.host().path(STATE).join("forgotten"))?;
    let mut texts = kept.map(|entry| Ok(fs::read_to_string(entry?.path())?));
    let is_kept = texts.any(|text: Result<String>| text.is_ok_and(|text| text.contains(left)));
    ensure!(is_kept, "{left} is nowhere");
    // And again: nothing is left to be taken back.
    rig.sealed.virtseal(create)?.refused()?;
    ensure!(rig.envelopes(vm)?.is_empty());
    Ok(())
}

/// With the reason gone it is through, by the envelope that is there.
fn succeeds(rig: &Rig, vm: &Uuid, create: &[&str], dir: &str, left: Option<&str>) -> Result<()> {
    fs::create_dir(rig.host().path(dir))?;
    rig.sealed.run(create)?;
    rig.expect_active(vm, &["disk"])?;
    if let Some(left) = left {
        ensure!(rig.envelopes(vm)?[0].id == left, "another one was made beside it");
    }
    let again = rig.sealed.virtseal(create)?.refused()?;
    expect_names(&again, &["exists"])?;
    rig.expect_active(vm, &["disk"])
}

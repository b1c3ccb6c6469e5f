//! All of a host's state in one file: made while virtseald runs, brought back when everything is lost.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::{Rig, STATE};
use virtseal_testkit::{expect_names, wait_until};

const BACKUP: &str = "/run/state.age";
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

fn generations(rig: &Rig) -> Result<Vec<i64>> {
    let shown = rig.sealed.json(&["vm", "status", "web01"])?;
    let objects = shown["vms"][0]["objects"].as_array().context("no objects")?;
    Ok(objects
        .iter()
        .filter_map(|object| object["generation"].as_i64())
        .collect())
}

#[test]
fn a_lost_state_directory_comes_back_from_its_backup() -> Result<()> {
    let mut rig = Rig::start()?;
    let passphrase = rig.passphrase()?;
    rig.sealed.seal_new("web01")?;
    let backup = ["state", "backup", "-o", BACKUP, "--passphrase-file", &passphrase];
    expect_names(&rig.sealed.run(&backup)?, &["backed up in /run/state.age"])?;
    expect_names(&rig.sealed.refused(10, &backup)?, &["never overwritten"])?;
    // What changes after it comes back from where it travels.
    rig.sealed.add_provider("spare")?;
    rig.sealed
        .run(&["provider", "recipients", "add", "spare", "--watch"])?;
    rig.sealed.wait_for_copies(0)?;
    let newer = generations(&rig)?;
    let spare = rig.host().path("/run/spare.age");
    fs::copy(rig.host().path(STATE).join("spare.age"), spare)?;

    let restore = ["state", "restore", "-i", BACKUP, "--passphrase-file", &passphrase];
    expect_names(
        &rig.sealed.refused(8, &restore)?,
        &["its keys would be replaced", "--yes-replace="],
    )?;
    let host = rig
        .host()
        .run(&["cat", "/proc/sys/kernel/hostname"])?
        .succeeded()?;
    let over = [&restore[..], &["--yes-replace", host.trim()]].concat();
    expect_names(
        &rig.sealed.refused(9, &over)?,
        &["another virtseald", "systemctl stop"],
    )?;

    // Everything is lost.
    rig.sealed.stop_daemon(Signal::SIGKILL)?;
    fs::remove_dir_all(rig.host().path(STATE))?;
    let wrong = rig.host().path("/run/wrong");
    fs::write(wrong, "another")?;
    let by_wrong = [
        "state",
        "restore",
        "-i",
        BACKUP,
        "--passphrase-file",
        "/run/wrong",
    ];
    expect_names(&rig.sealed.refused(3, &by_wrong)?, &["the passphrase is wrong"])?;
    ensure!(!rig.host().path(STATE).exists(), "half a state");
    expect_names(
        &rig.sealed.run(&restore)?,
        &["holds the state of", "systemctl start virtseald"],
    )?;
    rig.sealed.start_daemon()?;
    ensure!(rig.state_of("main")?.as_deref() == Some("locked"));
    rig.sealed.unlock()?;
    rig.sealed.expect_start("web01")?;
    // The start has taken in what was newer in its XML.
    let found = generations(&rig)?;
    ensure!(found >= newer, "{found:?}, and {newer:?} were there");
    rig.sealed.run(&["audit", "verify"])?;
    expect_names(&rig.sealed.run(&["audit", "show"])?, &["state-restore"])?;

    // Over what is there, by its name, and that is kept.
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    let said = rig.sealed.run(&over)?;
    expect_names(&said, &["what was there is in /var/lib/virtseal.before-"])?;
    rig.sealed.start_daemon()?;
    rig.sealed.unlock()?;
    rig.sealed.expect_start("web01")
}

/// Root can cut a log, and the host still has to start its VMs.
#[test]
fn a_log_that_was_cut_is_seen_and_stops_nothing() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.run(&["audit", "verify"])?;
    let log = rig.host().path(STATE).join("audit.log");
    let cut = |keep: usize| -> Result<()> {
        let text = fs::read_to_string(&log)?;
        let kept: Vec<_> = text.lines().take(keep).collect();
        Ok(fs::write(&log, kept.join("\n") + "\n")?)
    };
    cut(1)?;
    expect_names(
        &rig.sealed.refused(1, &["audit", "verify"])?,
        &["is not whole", "was cut off"],
    )?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    fs::write(&log, "")?;
    rig.sealed.start_daemon()?;
    expect_names(&rig.sealed.run(&["status"])?, &["audit log", "were written"])?;
    rig.sealed.refused(1, &["audit", "verify"])?;
    rig.sealed.unlock()?;
    expect_names(
        &rig.sealed.run(&["audit", "show"])?,
        &["audit-break", "provider-unlock"],
    )?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    for file in ["audit.log", "audit.log.1", "audit.log.2"] {
        let _ = fs::remove_file(log.with_file_name(file));
    }
    rig.sealed.start_daemon()?;
    rig.sealed.refused(1, &["audit", "verify"])?;

    // And a keystore that is damaged is left alone.
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    let keystore = rig.host().path(STATE).join("keystore.db");
    let mut bytes = fs::read(&keystore)?;
    bytes[4096..].fill(0x55);
    fs::write(&keystore, &bytes)?;
    // It listens before it opens its keystore, so that no call is lost.
    let _ = rig.sealed.start_daemon();
    let mut daemon = rig.sealed.take_daemon()?;
    ensure!(!daemon.wait(PATIENCE)?.success(), "it ends as if all were well");
    expect_names(&daemon.output(), &["is damaged", "virtseal state restore"])?;
    ensure!(fs::read(&keystore)? == bytes, "the damaged keystore was changed");
    Ok(())
}

/// What `virsh save` has written needs its provider, too.
#[test]
fn saved_states_keep_their_provider() -> Result<()> {
    let rig = Rig::start()?;
    rig.sealed.seal_new("saved01")?;
    rig.sealed.add_provider("spare")?;
    rig.sealed.run(&["provider", "default", "spare"])?;
    rig.sealed.start_paused("saved01")?;
    rig.host()
        .virsh(&["save", "saved01", "/run/saved01.state"])?
        .succeeded()?;
    let said = wait_until(PATIENCE, "the saved state to be noted", || {
        let said = rig.sealed.refused(8, &["provider", "delete", "main"])?;
        Ok(said.contains("saved to a file").then_some(said))
    })?;
    expect_names(&said, &["the state of saved01 that was saved to a file"])?;
    rig.sealed
        .run(&["provider", "move", "main", "spare", "--watch"])?;
    rig.sealed.wait_for_copies(0)?;
    expect_names(
        &rig.sealed.refused(8, &["provider", "delete", "main"])?,
        &["the state of saved01 that was saved to a file"],
    )?;
    rig.host()
        .virsh(&["restore", "--paused", "/run/saved01.state"])?
        .succeeded()?;
    wait_until(PATIENCE, "nothing to need the provider", || {
        let deleted = rig.sealed.virtseal(&["provider", "delete", "main"])?;
        Ok(deleted.status.success().then_some(()))
    })?;

    // libvirt's own says what it holds.
    rig.sealed.add_provider("third")?;
    rig.sealed.run(&["provider", "default", "third"])?;
    rig.host().virsh(&["managedsave", "saved01"])?.succeeded()?;
    rig.sealed
        .run(&["provider", "move", "spare", "third", "--watch"])?;
    rig.sealed.wait_for_copies(0)?;
    let said = rig.sealed.refused(8, &["provider", "delete", "spare"])?;
    expect_names(&said, &["managed save of saved01"])
}

//! The UEFI variables of a sealed VM are made anew: what virsh does of it leads to `vm nvram reset`, and that loses nothing in silence.

use std::fs;

use anyhow::{Context, Result, ensure};
use virtseal_testkit::rig::{NVRAM, Rig, words};
use virtseal_testkit::{SealedHost, expect_names};

/// What is kept of the store of `vm`, by its number.
fn kept_of(vm: &str, number: u32) -> String {
    format!("{NVRAM}/{vm}_VARS.fd.before-reset-{number}")
}

/// That nothing is done without the word, and that it is done as the refusal says.
fn reset_as_told(sealed: &SealedHost, vm: &str) -> Result<String> {
    let told = format!("virtseal vm nvram reset --yes-reset={vm} {vm}");
    expect_names(
        &sealed.refused(8, &["vm", "nvram", "reset", vm])?,
        &[vm, "would be lost", &told],
    )?;
    let word = format!("--yes-reset={vm}");
    sealed.run(&["vm", "nvram", "reset", &word, vm])
}

#[test]
fn a_start_with_reset_nvram_is_led_out_of() -> Result<()> {
    let sealed = SealedHost::start()?;
    let spec = sealed.seal_new("web01")?;
    sealed.expect_start("web01")?;
    let store = sealed.host().path(spec.nvram());
    let before = fs::read(&store)?;

    // libvirt asks nobody, puts the plain template there, and QEMU finds no key in it.
    let failed = sealed
        .host()
        .virsh(&["start", "--paused", "--reset-nvram", "web01"])?
        .refused()?;
    println!("{failed}");
    ensure!(fs::read(&store)? != before);
    sealed.expect_no_secrets()?;
    let shown = sealed.refused_start("web01")?;
    expect_names(
        &shown,
        &[
            "web01 stays off",
            "nvram",
            "is not encrypted",
            "virtseal vm nvram reset web01",
        ],
    )?;
    let would = sealed.run(&["vm", "nvram", "reset", "--dry-run", "web01"])?;
    expect_names(
        &would,
        &["would create", "would lose nothing more", "recovery key"],
    )?;
    let said = reset_as_told(&sealed, "web01")?;
    ensure!(
        !said.contains("before-reset"),
        "nothing is kept of a template: {said}"
    );
    ensure!(fs::read(&store)?.starts_with(b"LUKS"));
    sealed.expect_start("web01")?;

    // One that is missing is made anew as well, where it is not put back.
    fs::remove_file(&store)?;
    let shown = sealed.refused_start("web01")?;
    expect_names(
        &shown,
        &["does not exist", "put it back", "virtseal vm nvram reset web01"],
    )?;
    let status = sealed.json(&["vm", "status", "web01"])?;
    let next = status["vms"][0]["starts"]["next"].as_str().context("no advice")?;
    expect_names(next, &["put it back", "virtseal vm nvram reset web01"])?;
    reset_as_told(&sealed, "web01")?;
    sealed.expect_start("web01")
}

#[test]
fn the_old_variables_are_kept_and_come_back() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    let spec = sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    expect_names(
        &sealed.refused(9, &["vm", "nvram", "reset", "--yes-reset=web01", "web01"])?,
        &["web01 is running", "virsh shutdown web01"],
    )?;
    sealed.destroy("web01")?;
    let store = host.path(spec.nvram());
    let before = fs::read(&store)?;
    let xml = sealed.dumpxml("web01")?;

    let would = sealed.run(&["vm", "nvram", "reset", "--dry-run", "web01"])?;
    expect_names(
        &would,
        &[
            "would keep",
            "before-reset-",
            "would lose its boot entries",
            "Secure Boot keys",
        ],
    )?;
    expect_names(
        &sealed.refused(8, &["vm", "nvram", "reset", "--yes-reset=web1", "web01"])?,
        &["'web1' was typed"],
    )?;
    sealed.lock()?;
    sealed.refused(3, &["vm", "nvram", "reset", "--yes-reset=web01", "web01"])?;
    ensure!(fs::read(&store)? == before, "it was refused, and is another");
    ensure!(
        !host.path(kept_of("web01", 1)).exists(),
        "it was refused, and something was made"
    );
    sealed.unlock()?;

    let said = reset_as_told(&sealed, "web01")?;
    expect_names(&said, &[&kept_of("web01", 1)])?;
    ensure!(fs::read(host.path(kept_of("web01", 1)))? == before);
    ensure!(fs::read(&store)? != before && sealed.dumpxml("web01")? == xml);
    sealed.expect_start("web01")?;
    // A second one is kept beside the first.
    expect_names(&reset_as_told(&sealed, "web01")?, &[&kept_of("web01", 2)])?;
    ensure!(fs::read(host.path(kept_of("web01", 1)))? == before);
    fs::rename(host.path(kept_of("web01", 1)), &store)?;
    sealed.expect_start("web01")?;

    // What was kept is the VM's until its keys are destroyed.
    fs::write(host.path(kept_of("web01", 1)), &before)?;
    let receipt = sealed.run(&["vm", "shred", "--yes-shred=web01", "web01"])?;
    for number in [1, 2] {
        let line = receipt
            .lines()
            .find(|line| line.contains(&kept_of("web01", number)));
        ensure!(
            line.is_some_and(|line| line.contains("keyslots made dead")),
            "{receipt}"
        );
    }
    Ok(())
}

#[test]
fn a_reset_can_be_killed_at_every_change() -> Result<()> {
    let mut rig = Rig::start()?;
    let vm = |nth: usize| format!("web{nth:02}");
    let stores = |rig: &Rig, nth: usize| {
        let store = rig.host().path(SealedHost::spec(&vm(nth)).nvram());
        let kept = rig.host().path(kept_of(&vm(nth), 1));
        (store, kept)
    };
    let before = std::cell::RefCell::new(Vec::new());
    let steps = rig.at_each_change(
        |rig, nth| {
            rig.sealed.seal_new(&vm(nth))?;
            before.replace(fs::read(stores(rig, nth).0)?);
            words(&[
                "vm",
                "nvram",
                "reset",
                &format!("--yes-reset={}", vm(nth)),
                &vm(nth),
            ])
        },
        |rig, nth, command| {
            let uuid = rig.sealed.json(&["vm", "status", &vm(nth)])?["vms"][0]["uuid"]
                .as_str()
                .unwrap_or_default()
                .parse()?;
            rig.expect_openable(&uuid)?;
            let (store, kept) = stores(rig, nth);
            let old = before.borrow();
            let is_there = fs::read(&store)? == *old || fs::read(&kept)? == *old;
            ensure!(is_there, "the old variables are nowhere");
            rig.sealed.unlock()?;
            rig.sealed.expect_start(&vm(nth))?;
            let was_through = fs::read(&store)? != *old;
            rig.sealed.run(command)?;
            ensure!(fs::read(&kept)? == *old && fs::read(&store)? != *old);
            let second = rig.host().path(kept_of(&vm(nth), 2));
            ensure!(
                was_through || !second.exists(),
                "kept twice: {}",
                second.display()
            );
            rig.expect_openable(&uuid)?;
            rig.expect_no_temporaries()
        },
    )?;
    ensure!(
        steps.iter().any(|step| step.call.starts_with("rename")),
        "{steps:?}"
    );
    Ok(())
}

//! Storage that does not answer keeps back what is on it, and nothing else; and it is said that it is the storage.

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use uuid::Uuid;
use virtseal_testkit::{
    DomainSpec, HangingStorage, Hangs, HostBuilder, SealedHost, built_program, expect_names, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(90);
const IMAGES: &str = "/var/lib/libvirt/images";
const DEAD: &str = "/var/lib/libvirt/images/dead";
const MIB: usize = 1 << 20;

#[test]
fn a_copy_on_dead_storage_keeps_no_other_copy_back() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    fs::create_dir_all(host.path(DEAD))?;
    let on_dead = Path::new(DEAD).join("web01.qcow2");
    let dead = DomainSpec {
        disk: on_dead.clone(),
        ..SealedHost::spec("web01")
    };
    sealed.seal_empty(&dead)?;
    let alive = sealed.seal_new("web02")?;
    sealed.wait_for_copies(0)?;
    // Both copies fall behind while the images are away.
    let images = [host.path(&on_dead), host.path(&alive.disk)];
    let aside = |path: &Path| path.with_extension("aside");
    for image in &images {
        fs::rename(image, aside(image))?;
    }
    for vm in ["web01", "web02"] {
        sealed.run(&["vm", "rekey", vm, "--watch"])?;
    }
    sealed.wait_for_copies(2)?;

    let storage = HangingStorage::mount(host, Path::new(DEAD), &[], Hangs::Everything)?;
    fs::rename(aside(&images[1]), &images[1])?;
    // Its end has the copies looked at.
    sealed.expect_start("web02")?;
    sealed.wait_for_copies(1)?;
    wait_until(PATIENCE, "the copy that stays to say why", || {
        let jobs = sealed.run(&["jobs"])?;
        Ok(jobs
            .contains(&format!("the storage at {DEAD} does not answer"))
            .then_some(()))
    })?;
    ensure!(storage.held() > 0, "nothing has asked the dead storage");
    // Nor do commands about other VMs wait for it.
    sealed.seal_new("web03")?;
    sealed.expect_start("web03")?;
    sealed.run(&["vm", "rekey", "web02", "--watch"])?;
    sealed.wait_for_copies(1)?;

    // It answers again.
    drop(storage);
    fs::rename(aside(&images[0]), &images[0])?;
    sealed.expect_start("web02")?;
    sealed.wait_for_copies(0)
}

#[test]
fn few_starts_wait_for_dead_storage_and_it_is_said() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    fs::create_dir_all(host.path(DEAD))?;
    sealed.seal_empty(&DomainSpec {
        disk: Path::new(DEAD).join("web01.qcow2"),
        ..SealedHost::spec("web01")
    })?;
    sealed.seal_new("web02")?;
    sealed.wait_for_copies(0)?;
    let storage = HangingStorage::mount(host, Path::new(DEAD), &[], Hangs::Everything)?;
    // The first of them may find that it is only slow.
    let mut told = String::new();
    for _ in 0..3 {
        told = sealed.refused_start("web01")?;
    }
    expect_names(&told, &["web01", "on storage that does not answer", DEAD])?;
    let held = storage.held();
    for _ in 0..5 {
        sealed.refused_start("web01")?;
    }
    ensure!(storage.held() == held, "more starts wait for it");
    sealed.expect_start("web02")?;

    // A status says so of that VM, and tells of the other as ever.
    let status = wait_until(PATIENCE, "a status that does not wait for it", || {
        let status = sealed.virtseal(&["status", "--json"])?;
        let document: Value = serde_json::from_str(&status.stdout)?;
        Ok((document["vms"][1]["starts"]["outlook"] == "yes").then_some(document))
    })?;
    let dead = &status["vms"][0];
    ensure!(
        dead["name"] == "web01" && dead["starts"]["outlook"] != "yes",
        "{status}"
    );
    expect_names(&dead.to_string(), &["is on storage that does not answer"])?;
    // Nor does one of that VM alone wait, with what its disks are based on.
    let of_one = || -> Result<u64> {
        let status = sealed.run(&["vm", "status", "web01"])?;
        expect_names(&status, &["is on storage that does not answer"])?;
        Ok(storage.held())
    };
    of_one()?;
    let held = of_one()?;
    ensure!(of_one()? == held, "more wait for it each time");
    Ok(())
}

#[test]
fn a_vm_on_dead_storage_keeps_no_other_from_being_looked_at_while_it_runs() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    sealed.seal_new("web01")?;
    sealed.start_paused("web01")?;
    fs::create_dir_all(host.path(DEAD))?;
    let on_dead = Path::new(DEAD).join("plain01.raw");
    fs::write(host.path(&on_dead), vec![0; MIB])?;
    host.define(&DomainSpec::minimal("plain01", &on_dead))?;
    host.virsh(&["start", "--paused", "plain01"])?.succeeded()?;
    let storage = HangingStorage::mount(host, Path::new(DEAD), &[], Hangs::Everything)?;
    // It is heard of, and so is the other one behind it.
    host.virsh(&["resume", "plain01"])?.succeeded()?;
    wait_until(PATIENCE, "the dead storage to be asked", || {
        Ok((storage.held() > 0).then_some(()))
    })?;
    let other = host.empty_disk("other", 1 << 20)?;
    let other = other.to_str().context("a UTF-8 path")?;
    let attach = ["attach-disk", "web01", other, "vdb", "--driver", "qemu"];
    host.virsh(&[&attach[..], &["--subdriver", "raw", "--live"]].concat())?
        .succeeded()?;
    wait_until(PATIENCE, "the plain disk to be found", || {
        let log = sealed.run(&["audit", "show"])?;
        Ok(log.contains(other).then_some(()))
    })
}

#[test]
fn an_aborted_job_says_that_qemu_img_is_stuck_and_others_go_on() -> Result<()> {
    let sealed = SealedHost::start()?;
    let host = sealed.host();
    fs::create_dir_all(host.path(DEAD))?;
    let data: Vec<u8> = (0..16 * MIB).map(|at| (at / 512) as u8 | 1).collect();
    let source = format!("{IMAGES}/source.raw");
    fs::write(host.path(&source), &data)?;
    let behind = Hangs::ReadsBehind(4 * MIB as u64);
    let storage = HangingStorage::mount(host, Path::new(DEAD), &[("source.raw", data)], behind)?;

    let image = format!("{IMAGES}/made.qcow2");
    let from_dead = format!("{DEAD}/source.raw");
    let mut creating = create(&sealed, &image, &from_dead)?;
    wait_until(PATIENCE, "qemu-img to hang", || {
        Ok((storage.held() > 0).then_some(()))
    })?;
    let job = sealed.last_job()?["id"].to_string();
    sealed.run(&["jobs", "abort", &job])?;
    let told = wait_until(PATIENCE, "the job to say what it waits for", || {
        let waiting = sealed.last_job()?["waiting"].as_str().map(str::to_owned);
        Ok(waiting.filter(|waiting| waiting.contains("qemu-img")))
    })?;
    expect_names(&told, &["aborting", "stuck in storage"])?;
    let stuck = told
        .split(|c: char| !c.is_ascii_digit())
        .find(|number| !number.is_empty())
        .context("no process is named")?;
    let state = host.run(&["cat", &format!("/proc/{stuck}/comm")])?.succeeded()?;
    ensure!(state == "qemu-img", "process {stuck} is {state}");
    ensure!(!creating.wait()?.success(), "an aborted job was done");

    // Others are made meanwhile.
    let other = format!("{IMAGES}/other.qcow2");
    ensure!(
        create(&sealed, &other, &source)?.wait()?.success(),
        "it did not become {other}"
    );
    ensure!(
        job_of(&sealed, &job)?["waiting"].is_string(),
        "it came to its end by itself"
    );

    // Once it has ended, its place is free.
    drop(storage);
    wait_until(PATIENCE, "the end of the job", || {
        Ok(job_of(&sealed, &job)?["waiting"].is_null().then_some(()))
    })?;
    ensure!(
        create(&sealed, &image, &source)?.wait()?.success(),
        "it did not become {image}"
    );
    Ok(())
}

#[test]
fn volume_info_ends_where_storage_hangs() -> Result<()> {
    let sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    fs::create_dir_all(sealed.host().path(DEAD))?;
    let storage = HangingStorage::mount(sealed.host(), Path::new(DEAD), &[], Hangs::Everything)?;
    // Without its end: its thread waits as long as the storage hangs.
    let mut command = sealed.host().command(built_program("virtseal")?);
    let errors = fs::File::create(sealed.host().path("/run/said"))?;
    let mut asking = command
        .args(["--timeout", "1s", "volume", "info", &format!("{DEAD}/x.qcow2")])
        .stderr(errors)
        .spawn()?;
    wait_until(PATIENCE, "the command to say that the storage hangs", || {
        let said = fs::read_to_string(sealed.host().path("/run/said"))?;
        Ok(said
            .contains("does not answer: nothing came for 1s")
            .then_some(()))
    })?;
    drop(storage);
    ensure!(asking.wait()?.code() == Some(4));
    Ok(())
}

fn create(sealed: &SealedHost, image: &str, from: &str) -> Result<Child> {
    let vm = Uuid::new_v4().to_string();
    sealed
        .host()
        .command(built_program("virtseal")?)
        .args(["volume", "create", image, "--from", from, "--vm", &vm])
        .stdout(Stdio::null())
        .spawn()
        .context("virtseal did not start")
}

fn job_of(sealed: &SealedHost, id: &str) -> Result<Value> {
    let jobs = sealed.json(&["jobs"])?;
    let mut jobs = jobs["jobs"].as_array().into_iter().flatten();
    let id: i64 = id.parse()?;
    let found = jobs.find(|job| job["id"] == id);
    found.cloned().with_context(|| format!("no job {id}"))
}

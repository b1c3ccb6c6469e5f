//! What hangs with one VM makes no other wait, and says what it is when the same VM is asked for.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use virtseal_testkit::rig::IMAGES;
use virtseal_testkit::servers::{Manner, OpenBao, Relay};
use virtseal_testkit::{SealedHost, built_program, expect_names, wait_until};

/// Far less than what hangs does.
const AT_ONCE: Duration = Duration::from_secs(30);
/// How long a command waits for another one about the same VM.
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_seal_that_hangs_makes_no_other_vm_wait() -> Result<()> {
    let bao = OpenBao::start()?;
    let relay = Relay::to(bao.port())?;
    let mut sealed = SealedHost::start()?;
    sealed.configure("hook_deadline: 120s\nprovider_deadline: 100s\nprobe_interval: 60m\n")?;
    sealed.kill_and_restart()?;
    sealed.unlock()?;
    let address = format!("http://127.0.0.1:{}", relay.port());
    let mut add = vec!["provider", "add", "transit", "vault", "--address", &address];
    add.extend([
        "--auth",
        "approle",
        "--role-id",
        bao.role_id(),
        "--timeout-ms",
        "60000",
    ]);
    sealed.run(&add)?;
    bao.unlock(&sealed, "vault")?;
    for vm in ["starts", "shredded"] {
        sealed.seal_new(vm)?;
    }
    let left = "6a3f3a8c-6e0b-4d4c-9f65-0a6f5f0c2b11";
    let volume = |name: &str| format!("{IMAGES}/{name}.qcow2");
    let create = |name: &str, vm: &str| {
        let path = volume(name);
        sealed.run(&["volume", "create", &path, "--size", "64M", "--vm", vm])
    };
    create("left", left)?;
    let spec = SealedHost::spec("hangs");
    create("hangs", &spec.uuid.to_string())?;
    sealed.host().define(&spec)?;

    let asked = relay.requests();
    relay.be(Manner::Stalled)?;
    let mut hanging = sealed
        .host()
        .command(built_program("virtseal")?)
        .args(["vm", "seal", "hangs", "--provider", "vault"])
        .stdout(Stdio::null())
        .spawn()?;
    wait_until(PATIENCE, "the server is asked", || {
        Ok((relay.requests() > asked).then_some(()))
    })?;

    let began = Instant::now();
    let busy = sealed.refused(9, &["vm", "shred", "hangs", "--yes-shred", "hangs"])?;
    expect_names(
        &busy,
        &["hangs is being sealed, for ", "Next: the same command again"],
    )?;
    ensure!(
        began.elapsed() >= PATIENCE,
        "it did not wait: {:?}",
        began.elapsed()
    );

    let at_once = |what: &str, work: &dyn Fn() -> Result<()>| -> Result<()> {
        let began = Instant::now();
        work()?;
        println!("{what}: {:?}", began.elapsed());
        ensure!(began.elapsed() < AT_ONCE, "{what} took {:?}", began.elapsed());
        Ok(())
    };
    let run = |arguments: &[&str]| sealed.run(arguments).map(drop);
    let passphrase = sealed.passphrase_file()?.display().to_string();
    at_once("seal", &|| sealed.seal_new("sealed").map(drop))?;
    at_once("start", &|| sealed.expect_start("starts"))?;
    at_once("shred", &|| {
        run(&["vm", "shred", "shredded", "--yes-shred", "shredded"])
    })?;
    at_once("forget", &|| run(&["vm", "forget", left]))?;
    at_once("volume", &|| create("new", left).map(drop))?;
    at_once("share", &|| {
        run(&["volume", "share", &volume("new"), "--with", "starts"])
    })?;
    at_once("adopt", &|| run(&["vm", "adopt", "starts"]))?;
    at_once("rekey", &|| run(&["vm", "rekey", "starts"]))?;
    at_once("orphans", &|| run(&["provider", "orphans"]))?;
    at_once("status", &|| run(&["status"]))?;
    at_once("status of it", &|| run(&["vm", "status", "hangs"]))?;
    at_once("backup", &|| {
        run(&[
            "state",
            "backup",
            "-o",
            "/run/state.age",
            "--passphrase-file",
            &passphrase,
        ])
    })?;

    // A sweep goes through the others, and does not end before it has seen what comes of the seal.
    run(&["provider", "rekey"])?;
    wait_until(PATIENCE * 3, "the sweep waits for the seal", || {
        let waiting = sealed.last_job()?["waiting"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Ok(waiting.contains("is being sealed").then_some(()))
    })?;
    ensure!(hanging.try_wait()?.is_none(), "the seal did not hang");
    relay.be(Manner::Forward)?;
    ensure!(hanging.wait()?.success(), "the seal fails");
    wait_until(PATIENCE * 3, "the sweep ends", || {
        Ok((sealed.last_job()?["state"] == "done").then_some(()))
    })?;
    sealed.expect_start("hangs")
}

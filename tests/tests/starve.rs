//! Nobody who may only read keeps a VM from starting, or root from locking a provider: whatever they do, all at once.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use virtseal_testkit::{Attacker, Host, HostBuilder, Output, SealedHost, built_program, expect_names};

/// Starts as far as the hook is asked, and those of them that go through libvirt.
const STARTS: usize = 20;
const REAL_STARTS: usize = 2;
/// The daemon's own, those of the connections that readers may have, and of root's.
const MAX_DESCRIPTORS: usize = 900;
const MAX_THREADS: usize = 80;

#[test]
fn readers_starve_neither_starts_nor_lock() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    Attacker::let_read(&mut sealed)?;
    sealed.unlock()?;
    sealed.seal_new("web01")?;
    // A job to be watched, that waits for a backup.
    let file = sealed.passphrase_file()?.display().to_string();
    sealed.run(&["provider", "rotate", "main", "--passphrase-file", &file])?;
    fill_audit_log(sealed.host())?;
    sealed.start_paused("web01")?;
    let xml = sealed.host().virsh(&["dumpxml", "web01"])?.succeeded()?;
    sealed.destroy("web01")?;

    let mut attackers = Attacker::all(sealed.host())?;
    for _ in 0..REAL_STARTS {
        sealed.expect_start("web01")?;
    }
    for nth in REAL_STARTS..STARTS {
        hook(sealed.host(), "prepare", "begin", &xml).with_context(|| format!("start {nth}"))?;
        hook(sealed.host(), "release", "end", &xml)?;
    }
    let process = sealed.daemon()?.proc();
    let descriptors = fs::read_dir(process.join("fd"))?.count();
    ensure!(descriptors <= MAX_DESCRIPTORS, "{descriptors} descriptors");
    let threads = fs::read_dir(process.join("task"))?.count();
    ensure!(threads <= MAX_THREADS, "{threads} threads");
    sealed.lock()?;
    expect_names(&sealed.refused_start("web01")?, &["'main'", "is locked"])?;
    sealed.unlock()?;
    sealed.expect_start("web01")?;

    for attacker in &mut attackers {
        let attack = attacker.attack;
        let got = attacker.end()?;
        println!("{attack}: {got}");
        match attack {
            "watch" => ensure!(got == 64, "{got} of 64 watchers are told of the job"),
            "idle" => ensure!(got <= 104, "{got} connections of one user"),
            "endless" => ensure!(got == 0, "{got} MB were taken of messages without an end"),
            _ => ensure!(got > 0, "{attack} did nothing"),
        }
    }
    sealed.expect_no_secrets()
}

#[test]
fn refused_readers_are_told_why() -> Result<()> {
    let mut sealed = SealedHost::start_without_provider(HostBuilder::default())?;
    Attacker::let_read(&mut sealed)?;
    let host = sealed.host();
    as_reader(host, Attacker::FIRST_USER, &["status"])?.succeeded()?;
    let denied = as_reader(host, Attacker::FIRST_USER, &["provider", "lock", "main"])?;
    ensure!(denied.code() == Some(6), "{denied:?}");

    let mut attacker = Attacker::start(host, "idle", Attacker::FIRST_USER)?;
    let busy = as_reader(host, Attacker::FIRST_USER, &["status"])?;
    ensure!(busy.code() == Some(9), "{busy:?}");
    expect_names(
        &busy.stderr,
        &["user 54321", "96 connections", "Next: end programs of this user"],
    )?;
    // Of another user, or root's, nothing is refused.
    as_reader(host, Attacker::FIRST_USER + 1, &["status"])?.succeeded()?;
    sealed.virtseal(&["status"])?.succeeded()?;
    attacker.end()?;
    Ok(())
}

/// Runs the command line as a user of the group that may read.
fn as_reader(host: &Host, uid: u32, arguments: &[&str]) -> Result<Output> {
    let program = built_program("virtseal")?;
    // Wherever it was built may be closed to that user.
    let copy = "/run/virtseal-for-readers";
    if !host.path(copy).exists() {
        fs::copy(&program, host.path(copy))?;
    }
    let (uid, gid) = (format!("--reuid={uid}"), format!("--regid={}", Attacker::GROUP));
    host.run(&[&["setpriv", &uid, &gid, "--clear-groups", copy], arguments].concat())
}

/// The hook, as libvirt runs it for `web01`.
fn hook(host: &Host, operation: &str, suboperation: &str, xml: &str) -> Result<()> {
    // The directory of the running domain is libvirt's to make.
    fs::write(host.path("/etc/virtseal/hook.conf"), "master_key_tmpfs = off\n")?;
    let mut hook = host
        .command("/etc/libvirt/hooks/qemu.d/virtseal")
        .args(["web01", operation, suboperation, "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    hook.stdin
        .take()
        .context("no standard input")?
        .write_all(xml.as_bytes())?;
    let output = hook.wait_with_output()?;
    fs::remove_file(host.path("/etc/virtseal/hook.conf"))?;
    ensure!(
        output.status.success(),
        "{operation}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// 10,000 records, each of a start that was refused.
fn fill_audit_log(host: &Host) -> Result<()> {
    let socket = host.path(SealedHost::HOOK_SOCKET);
    let xml = "<domain type='kvm'><name>x</name><uuid>8d7e2f1c-5a57-4b3b-9f5c-0a6a4b1d2c3e</uuid></domain>";
    let prepare = json!({ "method": "io.virtseal.Lifecycle.Prepare", "parameters": { "xml": xml } });
    let prepare = format!("{prepare}\0");
    let fill = || -> Result<()> {
        let mut stream = BufReader::new(std::os::unix::net::UnixStream::connect(&socket)?);
        for _ in 0..10_000 / 50 {
            stream.get_mut().write_all(prepare.as_bytes())?;
            ensure!(stream.read_until(0, &mut Vec::new())? > 0, "hung up");
        }
        Ok(())
    };
    thread::scope(|scope| {
        let fillers: Vec<_> = (0..50).map(|_| scope.spawn(fill)).collect();
        fillers.into_iter().try_for_each(|filler| {
            filler
                .join()
                .unwrap_or_else(|_| anyhow::bail!("a thread panicked"))
        })
    })
}

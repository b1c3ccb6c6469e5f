//! The hook's whole process for a VM that is not sealed, as libvirt runs it at `prepare begin`: on a host where little is
//! sealed, and on one with 10,000 sealed VMs in the hook's index.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use virtseal_testkit::{DomainSpec, SealedHost, edit_keystore};

use crate::figure::{Figure, Target};
use crate::inside::ask;
use crate::samples::Samples;

const ROUNDS: usize = 1000;
const HOOK: &str = "/etc/libvirt/hooks/qemu.d/virtseal";
const XML: &str = "/run/unsealed.xml";
const DISK_BYTES: u64 = 1 << 20;
const MANY: u32 = 10_000;
/// A hook.conf that names an index of so many.
const MANY_CONF: &str = "/run/many.conf";

#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Times {
    hook: Samples,
    many: Samples,
    nothing: Samples,
}

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    let host = sealed.host();
    let vm = DomainSpec::minimal("unsealed", &host.empty_disk("unsealed", DISK_BYTES)?);
    host.define(&vm)?;
    // The XML of a VM that runs is what libvirt gives to hooks.
    host.virsh(&["start", "--paused", &vm.name])?.succeeded()?;
    let xml = host.virsh(&["dumpxml", &vm.name])?.succeeded()?;
    host.virsh(&["destroy", &vm.name])?.succeeded()?;
    fs::write(host.path(XML), &xml)?;
    index_of_many(sealed)?;
    let times: Times = ask(sealed.host(), &["hook", HOOK, XML])?;
    let (hook, nothing) = (times.hook.p99()?, times.nothing.p99()?);
    let (few, many) = (times.hook.median()?, times.many.median()?);
    let with_many = Figure::new(
        &format!("hook, the same with {MANY} sealed VMs, median"),
        many / few,
        "x",
        Target::AtMost(2.0),
        format!("{many:.2} ms, {few:.2} ms with few, {} each", times.many.len()),
    );
    let alone = Figure::new(
        "hook, whole process, VM not sealed, p99",
        hook,
        "ms",
        Target::AtMost(3.0),
        format!(
            "median {:.2} ms of {}; /bin/true {:.2} ms, p99 {nothing:.2} ms; XML of {} bytes",
            times.hook.median()?,
            times.hook.len(),
            times.nothing.median()?,
            xml.len()
        ),
    );
    Ok(vec![alone, with_many])
}

/// Has virtseald itself write the index of a keystore with [`MANY`] VMs, and keeps it for the hook. The keystore is as before then.
fn index_of_many(sealed: &mut SealedHost) -> Result<()> {
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(sealed, |keystore| {
        let transaction = keystore.transaction()?;
        for number in 0..MANY {
            let uuid = format!(
                "{:08x}-0000-4000-8000-00000000be9c",
                number.wrapping_mul(0x9e37_79b1)
            );
            transaction.execute(
                "INSERT INTO vms (uuid, name, sealed_at, vtpm_seen) VALUES (?1, 'many', 0, 0)",
                [uuid],
            )?;
        }
        Ok(transaction.commit()?)
    })?;
    sealed.start_daemon()?;
    // It listens before it has opened the keystore.
    sealed.run(&["status"])?;
    let host = sealed.host();
    let index = host.path("/var/lib/virtseal/hook.index");
    let many = host.path("/run/many.index");
    fs::copy(&index, &many)?;
    ensure!(
        fs::metadata(&many)?.len() > u64::from(MANY) * 33,
        "virtseald wrote no such index"
    );
    fs::write(host.path(MANY_CONF), "index = /run/many.index\n")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(sealed, |keystore| {
        Ok(keystore
            .execute("DELETE FROM vms WHERE name = 'many'", [])
            .map(drop)?)
    })?;
    sealed.start_daemon()?;
    sealed.unlock()
}

pub(crate) fn inside(hook: &str, xml: &str) -> Result<Times> {
    let xml = fs::read(xml)?;
    let mut times = Times::default();
    for _ in 0..ROUNDS {
        times.hook.time(|| run(hook, "", &xml))?;
        times.many.time(|| run(hook, MANY_CONF, &xml))?;
        times.nothing.time(|| run("/bin/true", "", &xml))?;
    }
    Ok(times)
}

fn run(program: &str, conf: &str, xml: &[u8]) -> Result<()> {
    let mut child = Command::new(Path::new(program))
        .env("VIRTSEAL_HOOK_CONF", conf)
        .args(["unsealed", "prepare", "begin", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    match stdin.write_all(xml) {
        // /bin/true reads nothing.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(error.into()),
        _ => drop(stdin),
    }
    let status = child.wait()?;
    ensure!(status.success(), "{program} ended with {status}");
    Ok(())
}

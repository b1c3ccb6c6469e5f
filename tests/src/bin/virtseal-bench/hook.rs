//! The hook's whole process for a VM that is not sealed, as libvirt runs it at `prepare begin`.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use virtseal_e2e::{DomainSpec, SealedHost};

use crate::figure::{Figure, Target};
use crate::inside::ask;
use crate::samples::Samples;

const ROUNDS: usize = 1000;
const HOOK: &str = "/etc/libvirt/hooks/qemu.d/virtseal";
const XML: &str = "/run/unsealed.xml";
const DISK_BYTES: u64 = 1 << 20;

#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Times {
    hook: Samples,
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
    let times: Times = ask(host, &["hook", HOOK, XML])?;
    let (hook, nothing) = (times.hook.p99()?, times.nothing.p99()?);
    Ok(vec![Figure::new(
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
    )])
}

pub(crate) fn inside(hook: &str, xml: &str) -> Result<Times> {
    let xml = fs::read(xml)?;
    let mut times = Times::default();
    for _ in 0..ROUNDS {
        times.hook.time(|| run(hook, &xml))?;
        times.nothing.time(|| run("/bin/true", &xml))?;
    }
    Ok(times)
}

fn run(program: &str, xml: &[u8]) -> Result<()> {
    let mut child = Command::new(Path::new(program))
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

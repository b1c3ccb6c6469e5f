//! `io.virtseal.Lifecycle.Prepare` for sealed VMs, one at a time and 32 at once, from connecting to the answer; and
//! the daemon's memory before and after.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtseal_testkit::rig::STATE;
use virtseal_testkit::{DomainSpec, SealedHost};

use crate::figure::{Figure, Target};
use crate::inside::ask;
use crate::samples::Samples;

const VMS: usize = 32;
const ROUNDS: usize = 32;
/// How many VMs are started at once while they are made.
const STARTERS: usize = 4;
const XMLS: &str = "/run/prepare";
/// By then the daemon has ended idle threads and given memory back.
const IDLE: Duration = Duration::from_secs(16);

#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Times {
    alone: Samples,
    together: Samples,
    empty_alone: Samples,
    empty_together: Samples,
    /// A line appended and synced, which each prepare waits for too: its audit record.
    synced_alone: Samples,
    synced_together: Samples,
}

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    let specs: Vec<_> = (0..VMS).map(spec).collect();
    make_vms(sealed, &specs)?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    thread::sleep(IDLE);
    let unlocked = Memory::of(&sealed.daemon()?.proc())?;
    let times: Times = ask(sealed.host(), &["prepare", XMLS])?;
    sealed.expect_no_secrets()?;
    thread::sleep(IDLE);
    let after = Memory::of(&sealed.daemon()?.proc())?;
    let calls = times.alone.len() + times.together.len();
    Ok(vec![
        latency(
            "1 at a time",
            [&times.alone, &times.empty_alone, &times.synced_alone],
            15.0,
        )?,
        latency(
            "32 at once",
            [&times.together, &times.empty_together, &times.synced_together],
            60.0,
        )?,
        unlocked.figure("idle after unlock"),
        after.figure(&format!("idle after {calls} prepares")),
    ])
}

fn latency(how: &str, [samples, empty, synced]: [&Samples; 3], most: f64) -> Result<Figure> {
    let measured = format!(
        "median {:.1} ms of {}; a call that does nothing {:.2} ms, p99 {:.2} ms; a line appended and synced {:.2} ms, \
         p99 {:.2} ms",
        samples.median()?,
        samples.len(),
        empty.median()?,
        empty.p99()?,
        synced.median()?,
        synced.p99()?
    );
    let name = format!("prepare, sealed VM, native provider, {how}, p99");
    Ok(Figure::new(
        &name,
        samples.p99()?,
        "ms",
        Target::AtMost(most),
        measured,
    ))
}

// --- the VMs ---

fn spec(number: usize) -> DomainSpec {
    let name = format!("prepared{number:02}");
    let disk = PathBuf::from(format!("/var/lib/libvirt/images/{name}.qcow2"));
    DomainSpec {
        disk_format: "qcow2",
        tpm: true,
        ..DomainSpec::minimal(&name, &disk)
    }
}

/// Seals the VMs, and starts each, so that its vTPM has a state to be opened. Keeps the XML with which it runs later: the first one
/// does not say yet that the vTPM has run, and a start with that is noted as one whose XML is behind.
fn make_vms(sealed: &SealedHost, specs: &[DomainSpec]) -> Result<()> {
    fs::create_dir_all(sealed.host().path(XMLS))?;
    for spec in specs {
        sealed.seal_empty(spec)?;
    }
    start_each(sealed, specs)?;
    sealed.wait_for_copies(0)?;
    start_each(sealed, specs)
}

fn start_each(sealed: &SealedHost, specs: &[DomainSpec]) -> Result<()> {
    // libvirt makes its directory for swtpm at the first start, and fails when two starts make it at once.
    let (first, others) = specs.split_first().context("no VMs")?;
    start_once(sealed, first)?;
    thread::scope(|scope| {
        let starters: Vec<_> = others
            .chunks(others.len().div_ceil(STARTERS))
            .map(|some| scope.spawn(|| some.iter().try_for_each(|spec| start_once(sealed, spec))))
            .collect();
        starters
            .into_iter()
            .try_for_each(|starter| joined(starter.join()))
    })
}

fn start_once(sealed: &SealedHost, spec: &DomainSpec) -> Result<()> {
    let host = sealed.host();
    host.virsh(&["start", "--paused", &spec.name])?.succeeded()?;
    let xml = host.virsh(&["dumpxml", &spec.name])?.succeeded()?;
    host.virsh(&["destroy", &spec.name])?.succeeded()?;
    let file = Path::new(XMLS).join(spec.uuid.to_string());
    Ok(fs::write(host.path(file), xml)?)
}

// --- the calls ---

struct Vm {
    uuid: String,
    prepare: Value,
}

pub(crate) fn inside(directory: &str) -> Result<Times> {
    let vms = fs::read_dir(directory)?
        .map(|entry| {
            let path = entry?.path();
            let uuid = path
                .file_name()
                .context("no name")?
                .to_string_lossy()
                .into_owned();
            let xml = fs::read_to_string(&path)?;
            Ok(Vm {
                uuid,
                prepare: json!({ "xml": xml }),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    ensure!(vms.len() == VMS, "{} VMs instead of {VMS}", vms.len());
    // A warm daemon has opened each object before.
    vms.iter()
        .try_for_each(|vm| vm.prepare().and_then(|()| vm.release()))?;
    let mut times = Times::default();
    for _ in 0..ROUNDS {
        for vm in &vms {
            times.alone.time(|| vm.prepare())?;
            vm.release()?;
            times.empty_alone.time(empty_call)?;
            times.synced_alone.time(|| vm.append())?;
        }
    }
    together(&vms, &mut times)?;
    Ok(times)
}

/// All VMs at once, in rounds.
fn together(vms: &[Vm], times: &mut Times) -> Result<()> {
    let barrier = Barrier::new(vms.len());
    let of_each = thread::scope(|scope| {
        let threads: Vec<_> = vms
            .iter()
            .map(|vm| scope.spawn(|| vm.prepare_with_others(&barrier)))
            .collect();
        threads
            .into_iter()
            .map(|thread| joined(thread.join()))
            .collect::<Result<Vec<_>>>()
    })?;
    for (prepares, empty, synced) in of_each {
        times.together.extend(prepares);
        times.empty_together.extend(empty);
        times.synced_together.extend(synced);
    }
    Ok(())
}

impl Vm {
    fn prepare(&self) -> Result<()> {
        call("io.virtseal.Lifecycle.Prepare", &self.prepare)
    }

    fn release(&self) -> Result<()> {
        let vm = json!({ "vm": self.uuid, "name": "prepared" });
        call("io.virtseal.Lifecycle.Released", &vm)
    }

    fn append(&self) -> Result<()> {
        let path = Path::new(STATE).join(format!("bench-{}", self.uuid));
        let mut file = fs::OpenOptions::new().create(true).append(true).open(path)?;
        file.write_all(&[b'.'; 300])?;
        Ok(file.sync_data()?)
    }

    fn prepare_with_others(&self, barrier: &Barrier) -> Result<(Samples, Samples, Samples)> {
        let (mut prepares, mut empty, mut synced) =
            (Samples::default(), Samples::default(), Samples::default());
        let mut outcome = Ok(());
        // Even one that fails comes to the barrier: the others wait there.
        for _ in 0..ROUNDS {
            barrier.wait();
            outcome = outcome.and_then(|()| prepares.time(|| self.prepare()));
            barrier.wait();
            outcome = outcome.and_then(|()| self.release());
            barrier.wait();
            outcome = outcome.and_then(|()| empty.time(empty_call));
            barrier.wait();
            outcome = outcome.and_then(|()| synced.time(|| self.append()));
        }
        outcome.map(|()| (prepares, empty, synced))
    }
}

fn empty_call() -> Result<()> {
    call("org.varlink.service.GetInfo", &json!({}))
}

/// As the hook does it: one connection, one call.
pub(crate) fn call(method: &str, parameters: &Value) -> Result<()> {
    let mut stream = UnixStream::connect(SealedHost::HOOK_SOCKET)?;
    let mut request = json!({ "method": method, "parameters": parameters })
        .to_string()
        .into_bytes();
    request.push(0);
    stream.write_all(&request)?;
    let mut reply = Vec::new();
    BufReader::new(stream).read_until(0, &mut reply)?;
    let reply: Value = serde_json::from_slice(reply.strip_suffix(&[0]).context("no reply")?)?;
    ensure!(reply.get("error").is_none(), "{method}: {reply}");
    Ok(())
}

fn joined<T>(outcome: thread::Result<Result<T>>) -> Result<T> {
    outcome.unwrap_or_else(|_| Err(anyhow!("a thread panicked")))
}

// --- the daemon's memory ---

/// Of a process, in KiB.
struct Memory {
    resident: u64,
    anonymous: u64,
}

impl Memory {
    /// Reads it from the process' directory in `/proc`.
    fn of(process: &Path) -> Result<Self> {
        let status = fs::read_to_string(process.join("status"))?;
        let field = |name: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse().ok())
                .with_context(|| format!("no {name} in {status}"))
        };
        Ok(Self {
            resident: field("VmRSS:")?,
            anonymous: field("RssAnon:")?,
        })
    }

    fn figure(&self, when: &str) -> Figure {
        let mebibytes = |kibibytes: u64| kibibytes as f64 / 1024.0;
        Figure::new(
            &format!("resident memory of virtseald, {when}"),
            mebibytes(self.resident),
            "MiB",
            Target::AtMost(16.0),
            format!(
                "RssAnon {:.1} MiB, the rest is code shared with others",
                mebibytes(self.anonymous)
            ),
        )
    }
}

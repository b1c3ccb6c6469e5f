//! What a start costs at a key server: requests, and time when the first of two KMIP nodes is dead.
//!
//! Measured at `io.virtseal.Lifecycle.Prepare`, which is all that virtseal adds to a start, with the provider locked and
//! unlocked before: nothing is cached, and every node is in its place.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use virtseal_testkit::servers::{Manner, OpenBao, PyKmip, Relay};
use virtseal_testkit::{DomainSpec, SealedHost};

use crate::figure::{Figure, Target};
use crate::inside::ask;
use crate::prepare::call;
use crate::samples::Samples;

const DISKS: usize = 8;
const ROUNDS: usize = 7;

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    let (kms, bao) = (PyKmip::start()?, OpenBao::start()?);
    let nodes = [Relay::to(kms.port())?, Relay::to(kms.port())?];
    let before_bao = Relay::to(bao.port())?;
    kms.add_to(sealed, "kms", &nodes.each_ref().map(Relay::port), false)?;
    bao.add_to(sealed, "vault", before_bao.port())?;
    let (on_kms, on_vault) = (Vm::make(sealed, "kms")?, Vm::make(sealed, "vault")?);
    let unlock_kms = || sealed.unlock_provider("kms");
    let mut figures = vec![
        round_trips(sealed, &on_kms, &nodes[0], "kms", unlock_kms)?,
        round_trips(sealed, &on_vault, &before_bao, "vault", || {
            bao.unlock(sealed, "vault")
        })?,
    ];
    for (manner, what) in [
        (Manner::Dead, "connection refused"),
        (Manner::Silent, "black hole"),
    ] {
        figures.extend(dead_node(sealed, &on_kms, &nodes[0], manner, what, unlock_kms)?);
    }
    Ok(figures)
}

fn lock(sealed: &SealedHost, provider: &str) -> Result<()> {
    sealed
        .virtseal(&["provider", "lock", provider])?
        .succeeded()
        .map(drop)
}

/// The most of all rounds: one that costs more is one too many, unless a probe of the background came between.
fn round_trips(
    sealed: &SealedHost,
    vm: &Vm,
    relay: &Relay,
    provider: &str,
    unlock: impl Fn() -> Result<()>,
) -> Result<Figure> {
    let mut counted = Vec::new();
    for _ in 0..ROUNDS {
        lock(sealed, provider)?;
        unlock()?;
        let before = relay.requests();
        vm.starts(sealed, 1)?;
        counted.push(relay.requests() - before);
    }
    counted.sort_unstable();
    let median = counted[counted.len() / 2];
    Ok(Figure::new(
        &format!(
            "requests to the server for a start, {DISKS} disks and NVRAM, {}",
            kind_of(provider)
        ),
        median as f64,
        "requests",
        Target::Exactly(1.0),
        format!("counted before the server in {ROUNDS} starts: {counted:?}"),
    ))
}

fn kind_of(provider: &str) -> &'static str {
    match provider {
        "kms" => "kmip",
        _ => "transit",
    }
}

fn dead_node(
    sealed: &SealedHost,
    vm: &Vm,
    first: &Relay,
    manner: Manner,
    what: &str,
    unlock: impl Fn() -> Result<()>,
) -> Result<[Figure; 2]> {
    let [mut healthy, mut healthy_again, mut dead, mut dead_again] = <[Samples; 4]>::default();
    for _ in 0..ROUNDS {
        for (manner, one, two) in [
            (Manner::Forward, &mut healthy, &mut healthy_again),
            (manner, &mut dead, &mut dead_again),
        ] {
            first.be(Manner::Forward)?;
            lock(sealed, "kms")?;
            unlock()?;
            first.be(manner)?;
            for (samples, time) in [one, two].into_iter().zip(vm.starts(sealed, 2)?) {
                samples.push(time);
            }
        }
    }
    first.be(Manner::Forward)?;
    let figure = |which: &str, with: &Samples, without: &Samples, most: f64| -> Result<Figure> {
        let (with, without) = (with.median()?, without.median()?);
        Ok(Figure::new(
            &format!("a first KMIP node that is dead ({what}) adds to the {which} start"),
            with - without,
            "ms",
            Target::AtMost(most),
            format!("prepare, median of {ROUNDS}: {with:.1} ms; with both nodes {without:.1} ms"),
        ))
    };
    // Two medians of a busy machine are never the same: what is no wait is within some milliseconds.
    Ok([
        figure("first", &dead, &healthy, 300.0)?,
        figure("second", &dead_again, &healthy_again, 15.0)?,
    ])
}

/// What the calls of a start need, as a file in the host.
struct Vm {
    calls: String,
}

#[derive(Serialize, Deserialize)]
struct Calls {
    prepare: Value,
    release: Value,
}

impl Vm {
    /// Seals a VM under `provider` and starts it once; keeps the XML of its running.
    fn make(sealed: &SealedHost, provider: &str) -> Result<Self> {
        let name = format!("eight-on-{provider}");
        let spec = DomainSpec {
            tpm: false,
            ..SealedHost::spec(&name)
        };
        let (host, uuid) = (sealed.host(), spec.uuid.to_string());
        let mut xml = spec.xml();
        for nth in 0..DISKS {
            let path = match nth {
                0 => spec.disk.display().to_string(),
                nth => format!("/var/lib/libvirt/images/{name}-{nth}.qcow2"),
            };
            let create = ["volume", "create", &path, "--size", "16M", "--vm", &uuid];
            sealed
                .virtseal(&[&create[..], &["--provider", provider]].concat())?
                .succeeded()?;
            if nth > 0 {
                let target = char::from(b'a' + u8::try_from(nth)?);
                let disk = format!(
                    "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{path}'/>\
                     <target dev='vd{target}' bus='virtio'/></disk></devices>"
                );
                xml = virtseal_testkit::edited(&xml, "</devices>", &disk)?;
            }
        }
        host.define_xml(&xml)?;
        sealed
            .virtseal(&["vm", "seal", &name, "--provider", provider])?
            .succeeded()?;
        host.virsh(&["start", "--paused", &name])?.succeeded()?;
        let running = host.virsh(&["dumpxml", &name])?.succeeded()?;
        host.virsh(&["destroy", &name])?.succeeded()?;
        let calls = Calls {
            prepare: json!({ "xml": running }),
            release: json!({ "vm": uuid, "name": name }),
        };
        let file = format!("/run/{name}.json");
        fs::write(host.path(&file), serde_json::to_vec(&calls)?)?;
        Ok(Self { calls: file })
    }

    /// As many starts as far as virtseal has to do with them, one after the other.
    fn starts(&self, sealed: &SealedHost, starts: usize) -> Result<Vec<Duration>> {
        ask(sealed.host(), &["kms", &self.calls, &starts.to_string()])
    }
}

pub(crate) fn inside(vm: &str, starts: usize) -> Result<Vec<Duration>> {
    let calls: Calls = serde_json::from_slice(&fs::read(vm)?)?;
    let one = |_| {
        let began = Instant::now();
        call("io.virtseal.Lifecycle.Prepare", &calls.prepare)?;
        let took = began.elapsed();
        call("io.virtseal.Lifecycle.Released", &calls.release)?;
        Ok(took)
    };
    (0..starts).map(one).collect()
}

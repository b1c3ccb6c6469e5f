//! `virsh start` of a sealed VM (disk, vTPM, NVRAM) against the same VM that is not sealed, on the same
//! host and on one without virtseal.

use std::path::PathBuf;

use anyhow::{Context, Result};
use virtseal_testkit::{DomainSpec, Host, SealedHost};

use crate::figure::{Figure, Target};
use crate::samples::Samples;

const ROUNDS: usize = 25;
/// The first start makes the TPM and the UEFI variables, and fills libvirt's caches.
const UNCOUNTED_ROUNDS: usize = 2;
const SEALED: &str = "start-sealed";
const PLAIN: &str = "start-plain";

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    let bare = Host::start()?;
    let host = sealed.host();
    sealed.seal_empty(&spec(SEALED))?;
    define_plain(host)?;
    define_plain(&bare)?;
    let starts = [(host, SEALED), (host, PLAIN), (&bare, PLAIN)];
    for (host, vm) in starts {
        for _ in 0..UNCOUNTED_ROUNDS {
            start(host, vm, &mut Samples::default())?;
        }
    }
    let mut samples = [(); 3].map(|()| Samples::default());
    for _ in 0..ROUNDS {
        for ((host, vm), samples) in starts.into_iter().zip(&mut samples) {
            start(host, vm, samples)?;
        }
    }
    let [ours, plain, bare] = samples;
    let (ours_median, plain_median) = (ours.median()?, plain.median()?);
    Ok(vec![Figure::new(
        "virsh start sealed (disk, vTPM, NVRAM) / plain with vTPM",
        ours_median / plain_median,
        "x",
        Target::AtMost(1.10),
        format!(
            "median {ours_median:.0} ms of {}; plain {plain_median:.0} ms; plain, no virtseal on the host {:.0} ms",
            ours.len(),
            bare.median()?
        ),
    )])
}

fn spec(name: &str) -> DomainSpec {
    let disk = PathBuf::from(format!("/var/lib/libvirt/images/{name}.qcow2"));
    DomainSpec {
        disk_format: "qcow2",
        tpm: true,
        ..DomainSpec::minimal(name, &disk)
    }
}

fn define_plain(host: &Host) -> Result<()> {
    let spec = spec(PLAIN);
    let disk = spec.disk.to_str().context("a UTF-8 path")?;
    host.run(&["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"])?
        .succeeded()?;
    host.define(&spec)
}

/// With `--paused` all work of the start is done, and the guest takes no time from the next one.
fn start(host: &Host, vm: &str, samples: &mut Samples) -> Result<()> {
    samples.time(|| host.virsh(&["start", "--paused", vm])?.succeeded())?;
    host.virsh(&["destroy", vm])?.succeeded().map(drop)
}

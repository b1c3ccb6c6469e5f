//! `virsh start` of a sealed VM (disk, vTPM, NVRAM) against the same VM on a host without virtseal.

use std::path::Path;

use anyhow::Result;
use virtseal_e2e::{DomainSpec, Host, SealedHost};

use crate::figure::{Figure, Target};
use crate::samples::Samples;

const ROUNDS: usize = 25;
/// The first start makes the TPM and the UEFI variables, and fills libvirt's caches.
const UNCOUNTED_ROUNDS: usize = 2;
const VM: &str = "started";
const DISK: &str = "/var/lib/libvirt/images/started.qcow2";

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    let plain = Host::start()?;
    let spec = DomainSpec {
        disk_format: "qcow2",
        tpm: true,
        ..DomainSpec::minimal(VM, Path::new(DISK))
    };
    plain
        .run(&["qemu-img", "create", "-q", "-f", "qcow2", DISK, "64M"])?
        .succeeded()?;
    plain.define(&spec)?;
    sealed.seal_empty(&spec)?;
    for host in [sealed.host(), &plain] {
        for _ in 0..UNCOUNTED_ROUNDS {
            start(host, &mut Samples::default())?;
        }
    }
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for _ in 0..ROUNDS {
        start(sealed.host(), &mut ours)?;
        start(&plain, &mut theirs)?;
    }
    let (ours_median, theirs_median) = (ours.median()?, theirs.median()?);
    Ok(vec![Figure::new(
        "virsh start sealed (disk, vTPM, NVRAM) / plain with vTPM",
        ours_median / theirs_median,
        "x",
        Target::AtMost(1.10),
        format!(
            "median {ours_median:.0} ms of {}; no virtseal on the host: {theirs_median:.0} ms of {}",
            ours.len(),
            theirs.len()
        ),
    )])
}

/// With `--paused` all work of the start is done, and the guest takes no time from the next one.
fn start(host: &Host, samples: &mut Samples) -> Result<()> {
    samples.time(|| host.virsh(&["start", "--paused", VM])?.succeeded())?;
    host.virsh(&["destroy", VM])?.succeeded().map(drop)
}

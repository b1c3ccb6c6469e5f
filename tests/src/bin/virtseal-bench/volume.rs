//! `virtseal volume create` of 100 GiB, from the command line to the daemon's answer, against `qemu-img create`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use virtseal_testkit::{SealedHost, built_program};

use crate::figure::{Figure, Target};
use crate::inside::{ask, succeed};
use crate::samples::Samples;

const ROUNDS: usize = 51;
/// They take seconds each.
const LUKS_ROUNDS: usize = 3;
const OURS: &str = "/var/lib/libvirt/images/ours.qcow2";
const PLAIN: &str = "/var/lib/libvirt/images/plain.qcow2";
const LUKS: &str = "/var/lib/libvirt/images/luks.qcow2";
const LUKS_SECRET: &str = "/run/luks-secret";

#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Times {
    ours: Samples,
    plain: Samples,
    luks: Samples,
}

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    let virtseal = built_program("virtseal")?;
    let times: Times = ask(
        sealed.host(),
        &["volume", virtseal.to_str().context("a UTF-8 path")?],
    )?;
    let (ours, plain, luks) = (times.ours.median()?, times.plain.median()?, times.luks.median()?);
    let of_ours = format!("median {ours:.1} ms of {}", times.ours.len());
    Ok(vec![
        Figure::new(
            "volume create 100 GiB / qemu-img create, plain",
            ours / plain,
            "x",
            Target::AtMost(1.5),
            format!("{of_ours}; qemu-img {plain:.1} ms of {}", times.plain.len()),
        ),
        Figure::new(
            "qemu-img create LUKS, default iterations / volume create",
            luks / ours,
            "x",
            Target::AtLeast(50.0),
            format!("{of_ours}; qemu-img {luks:.0} ms of {}", times.luks.len()),
        ),
    ])
}

pub(crate) fn inside(virtseal: &str) -> Result<Times> {
    fs::write(LUKS_SECRET, "correct horse battery staple")?;
    // One round of each that does not count: everything is in the page cache then.
    round(virtseal, &mut Times::default())?;
    let mut times = Times::default();
    for _ in 0..ROUNDS {
        round(virtseal, &mut times)?;
    }
    for _ in 0..LUKS_ROUNDS {
        times.luks.time(create_luks)?;
        fs::remove_file(LUKS)?;
    }
    Ok(times)
}

fn round(virtseal: &str, times: &mut Times) -> Result<()> {
    let vm = Uuid::new_v4().to_string();
    times.ours.time(|| {
        succeed(
            virtseal,
            &["volume", "create", OURS, "--size", "100G", "--vm", &vm],
        )
    })?;
    times
        .plain
        .time(|| succeed("qemu-img", &["create", "-q", "-f", "qcow2", PLAIN, "100G"]))?;
    for image in [OURS, PLAIN] {
        fs::remove_file(Path::new(image))?;
    }
    Ok(())
}

fn create_luks() -> Result<()> {
    let secret = format!("secret,id=s,file={LUKS_SECRET}");
    let options = "encrypt.format=luks,encrypt.key-secret=s";
    succeed(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "--object", &secret, "-o", options, LUKS, "100G",
        ],
    )
}

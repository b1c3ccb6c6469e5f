//! What readers cost a start who do all that they can at once; and how long `virtseal status` takes on a host with 3,000 VMs.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use uuid::Uuid;
use virtseal_testkit::{Attacker, SealedHost};

use crate::figure::{Figure, Target};
use crate::inside::ask;
use crate::prepare::call;
use crate::samples::Samples;

const ROUNDS: usize = 200;
const VMS: usize = 3000;
const ASKED: usize = 20;
/// By then the daemon looks no more at what somebody has asked for.
const FORGOTTEN: Duration = Duration::from_secs(25);
const XML: &str = "/run/readers.xml";

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    Attacker::let_read(sealed)?;
    sealed.unlock()?;
    let spec = sealed.seal_new("readers01")?;
    sealed.start_paused(&spec.name)?;
    let xml = sealed.host().virsh(&["dumpxml", &spec.name])?.succeeded()?;
    sealed.destroy(&spec.name)?;
    fs::write(sealed.host().path(XML), xml)?;
    let inside = ["readers", XML, &spec.uuid.to_string()].map(str::to_owned);
    let inside: Vec<_> = inside.iter().map(String::as_str).collect();
    let alone: Samples = ask(sealed.host(), &inside)?;
    // A job to be watched, that waits for a backup.
    let passphrase = sealed.passphrase_file()?.display().to_string();
    sealed.run(&["provider", "rotate", "main", "--passphrase-file", &passphrase])?;
    let attackers = Attacker::all(sealed.host())?;
    let attacked: Samples = ask(sealed.host(), &inside)?;
    drop(attackers);
    let backup = "/var/lib/virtseal/readers.age";
    sealed.run(&[
        "provider",
        "backup",
        "main",
        "--output",
        backup,
        "--passphrase-file",
        &passphrase,
    ])?;
    let added = attacked.median()? - alone.median()?;
    let measured = format!(
        "median {:.1} ms alone, {:.1} ms with all attacks at once, p99 {:.1} and {:.1} ms, {ROUNDS} of each",
        alone.median()?,
        attacked.median()?,
        alone.p99()?,
        attacked.p99()?
    );
    let name = "prepare, what attacking readers add at the median";
    Ok(vec![
        Figure::new(name, added, "ms", Target::AtMost(50.0), measured),
        status(sealed, &spec.name)?,
    ])
}

/// Starts, one after the other.
pub(crate) fn inside(xml: &str, uuid: &str) -> Result<Samples> {
    let prepare = json!({ "xml": fs::read_to_string(xml)? });
    let release = json!({ "vm": uuid, "name": "readers01" });
    let mut samples = Samples::default();
    for _ in 0..ROUNDS {
        samples.time(|| call("io.virtseal.Lifecycle.Prepare", &prepare))?;
        call("io.virtseal.Lifecycle.Released", &release)?;
    }
    Ok(samples)
}

/// Of copies of a sealed VM: what there is to read and to look at is the same as with 3,000 of them.
fn status(sealed: &mut SealedHost, name: &str) -> Result<Figure> {
    let (host, xml) = (sealed.host(), sealed.dumpxml(name)?);
    let uuid = host.virsh(&["domuuid", name])?.succeeded()?;
    let (mut define, mut undefine) = (String::new(), String::new());
    fs::create_dir_all(host.path("/run/many"))?;
    for number in 0..VMS {
        let copy = format!("many{number:04}");
        let xml = xml
            .replace(name, &copy)
            .replace(uuid.trim(), &Uuid::new_v4().to_string());
        let file = Path::new("/run/many").join(&copy);
        fs::write(host.path(&file), xml)?;
        writeln!(define, "define {}", file.display())?;
        writeln!(undefine, "undefine --keep-nvram --keep-tpm {copy}")?;
    }
    fs::write(host.path("/run/define"), define)?;
    fs::write(host.path("/run/undefine"), undefine)?;
    let virsh = |commands: &str| {
        let script = format!("virsh -q -c qemu:///system <{commands} >/dev/null");
        host.run(&["sh", "-c", &script])?.succeeded()
    };
    virsh("/run/define")?;
    thread::sleep(FORGOTTEN);
    let mut samples = Samples::default();
    // The first one finds nothing that was looked at before.
    let began = Instant::now();
    let shown = sealed.json(&["status"])?;
    let first = began.elapsed().as_secs_f64();
    let shown = shown["vms"].as_array().context("no VMs")?.len();
    ensure!(shown > VMS, "{shown} VMs are shown");
    for _ in 0..ASKED {
        samples.time(|| sealed.virtseal(&["--json", "status"])?.succeeded())?;
    }
    virsh("/run/undefine")?;
    let measured = format!(
        "the median of {ASKED}, p99 {:.2} s; the first one {first:.2} s",
        samples.p99()? / 1000.0
    );
    let name = format!("virtseal status with {VMS} VMs");
    Ok(Figure::new(
        &name,
        samples.median()? / 1000.0,
        "s",
        Target::AtMost(0.3),
        measured,
    ))
}

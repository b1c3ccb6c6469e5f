//! What readers cost a start who do all that they can at once.

use std::fs;

use anyhow::Result;
use serde_json::json;
use virtseal_testkit::{Attacker, SealedHost};

use crate::figure::{Figure, Target};
use crate::inside::ask;
use crate::prepare::call;
use crate::samples::Samples;

const ROUNDS: usize = 200;
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
    Ok(vec![Figure::new(
        name,
        added,
        "ms",
        Target::AtMost(50.0),
        measured,
    )])
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

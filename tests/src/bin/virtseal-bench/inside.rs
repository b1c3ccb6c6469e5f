//! The half of an experiment that runs inside the private host, as a process of its own that answers in JSON.

use std::env;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use virtseal_testkit::Host;

use crate::{hook, kms, prepare, readers, status, unwraps, volume};

/// Runs `virtseal-bench inside ARGUMENTS` inside `host` and returns its answer.
pub(crate) fn ask<T: DeserializeOwned>(host: &Host, arguments: &[&str]) -> Result<T> {
    let output = host
        .command(env::current_exe()?)
        .arg("inside")
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()?;
    ensure!(
        output.status.success(),
        "{} inside the host ended with {}",
        arguments.join(" "),
        output.status
    );
    serde_json::from_slice(&output.stdout).context("its answer is no JSON")
}

/// The other side of [`ask`].
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let answer = match arguments[..] {
        ["volume", virtseal] => serde_json::to_string(&volume::inside(virtseal)?),
        ["hook", hook, xml] => serde_json::to_string(&hook::inside(hook, xml)?),
        ["prepare", directory] => serde_json::to_string(&prepare::inside(directory)?),
        ["kms", vm, starts] => serde_json::to_string(&kms::inside(vm, starts.parse()?)?),
        ["readers", xml, uuid] => serde_json::to_string(&readers::inside(xml, uuid)?),
        ["status", virtseal] => serde_json::to_string(&status::inside(virtseal)?),
        ["unwraps"] => serde_json::to_string(&unwraps::inside()?),
        _ => bail!("there is nothing like {arguments:?} to do inside"),
    };
    println!("{}", answer?);
    Ok(())
}

/// Runs a program to its end; its output is of interest only if it fails.
pub(crate) fn succeed(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program} did not start"))?;
    ensure!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

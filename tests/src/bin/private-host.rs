//! Runs a command, or a shell, on a private libvirt host, for scripts and for trying things out:
//!
//! ```text
//! private-host [--hook PROGRAM] [--libvirtd-conf LINE]... [COMMAND [ARGUMENT]...]
//! ```
//!
//! The host is gone when the command ends. Its exit status is the command's. The command finds the directory that backs
//! the host's files in `VIRTSEAL_E2E_DIRECTORY`.

use std::env;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use virtseal_testkit::{Host, HostBuilder};

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("private-host: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let (builder, command) = parse(env::args().skip(1).collect())?;
    let (program, arguments) = command.split_first().context("no command")?;
    let host = builder.start()?;
    let status = host
        .command(program)
        .args(arguments)
        .env("VIRTSEAL_E2E_DIRECTORY", host.directory())
        .status()?;
    Ok(ExitCode::from(
        status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(1),
    ))
}

fn parse(mut arguments: Vec<String>) -> Result<(HostBuilder, Vec<String>)> {
    let mut builder = Host::builder();
    while let Some(option) = arguments
        .first()
        .filter(|argument| argument.starts_with("--"))
        .cloned()
    {
        let value = arguments
            .get(1)
            .with_context(|| format!("{option} needs a value"))?;
        builder = match option.as_str() {
            "--hook" => builder.hook(Path::new(value)),
            "--libvirtd-conf" => builder.libvirtd_conf(value),
            _ => anyhow::bail!("unknown option {option}; known are --hook and --libvirtd-conf"),
        };
        arguments.drain(..2);
    }
    if arguments.is_empty() {
        arguments.push("bash".to_owned());
    }
    Ok((builder, arguments))
}

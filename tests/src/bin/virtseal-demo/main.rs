//! `make demo`: the main job on a real libvirt, QEMU, OVMF and swtpm, one line a step.
//!
//! Every step checks what it shows; the first that sees anything else ends the demo with what happened, the ends of
//! the logs, and exit status 1. It all lives in a private host that is gone afterwards, also after Ctrl-C.

mod screen;
mod search;
mod story;

use std::fs;
use std::process::ExitCode;

use anyhow::{Result, anyhow, ensure};
use virtseal_testkit::{Host, SealedHost};

use screen::{Said, Screen};

const LOGS: [&str; 6] = [
    "/var/log/virtseald.out",
    "/var/log/libvirtd.out",
    "/var/log/libvirt/libvirtd.log",
    "/var/log/libvirt/qemu/web01.log",
    "/var/log/swtpm/libvirt/qemu/web01-swtpm.log",
    "/run/console/web01.sock.log",
];
const LOG_TAIL_LINES: usize = 15;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nvirtseal-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut screen = Screen::new();
    let sealed = screen.step("host", start)?;
    let told = story::tell(&mut screen, &sealed);
    if told.is_err() {
        show_logs(sealed.host());
    }
    told?;
    screen.step("clean up", || clean_up(sealed))?;
    println!(
        "\nAll as it should be, in {:.0} s. Next: README.md, \"Seal a VM\".",
        screen.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The machine is probed while the host starts: on some, a `/dev/kvm` that does not work takes 12 s to find out.
fn start() -> Result<(Said, SealedHost)> {
    let probe = std::thread::spawn(story::prepare_machine);
    let sealed = SealedHost::start_without_provider(Host::builder())?;
    let accelerator = probe
        .join()
        .unwrap_or_else(|_| Err(anyhow!("the probe panicked")))?;
    let versions = sealed.host().versions()?;
    let line = format!("private {versions} with virtseal; {accelerator}");
    Ok((Said::line(line), sealed))
}

fn clean_up(sealed: SealedHost) -> Result<(Said, ())> {
    let directory = sealed.host().directory().to_owned();
    drop(sealed);
    ensure!(!directory.exists(), "{} is still there", directory.display());
    let line = format!("daemons and VMs ended, {} removed", directory.display());
    Ok((Said::line(line), ()))
}

fn show_logs(host: &Host) {
    for log in LOGS {
        let Ok(bytes) = fs::read(host.path(log)) else {
            continue;
        };
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        if lines.is_empty() {
            continue;
        }
        eprintln!("\n--- the end of {log}");
        for line in &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..] {
            eprintln!("{line}");
        }
    }
}

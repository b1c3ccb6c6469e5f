//! `virtseal provider move` of 10,000 envelopes from the command line to the job's end: between two native providers, into a
//! token of SoftHSM, and out of it.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rusqlite::params;
use uuid::Uuid;
use virtseal_testkit::rig::root_of;
use virtseal_testkit::servers::SoftHsm;
use virtseal_testkit::{RootKey, SealedHost, edit_keystore};

use crate::figure::{Figure, Target};

const ENVELOPES: u32 = 10_000;
const ENVELOPES_OF_A_VM: u32 = 4;
const LEAST_A_SECOND: f64 = 2000.0;
const MAX_MIB: f64 = 8.0;

pub(crate) fn measure(sealed: &mut SealedHost) -> Result<Vec<Figure>> {
    let hsm = SoftHsm::new()?;
    hsm.make("kek")?;
    sealed.add_provider("spare")?;
    let root = root_of(sealed, "main", "/run/sweep-root.json")?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    fill(sealed, &root)?;
    hsm.start_daemon(sealed)?;
    for name in ["main", "spare"] {
        sealed.unlock_provider(name)?;
    }
    hsm.add_to(sealed, "hsm", "kek")?;
    let mut figures = sweep(sealed, ("main", "spare"), "native to native")?;
    figures.extend(sweep(sealed, ("spare", "hsm"), "native to SoftHSM")?);
    figures.extend(sweep(sealed, ("hsm", "main"), "SoftHSM to native")?);
    // Whoever measures next finds the host as it was.
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(sealed, |keystore| {
        keystore.execute("DELETE FROM stale_copies", [])?;
        Ok(keystore.execute("DELETE FROM envelopes WHERE created = 0", [])?)
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    Ok(figures)
}

fn sweep(sealed: &mut SealedHost, (from, to): (&str, &str), name: &str) -> Result<Vec<Figure>> {
    let daemon = sealed.daemon()?.outside_pid()?;
    let before = memory_mib(daemon.as_raw(), "VmRSS:")?;
    // The high-water mark counts from here.
    fs::write(format!("/proc/{daemon}/clear_refs"), "5")?;
    let began = Instant::now();
    let moved = sealed.run(&["provider", "move", from, to, "--watch", "--json"])?;
    let seconds = began.elapsed().as_secs_f64();
    let told: serde_json::Value = serde_json::from_str(&moved)?;
    let changed = told["job"]["changed"].as_u64().context("no job")?;
    ensure!(changed >= u64::from(ENVELOPES), "not all moved: {moved}");
    let most = memory_mib(daemon.as_raw(), "VmHWM:")?;
    Ok(vec![
        Figure::new(
            &format!("move of 10,000 envelopes, {name}"),
            changed as f64 / seconds,
            "/s",
            Target::AtLeast(LEAST_A_SECOND),
            format!(
                "{changed} envelopes in {seconds:.1} s, each unwrapped, wrapped, unwrapped again, committed"
            ),
        ),
        Figure::new(
            &format!("virtseald's memory during that move, {name}, most above before"),
            most - before,
            "MiB",
            Target::AtMost(MAX_MIB),
            format!("{before:.1} MiB resident before, {most:.1} MiB at the most"),
        ),
    ])
}

/// vTPMs: they need no image to be there.
fn fill(sealed: &SealedHost, root: &RootKey) -> Result<()> {
    edit_keystore(sealed, |keystore| {
        let transaction = keystore.transaction()?;
        let mut vm = Uuid::new_v4();
        for nth in 0..ENVELOPES {
            if nth % ENVELOPES_OF_A_VM == 0 {
                vm = Uuid::new_v4();
            }
            let (id, json) = root.new_vtpm_envelope("main", vm)?;
            transaction.execute(
                "INSERT INTO envelopes (id, vm, kind, generation, json, state, location, created, updated)
                 VALUES (?1, ?2, 'vtpm', 1, ?3, 'active', '', 0, 0)",
                params![id.to_string(), vm.to_string(), json],
            )?;
        }
        Ok(transaction.commit()?)
    })
}

fn memory_mib(pid: i32, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.split_whitespace().next());
    Ok(kib.context("no such field")?.parse::<f64>()? / 1024.0)
}

//! `make bench`: what virtseal promises about time and memory, each figure next to a peer measured in the same run.
//!
//! ```text
//! virtseal-bench [volume|hook|prepare|start|readers|status|sweep|unwraps|kms]...
//! ```
//!
//! Prints a table, writes `target/bench/results.json` (see [`figure::Figure`]) and ends with exit status 1 where a
//! target is missed. Runs of virtseal and its peer alternate, so that a busy machine is as busy for both.
//!
//! Programs are timed by this program again, running inside the private host as `virtseal-bench inside …`: entering
//! the host costs as much as some of them take.

mod figure;
mod hook;
mod inside;
mod kms;
mod prepare;
mod readers;
mod samples;
mod start;
mod status;
mod sweep;
mod unwraps;
mod volume;

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use virtseal_testkit::SealedHost;

use figure::Figure;

const RESULTS: &str = "target/bench/results.json";
const EXPERIMENTS: [(&str, Experiment); 9] = [
    ("volume", volume::measure),
    ("hook", hook::measure),
    ("prepare", prepare::measure),
    ("start", start::measure),
    ("readers", readers::measure),
    ("status", status::measure),
    ("sweep", sweep::measure),
    ("unwraps", unwraps::measure),
    ("kms", kms::measure),
];

type Experiment = fn(&mut SealedHost) -> Result<Vec<Figure>>;

fn main() -> ExitCode {
    let arguments: Vec<_> = env::args().skip(1).collect();
    let outcome = match arguments.split_first() {
        Some((first, rest)) if first == "inside" => inside::run(rest).map(|()| true),
        _ => run(&arguments),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("virtseal-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all targets are met.
fn run(names: &[String]) -> Result<bool> {
    for name in names {
        ensure!(
            EXPERIMENTS.iter().any(|(known, _)| known == name),
            "there is no experiment {name:?}"
        );
    }
    let mut sealed = SealedHost::start()?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}, {cpus} CPUs, {}", sealed.host().versions()?, load_average());
    let (mut figures, mut failed) = (Vec::new(), false);
    for (name, experiment) in EXPERIMENTS {
        if names.is_empty() || names.iter().any(|wanted| wanted == name) {
            eprintln!("measuring: {name}");
            match experiment(&mut sealed) {
                Ok(measured) => figures.extend(measured),
                // What the others have measured took minutes.
                Err(error) => {
                    eprintln!("virtseal-bench: {name}: {error:#}");
                    failed = true;
                }
            }
        }
    }
    println!("\n{}", figure::table(&figures));
    save(&figures)?;
    let missed = figures.iter().filter(|figure| !figure.ok).count();
    if missed > 0 {
        println!("\n{missed} of {} targets missed", figures.len());
    }
    Ok(missed == 0 && !failed)
}

fn save(figures: &[Figure]) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(RESULTS);
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&path, serde_json::to_string_pretty(figures)? + "\n")?;
    println!("\n{RESULTS} is written");
    Ok(())
}

/// Figures of a busy machine deserve less trust.
fn load_average() -> String {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    format!(
        "load average {}",
        load.split_whitespace().next().unwrap_or("unknown")
    )
}

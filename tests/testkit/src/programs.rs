//! Finding the programs the stories run. A story never skips: what is missing is an error with the way to get it.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

/// Debian's package of each program the stage itself runs.
const STAGE: &[(&str, &str)] = &[
    ("bash", "bash"),
    ("unshare", "util-linux"),
    ("nsenter", "util-linux"),
    ("libvirtd", "libvirt-daemon"),
    ("virsh", "libvirt-clients"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("swtpm", "swtpm"),
    ("swtpm_setup", "swtpm-tools"),
];

/// Checks that each program, given as (program, Debian package), is on PATH.
///
/// # Errors
/// One error that names every missing program and its package.
pub fn require_programs(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = programs
        .iter()
        .filter(|(program, _)| find_on_path(program).is_none())
        .map(|(program, package)| format!("{program} (package {package})"))
        .collect();
    if !missing.is_empty() {
        bail!(
            "these programs are missing: {}; run: make deps",
            missing.join(", ")
        );
    }
    Ok(())
}

/// What every [`Host`](crate::Host) needs.
pub(crate) fn require_stage() -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the end-to-end stage makes mounts and runs libvirtd: run it as root"
    );
    require_programs(STAGE)
}

/// The path of a program of this workspace (`virtseald`, `virtseal`, `virtseal-hook`), built by the same cargo run
/// that built the caller.
///
/// # Errors
/// It isn't there: `cargo test -p virtseal-e2e` alone does not build the other packages' programs.
pub fn built_program(name: &str) -> Result<PathBuf> {
    let caller = env::current_exe().context("the path of this program is unknown")?;
    // A test lies in target/PROFILE/deps, a program in target/PROFILE.
    caller
        .ancestors()
        .skip(1)
        .take(2)
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!(
                "{name} is not beside {}; run: cargo build --workspace",
                caller.display()
            )
        })
}

/// The directory of the stage's scripts and templates.
pub(crate) fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../host").join(name)
}

fn find_on_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    // Daemons live in sbin, which a user's PATH may lack.
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_named_with_its_package() {
        let error = require_programs(&[("sh", "dash"), ("no-such-program", "some-package")]).unwrap_err();
        let expected = "these programs are missing: no-such-program (package some-package); run: make deps";
        assert_eq!(error.to_string(), expected);
    }
}

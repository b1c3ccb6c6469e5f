//! VMs go from a token to a key server, to another one and to a key on the host, and notice nothing of it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use virtseal_e2e::servers::{OpenBao, PyKmip, SoftHsm};
use virtseal_e2e::{Host, SealedHost, edit_keystore, expect_names, kept_envelopes, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
const STATE: &str = "/var/lib/virtseal";
const IMAGES: &str = "/var/lib/libvirt/images";
const VOLUMES: usize = 12;

/// A host with the providers `hsm` (SoftHSM), `kms` (PyKMIP) and `vault` (OpenBao).
struct Rig {
    sealed: SealedHost,
    hsm: SoftHsm,
    bao: OpenBao,
    _kms: PyKmip,
}

impl Rig {
    fn start() -> Result<Self> {
        let (hsm, kms, bao) = (SoftHsm::new()?, PyKmip::start()?, OpenBao::start()?);
        hsm.make("kek")?;
        let mut sealed = SealedHost::start_without_provider(Host::builder())?;
        let settings = sealed.host().path("/etc/virtseal");
        fs::create_dir_all(&settings)?;
        fs::write(settings.join("virtseald.yaml"), "batch_size: 1\ninterval: 20ms\n")?;
        sealed.stop_daemon(Signal::SIGTERM)?;
        let launcher = hsm.launcher();
        sealed.start_daemon_through(&launcher.each_ref().map(String::as_str))?;
        hsm.add_to(&sealed, "hsm", "kek")?;
        kms.add_to(&sealed, "kms", &[kms.port()], false)?;
        bao.add_to(&sealed, "vault", bao.port())?;
        Ok(Self {
            sealed,
            hsm,
            bao,
            _kms: kms,
        })
    }

    fn virtseal(&self, arguments: &[&str]) -> Result<String> {
        run(&self.sealed, arguments)
    }

    fn refused(&self, code: i32, arguments: &[&str]) -> Result<String> {
        let output = self.sealed.virtseal(arguments)?;
        ensure!(
            output.status.code() == Some(code),
            "{} ended with {:?}, not {code}: {}{}",
            output.command,
            output.status.code(),
            output.stdout,
            output.stderr
        );
        Ok(output.stderr)
    }

    fn unlock(&self) -> Result<()> {
        self.hsm.unlock(&self.sealed, "hsm")?;
        self.bao.unlock(&self.sealed, "vault")
    }

    fn kill_and_restart(&mut self) -> Result<()> {
        self.sealed.stop_daemon(Signal::SIGKILL)?;
        let launcher = self.hsm.launcher();
        self.sealed
            .start_daemon_through(&launcher.each_ref().map(String::as_str))
    }

    fn seal(&self, vm: &str) -> Result<()> {
        let mut spec = SealedHost::spec(vm);
        spec.tpm = true;
        let (disk, uuid) = (spec.disk.display().to_string(), spec.uuid.to_string());
        self.virtseal(&["volume", "create", &disk, "--size", "64M", "--vm", &uuid])?;
        self.sealed.host().define(&spec)?;
        self.virtseal(&["vm", "seal", vm]).map(drop)
    }

    fn starts(&self, vm: &str) -> Result<()> {
        self.sealed.start_paused(vm)?;
        self.sealed.destroy(vm)
    }

    fn last_job(&self) -> Result<Value> {
        let jobs = self.sealed.json(&["jobs"])?;
        jobs["jobs"]
            .as_array()
            .and_then(|jobs| jobs.last())
            .cloned()
            .context("no job")
    }

    /// The KEK of every envelope, all of which have one stanza, of `provider`.
    fn keks(&self, provider: &str) -> Result<Vec<String>> {
        let kept = kept_envelopes(&self.sealed.host().path(STATE))?;
        kept.iter()
            .map(|envelope| {
                let name = envelope.stanza("provider_name")?;
                ensure!(name == provider, "{} is of {name}", envelope.id);
                Ok(envelope.stanza("kek")?.to_owned())
            })
            .collect()
    }

    /// With every other provider locked.
    fn starts_with(&self, provider: &str, vm: &str) -> Result<()> {
        for other in ["hsm", "vault", "kms"].iter().filter(|other| **other != provider) {
            // One that was deleted is out of the way too.
            let _ = self.sealed.virtseal(&["provider", "lock", other])?;
        }
        self.starts(vm)
    }

    fn move_all(&self, from: &str, to: &str) -> Result<()> {
        self.virtseal(&["provider", "default", to])?;
        let moved = self.virtseal(&["provider", "move", from, to, "--watch"])?;
        expect_names(&moved, &["done", "0 left"])
    }

    fn rotate(&self, provider: &str) -> Result<()> {
        let before = self.keks(provider)?;
        let rotated = self.virtseal(&["provider", "rotate", provider, "--watch"])?;
        expect_names(&rotated, &["done", "0 left"])?;
        let after = self.keks(provider)?;
        ensure!(
            after.iter().all(|kek| !before.contains(kek)),
            "{before:?}, {after:?}"
        );
        Ok(())
    }
}

#[test]
fn a_fleet_moves_from_a_token_to_kmip_and_on() -> Result<()> {
    let mut rig = Rig::start()?;
    for vm in ["off01", "run01"] {
        rig.seal(vm)?;
    }
    for nth in 0..VOLUMES {
        let (path, vm) = (
            format!("{IMAGES}/fleet{nth}.qcow2"),
            format!("00000000-0000-4000-8000-0000000000{nth:02}"),
        );
        rig.virtseal(&["volume", "create", &path, "--size", "8M", "--vm", &vm])?;
    }
    rig.keks("hsm")?;
    rig.rotate("hsm")?;
    rig.starts("off01")?;
    rig.sealed.start_paused("run01")?;

    // From the token to the key server; the daemon dies on the way, again and again.
    rig.virtseal(&["provider", "default", "kms"])?;
    rig.virtseal(&["provider", "move", "hsm", "kms"])?;
    let (began, mut kills) = (Instant::now(), 0);
    while rig.last_job()?["state"] == "running" {
        ensure!(began.elapsed() < 2 * PATIENCE, "{}", rig.last_job()?);
        if kills < 3 {
            let seen = rig.last_job()?["seen"].as_i64();
            wait_until(PATIENCE, "the next envelope", || {
                let job = rig.last_job()?;
                Ok((job["seen"].as_i64() > seen || job["state"] != "running").then_some(()))
            })?;
            rig.kill_and_restart()?;
            rig.unlock()?;
            kills += 1;
        }
    }
    let job = rig.last_job()?;
    ensure!(job["state"] == "done" && kills > 1, "{kills} kills, {job}");
    ensure!(job["changed"].as_i64() == Some(6 + VOLUMES as i64), "{job}");
    rig.keks("kms")?;
    wait_for_copies(&rig.sealed, 1)?;
    expect_names(
        &rig.refused(8, &["provider", "delete", "hsm"])?,
        &["'hsm' stays", "run01.qcow2", "virtseal jobs"],
    )?;
    rig.sealed.destroy("run01")?;
    wait_for_copies(&rig.sealed, 0)?;
    for vm in ["off01", "run01"] {
        rig.starts_with("kms", vm)?;
    }
    rig.virtseal(&["provider", "delete", "hsm"])?;

    // New keys at the key server; a VM that is destroyed takes its old ones with it.
    rig.rotate("kms")?;
    rig.starts("off01")?;
    let receipt = rig.virtseal(&["vm", "shred", "run01", "--yes-shred", "run01"])?;
    let destroyed = receipt.matches("destroyed KEK").count();
    ensure!(destroyed == 2, "{receipt}");
    expect_names(&receipt, &["the KMS was told to destroy the key"])?;
    wait_for_copies(&rig.sealed, 0)?;

    // On to the transit engine, and to a key on the host.
    rig.bao.unlock(&rig.sealed, "vault")?;
    rig.move_all("kms", "vault")?;
    rig.rotate("vault")?;
    wait_for_copies(&rig.sealed, 0)?;
    rig.starts_with("vault", "off01")?;
    rig.virtseal(&["provider", "delete", "kms"])?;
    rig.sealed.add_provider("main")?;
    rig.move_all("vault", "main")?;
    wait_for_copies(&rig.sealed, 0)?;
    rig.keks("main")?;
    rig.virtseal(&["provider", "delete", "vault"])?;
    rig.starts("off01")
}

#[test]
fn what_the_keystore_was_not_told_is_found_before_a_provider_goes() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.add_provider("spare")?;
    sealed.seal_new("web01")?;
    let dump = sealed.dumpxml("web01")?;
    let image = sealed.host().path(format!("{IMAGES}/web01.qcow2"));
    let backup = fs::read(&image)?;
    run(&sealed, &["provider", "default", "spare"])?;
    run(&sealed, &["provider", "move", "main", "spare", "--watch"])?;
    wait_for_copies(&sealed, 0)?;

    // An admin defines the VM from an old dump and puts an old image back.
    sealed.host().define_xml(&dump)?;
    fs::write(&image, backup)?;
    let output = sealed.virtseal(&["provider", "delete", "main"])?;
    ensure!(output.status.code() == Some(8), "{}", output.stderr);
    expect_names(
        &output.stderr,
        &[
            "copies that are behind",
            "the XML of web01",
            "web01.qcow2",
            "virtseal jobs",
        ],
    )?;
    wait_for_copies(&sealed, 0)?;

    // And brings a VM of another host, which has not started here.
    sealed.seal_new("guest01")?;
    run(&sealed, &["provider", "move", "spare", "main", "--watch"])?;
    wait_for_copies(&sealed, 0)?;
    run(&sealed, &["provider", "default", "main"])?;
    run(
        &sealed,
        &["provider", "move", "main", "spare", "--vm", "web01", "--watch"],
    )?;
    wait_for_copies(&sealed, 0)?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(&sealed, |keystore| {
        let others = "vm <> (SELECT vm FROM envelopes WHERE location LIKE '%/web01.qcow2')";
        Ok(keystore.execute(&format!("DELETE FROM envelopes WHERE {others}"), [])?)
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    let file = sealed.passphrase_file()?;
    let file = file.to_str().context("a UTF-8 path")?;
    run(
        &sealed,
        &["provider", "unlock", "spare", "--passphrase-file", file],
    )?;
    run(&sealed, &["provider", "default", "spare"])?;
    let output = sealed.virtseal(&["provider", "delete", "main"])?;
    expect_names(
        &output.stderr,
        &["3 objects of 1 VMs", "virtseal provider move main spare"],
    )?;
    run(&sealed, &["provider", "move", "main", "spare", "--watch"])?;
    wait_for_copies(&sealed, 0)?;
    run(&sealed, &["provider", "delete", "main"])?;
    for vm in ["web01", "guest01"] {
        sealed.start_paused(vm)?;
        sealed.destroy(vm)?;
    }
    Ok(())
}

fn run(sealed: &SealedHost, arguments: &[&str]) -> Result<String> {
    sealed.virtseal(arguments)?.succeeded()
}

/// Until only so many copies are behind.
fn wait_for_copies(sealed: &SealedHost, left: i64) -> Result<()> {
    wait_until(PATIENCE, "the copies to follow", || {
        let jobs = sealed.json(&["jobs"])?;
        Ok((jobs["stale_copies"].as_i64() == Some(left)).then_some(()))
    })
}

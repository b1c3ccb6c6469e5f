//! VMs go from a token to a key server, to another one and to a key on the host, and notice nothing of it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::rig::{IMAGES, STATE};
use virtseal_testkit::servers::{OpenBao, PyKmip, SoftHsm};
use virtseal_testkit::{Host, SealedHost, edit_keystore, expect_names, kept_envelopes, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
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
        sealed.configure("batch_size: 1\ninterval: 20ms\n")?;
        sealed.stop_daemon(Signal::SIGTERM)?;
        hsm.start_daemon(&mut sealed)?;
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

    fn unlock(&self) -> Result<()> {
        self.hsm.unlock(&self.sealed, "hsm")?;
        self.bao.unlock(&self.sealed, "vault")
    }

    fn kill_and_restart(&mut self) -> Result<()> {
        self.sealed.stop_daemon(Signal::SIGKILL)?;
        self.hsm.start_daemon(&mut self.sealed)
    }

    fn seal(&self, vm: &str) -> Result<()> {
        let mut spec = SealedHost::spec(vm);
        spec.tpm = true;
        self.sealed.seal_empty(&spec)
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
        self.sealed.expect_start(vm)
    }

    fn move_all(&self, from: &str, to: &str) -> Result<()> {
        self.sealed.run(&["provider", "default", to])?;
        let moved = self.sealed.run(&["provider", "move", from, to, "--watch"])?;
        expect_names(&moved, &["done", "0 left"])
    }

    fn rotate(&self, provider: &str) -> Result<()> {
        let before = self.keks(provider)?;
        let rotated = self.sealed.run(&["provider", "rotate", provider, "--watch"])?;
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
        rig.sealed
            .run(&["volume", "create", &path, "--size", "8M", "--vm", &vm])?;
    }
    rig.keks("hsm")?;
    rig.rotate("hsm")?;
    rig.sealed.expect_start("off01")?;
    rig.sealed.start_paused("run01")?;

    // From the token to the key server; the daemon dies on the way, again and again.
    rig.sealed.run(&["provider", "default", "kms"])?;
    rig.sealed.run(&["provider", "move", "hsm", "kms"])?;
    let (began, mut kills) = (Instant::now(), 0);
    while rig.sealed.last_job()?["state"] == "running" {
        ensure!(began.elapsed() < 2 * PATIENCE, "{}", rig.sealed.last_job()?);
        if kills < 3 {
            let seen = rig.sealed.last_job()?["seen"].as_i64();
            wait_until(PATIENCE, "the next envelope", || {
                let job = rig.sealed.last_job()?;
                Ok((job["seen"].as_i64() > seen || job["state"] != "running").then_some(()))
            })?;
            rig.kill_and_restart()?;
            rig.unlock()?;
            kills += 1;
        }
    }
    let job = rig.sealed.last_job()?;
    ensure!(job["state"] == "done" && kills > 1, "{kills} kills, {job}");
    ensure!(job["changed"].as_i64() == Some(6 + VOLUMES as i64), "{job}");
    rig.keks("kms")?;
    rig.sealed.wait_for_copies(1)?;
    expect_names(
        &rig.sealed.refused(8, &["provider", "delete", "hsm"])?,
        &["'hsm' stays", "run01.qcow2", "virtseal jobs"],
    )?;
    rig.sealed.destroy("run01")?;
    rig.sealed.wait_for_copies(0)?;
    for vm in ["off01", "run01"] {
        rig.starts_with("kms", vm)?;
    }
    rig.sealed.run(&["provider", "delete", "hsm"])?;

    // New keys at the key server; a VM that is destroyed takes its old ones with it.
    rig.rotate("kms")?;
    rig.sealed.expect_start("off01")?;
    let receipt = rig
        .sealed
        .run(&["vm", "shred", "run01", "--yes-shred", "run01"])?;
    let destroyed = receipt.matches("destroyed KEK").count();
    ensure!(destroyed == 2, "{receipt}");
    expect_names(&receipt, &["the KMS was told to destroy the key"])?;
    rig.sealed.wait_for_copies(0)?;

    // On to the transit engine, and to a key on the host.
    rig.bao.unlock(&rig.sealed, "vault")?;
    rig.move_all("kms", "vault")?;
    rig.rotate("vault")?;
    rig.sealed.wait_for_copies(0)?;
    rig.starts_with("vault", "off01")?;
    rig.sealed.run(&["provider", "delete", "kms"])?;
    rig.sealed.add_provider("main")?;
    rig.move_all("vault", "main")?;
    rig.sealed.wait_for_copies(0)?;
    rig.keks("main")?;
    rig.sealed.run(&["provider", "delete", "vault"])?;
    rig.sealed.expect_start("off01")
}

#[test]
fn what_the_keystore_was_not_told_is_found_before_a_provider_goes() -> Result<()> {
    let mut sealed = SealedHost::start()?;
    sealed.add_provider("spare")?;
    sealed.seal_new("web01")?;
    let dump = sealed.dumpxml("web01")?;
    let image = sealed.host().path(format!("{IMAGES}/web01.qcow2"));
    let backup = fs::read(&image)?;
    sealed.run(&["provider", "default", "spare"])?;
    sealed.run(&["provider", "move", "main", "spare", "--watch"])?;
    sealed.wait_for_copies(0)?;

    // An admin defines the VM from an old dump and puts an old image back.
    sealed.host().define_xml(&dump)?;
    fs::write(&image, backup)?;
    expect_names(
        &sealed.refused(8, &["provider", "delete", "main"])?,
        &["outdated cop", "the XML of web01", "web01.qcow2", "virtseal jobs"],
    )?;
    sealed.wait_for_copies(0)?;

    // And brings a VM of another host, which has not started here.
    sealed.seal_new("guest01")?;
    sealed.run(&["provider", "move", "spare", "main", "--watch"])?;
    sealed.wait_for_copies(0)?;
    sealed.run(&["provider", "default", "main"])?;
    sealed.run(&["provider", "move", "main", "spare", "--vm", "web01", "--watch"])?;
    sealed.wait_for_copies(0)?;
    sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(&sealed, |keystore| {
        let others = "vm <> (SELECT vm FROM envelopes WHERE location LIKE '%/web01.qcow2')";
        Ok(keystore.execute(&format!("DELETE FROM envelopes WHERE {others}"), [])?)
    })?;
    sealed.start_daemon()?;
    sealed.unlock()?;
    sealed.unlock_provider("spare")?;
    sealed.run(&["provider", "default", "spare"])?;
    expect_names(
        &sealed.refused(8, &["provider", "delete", "main"])?,
        &["3 objects of 1 VMs", "virtseal provider move main spare"],
    )?;
    sealed.run(&["provider", "move", "main", "spare", "--watch"])?;
    sealed.wait_for_copies(0)?;
    sealed.run(&["provider", "delete", "main"])?;
    for vm in ["web01", "guest01"] {
        sealed.expect_start(vm)?;
    }
    Ok(())
}

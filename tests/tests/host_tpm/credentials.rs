//! The TPM has what unlocks a provider of another kind: the VMs of a KMS, a Vault and a token start after a reboot without anybody, until the host
//! boots otherwise; what is said then leads back to that.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use virtseal_testkit::rig::STATE;
use virtseal_testkit::servers::{OpenBao, PyKmip, SoftHsm};
use virtseal_testkit::{Way, edited, expect_names, wait_until};

use super::{KMS, PATIENCE, Rig};

impl Rig {
    fn wait_for_state(&self, provider: &str, state: &str) -> Result<()> {
        wait_until(PATIENCE, &format!("provider '{provider}' to be {state}"), || {
            Ok((self.sealed.provider(provider)?["state"] == state).then_some(()))
        })
    }

    /// Why the TPM did not unlock it.
    fn reason_of(&self, provider: &str) -> Result<String> {
        wait_until(PATIENCE, "the reason why it is locked", || {
            let shown = self.sealed.provider(provider)?;
            ensure!(shown["state"] == "locked", "{shown}");
            Ok(shown["reason"].as_str().map(str::to_owned))
        })
    }
}

/// No key of it is on disk in the clear, and nobody knows a passphrase.
#[test]
fn kmip_key_by_the_tpm() -> Result<()> {
    let (mut rig, kms) = (Rig::start()?, PyKmip::start()?);
    kms.add_to(&rig.sealed, KMS, &[kms.port()], false)?;
    rig.sealed.run(&["provider", "default", KMS])?;
    rig.sealed.seal_new("web01")?;
    let (pem, key) = kms.client("kvm-host")?;
    let both = [std::fs::read(&pem)?, std::fs::read(&key)?].concat();
    let (pem, key) = (pem.display().to_string(), key.display().to_string());
    let identity = ["provider", "identity", KMS, "--cert", &pem, "--key", &key];
    rig.sealed.run(&[&identity[..], &["--encrypt", "tpm"]].concat())?;
    let shown = rig.sealed.run(&["provider", "show", KMS])?;
    expect_names(
        &shown,
        &["unlocked by  TPM (PCR 7, since 20", "tpm           PCR 7"],
    )?;
    let record = record(&rig)?;
    let identity_on_disk = std::fs::read_to_string(record.with_file_name("identity.json"))?;
    ensure!(identity_on_disk.contains("BEGIN AGE ENCRYPTED FILE"));
    ensure!(std::fs::read_to_string(record)?.contains("bound_key"));

    rig.power_on()?;
    rig.restart()?;
    rig.wait_for_state(KMS, "ready")?;
    rig.sealed.expect_start("web01")?;
    // Nobody is asked for what nobody knows.
    rig.sealed.run(&["provider", "lock", KMS])?;
    rig.sealed.run(&["provider", "unlock", KMS])?;
    rig.sealed.expect_start("web01")?;
    rig.refused(8, &["provider", "tpm", KMS, "--remove"], &["provider identity"])?;

    rig.measure_something_else()?;
    rig.restart()?;
    expect_names(&rig.reason_of(KMS)?, &["PCR 7 differs", "provider identity"])?;
    let refused = rig.sealed.refused_start("web01")?;
    let (_, next) = refused.split_once("Next: virtseal ").context("no way out")?;
    let refused = rig.sealed.refused(3, &next.split(' ').collect::<Vec<_>>())?;
    expect_names(&refused, &["PCR 7 differs", "--encrypt tpm"])?;
    let file = "/run/identity.pem";
    std::fs::write(rig.sealed.host().path(file), both)?;
    Way::that_begins("virtseal provider identity", &refused)?
        .with("FILE", file)
        .take(&rig.sealed)?;
    rig.sealed.run(&["provider", "unlock", KMS])?;
    rig.sealed.expect_start("web01")?;
    rig.power_on()?;
    rig.measure_something_else()?;
    rig.restart()?;
    rig.wait_for_state(KMS, "ready")?;
    rig.sealed.expect_start("web01")
}

/// Another identity takes neither the PIN away nor the PCRs.
#[test]
fn a_new_identity_keeps_the_pin_for_the_tpm() -> Result<()> {
    let (mut rig, kms) = (Rig::start()?, PyKmip::start()?);
    kms.add_to(&rig.sealed, KMS, &[kms.port()], false)?;
    rig.sealed.run(&["provider", "default", KMS])?;
    rig.sealed.seal_new("web01")?;
    let (pin, wrong) = ("/run/pin", "/run/wrong");
    std::fs::write(rig.sealed.host().path(pin), "1357 9\n")?;
    std::fs::write(rig.sealed.host().path(wrong), "2468\n")?;
    let (pem, key) = kms.client("kvm-host")?;
    let (pem, key) = (pem.display().to_string(), key.display().to_string());
    let identity = [
        "provider",
        "identity",
        KMS,
        "--cert",
        &pem,
        "--key",
        &key,
        "--encrypt",
        "tpm",
    ];
    let with_pin = [&identity[..], &["--pin-file", pin]].concat();
    rig.sealed.refused(2, &with_pin)?;
    rig.sealed.run(&identity)?;
    let enroll = [
        "provider",
        "tpm",
        KMS,
        "--enroll",
        "--pcrs",
        "4,7",
        "--pin-file",
        pin,
    ];
    rig.sealed.run(&enroll)?;
    let expect_kept = |rig: &Rig| -> Result<()> {
        let tpm = rig.sealed.provider(KMS)?["tpm"].clone();
        ensure!(tpm["pin"] == true && tpm["pcrs"] == "4,7", "{tpm}");
        Ok(())
    };
    expect_kept(&rig)?;
    // Who types nothing, or something else, changes nothing.
    let wrongly = [&identity[..], &["--pin-file", wrong]].concat();
    rig.refused(
        3,
        &wrongly,
        &["does not accept this PIN", "provider identity", "with its PIN"],
    )?;
    rig.sealed.refused(2, &identity)?;
    expect_kept(&rig)?;
    rig.sealed.run(&with_pin)?;
    expect_kept(&rig)?;

    rig.power_on()?;
    rig.measure_something_else()?;
    rig.restart()?;
    rig.wait_for_state(KMS, "locked")?;
    rig.sealed.run(&with_pin)?;
    expect_kept(&rig)?;
    rig.restart()?;
    expect_names(&rig.reason_of(KMS)?, &["needs its PIN"])?;
    rig.sealed
        .run(&["provider", "unlock", KMS, "--tpm", "--pin-file", pin])?;
    rig.sealed.expect_start("web01")
}

/// Nobody knows then for which PCRs it was, nor whether with a PIN: what asks for less comes in its place only by root's word. So it is
/// where the PIN was forgotten; and without the TPM, a passphrase takes its place.
#[test]
fn a_damaged_record_takes_no_pin_away() -> Result<()> {
    let (mut rig, kms) = (Rig::start()?, PyKmip::start()?);
    kms.add_to(&rig.sealed, KMS, &[kms.port()], false)?;
    rig.sealed.run(&["provider", "default", KMS])?;
    rig.sealed.seal_new("web01")?;
    let (pem, key) = kms.client("kvm-host")?;
    let (file, pin, wrong) = ("/run/identity.pem", "/run/pin", "/run/wrong");
    let both = [std::fs::read(pem)?, std::fs::read(key)?].concat();
    for (path, content) in [(file, &both[..]), (pin, b"1357 9"), (wrong, b"2468")] {
        std::fs::write(rig.sealed.host().path(path), content)?;
    }
    let identity = ["provider", "identity", KMS, "--cert", file, "--encrypt", "tpm"];
    let enroll = [
        "provider",
        "tpm",
        KMS,
        "--enroll",
        "--pcrs",
        "4,7",
        "--pin-file",
        pin,
    ];
    let restart = |rig: &mut Rig, state: &str| -> Result<()> {
        rig.restart()?;
        rig.wait_for_state(KMS, state)
    };
    let take = |rig: &Rig, begin: &str, told: &str| -> Result<()> {
        let way = Way::that_begins(begin, told)?.with("FILE", file);
        way.typing(&["its new passphrase"; 2]).take(&rig.sealed)?;
        rig.sealed.expect_start("web01")
    };
    rig.sealed.run(&identity)?;
    for (damage, is_locked) in [
        ("identity", false),
        ("cut", false),
        ("cut", true),
        ("key", true),
        ("gone", true),
    ] {
        rig.sealed.run(&enroll)?;
        spoil(&record(&rig)?, damage)?;
        if is_locked {
            restart(&mut rig, "locked")?;
            let told = rig.sealed.virtseal(&["provider", "unlock", KMS])?.refused()?;
            expect_names(
                &told,
                &["--encrypt, then virtseal provider unlock kmip-prod, then"],
            )?;
        }
        let told = rig.sealed.refused(3, &identity)?;
        expect_names(
            &told,
            &["tells neither for which PCRs", "for PCR 7 and without a PIN"],
        )?;
        if ["cut", "key"].contains(&damage) {
            let with_pin = [&identity[..], &["--pin-file", pin]].concat();
            expect_names(&rig.sealed.refused(3, &with_pin)?, &["neither for which PCRs"])?;
        }
        take(&rig, "virtseal provider identity", &told)?;
        let tpm = rig.sealed.provider(KMS)?["tpm"].clone();
        ensure!(tpm["pcrs"] == "7" && tpm["pin"] == false, "{tpm}");
    }
    restart(&mut rig, "ready")?;

    rig.sealed.run(&enroll)?;
    restart(&mut rig, "locked")?;
    let told = rig
        .sealed
        .refused(3, &[&identity[..], &["--pin-file", wrong]].concat())?;
    take(
        &rig,
        "virtseal provider identity kmip-prod --cert FILE --encrypt, then",
        &told,
    )?;
    rig.tpm.power_off();
    rig.restart()?;
    let told = rig.sealed.refused(4, &["provider", "unlock", KMS])?;
    take(&rig, "virtseal provider identity", &told)
}

/// What the TPM has of the KMS's identity.
fn record(rig: &Rig) -> Result<PathBuf> {
    let provider = rig.sealed.provider(KMS)?;
    let id = provider["id"].as_str().context("no id")?;
    let directory = rig.sealed.host().path(format!("{STATE}/providers/{id}"));
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("unlock-") {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("nothing of the TPM")
}

fn spoil(record: &Path, damage: &str) -> Result<()> {
    let identity = record.with_file_name("identity.json");
    let cut = |file: &Path| std::fs::write(file, &std::fs::read(file)?[..100]);
    match damage {
        "identity" => cut(&identity)?,
        "cut" => cut(record)?,
        "key" => {
            let text = std::fs::read_to_string(record)?;
            std::fs::write(record, edited(&text, r#""bound_key": ""#, r#""bound_key": "00"#)?)?;
        }
        _ => std::fs::remove_file(record)?,
    }
    Ok(())
}

/// What was given once unlocks a Vault, a token and a KMS after a reboot, and is on disk for the TPM alone.
#[test]
fn secret_id_pin_and_passphrase_by_the_tpm() -> Result<()> {
    let (mut rig, bao, kms, hsm) = (
        Rig::start()?,
        OpenBao::start()?,
        PyKmip::start()?,
        SoftHsm::new()?,
    );
    let launcher = hsm.launcher();
    let launcher = launcher.each_ref().map(String::as_str);
    rig.restart_through(&launcher)?;
    hsm.make("kek")?;
    bao.add_to(&rig.sealed, "vault", bao.port())?;
    hsm.add_to(&rig.sealed, "hsm", "kek")?;
    kms.add_to(&rig.sealed, KMS, &[kms.port()], true)?;
    for (provider, vm) in [("vault", "web01"), ("hsm", "web02")] {
        rig.sealed.run(&["provider", "default", provider])?;
        rig.sealed.seal_new(vm)?;
    }
    std::fs::write(rig.sealed.host().path("/run/wrong"), "not it")?;
    rig.refused(
        3,
        &[
            "provider",
            "tpm",
            "vault",
            "--enroll",
            "--credential-file",
            "/run/wrong",
        ],
        &["'vault'"],
    )?;
    let files = [
        ("vault", bao.secret_id().display().to_string()),
        ("hsm", hsm.pin_file().display().to_string()),
        (KMS, rig.sealed.passphrase_file()?.display().to_string()),
    ];
    for (provider, file) in &files {
        let said = rig
            .sealed
            .run(&["provider", "tpm", provider, "--enroll", "--credential-file", file])?;
        let unlocks = format!("unlocks '{provider}' when virtseald starts");
        expect_names(&said, &[&unlocks, "PCR 7 is what it is now"])?;
    }
    let come_up = |rig: &mut Rig| -> Result<()> {
        rig.restart_through(&launcher)?;
        for (provider, _) in &files {
            rig.wait_for_state(provider, "ready")?;
        }
        rig.sealed.expect_start("web01")?;
        rig.sealed.expect_start("web02")
    };
    rig.power_on()?;
    come_up(&mut rig)?;

    // The host boots otherwise: a start says what keeps it off, the provider what leads back.
    rig.measure_something_else()?;
    rig.restart_through(&launcher)?;
    for (provider, file) in &files {
        let reason = rig.reason_of(provider)?;
        expect_names(&reason, &["PCR 7 differs", "--credential-file FILE"])?;
        let (_, next) = reason.split_once("Next: ").context("no way out")?;
        let secret = std::fs::read_to_string(rig.sealed.host().path(file))
            .or_else(|_| std::fs::read_to_string(file))?;
        for step in next.split(", then ") {
            let done = rig
                .sealed
                .at_a_terminal(&step.replace("FILE", file), &[secret.trim()])?;
            ensure!(done.status.success(), "{step}: {done:?}");
        }
    }
    come_up(&mut rig)?;

    // For other PCRs: what the TPM has so far is enough.
    rig.sealed.run(&["provider", "set", "vault", "tpm=4,7"])?;
    let refused = rig
        .sealed
        .refused(2, &["provider", "set", "vault", "tpm=7", "description=x"])?;
    expect_names(&refused, &["'tpm' is set alone"])?;
    come_up(&mut rig)?;
    expect_names(
        &rig.sealed.run(&["provider", "show", "vault"])?,
        &["tpm           PCR 4,7"],
    )?;

    rig.sealed.run(&["provider", "set", "vault", "tpm="])?;
    rig.restart_through(&launcher)?;
    rig.wait_for_state(KMS, "ready")?;
    rig.wait_for_state("hsm", "ready")?;
    ensure!(rig.sealed.provider("vault")?["state"] == "locked");
    bao.unlock(&rig.sealed, "vault")?;
    rig.sealed.expect_start("web01")
}

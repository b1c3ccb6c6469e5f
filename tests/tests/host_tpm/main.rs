//! A host that comes up by itself: its TPM unlocks a native provider, and the passphrase does whatever the TPM says; and it
//! keeps keys of a KMS, for a reboot while that is down.

mod credentials;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use virtseal_testkit::servers::PyKmip;
use virtseal_testkit::{
    HostTpm, KernelKey, Readiness, SealedHost, Way, edit_keystore, expect_names, wait_until,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// A sealed host whose TPM is a swtpm.
struct Rig {
    sealed: SealedHost,
    tpm: HostTpm,
}

impl Rig {
    fn start() -> Result<Self> {
        let mut sealed = SealedHost::start()?;
        let tpm = HostTpm::of(&mut sealed)?;
        Ok(Self { sealed, tpm })
    }

    /// PCRs are zero then, keys are those that it had.
    fn power_on(&mut self) -> Result<()> {
        self.tpm.power_on(self.sealed.host())
    }

    /// As a boot with another Secure Boot configuration does.
    fn measure_something_else(&self) -> Result<()> {
        self.tpm.extend(self.sealed.host(), 7)
    }

    fn refused(&self, code: i32, arguments: &[&str], parts: &[&str]) -> Result<()> {
        expect_names(&self.sealed.refused(code, arguments)?, parts)
    }

    fn enroll(&self) -> Result<()> {
        let said = self.sealed.run(&["provider", "tpm", "main", "--enroll"])?;
        expect_names(
            &said,
            &[
                "unlocks 'main' when virtseald starts",
                "PCR 7 is what it is now",
                "Keep the passphrase",
            ],
        )
    }

    /// As a reboot of the host does to virtseald; who asks it waits for no TPM.
    fn restart(&mut self) -> Result<()> {
        self.restart_through(&[])
    }

    fn restart_through(&mut self, launcher: &[&str]) -> Result<()> {
        self.sealed.stop_daemon(Signal::SIGKILL)?;
        let begin = Instant::now();
        self.sealed.start_daemon_through(launcher)?;
        self.sealed.run(&["status"])?;
        ensure!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        Ok(())
    }

    fn expect_state(&self, state: &str) -> Result<()> {
        wait_until(PATIENCE, &format!("provider 'main' to be {state}"), || {
            Ok((self.sealed.provider("main")?["state"] == state).then_some(()))
        })
    }

    /// Until the daemon has tried, and says why it could not.
    fn expect_locked_because(&self, parts: &[&str]) -> Result<()> {
        let reason = wait_until(PATIENCE, "the reason why 'main' is locked", || {
            let main = self.sealed.provider("main")?;
            ensure!(main["state"] == "locked", "{main}");
            Ok(main["reason"].as_str().map(str::to_owned))
        })?;
        expect_names(&reason, parts)
    }
}

#[test]
fn tpm_unlocks_at_start_until_the_host_boots_otherwise() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    ensure!(rig.sealed.provider("main")?["unlocked_by"] == serde_json::json!(["passphrase"]));
    // Of one that is unlocked nothing is asked.
    rig.sealed.lock()?;
    rig.refused(
        7,
        &["provider", "unlock", "main", "--tpm"],
        &["'main' is not enrolled", "--enroll"],
    )?;
    rig.sealed.unlock()?;
    rig.refused(
        2,
        &["provider", "tpm", "main", "--enroll", "--pcrs", "16"],
        &["'16'", "4,7"],
    )?;
    rig.enroll()?;
    let shown = rig.sealed.run(&["provider", "show", "main"])?;
    expect_names(&shown, &["unlocked by  passphrase; TPM (PCR 7, since 20"])?;

    rig.power_on()?;
    // A start that comes at once waits for the TPM.
    rig.restart()?;
    rig.sealed.expect_start("web01")?;
    rig.expect_state("ready")?;

    // Locked by hand it stays locked, until the next unlock in whatever way.
    rig.sealed.lock()?;
    expect_names(
        &rig.sealed.refused_start("web01")?,
        &["web01", "'main' is locked"],
    )?;
    rig.sealed.run(&["provider", "unlock", "main", "--tpm"])?;
    rig.expect_state("ready")?;

    rig.measure_something_else()?;
    rig.restart()?;
    rig.expect_locked_because(&[
        "PCR 7 differs from when it was enrolled",
        "with its passphrase",
        "virtseal provider tpm main --enroll",
    ])?;
    let refused = rig.sealed.refused_start("web01")?;
    expect_names(
        &refused,
        &[
            "web01 stays off",
            "'main' is locked",
            "PCR 7 differs",
            "virtseal provider unlock main",
        ],
    )?;
    rig.refused(
        3,
        &["provider", "unlock", "main", "--tpm"],
        &["PCR 7 differs", "with its passphrase"],
    )?;
    rig.sealed.unlock()?;
    rig.sealed.expect_start("web01")?;
    rig.enroll()?;
    rig.restart()?;
    rig.expect_state("ready")?;

    // Who enrolls again without saying which PCRs means those of before.
    let chosen = ["provider", "tpm", "main", "--enroll", "--pcrs", "7+0"];
    for command in [&chosen[..], &chosen[..4]] {
        expect_names(&rig.sealed.run(command)?, &["PCR 0,7 is what it is now"])?;
    }
    rig.measure_something_else()?;
    rig.sealed.lock()?;
    let refused = rig.sealed.refused(3, &["provider", "unlock", "main", "--tpm"])?;
    rig.sealed.unlock()?;
    let again = Way::named("virtseal provider tpm main --enroll --pcrs 0,7", &refused)?;
    expect_names(&again.take(&rig.sealed)?, &["PCR 0,7 is what it is now"])?;

    let removed = rig.sealed.run(&["provider", "tpm", "main", "--remove"])?;
    expect_names(&removed, &["does not unlock 'main' any more"])?;
    rig.restart()?;
    rig.refused(7, &["provider", "unlock", "main", "--tpm"], &["not enrolled"])?;
    ensure!(rig.sealed.provider("main")?["state"] == "locked");
    rig.sealed.unlock()
}

#[test]
fn a_pin_is_asked_for_and_signed_kernels_need_no_passphrase() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    let (pin, wrong) = ("/run/pin", "/run/wrong");
    std::fs::write(rig.sealed.host().path(pin), "1357 9\n")?;
    std::fs::write(rig.sealed.host().path(wrong), "1357")?;
    let enroll = ["provider", "tpm", "main", "--enroll"];
    let unlock = ["provider", "unlock", "main", "--tpm", "--pin-file"];
    let with = |command: &[&'static str], more: &[&'static str]| [command, more].concat();

    // Nothing is measured on this host, and it says what that means.
    let said = rig.sealed.virtseal(&with(&enroll, &["--pin-file", pin]))?;
    let nothing = ["nothing has been measured into PCR 7", "the same whatever boots"];
    expect_names(&said.stderr, &nothing)?;
    let said = said.succeeded()?;
    expect_names(&said, &["types its PIN", "nor its command line or initrd"])?;
    rig.restart()?;
    rig.expect_locked_because(&["needs its PIN", "virtseal provider unlock main --tpm"])?;
    let told = rig.sealed.refused_start("web01")?;
    expect_names(&told, &["web01 stays off", "needs its PIN"])?;
    rig.refused(3, &with(&unlock, &[wrong]), &["does not accept this PIN", "left"])?;
    rig.expect_locked_because(&["needs its PIN"])?;
    Way::that_begins("virtseal provider unlock main --tpm", &told)?
        .typing(&["1357 9"])
        .take(&rig.sealed)?;
    rig.sealed.expect_start("web01")?;
    let shown = rig.sealed.provider("main")?;
    ensure!(
        shown["tpm"]["pin"] == true && shown["tpm"]["pcrs"] == "7",
        "{shown}"
    );

    // A backup of the state has it too: on the same machine it opens again.
    let passphrase = rig.sealed.passphrase_file()?.display().to_string();
    let state = |verb, option| {
        [
            "state",
            verb,
            option,
            "/run/state.age",
            "--passphrase-file",
            &passphrase,
        ]
    };
    rig.sealed.run(&state("backup", "-o"))?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    std::fs::remove_dir_all(rig.sealed.host().path("/var/lib/virtseal"))?;
    rig.sealed.run(&state("restore", "-i"))?;
    rig.sealed.start_daemon()?;
    rig.sealed.run(&with(&unlock, &[pin]))?;
    rig.expect_state("ready")?;

    // A rotation takes it along with its PIN. Who forgets the PIN does not lose it, who wants to does.
    let rotate = ["provider", "rotate", "main", "--passphrase-file", &passphrase];
    let wrongly = [&rotate[..], &["--tpm-pin-file", wrong]].concat();
    rig.refused(3, &wrongly, &["does not accept this PIN"])?;
    rig.sealed
        .run(&[&rotate[..], &["--tpm-pin-file", pin]].concat())?;
    rig.restart()?;
    rig.sealed.run(&with(&unlock, &[pin]))?;
    rig.expect_state("not_backed_up")?;
    rig.refused(2, &enroll, &["a passphrase is needed"])?;
    rig.sealed.run(&with(&enroll, &["--no-pin"]))?;
    rig.restart()?;
    rig.expect_state("not_backed_up")?;

    // PCR 11 is for a key to sign: a kernel that it has not signed opens nothing.
    let (key, stranger) = (KernelKey::generate()?, KernelKey::generate()?);
    key.write_public(rig.sealed.host(), "/run/kernels.pem")?;
    rig.refused(
        2,
        &with(&enroll, &["--pcrs", "7,11"]),
        &["each update of the kernel", "--pcr-public-key FILE"],
    )?;
    let signed = with(
        &enroll,
        &["--pcr", "7+11", "--pcr-public-key", "/run/kernels.pem"],
    );
    rig.refused(3, &signed, &["is not signed", "tpm2-pcr-signature.json"])?;
    key.sign_kernel(rig.sealed.host(), &rig.tpm)?;
    let said = rig.sealed.run(&signed)?;
    expect_names(&said, &["PCR 7 is what it is now and PCR 11 is what the key"])?;
    rig.tpm.extend(rig.sealed.host(), 11)?;
    stranger.sign_kernel(rig.sealed.host(), &rig.tpm)?;
    rig.restart()?;
    rig.expect_locked_because(&["PCR 11 is now is not signed by the key", "has none by it"])?;
    key.sign_kernel(rig.sealed.host(), &rig.tpm)?;
    rig.restart()?;
    rig.expect_state("not_backed_up")?;
    let shown = rig.sealed.run(&["provider", "show", "main"])?;
    expect_names(&shown, &["TPM (PCR 7,11, 11 signed by ", "since 20"])
}

#[test]
fn an_absent_or_hanging_tpm_delays_no_start() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.enroll()?;

    // It comes later than virtseald.
    rig.tpm.power_off();
    rig.restart()?;
    rig.expect_locked_because(&["can't reach the TPM at swtpm:host=127.0.0.1"])?;
    rig.refused(
        4,
        &["provider", "unlock", "main", "--tpm"],
        &["can't reach the TPM", "with its passphrase"],
    )?;
    rig.power_on()?;
    rig.expect_state("ready")?;

    // A lock by hand ends the tries.
    rig.tpm.power_off();
    rig.restart()?;
    rig.expect_locked_because(&["can't reach the TPM"])?;
    rig.sealed.lock()?;
    rig.power_on()?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(rig.sealed.provider("main")?["state"] == "locked");
    rig.sealed.run(&["provider", "unlock", "main", "--tpm"])?;

    // It hangs: everything else goes on, and the passphrase opens. systemd, which other units wait for, is told soon enough.
    let readiness = Readiness::of(&rig.sealed)?;
    rig.tpm.process()?.signal(Signal::SIGSTOP)?;
    rig.restart_through(&["env", Readiness::ENVIRONMENT])?;
    ensure!(!readiness.has_come(), "ready before the TPM was tried");
    rig.sealed.unlock()?;
    rig.expect_state("ready")?;
    readiness.wait(Duration::from_secs(30))?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    rig.tpm.process()?.signal(Signal::SIGCONT)?;
    rig.sealed.start_daemon()?;
    rig.expect_state("ready")
}

#[test]
fn a_rotation_takes_the_tpm_along() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.sealed.seal_new("web01")?;
    rig.enroll()?;
    let passphrase = rig.sealed.passphrase_file()?.display().to_string();
    let rotate = ["provider", "rotate", "main", "--passphrase-file", &passphrase];

    // Without the TPM it gets none of the new root key, says so, and catches up at the next unlock.
    rig.tpm.power_off();
    let rotated = rig.sealed.virtseal(&rotate)?;
    expect_names(
        &rotated.stderr,
        &["the TPM does not unlock 'main' any more", "--enroll"],
    )?;
    rig.power_on()?;
    rig.restart()?;
    rig.expect_locked_because(&["newer root key than the TPM opens"])?;
    rig.sealed.unlock()?;
    rig.restart()?;
    rig.expect_state("not_backed_up")?;
    rig.sealed.start_paused("web01")
}

const KMS: &str = "kmip-prod";

impl Rig {
    /// Until that many keys are on disk.
    fn expect_kept(&self, keks: u64) -> Result<()> {
        wait_until(PATIENCE, &format!("{keks} keys on disk"), || {
            Ok((self.sealed.provider(KMS)?["persist"]["keks"] == keks).then_some(()))
        })
    }

    fn stays_off_because(&self, parts: &[&str]) -> Result<()> {
        let refused = self.sealed.refused_start("web01")?;
        expect_names(&refused, &["web01 stays off", KMS, "unreachable"])?;
        expect_names(&refused, parts)
    }

    fn restart_without(&mut self, kms: &mut PyKmip) -> Result<()> {
        kms.kill();
        self.restart()
    }

    fn finds(&self, kms: &mut PyKmip) -> Result<()> {
        kms.run()?;
        wait_until(PATIENCE, "the KMS is found again", || {
            Ok(self.sealed.expect_start("web01").ok())
        })
    }
}

#[test]
fn kept_keys_start_vms_after_a_reboot_while_the_kms_is_down() -> Result<()> {
    let mut kms = PyKmip::start()?;
    let mut rig = Rig::start()?;
    kms.add_to(&rig.sealed, KMS, &[kms.port()], false)?;
    rig.sealed.run(&["provider", "default", KMS])?;
    rig.sealed.seal_new("web01")?;
    let persist = ["provider", "cache", KMS, "24h", "--persist", "tpm"];
    rig.refused(
        2,
        &["provider", "cache", KMS, "24h", "--persist-for", "72h"],
        &["--persist tpm"],
    )?;
    rig.refused(
        2,
        &["provider", "cache", KMS, "none", "--persist", "tpm"],
        &["nothing to keep"],
    )?;
    rig.refused(
        2,
        &["provider", "cache", "main", "24h", "--persist", "tpm"],
        &["nothing to cache"],
    )?;
    let kernel = rig
        .sealed
        .refused(2, &[&persist[..], &["--pcrs", "7,11"]].concat())?;
    expect_names(&kernel, &["each update of the kernel", "--pcrs 7"])?;

    // Without it, the cache ends with virtseald.
    rig.sealed.expect_start("web01")?;
    rig.restart_without(&mut kms)?;
    rig.stays_off_because(&["connection refused"])?;
    rig.finds(&mut kms)?;

    Way::that_begins("virtseal provider cache kmip-prod 24h --persist tpm", &kernel)?.take(&rig.sealed)?;
    // As `provider tpm --enroll` it says what the PCRs are worth: nothing is measured on this host.
    let said = rig
        .sealed
        .virtseal(&[&persist[..], &["--persist-for", "72h"]].concat())?;
    expect_names(
        &said.stderr,
        &["nothing has been measured into PCR 7", "the same whatever boots"],
    )?;
    let shown = said.succeeded()?;
    expect_names(&shown, &["24h, 1 keys in it", "persist      72h,", "PCR 7"])?;
    for time in ["48h", "72h"] {
        rig.sealed
            .run(&["provider", "set", KMS, &format!("persist={time}")])?;
        let shown = rig.sealed.run(&["provider", "show", KMS])?;
        expect_names(&shown, &[&format!("persist      {time},"), "PCR 7"])?;
    }
    // For which PCRs it was is not known any more: it is for root to say, and not PCR 7 unasked.
    rig.sealed.run(&[&persist[..], &["--pcrs", "4,7"]].concat())?;
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    edit_keystore(&rig.sealed, |keystore| {
        Ok(keystore.execute("UPDATE kek_persistence SET sealed = x'00'", [])?)
    })?;
    rig.sealed.start_daemon()?;
    let told = rig.sealed.refused(2, &["provider", "set", KMS, "persist=72h"])?;
    let way = Way::that_begins("virtseal provider cache", &told)?.with("LIST", "7");
    way.take(&rig.sealed)?;
    rig.sealed.run(&["provider", "set", KMS, "persist=72h"])?;
    rig.sealed.expect_start("web01")?;
    rig.expect_kept(1)?;
    rig.power_on()?;
    rig.restart_without(&mut kms)?;
    rig.sealed.expect_start("web01").context("from the disk")?;

    rig.sealed.run(&["provider", "lock", KMS])?;
    rig.sealed.unlock_provider(KMS)?;
    rig.stays_off_because(&["its key is not kept on disk"])?;
    rig.restart()?;
    rig.stays_off_because(&["its key is not kept on disk"])?;

    // A host that boots otherwise gets nothing, is told why, and goes on where the KMS answers.
    rig.finds(&mut kms)?;
    rig.expect_kept(1)?;
    rig.measure_something_else()?;
    rig.restart_without(&mut kms)?;
    wait_until(PATIENCE, "the reason why nothing is opened", || {
        Ok(rig.sealed.provider(KMS)?["persist"]["problem"]
            .is_string()
            .then_some(()))
    })?;
    rig.stays_off_because(&["can't be opened: PCR 7 differs from when it was enrolled"])?;
    let shown = rig.sealed.virtseal(&["provider", "show", KMS])?;
    expect_names(
        &shown.stderr,
        &["no key is kept for a reboot", "--persist tpm --persist-for 72h"],
    )?;
    rig.finds(&mut kms)?;
    kms.kill();
    rig.power_on()?;
    rig.restart()?;
    rig.sealed.expect_start("web01").context("as it booted then")?;

    // No TPM to be found: a server that answers is all it takes.
    rig.tpm.power_off();
    kms.run()?;
    rig.restart()?;
    wait_until(PATIENCE, "the KMS is found", || {
        Ok(rig.sealed.expect_start("web01").ok())
    })?;
    let told = rig.sealed.refused(4, &persist)?;
    expect_names(&told, &["can't reach the TPM", "virtseald.yaml"])?;
    Way::that_begins("virtseal provider cache", &told)?
        .with("POLICY", "24h")
        .take(&rig.sealed)?;
    ensure!(
        rig.sealed.provider(KMS)?["persist"].is_null(),
        "{}",
        rig.sealed.provider(KMS)?
    );
    rig.restart_without(&mut kms)?;
    rig.stays_off_because(&["connection refused"])
}

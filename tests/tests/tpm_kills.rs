//! kill -9 of virtseald, and a full disk, while it deals with what the host's TPM opens: afterwards the TPM opens the provider
//! by what was there before or by what is there now, and the passphrase does in any case.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use virtseal_testkit::rig::{Rig, STATE, words};
use virtseal_testkit::servers::PyKmip;
use virtseal_testkit::{expect_names, expect_order, newest_root, pin_log, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
/// How many kills a story makes; `make soak` asks for more.
const KILLS: &str = "VIRTSEAL_KILLS";
const ENROLL: [&str; 4] = ["provider", "tpm", "main", "--enroll"];

/// The daemon, which was just started, gets the provider open by the TPM, by a later try where the TPM was still full of what
/// the daemon before it had in it.
fn expect_opened(rig: &Rig) -> Result<()> {
    let mut reason = serde_json::Value::Null;
    wait_until(PATIENCE, "that the TPM opens the provider", || {
        let main = rig.sealed.provider("main")?;
        reason = main["reason"].clone();
        Ok((main["state"] != "locked").then_some(()))
    })
    .with_context(|| format!("the provider is locked: {reason}"))
}

fn is_enrolled(rig: &Rig) -> Result<bool> {
    let ways = rig.sealed.provider("main")?["unlocked_by"].clone();
    let ways = ways.as_array().context("no list of ways in")?;
    let is_tpm = |way: &serde_json::Value| way.as_str().is_some_and(|way| way.starts_with("TPM"));
    Ok(ways.iter().any(is_tpm))
}

#[test]
fn tpm_enrolment_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.give_tpm()?;
    let steps = rig.at_each_change(
        |rig, nth| {
            // One time there is an enrolment to be replaced, the other there is none.
            match nth % 2 {
                0 => rig.sealed.run(&ENROLL)?,
                _ => rig.sealed.run(&["provider", "tpm", "main", "--remove"])?,
            };
            words(&ENROLL)
        },
        |rig, nth, command| {
            let enrolled = is_enrolled(rig)?;
            ensure!(enrolled || nth % 2 == 1, "the enrolment of before is gone");
            match enrolled {
                true => expect_opened(rig)?,
                false => rig.sealed.unlock()?,
            }
            rig.sealed.run(command)?;
            if nth % 4 == 0 {
                rig.sealed.kill_and_restart()?;
                expect_opened(rig).context("enrolled again")?;
            }
            Ok(())
        },
    )?;
    // What is answered is on the disk.
    expect_order(&steps, "pwrite64(keystore.db-wal)", "fdatasync(keystore.db-wal)")
}

#[test]
fn taking_the_tpm_away_can_be_killed_at_every_step() -> Result<()> {
    let mut rig = Rig::start()?;
    rig.give_tpm()?;
    rig.at_each_change(
        |rig, _| {
            rig.sealed.run(&ENROLL)?;
            words(&["provider", "tpm", "main", "--remove"])
        },
        |rig, _, command| {
            match is_enrolled(rig)? {
                true => expect_opened(rig)?,
                false => rig.sealed.unlock()?,
            }
            rig.sealed.run(command)?;
            ensure!(!is_enrolled(rig)?, "still enrolled");
            Ok(())
        },
    )?;
    Ok(())
}

/// One time the identity gets a passphrase that nobody but the TPM has in the place of one that an admin knows, the other time it
/// is the reverse: whichever counts, the provider asks for that one.
#[test]
fn an_identity_by_the_tpm_can_be_killed_at_every_step() -> Result<()> {
    const KMS: &str = "kms";
    let kms = PyKmip::start()?;
    let mut rig = Rig::start()?;
    rig.give_tpm()?;
    kms.add_to(&rig.sealed, KMS, &[kms.port()], true)?;
    let (pem, key) = kms.client("kvm-host")?;
    let (pem, key) = (pem.display().to_string(), key.display().to_string());
    let passphrase = rig.passphrase()?;
    let identity = ["provider", "identity", KMS, "--cert", &pem, "--key", &key];
    let by_tpm = [&identity[..], &["--encrypt", "tpm"]].concat();
    let by_passphrase = [&identity[..], &["--encrypt", "--passphrase-file", &passphrase]].concat();
    let id = rig.sealed.provider(KMS)?["id"].clone();
    let directory = rig
        .host()
        .path(STATE)
        .join("providers")
        .join(id.as_str().context("no id")?);
    let (mut old, mut new) = (0, 0);
    let steps = rig.at_each_change(
        |rig, nth| {
            let (before, command) = match nth % 2 {
                0 => (&by_tpm, &by_passphrase),
                _ => (&by_passphrase, &by_tpm),
            };
            rig.sealed.run(before)?;
            words(command)
        },
        |rig, nth, command| {
            // Once it answers, the TPM was tried.
            let is_by_tpm = rig.sealed.provider(KMS)?["asks_for"].is_null();
            *(if is_by_tpm == (nth % 2 == 1) {
                &mut new
            } else {
                &mut old
            }) += 1;
            let mut kept = fs::read_dir(&directory)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<std::io::Result<Vec<_>>>()?;
            kept.retain(|name| name.starts_with("unlock") || name.ends_with(".new"));
            ensure!(
                kept.len() == usize::from(is_by_tpm),
                "by the TPM: {is_by_tpm}, {kept:?}"
            );
            rig.sealed.run(&["provider", "lock", KMS])?;
            match is_by_tpm {
                true => drop(rig.sealed.run(&["provider", "unlock", KMS])?),
                false => rig.sealed.unlock_provider(KMS)?,
            }
            ensure!(rig.sealed.provider(KMS)?["state"] == "ready");
            rig.sealed.run(command).map(drop)
        },
    )?;
    println!("{old} times the old passphrase, {new} times the new one");
    ensure!(old > 0 && new > 0, "{old} and {new}");
    expect_order(&steps, "fsync(identity.new)", "rename(identity.new")
}

#[test]
fn a_full_disk_keeps_the_enrolment_of_before() -> Result<()> {
    let mut rig = Rig::start()?;
    // The same state, on a small disk of its own.
    rig.sealed.stop_daemon(Signal::SIGTERM)?;
    let small = "cp -a /var/lib/virtseal /run/state && mount -t tmpfs -o size=1m,mode=0700 small /var/lib/virtseal && \
                 cp -a /run/state/. /var/lib/virtseal/";
    rig.host().run(&["sh", "-c", small])?.succeeded()?;
    rig.sealed.start_daemon()?;
    rig.give_tpm()?;
    let ballast = rig.host().path(STATE).join("ballast");
    for enrolled in [false, true] {
        let pinned = pin_log(&rig.sealed)?;
        let filled = fs::write(&ballast, vec![0; 2 << 20]);
        ensure!(filled.is_err(), "the state directory is not full");
        let said = rig.sealed.virtseal(&ENROLL)?.refused()?;
        expect_names(&said, &["no space left", STATE])?;
        // Also for the daemon that starts on the full disk.
        rig.sealed.kill_and_restart()?;
        ensure!(is_enrolled(&rig)? == enrolled, "{said}");
        if enrolled {
            expect_opened(&rig)?;
        }
        fs::remove_file(&ballast)?;
        drop(pinned);
        rig.sealed.unlock()?;
        rig.sealed.run(&ENROLL)?;
    }
    rig.sealed.kill_and_restart()?;
    expect_opened(&rig)?;
    Ok(())
}

/// One time at any time from the command to its answer, the other soon after the new root key is kept, which is where it and
/// what the TPM opens could come apart.
#[test]
fn no_kill_in_a_rotation_leaves_the_provider_locked() -> Result<()> {
    let kills: u32 = std::env::var(KILLS).map_or(Ok(4), |kills| kills.parse())?;
    let mut rig = Rig::start()?;
    rig.give_tpm()?;
    rig.sealed.run(&ENROLL)?;
    let file = rig.passphrase()?;
    let rotate = ["provider", "rotate", "main", "--passphrase-file", &file];
    let began = Instant::now();
    rig.sealed.run(&rotate)?;
    let whole = began.elapsed();
    let (mut answered, mut rotated, mut locked) = (0, 0, Vec::new());
    for nth in 0..kills {
        back_up(&rig, nth)?;
        let when = match nth % 2 {
            0 => When::After(whole.mul_f64(1.1 * random()?)),
            _ => When::AfterTheCommit(SOON.mul_f64(random()?)),
        };
        let daemon = rig.sealed.daemon()?.outside_pid()?;
        let state = rig.host().path(STATE);
        let before = newest_root(&state)?;
        let output = std::thread::scope(|scope| {
            let killer = scope.spawn(|| {
                when.wait(&state, before);
                kill(daemon, Signal::SIGKILL)
            });
            let output = rig.sealed.virtseal(&rotate);
            killer.join().expect("it does not panic").context("the kill")?;
            output
        })?;
        rig.expect_killed()?;
        rig.sealed.start_daemon()?;
        answered += u32::from(output.status.success());
        if let Err(why) = expect_opened(&rig) {
            locked.push((when, why));
            rig.sealed.unlock()?;
        }
        rotated += u32::from(newest_root(&state)? > before);
    }
    println!(
        "{kills} steps: kills in rotations of {whole:?}, {answered} after the answer, {rotated} after the new root key was kept; \
         {} left the provider locked",
        locked.len()
    );
    ensure!(locked.is_empty(), "left locked: {locked:?}");
    ensure!(rotated > 0, "no kill came late enough");
    back_up(&rig, kills)?;
    rig.sealed.kill_and_restart()?;
    expect_opened(&rig)?;
    Ok(())
}

/// As long as it takes from the new root key to the answer, and a bit.
const SOON: Duration = Duration::from_millis(200);

/// When the daemon is killed.
#[derive(Clone, Copy, Debug)]
enum When {
    After(Duration),
    AfterTheCommit(Duration),
}

impl When {
    /// `before` is the newest root key so far.
    fn wait(self, state: &Path, before: u32) {
        let time = match self {
            Self::After(time) => time,
            Self::AfterTheCommit(time) => {
                let began = Instant::now();
                while newest_root(state).is_ok_and(|newest| newest == before) && began.elapsed() < PATIENCE {
                    wait_for_a_change(state);
                }
                time
            }
        };
        sleep(time);
    }
}

/// Of the keystore's log; a while at the most.
fn wait_for_a_change(state: &Path) {
    let seen = || {
        let log = fs::metadata(state.join("keystore.db-wal")).ok()?;
        Some((log.len(), log.mtime(), log.mtime_nsec()))
    };
    let before = seen();
    for _ in 0..100 {
        if seen() != before {
            return;
        }
        sleep(Duration::from_micros(200));
    }
}

/// Lets the next rotation have something to retire.
fn back_up(rig: &Rig, nth: u32) -> Result<()> {
    let file = format!("/run/kept-{nth}.json");
    let backup = ["provider", "backup", "main", "--output", &file, "--no-passphrase"];
    rig.sealed.run(&backup)?;
    wait_until(PATIENCE, "the job of the last rotation", || {
        let jobs = rig.sealed.json(&["jobs"])?;
        let jobs = jobs["jobs"].as_array().context("no list of jobs")?;
        let runs = jobs.iter().any(|job| job["state"] == "running");
        Ok((!runs && rig.sealed.provider("main")?["state"] == "ready").then_some(()))
    })
}

/// From 0 to 1.
fn random() -> Result<f64> {
    let mut bytes = [0; 4];
    openssl::rand::rand_bytes(&mut bytes)?;
    Ok(f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX))
}

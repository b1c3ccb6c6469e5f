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
use virtseal_testkit::{HostTpm, expect_names, expect_order, newest_root, pin_log, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);
/// How many kills a story makes; `make soak` asks for more.
const KILLS: &str = "VIRTSEAL_KILLS";
const ENROLL: [&str; 4] = ["provider", "tpm", "main", "--enroll"];

/// What came of the daemon's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Unlocked,
    Locked,
}

/// Waits until the daemon, which was just started, has asked the TPM.
fn found(rig: &Rig) -> Result<Found> {
    wait_until(PATIENCE, "what the TPM says to the daemon's start", || {
        let main = rig.sealed.provider("main")?;
        let unlocked = main["state"] != "Locked";
        let refused = main["reason"].is_string();
        Ok(match (unlocked, refused) {
            (true, _) => Some(Found::Unlocked),
            (false, true) => Some(Found::Locked),
            (false, false) => None,
        })
    })
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
    let _tpm = HostTpm::of(&mut rig.sealed)?;
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
                true => ensure!(found(rig)? == Found::Unlocked, "the TPM does not open it"),
                false => rig.sealed.unlock()?,
            }
            rig.sealed.run(command)?;
            if nth % 4 == 0 {
                rig.sealed.kill_and_restart()?;
                ensure!(found(rig)? == Found::Unlocked, "enrolled again, and not opened");
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
    let _tpm = HostTpm::of(&mut rig.sealed)?;
    rig.at_each_change(
        |rig, _| {
            rig.sealed.run(&ENROLL)?;
            words(&["provider", "tpm", "main", "--remove"])
        },
        |rig, _, command| {
            match is_enrolled(rig)? {
                true => ensure!(found(rig)? == Found::Unlocked, "the TPM does not open it"),
                false => rig.sealed.unlock()?,
            }
            rig.sealed.run(command)?;
            ensure!(!is_enrolled(rig)?, "still enrolled");
            Ok(())
        },
    )?;
    Ok(())
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
    let _tpm = HostTpm::of(&mut rig.sealed)?;
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
            ensure!(found(&rig)? == Found::Unlocked, "the TPM does not open it");
        }
        fs::remove_file(&ballast)?;
        drop(pinned);
        rig.sealed.unlock()?;
        rig.sealed.run(&ENROLL)?;
    }
    rig.sealed.kill_and_restart()?;
    ensure!(found(&rig)? == Found::Unlocked, "the TPM does not open it");
    Ok(())
}

/// One time at any time from the command to its answer, the other soon after the new root key is kept, which is where it and
/// what the TPM opens could come apart.
#[test]
fn no_kill_in_a_rotation_leaves_the_provider_locked() -> Result<()> {
    let kills: u32 = std::env::var(KILLS).map_or(Ok(4), |kills| kills.parse())?;
    let mut rig = Rig::start()?;
    let _tpm = HostTpm::of(&mut rig.sealed)?;
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
        rig.sealed.daemon()?.wait(PATIENCE)?;
        rig.sealed.start_daemon()?;
        answered += u32::from(output.status.success());
        if found(&rig)? == Found::Locked {
            locked.push((when, rig.sealed.provider("main")?["reason"].clone()));
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
    ensure!(found(&rig)? == Found::Unlocked, "the TPM does not open it");
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
        Ok((!runs && rig.sealed.provider("main")?["state"] == "Ready").then_some(()))
    })
}

/// From 0 to 1.
fn random() -> Result<f64> {
    let mut bytes = [0; 4];
    openssl::rand::rand_bytes(&mut bytes)?;
    Ok(f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX))
}
